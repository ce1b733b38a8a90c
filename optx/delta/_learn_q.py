"""q of each linear layer, learned by gradient descent on what the pruned model puts out.

Source: "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models", arXiv 2410.09344, and
its official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, near
from optx.delta._input_stats import call, linear_axes
from optx.delta._random_mask import Dropout, key_of

_START, _RATE, _STEPS, _PATIENCE = 1e-4, 1e-2, 200, 5


def learned_q(
    model: nn.Module,
    changes: Mapping[str, Tensor],
    inputs: Sequence[Any],
    full: Sequence[Any],
    apart: Callable[[Any, Any], Any],
    p: float,
    seeds: Sequence[int],
) -> dict[str, float]:
    """q = (1-p) + |a|, at most 1, with one learned a per layer; those of the lowest distance that was seen.

    AdamW (lr 1e-2, cosine over 200 steps, at most so many) from a = 1e-4; it ends after five steps in a row
    without improvement. A step's distance is the mean over all inputs and all masks. Of what is pruned beside
    the layers, a bias has its weight's q and the rest the mean of all, as in `Delta.dare`.

    Args:
        model: in eval mode. Its weights and their gradients stay as they are.
        changes: by tensor name, those that are pruned.
        inputs: batches.
        full: the full model's outputs on them.
        apart: distance of a full output and a pruned one, a scalar tensor with a gradient.
        p: share dropped.
        seeds: of the masks.

    Raises:
        OptxError: no changed tensor is a linear layer's weight, or ``apart`` gives no gradient.
    """
    layers = [name for name in linear_axes(model) if name in changes]
    if not layers:
        raise OptxError(
            "Delta.find_q: strategy 'learned' needs the weight of a torch.nn.Linear (or transformers Conv1D) "
            f"of the model, and the delta has none. {near('weight', changes)}"
        )
    a = torch.full((len(layers),), _START, requires_grad=True)
    optimizer = torch.optim.AdamW([a], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=_STEPS)
    trial = _Pruned(model, changes, layers, p)
    least, best, idle = math.inf, (1.0 - p + a.detach().abs()).clamp(max=1.0), 0
    for _ in range(_STEPS):
        a.grad, total = torch.zeros_like(a), 0.0
        for seed in seeds:
            masked = trial.masked(seed)
            for batch, want in zip(inputs, full, strict=True):
                q = (1.0 - p + a.abs()).clamp(max=1.0)
                loss = apart(want, trial.output(masked, q, batch))
                if not (isinstance(loss, Tensor) and loss.requires_grad):
                    raise OptxError(
                        "Delta.find_q: strategy 'learned' needs a distance that is a tensor with a gradient."
                    )
                a.grad += torch.autograd.grad(loss, a)[0] / (len(seeds) * len(inputs))
                total += float(loss.detach())
        idle += 1
        if total < least:
            least, best, idle = total, (1.0 - p + a.detach().abs()).clamp(max=1.0), 0
        if idle > _PATIENCE or not math.isfinite(total):
            break
        optimizer.step()
        schedule.step()
    return dict(zip(layers, best.tolist(), strict=True))


class _Pruned:
    """A model run with pruned weights beside its own."""

    def __init__(
        self, model: nn.Module, changes: Mapping[str, Tensor], layers: Sequence[str], p: float
    ) -> None:
        self._model, self._changes, self._p = model, changes, p
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        self._own = {name: own[name].detach() for name in changes}
        place = {name: i for i, name in enumerate(layers)}
        # None: the mean of all.
        self._place = {n: place.get(n, place.get(n.removesuffix("bias") + "weight")) for n in changes}

    def masked(self, seed: int) -> dict[str, Tensor]:
        """What a seed's mask keeps of each change, not rescaled."""
        return {
            name: Dropout(key_of(seed, name), self._p, 1.0).scale(change)
            for name, change in self._changes.items()
        }

    def output(self, masked: Mapping[str, Tensor], q: Tensor, batch: Any) -> Any:
        """On a batch, with each layer's q."""
        weights: dict[str, Tensor] = {}
        for name, kept in masked.items():
            own, place = self._own[name], self._place[name]
            factor = (q.mean() if place is None else q[place]).to(kept.device)
            start = own.to(kept.dtype) - self._changes[name]
            weights[name] = (start + kept / factor).to(own.dtype)

        def run(*args: Any, **named: Any) -> Any:
            return torch.func.functional_call(self._model, weights, args, named)

        return call(run, batch)
