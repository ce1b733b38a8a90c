"""The state that rules read where a base runs as it is: looked at, by the names that rules have for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import ShapeError, TransformError
from optx._names import parameter_names
from optx.step import bits
from optx.step.bases import base_rules
from optx.step.checks import check_has_memory, shapes_differ
from optx.step.slots import Slots
from optx.step.state import is_ours
from optx.step.transform import Group


class StateByRole(Mapping[str, list[Tensor]]):
    """State tensors of some parameters by role: the base's (zeros until it has any) or a transform's.

    Args:
        base: whose state it is.
        slots: the transforms' state.
        params: the parameters.
        packed: the roles that are packed.
    """

    def __init__(
        self, base: Optimizer, slots: Slots, params: Sequence[Tensor], packed: Sequence[str] = ()
    ) -> None:
        self._base, self._slots, self._params, self._packed = base, slots, params, packed

    def __getitem__(self, name: str) -> list[Tensor]:
        if "." in name:
            slots = [self._slots.get(p, f"optx.{name}") for p in self._params]
            packed = name in self._packed
            for p, slot in zip(self._params, slots, strict=True):
                check_has_memory(self._base, p, f"its state 'optx.{name}'", slot)
                if not bits.fits(slot.shape, p) if packed else self._misfits(name, p, slot):
                    owner = parameter_names(self._base)[id(p)]
                    raise ShapeError(shapes_differ(owner, p, f"its state 'optx.{name}'", slot))
            return [self._slots.packed(p, f"optx.{name}") for p in self._params] if packed else slots
        state = self._base.state
        found = [base_state_of(state, p, name) for p in self._params]
        return [torch.zeros_like(p) if t is None else t for t, p in zip(found, self._params, strict=True)]

    def _misfits(self, name: str, p: Tensor, slot: Tensor) -> bool:
        return (
            slot.shape != p.shape and slot.numel() != 1 and slot.shape != self._slots.shape(p, f"optx.{name}")
        )

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def base_state_of(state: Any, p: Tensor, name: str) -> Any:
    """The base's state of a parameter by name; None before its first step."""
    own = {k: v for k, v in state.get(p, {}).items() if not is_ours(k)}
    if not own:
        return None
    if own.get(name) is None and name != "momentum_buffer":
        raise TransformError(
            f"optx: a rule reads {name!r} of the base, which keeps none for a parameter of shape "
            f"{tuple(p.shape)} (it has {', '.join(map(repr, own))})."
        )
    return own.get(name)


def step_counts(base: Optimizer, group: Group, params: Sequence[Tensor]) -> list[float]:
    """The number of this step for each parameter, as its base counts."""
    rules = base_rules(base, group)
    if rules is not None and rules.counted == "group":
        return [float(group.get("step", 0)) + 1.0] * len(params)
    steps = [base_state_of(base.state, p, "step") for p in params]
    return [1.0 if step is None else float(step) + 1.0 for step in steps]
