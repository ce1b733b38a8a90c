"""Where transforms keep their tensors: ``state[p]["optx.<transform>.<slot>"]``, out of the base's sight.

Most bases initialise a parameter when ``state[p]`` is empty, and torch's distributed checkpoint takes a
non-empty ``state`` for an initialised optimizer. So a slot is *pending* here until its parameter has taken
a step, and all slots are pending while the base's own ``step`` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optx._names import placed_like
from optx.step import bits

PREFIX = "optx."
OF_WIDTH = (
    "optx.mu."  # keys of groups that tell what is in their numbers: they stay as long as the numbers do
)
SCALE = "optx.scale."  # what follows is the key of a moment of 8 bits, without our prefix
REST = "optx.rest"  # what a bfloat16 weight lost
PENDING = "optx_pending"  # top-level entry of a state_dict: slots of parameters that have not stepped yet


def is_ours(key: object) -> bool:
    """Whether a state or group key belongs to optx."""
    return isinstance(key, str) and key.startswith(PREFIX)


class SlotStore:
    """The slots of one wrapped optimizer.

    Attributes:
        pending: slots that are not in ``state`` yet.
        lasting: slots that can't be made again (an anchor: the weights have moved): ``state.clear()`` resets
            the moments, and these come back.
        derived: whether numbers taken from the base's state are still right.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.pending: dict[Tensor, dict[str, Tensor]] = {}
        self.lasting: dict[Tensor, dict[str, Tensor]] = {}
        self.derived = Derived()

    def get(self, p: Tensor, key: str, make: Callable[[], Tensor], lasting: bool = False) -> Tensor:
        """A slot, made on first use."""
        state = self.base.state
        if p in state and key in state[p]:
            slot = state[p][key]
        else:
            slots = self.pending.setdefault(p, {})
            if key not in slots:
                kept = self.lasting.get(p, {}).get(key)
                slots[key] = make() if kept is None else kept
            slot = slots[key]
        if lasting:
            self.lasting.setdefault(p, {})[key] = slot
        return slot

    def tidy(self) -> None:
        """Drop entries that are None: ZeroRedundancyOptimizer leaves one for what other processes keep."""
        state = self.base.state
        for p in [p for p, entry in state.items() if entry is None]:
            del state[p]

    def of(self, p: Tensor) -> dict[str, Tensor]:
        """All slots of a parameter."""
        state = self.base.state
        present = {k: v for k, v in state[p].items() if is_ours(k)} if p in state else {}
        return {**self.lasting.get(p, {}), **self.pending.get(p, {}), **present}

    def present(self, parameters: Iterable[Tensor], key: str) -> list[Tensor | None]:
        """One slot of some parameters, None where there is none yet."""
        state, pending, nothing = self.base.state, self.pending, dict[str, Any]()
        if not pending:
            return [state.get(p, nothing).get(key) for p in parameters]
        return [state.get(p, nothing).get(key, pending.get(p, nothing).get(key)) for p in parameters]

    def put(self, p: Tensor, key: str, value: Tensor) -> None:
        """Replace a slot, wherever it is."""
        state = self.base.state
        where = state[p] if p in state and key in state[p] else self.pending.setdefault(p, {})
        where[key] = value

    def drop(self, p: Tensor, keys: Iterable[str]) -> None:
        """Forget some slots."""
        for key in keys:
            for slots in (self.base.state.get(p), self.pending.get(p), self.lasting.get(p)):
                if slots:
                    slots.pop(key, None)
        if not self.pending.get(p, True):
            del self.pending[p]

    def settle(self, parameters: Iterable[Tensor]) -> None:
        """Move the slots of parameters that took a step to where torch keeps state."""
        for p in parameters:
            slots = self.pending.pop(p, None)
            if slots:
                shown = self.base.state[p]
                # What a person put there meanwhile (an anchor of a new shape) is newer.
                shown.update({k: v for k, v in slots.items() if k not in shown})

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

    def forget(self, parameters: Sequence[Tensor]) -> None:
        """Parameters that left the optimizer."""
        for p in parameters:
            self.pending.pop(p, None)
            self.lasting.pop(p, None)
        self.derived.forget(parameters)

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
        for slots in (self.pending, self.lasting):
            if old in slots:
                moved = {k: _moved(v, old, new) for k, v in slots.pop(old).items()}
                slots[new] = {**moved, **slots.get(new, {})}


def _moved(slot: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """A slot of a parameter as it goes with the one in its place; packed bits by their rows."""
    packed = slot.dtype == torch.uint8 and slot.ndim == 2 and slot.shape != old.shape == new.shape
    if packed and bits.fits(slot.shape, old):
        return bits.settled(slot, new)
    return placed_like(slot, new)


class Derived:
    """Whether a number that was taken from a state tensor of the base is still right.

    AdamR keeps the sum of the second moment from one step to the next. Whatever else changes that moment (or
    the sum) in place counts up its version, and whatever replaces it is another object or lies elsewhere: to
    look costs no pass over it. An edit in place through ``.data`` or NumPy counts up nothing and isn't seen.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], tuple[Any, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": {}}  # a copy has other tensors, and looks at them itself

    def stale(
        self, key: str, parameters: Sequence[Tensor], sources: Sequence[Any], kept: Sequence[Any]
    ) -> list[int]:
        """Positions of the parameters whose source or number is not what it was when `took` was called."""
        seen = self._seen
        return [
            i
            for i, (p, source, number) in enumerate(zip(parameters, sources, kept, strict=True))
            if not (isinstance(source, Tensor) and isinstance(number, Tensor))
            or (known := seen.get((key, id(p)))) is None
            or known[0] is not p
            or known[1] is not source
            or known[2] is not number
            or known[3:] != _stamps(source, number)
        ]

    def took(
        self, key: str, parameters: Sequence[Tensor], sources: Sequence[Any], kept: Sequence[Any]
    ) -> None:
        """The numbers have just been taken from these."""
        for p, source, number in zip(parameters, sources, kept, strict=True):
            if isinstance(source, Tensor) and isinstance(number, Tensor):
                self._seen[key, id(p)] = (p, source, number, *_stamps(source, number))

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Parameters that left, or whose numbers nobody keeps up any more."""
        gone = set(map(id, parameters))
        self._seen = {key: known for key, known in self._seen.items() if key[1] not in gone}


def _stamps(*tensors: Tensor) -> tuple[Any, ...]:
    """Where tensors lie, and how often they were changed in place."""
    try:
        return tuple(stamp for t in tensors for stamp in (t._version, t.data_ptr()))
    except RuntimeError:  # one that lies nowhere
        return tuple(t._version for t in tensors)


def close_enough(kept: Tensor, anew: Tensor) -> bool:
    """Whether a derived number is right but for the order in which it was summed; then its bits stay."""
    a, b = float(kept), float(anew)
    return kept.dtype == anew.dtype and (a == b or abs(a - b) <= 1e-6 * abs(b))


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
