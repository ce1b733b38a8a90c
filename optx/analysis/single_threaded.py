"""Whether a model that is given a mixture of tokens follows the heaviest of them.

Source: "LLMs are Single-threaded Reasoners", arXiv 2508.03440.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, check_range, check_whole
from optx.thinking._calls import Caller
from optx.thinking._handle import ThinkingHandle
from optx.thinking._mix import entropy
from optx.thinking._prompts import Seeds, generators_of, prompts_of
from optx.thinking._state import Sequences, Step
from optx.thinking._trail import Trail


@dataclass(frozen=True, eq=False)
class SingleThreaded:
    """What `single_threadedness` found, step by step: (B, T) float64, nan where a row fed one token.

    Attributes:
        soft_top1: JS of the next tokens after the mixture, and after its heaviest token alone.
        soft_top2: after the mixture, and after its second token alone.
        top1_top2: after the one, and after the other.
        noise: JS(y, pi): how far noise has moved the weights.
        entropy: of the weights y, from 0 (one token) to ln K.
        top: the heaviest weight.
        tokens: (B, T) int64, each step's heaviest.
    """

    soft_top1: Tensor
    soft_top2: Tensor
    top1_top2: Tensor
    noise: Tensor
    entropy: Tensor
    top: Tensor
    tokens: Tensor

    def __repr__(self) -> str:
        found, (rows, steps) = self.mean(), self.tokens.shape
        return (
            f"SingleThreaded({rows} rows of {steps} steps, {found['steps']:.0f} of them soft; JS of what "
            f"follows: mixture and heaviest {found['soft_top1']:.3g}, "
            f"mixture and second {found['soft_top2']:.3g}, "
            f"heaviest and second {found['top1_top2']:.3g})"
        )

    def mean(self, low: float = 0.0, high: float = 1.0) -> dict[str, float]:
        """Means over steps, by name, and ``steps``, how many; nan of none.

        Args:
            low: the least that a step's heaviest weight is.
            high: the most.
        """
        check_range("mean", "low", low, 0, 1)
        check_range("mean", "high", high, low, 1)
        chosen = (self.top >= low) & (self.top <= high) & self.soft_top2.isfinite()
        names = ("soft_top1", "soft_top2", "top1_top2", "noise", "entropy", "top")
        return {name: float(getattr(self, name)[chosen].mean()) for name in names} | {
            "steps": float(chosen.sum())
        }


@torch.no_grad()
def single_threadedness(
    handle: ThinkingHandle,
    input_ids: Any,
    attention_mask: Tensor | None = None,
    *,
    steps: int = 40,
    seed: Seeds = 0,
    stop_ids: int | Sequence[int] | None = None,
    use_cache: bool | None = None,
) -> SingleThreaded:
    """Compare what a model says after a mixture with what it says after one of its tokens alone.

    At each soft step the model is called three times from one and the same past (with a copy of its KV
    cache): with the mixture, with its heaviest token, with its second. A model reasons in one thread if
    JS(P_soft, P_top1) is far below JS(P_soft, P_top2). JS is the Jensen-Shannon divergence in nats, from 0
    to ln 2, of whole next-token distributions at temperature 1.

    The handle, its rows, the model and all generators stay as they are.

    Args:
        handle: what `optx.attach` returned for `optx.SoftThinking`; its options say how weights are drawn.
        input_ids: prompts, in any form that ``handle.generate`` takes.
        attention_mask: (B, P), 0 at padding.
        steps: T. Rows that stop before have nan from there.
        seed: of the noise, as ``handle.begin`` has it.
        stop_ids: tokens that end a row, as ``handle.begin`` has them.
        use_cache: None: if the model has a cache.

    Returns:
        All of it, step by step; ``.mean(0.5, 0.9)`` is of steps whose heaviest weight is in between.

    Paper values:
        None to set: the handle's options are those of the thinking.

    Limits: Costs three calls of the model a step, and two copies of its cache. Steps of which only one token
        is left have no second and are nan.

    Keywords: soft thinking, latent reasoning, Jensen-Shannon divergence, greedy decoding, diagnostics.

    Evidence: ``optx run think``; ``test_single_threaded.py``.

    Source: arXiv 2508.03440, section 3.

    Raises:
        OptxError: a handle of another kind or one that is switched off, or mixtures of one token.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> handle = optx.attach(model, optx.SoftThinking(noise=None))
        >>> found = optx.analysis.single_threadedness(handle, torch.tensor([[3, 4]]), steps=5)
        >>> found.mean()["steps"]
        5.0
    """
    if not isinstance(handle, ThinkingHandle):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(
            f"single_threadedness: handle is a {type(handle).__name__}; it must be what "
            "optx.attach(model, optx.SoftThinking(...)) returned."
        )
    T = check_whole("single_threadedness", "steps", steps, 1)
    handle.check_acts("single_threadedness")
    prompts, mask = prompts_of(handle.model, input_ids, attention_mask, "single_threadedness")
    B = len(prompts)
    rows = Sequences(
        generators_of(seed, B, "single_threadedness"), torch.ones(B, dtype=torch.bool), handle.stops(stop_ids)
    )
    trail, caller = Trail(prompts, mask), Caller(handle.model, mask, use_cache)
    logits = _next(handle, caller, trail)
    found = list[dict[str, Tensor]]()
    for _ in range(T):
        step = rows.step(logits, handle.injection)
        if step.ids.shape[1] < 2:
            raise OptxError(
                "single_threadedness: a mixture has one token; max_topk and top_k must be at least 2."
            )
        trail.steps.append(step)
        caller.grow()
        alone = [_branch(handle, caller, trail, k) for k in (0, 1)]
        logits = _next(handle, caller, trail)
        found.append(_compared(step, logits, *alone))
    stacked = {name: torch.stack([one[name] for one in found], 1).cpu() for name in found[0]}
    return SingleThreaded(**stacked, tokens=torch.stack([one.ids[:, 0] for one in trail.steps], 1).cpu())


def _next(handle: ThinkingHandle, caller: Caller, trail: Trail) -> Tensor:
    """The logits after all steps of a trail, (B, V); the caller has been given all but the last."""
    every = not caller.caches or caller.cache is None
    with handle.feeding(trail.inputs(every)):
        return caller(trail.tokens() if every else trail.steps[-1].ids[:, :1])


def _branch(handle: ThinkingHandle, caller: Caller, trail: Trail, k: int) -> Tensor:
    """What the logits would be if the last step had fed its token k alone."""
    last = trail.steps[-1]
    ids = last.ids.clone()
    ids[:, 0] = last.ids[:, k]
    other = Trail(trail.prompts, trail.mask)
    other.steps = [*trail.steps[:-1], last._replace(ids=ids, soft=torch.zeros_like(last.soft))]
    return _next(handle, caller.branch(), other)


def _compared(step: Step, soft: Tensor, top1: Tensor, top2: Tensor) -> dict[str, Tensor]:
    """Numbers of one step, (B,) float64."""
    P, P1, P2 = (one.double().softmax(-1) for one in (soft, top1, top2))
    y, pi = step.weights.double(), step.kept.double()
    two = step.soft & (step.weights[:, 1] > 0)
    numbers = {
        "soft_top1": (divergence(P, P1), two),
        "soft_top2": (divergence(P, P2), two),
        "top1_top2": (divergence(P1, P2), two),
        "noise": (divergence(y, pi), step.soft),
        "entropy": (entropy(y), step.soft),
        "top": (y[:, 0], step.soft),
    }
    return {name: one.where(there, torch.full_like(one, torch.nan)) for name, (one, there) in numbers.items()}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of two distributions along the last axis, in nats."""
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp_min(0)
