"""Where transforms keep their tensors: ``state[p]["optx.<transform>.<slot>"]``, out of the base's sight.

Most bases initialise a parameter when ``state[p]`` is empty, and torch's distributed checkpoint takes a
non-empty ``state`` for an initialised optimizer. So a slot is *pending* here until its parameter has taken
a step, and all slots are pending while the base's own ``step`` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optx._names import placed_like

PREFIX = "optx."
PENDING = "optx_pending"  # top-level entry of a state_dict: slots of parameters that have not stepped yet


def is_ours(key: object) -> bool:
    """Whether a state or group key belongs to optx."""
    return isinstance(key, str) and key.startswith(PREFIX)


class SlotStore:
    """The slots of one wrapped optimizer."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.pending: dict[Tensor, dict[str, Tensor]] = {}

    def get(self, p: Tensor, key: str, make: Callable[[], Tensor]) -> Tensor:
        """A slot, made on first use."""
        state = self.base.state
        if p in state and key in state[p]:
            return state[p][key]
        slots = self.pending.setdefault(p, {})
        if key not in slots:
            slots[key] = make()
        return slots[key]

    def of(self, p: Tensor) -> dict[str, Tensor]:
        """All slots of a parameter."""
        state = self.base.state
        present = {k: v for k, v in state[p].items() if is_ours(k)} if p in state else {}
        return {**present, **self.pending.get(p, {})}

    def settle(self, parameters: Iterable[Tensor]) -> None:
        """Move the slots of parameters that took a step to where torch keeps state."""
        for p in parameters:
            slots = self.pending.pop(p, None)
            if slots:
                self.base.state[p].update(slots)

    @contextmanager
    def hidden(self, parameters: Iterable[Tensor]) -> Generator[None]:
        """While inside, no ``state[p]`` shows a slot; afterwards those of stepped parameters do."""
        state = self.base.state
        moved: list[Tensor] = []
        for p in parameters:
            if p in state:
                ours = [k for k in state[p] if is_ours(k)]
                if ours:
                    self.pending.setdefault(p, {}).update({k: state[p].pop(k) for k in ours})
                    moved.append(p)
        try:
            yield
        finally:
            self.settle(moved)

    @contextmanager
    def restored_on_error(self) -> Generator[None]:
        """If an error leaves the block, groups, state, gradients and slots are as they were before it."""
        state = dict(self.base.state)
        dicts = [d for d in (*self.base.param_groups, *state.values()) if isinstance(d, dict)]
        contents = [dict(d) for d in dicts]
        params = (p for group in self.base.param_groups for p in group["params"])
        grads = [(p, p.grad) for p in params if p.is_leaf]
        pending = {p: dict(slots) for p, slots in self.pending.items()}
        try:
            yield
        except BaseException:
            self.base.state.clear()
            self.base.state.update(state)
            for d, before in zip(dicts, contents, strict=True):
                d.clear()
                d.update(before)
            for p, grad in grads:
                p.grad = grad
            self.pending = pending
            raise

    def drop_base_state(self, p: Tensor, derived: Iterable[str]) -> None:
        """Forget what the base knows of a parameter; keep our slots, but for those derived from that."""
        slots = {k: v for k, v in self.of(p).items() if k not in set(derived)}
        self.base.state.pop(p, None)
        self.pending.pop(p, None)
        if slots:
            self.pending[p] = slots

    def follow(self, old: Tensor, new: Tensor) -> None:
        """A parameter object was replaced (Accelerate does so): its state goes with the name."""
        if old in self.base.state and new not in self.base.state:
            self.base.state[new] = self.base.state.pop(old)
        if old in self.pending:
            self.pending[new] = {k: placed_like(v, new) for k, v in self.pending.pop(old).items()}


def saved_slots(state_dict: dict[str, Any]) -> dict[Any, dict[str, Tensor]]:
    """The optx slots in a state dict, by its keys for parameters."""
    found: dict[Any, dict[str, Tensor]] = {}
    for number, entry in state_dict["state"].items():
        if isinstance(entry, dict):
            ours = {k: v for k, v in entry.items() if is_ours(k)}
            if ours:
                found[number] = ours
    for number, slots in state_dict.get(PENDING, {}).items():
        found.setdefault(number, {}).update(slots)
    return found


def without_ours(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as the base alone would have made it (its tensors are shared, not copied)."""
    state = {
        n: {k: v for k, v in entry.items() if not is_ours(k)} if isinstance(entry, dict) else entry
        for n, entry in state_dict["state"].items()
    }
    return {**{k: v for k, v in state_dict.items() if k != PENDING}, "state": state}
