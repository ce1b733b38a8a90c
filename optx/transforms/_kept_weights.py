"""Which bits belong to which parameter of an optimizer, and what of its state goes with its weights.

What `KeepMask` finds out before training starts; its rules are in ``keep_mask.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, TransformError, near, warn
from optx._masked_model import in_all, local
from optx._masks import Masks
from optx._names import has_names, parameter_names, plain_name, whole
from optx.step import bits
from optx.step.state import is_ours
from optx.step.transform import Host

LEAST = 0.01  # of a weight's numbers, as in `Masks.of`: with fewer zeros it is not pruned


class Pairing:
    """The masks, by parameter of an optimizer.

    Args:
        masks: None to take them from the weights.
        model: gives the parameters' names.
    """

    def __init__(self, masks: Masks | None, model: nn.Module | None) -> None:
        self.masks, self.model = masks, model

    def of(self, parameters: list[Tensor], optimizer: Host, some: bool = True) -> dict[int, Tensor]:
        """The packed mask of each parameter that has one, by ``id``.

        Args:
            parameters: those that are served.
            optimizer: theirs.
            some: raise where none has one.
        """
        if self.masks is None:
            return self._zeros(parameters, optimizer, some)
        names = self._names(self.masks, optimizer)
        found: dict[int, Tensor] = {}
        for p in parameters:
            own = names.get(id(p), [])
            kept = [self.masks.packed(name) for name in own]
            if kept and not all(torch.equal(kept[0], other) for other in kept):
                raise OptxError(
                    f"KeepMask: {own[0]!r} and {own[1]!r} are one weight, and their masks are two."
                )
            if kept:
                if self.masks.shape(own[0]) != tuple(p.shape):
                    raise ShapeError(
                        f"KeepMask: the mask of {own[0]!r} is of shape {self.masks.shape(own[0])}, the "
                        f"weight has {tuple(p.shape)}. Give the masks of this model."
                    )
                found[id(p)] = kept[0]
        if some and not found:
            raise TransformError(
                f"KeepMask: none of the {len(self.masks)} weights that have a mask, as "
                f"{next(iter(self.masks))!r}, is trained by this optimizer in a group that keep_mask acts "
                f"on; there is nothing to keep.{self._whose(optimizer)}"
            )
        return found

    def _whose(self, optimizer: Host) -> str:
        """What to do where names were those of the model that the masks remember."""
        if self.model is not None or has_names(optimizer.base):
            return ""
        return " Names were those of the model that the masks are of: for another one, pass model=model."

    def _names(self, masks: Masks, optimizer: Host) -> dict[int, list[str]]:
        """The masks' names of each parameter; several where weights are tied."""
        model = self.model
        if model is None and not has_names(optimizer.base):
            model = masks.model
            if model is None:
                raise TransformError(
                    "KeepMask: masks are found by name, and the optimizer does not know its parameters' "
                    "names. Build it from model.named_parameters(), or pass model=model."
                )
        names: dict[int, list[str]] = {}
        if model is not None:
            for name, p in masks.parameters_of(model).items():
                names.setdefault(id(p), []).append(name)
            return names
        there: dict[str, int] = {}
        for key, name in parameter_names(optimizer.base).items():
            name = plain_name(name)
            if name in masks and name in there:
                raise TransformError(
                    f"KeepMask: two parameters of the optimizer are called {name!r}, and masks are found by "
                    "name. Pass model=, a module whose names tell them apart."
                )
            there[name] = key
        for name in masks:
            if name not in there:
                raise TransformError(
                    f"KeepMask: the optimizer has no parameter {name!r}, which the masks have. "
                    f"{near(name, there)} Where it is not trained, pass model=model."
                )
            names.setdefault(there[name], []).append(name)
        return names

    def _zeros(self, parameters: list[Tensor], optimizer: Host, some: bool) -> dict[int, Tensor]:
        """Where weights of two or more dimensions are not 0."""
        names = parameter_names(optimizer.base, self.model)
        found: dict[int, Tensor] = {}
        empty: list[str] = []
        for p in parameters:
            if p.ndim < 2 or not p.numel():
                continue
            kept = p.detach() != 0
            zeros = p.numel() - int(whole(kept.sum()))
            if zeros == p.numel():
                empty.append(names[id(p)])
            elif zeros and zeros >= LEAST * p.numel():
                found[id(p)] = kept
        if some and not found:
            raise TransformError(
                "KeepMask: no weight is pruned (of none with two or more dimensions is 1 % of the numbers 0, "
                "or all are). Prune the model before optx.wrap, with optx.prune, or pass masks=."
            )
        if empty:
            warn(
                f"KeepMask: {len(empty)} weights have nothing but zeros, as layers that start at 0, and are "
                f"trained: {', '.join(map(repr, empty[:3]))}{', ...' if len(empty) > 3 else ''}. If they "
                "were pruned, pass masks=."
            )
        return found


def regrown(pairs: Mapping[Tensor, Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Of weights and their settled slots, those that are not 0 where they are masked, and how often."""
    for p, slot in pairs.items():
        if bits.form(slot, p) != "ones" and p.numel():
            off = ~local(bits.mask_of(slot, p))
            count = int(in_all(p, ((local(p) != 0) & off).sum()))
            if count:
                yield p, count


def newly_kept(
    asked: Mapping[Tensor, Tensor], now: Mapping[Tensor, Tensor], least: float
) -> Iterator[tuple[Tensor, int]]:
    """Of weights, those of which masks now keep numbers that others have pruned, and how many.

    Args:
        asked: the others, as settled slots; a weight without one is left out.
        now: those now.
        least: the share of a weight's numbers that is not too few to count.
    """
    for p, slot in now.items():
        other = asked.get(p)
        if other is None or other is slot or bits.form(other, p) == "ones" or not p.numel():
            continue
        kept, wanted = local(bits.mask_of(slot, p)), local(bits.mask_of(bits.settled(other, p), p))
        count = int(in_all(p, (kept & ~wanted).sum()))
        if count and count >= least * p.numel():
            yield p, count


# Names under which optimizers keep, number by number, what goes with a weight: other weights (averages, those
# of steps before), and moments. What mixes weights (factors, preconditioners, what lies in another basis) is
# left: it moves a pruned weight at most for as long as a step lasts.
_WEIGHTS = frozenset(
    {
        *("ax", "backup_params", "ema", "lookahead_params", "master_param", "master_params", "master_weight"),
        *("mov_avg_param", "p0", "param_buffer", "prev_param", "shadow", "slow_buffer", "slow_param"),
        *("slow_params", "x", "x0", "x_k", "y", "z"),
    }
)
_MOMENTS = frozenset(
    {
        *("acc_delta", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum"),
        *("momentum_buffer", "prev", "previous_grad", "square_avg", "sum"),
    }
)


def mask_state(state: dict[Any, Any], p: Tensor, slot: Tensor) -> None:
    """Set to 0 what a base remembers of masked weights: by new tensors in place of the old ones."""
    own = {k: v for k, v in state.items() if not is_ours(k)}
    # A list, or a tensor of another shape, is a preconditioner or its like: moments may lie in its basis.
    plain = all(not isinstance(v, list | tuple | dict) and _plain(v, p) for v in own.values())
    names = _WEIGHTS | _MOMENTS if plain else _WEIGHTS
    mask: Tensor | None = None
    for key, value in own.items():
        if key in names and isinstance(value, Tensor) and value.shape == p.shape and value.numel():
            mask = bits.mask_of(slot, p) if mask is None else mask
            if bool(whole(((value != 0) & ~mask).any())):
                state[key] = torch.where(mask, value, torch.zeros_like(value))


def _plain(value: Any, p: Tensor) -> bool:
    return not isinstance(value, Tensor) or value.shape == p.shape or value.numel() == 1
