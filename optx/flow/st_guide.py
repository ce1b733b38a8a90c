"""Straight-through guidance (STGFlow): samples steered by a classifier of clean sequences.

Source: arXiv 2503.17361, section 5 and algorithm 3.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, check_choice, check_range, check_whole, shown
from optx.flow._draws import Draws

_LARGEST = torch.finfo(torch.float32).max
POINTS = ("posterior", "state")


class STGuide:
    """Steer a flow by a classifier that was trained on clean sequences, without training either.

    At each step whole sequences are drawn, and the classifier's gradient at their one-hot form is taken for
    the one at the distribution that they were drawn from (straight-through). Through the softmax of the
    point x it becomes a velocity, of which each position's sum is 0: G = x (r - <x, r>), r the mean gradient
    over the samples. The flow's velocity and gamma G are what x moves by.

    The classifier's parameters get no gradient, and it is in eval mode meanwhile.

    Args:
        classifier: of one-hot sequences (B, L, V) in its own dtype; it gives one number for each, (B,) or
            (B, 1), that is to rise: a probability or a score. Padding is rows of zeros.
        gamma: how much of the gradient is added; 0 is nothing, bit for bit, and below 0 the number falls.
        samples: M, sequences that are drawn for each row and step.
        log_prob: the classifier gives probabilities, and the gradient of their log is wanted.
        at: what sequences are drawn from: ``"posterior"``, the model's softmax, whose draws look like data
            from the first step on, as what the classifier was trained on; ``"state"``, x itself, which is
            noise for long.
        top_k: draw among each position's so many likeliest tokens only. None: all.

    Paper values:
        ``samples=10``: the most that it draws. ``gamma``: a matter of the classifier; a mean over L
        positions has gradients of 1/L, for which tens or hundreds are needed.

    Limits: A gradient at one sequence says what a single exchange of a token does, to first order. It is not
        scaled by lambda/tau(t), so that it acts early. Large gamma in few steps is clamped at the simplex.
        A score that saturates (``log_prob=True`` helps) has no gradient.

    Keywords: STGFlow, classifier guidance, straight-through estimator, controllable generation, Gumbel
        softmax, plug-and-play, discrete flow.

    Evidence: ``optx run flow``; ``test_st_guide.py``.

    Raises:
        OptxError: an option out of range; a classifier that can't be differentiated in its input.
        ShapeError: a classifier that gives something else than one number for each sequence.

    Example:
        >>> import torch, optx
        >>> flow, model = optx.GumbelFlow(4), lambda x, t: torch.zeros_like(x)
        >>> share_of_2 = lambda sequences: sequences[..., 2].mean(-1)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> guide = optx.STGuide(share_of_2, gamma=100.0)
        >>> tokens = flow.sample(model, (64, 16), guide=guide, generator=seeded)
        >>> round((tokens == 2).float().mean().item(), 2)
        1.0

    Source: arXiv 2503.17361, algorithm 3.
    """

    def __init__(
        self,
        classifier: Any,
        gamma: float = 1.0,
        samples: int = 8,
        *,
        log_prob: bool = False,
        at: str = "posterior",
        top_k: int | None = None,
    ) -> None:
        if not callable(classifier):
            raise OptxError(
                f"STGuide: classifier is a {type(classifier).__name__}; it is called with one-hot sequences."
            )
        check_range("STGuide", "gamma", gamma, -_LARGEST, _LARGEST)
        check_whole("STGuide", "samples", samples, 1)
        check_choice("STGuide", "log_prob", log_prob, (True, False))
        check_choice("STGuide", "at", at, POINTS)
        if top_k is not None:
            check_whole("STGuide", "top_k", top_k, 1)
        self.classifier, self.gamma, self.samples = classifier, gamma, samples
        self.log_prob, self.at, self.top_k = log_prob, at, top_k

    def __call__(self, x: Tensor, posterior: Tensor, draws: Draws) -> Tensor | None:
        """gamma G at a point x (B, L, V), or None where gamma is 0 and nothing is drawn."""
        if self.gamma == 0:
            return None
        there = x.sum(-1, keepdim=True) > 0  # padding is rows of zeros
        one_hot = self.drawn(x if self.at == "state" else posterior, draws) * there[:, None]
        return self.gamma * through_softmax(x, self.gradient(one_hot).mean(1))

    def drawn(self, distribution: Tensor, draws: Draws) -> Tensor:
        """M sequences of each row, one-hot: (B, M, L, V)."""
        rows, length, vocab = distribution.shape
        logits = distribution.log()
        if self.top_k is not None:
            if self.top_k > vocab:
                raise OptxError(f"STGuide: top_k is {self.top_k}; the vocabulary has {vocab} tokens.")
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        g = draws.gumbel(rows, self.samples, length, vocab)
        ids = (logits[:, None] + g).argmax(-1)
        return torch.zeros_like(g).scatter_(-1, ids[..., None], 1)

    def gradient(self, one_hot: Tensor) -> Tensor:
        """r = df/dx at one-hot sequences (B, M, L, V); of ln f if ``log_prob``. The same shape."""
        with torch.inference_mode(False), torch.enable_grad():
            point = one_hot.flatten(0, 1).detach().clone().requires_grad_()
            found = self._scores(point)
            if not found.requires_grad:
                raise OptxError(
                    "STGuide: the classifier's output doesn't depend on its input by operations that have a "
                    "gradient; it may take an argmax, or run under no_grad."
                )
            value = found.clamp_min(torch.finfo(found.dtype).tiny).log() if self.log_prob else found
            (r,) = cast("tuple[Tensor | None]", torch.autograd.grad(value.sum(), point, allow_unused=True))
        if r is None:
            raise OptxError("STGuide: the classifier has a gradient, but none that reaches its input.")
        return r.reshape(one_hot.shape)

    def _scores(self, point: Tensor) -> Tensor:
        """One number for each sequence, (B M,), in float32 or wider."""
        weights = self.classifier.parameters() if isinstance(self.classifier, nn.Module) else ()
        dtype = next((p.dtype for p in weights if p.is_floating_point()), point.dtype)
        try:
            found = self.classifier(point.to(dtype))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ShapeError(
                f"STGuide: the classifier failed on one-hot sequences of shape {tuple(point.shape)}, "
                f"(B, L, V): {error}. It must take the vocabulary of {point.shape[-1]}."
            ) from error
        if not isinstance(found, Tensor) or found.shape not in ((len(point),), (len(point), 1)):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(
                f"STGuide: the classifier gave {got} for {len(point)} sequences; it must give one number for "
                f"each, ({len(point)},) or ({len(point)}, 1). Pick a class, or add them up."
            )
        found = found.reshape(-1).to(torch.promote_types(found.dtype, torch.float32))
        if self.log_prob and bool((wrong := (found < 0) | (found > 1.001)).any()):
            one = found.detach()[wrong][0].item()
            raise OptxError(
                f"STGuide: log_prob=True takes the log of probabilities; the classifier gave {shown(one)}."
                " Give it a sigmoid or softmax, or leave log_prob out."
            )
        return found


def through_softmax(x: Tensor, r: Tensor) -> Tensor:
    """The softmax's Jacobian, applied once: x (r - <x, r>), whose sum is 0."""
    return x * (r - (x * r).sum(-1, keepdim=True))
