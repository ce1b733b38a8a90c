"""Takes back a failed step: what a base without a fused form, and the rules around it, had done by then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from optx._memory import lost_memory, writes_overlap


class Undo:
    """Weights, state and group numbers as they are now, to be put back after an error.

    A base moves weights and state in place and may fail at any of them, so all of them are copied: while its
    step runs, that takes as much memory again.

    Args:
        base: its groups' numbers and its state are remembered.
        parameters: those that the step may move.
        pending: slots that are not in ``state`` (see `SlotStore`).
        written: whether anything writes a state tensor of that name; others need no copy.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        parameters: Iterable[Tensor],
        pending: Mapping[Tensor, dict[str, Tensor]],
        written: Callable[[Any], bool],
    ) -> None:
        # Some keep the optimizer that does the work within: SAM, ZeroRedundancyOptimizer.
        within = [v for v in vars(base).values() if isinstance(v, torch.optim.Optimizer)]
        self._groups = [(group, dict(group)) for o in (base, *within) for group in o.param_groups]
        # The version tells whether somebody moved the weight meanwhile.
        self.weights = {p: (p._version, p.detach().clone()) for p in parameters if not lost_memory(p)}
        self._states = [(o.state, self._remember(o.state, written)) for o in (base, *within)]
        self._pending = {
            p: _Remembered({k: (v, written(k)) for k, v in slots.items()}) for p, slots in pending.items()
        }

    def _remember(
        self, state: Mapping[Tensor, dict[str, Any]], written: Callable[[str], bool]
    ) -> dict[Tensor, _Remembered]:
        return {
            p: _Remembered({k: (v, written(k)) for k, v in state[p].items()})
            for p in self.weights
            if p in state
        }

    def restore(self, pending: dict[Tensor, dict[str, Tensor]]) -> None:
        """Put everything back into the tensors that held it."""
        with torch.no_grad():
            for p, (_, copy) in self.weights.items():
                if not writes_overlap(p):  # nobody can have written that one
                    p.detach().copy_(copy)
            for state, entries in self._states:
                for p in self.weights:
                    if p in entries:
                        _refill(state[p], entries[p].entries())
                    else:
                        state.pop(p, None)
            _refill(pending, {p: remembered.entries() for p, remembered in self._pending.items()})
        for group, numbers in self._groups:
            _refill(group, numbers)


def _refill(target: dict[Any, Any], entries: dict[Any, Any]) -> None:
    target.clear()
    target.update(entries)


class _Remembered:
    """One parameter's state: tensors with copies of what they hold, lists and dicts with what is in them."""

    def __init__(self, entries: Mapping[str, tuple[Any, bool]]) -> None:
        self._makers = {key: _remember(value, copied) for key, (value, copied) in entries.items()}

    def entries(self) -> dict[str, Any]:
        """The same objects, holding what they held."""
        return {key: make() for key, make in self._makers.items()}


def _remember(value: Any, copied: bool) -> Callable[[], Any]:
    """A function that gives the value back as it is now."""
    if isinstance(value, Tensor):
        return _remember_tensor(value) if copied else lambda: value
    if isinstance(value, dict):
        items = {k: _remember(v, copied) for k, v in value.items()}

        def fill_dict() -> Any:
            _refill(value, {k: make() for k, make in items.items()})
            return value

        return fill_dict
    if isinstance(value, list):
        parts = [_remember(v, copied) for v in value]

        def fill_list() -> Any:
            value[:] = [make() for make in parts]
            return value

        return fill_list
    if isinstance(value, tuple):
        members = [_remember(v, copied) for v in value]
        return lambda: type(value)(make() for make in members) if type(value) is tuple else value
    return lambda: value


def _remember_tensor(tensor: Tensor) -> Callable[[], Tensor]:
    if lost_memory(tensor):  # nothing can be read from it, nor written
        return lambda: tensor
    copy = tensor.detach().clone()

    def give() -> Tensor:
        if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
            return copy  # it was replaced from within (.data, resize_)
        if not writes_overlap(tensor):
            tensor.detach().copy_(copy)
        return tensor

    return give
