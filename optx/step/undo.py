"""Takes back a failed step: what a base without a fused form, and the rules around it, had done by then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from optx.step.memory import lost_memory, writes_overlap


class Copies:
    """Copies of the tensors of one step, made all at once.

    On a CPU they lie in one stretch of memory that is kept for the next step: to get so much anew from the
    system takes longer than the copying. A GPU's allocator keeps it by itself.
    """

    def __init__(self) -> None:
        self._asked: dict[int, Tensor] = {}
        self._copies: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}  # where copies are put, by the id of what is copied

    def ask(self, tensor: Tensor) -> None:
        """This one is to be copied by `take`."""
        self._asked[id(tensor)] = tensor.detach()

    def take(self) -> None:
        """Copy all that were asked for."""
        asked, self._asked = self._asked, {}
        plain = {i: t for i, t in asked.items() if _is_plain(t)}
        kept = self._kept
        if kept.keys() != plain.keys() or not all(map(_alike, kept.values(), map(plain.get, kept))):
            self._kept = kept = _room_for(plain)
        if kept:
            copy = torch._foreach_copy_  # pyright: ignore
            copy(list(kept.values()), [plain[i] for i in kept])
        self._copies = {**kept, **{i: t.clone() for i, t in asked.items() if i not in kept}}

    def put_back(self, tensor: Tensor) -> Tensor:
        """A tensor with what it held; another one if it was replaced from within (``.data``, ``resize_``)."""
        copy = self._copies.get(id(tensor))
        if copy is None:
            return tensor
        if not _alike(copy, tensor):
            return copy.clone()
        if not writes_overlap(tensor):  # nobody can have written one that does
            tensor.detach().copy_(copy)
        return tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The copy of one of them, for this step."""
        return self._copies[id(tensor)]

    def release(self) -> None:
        """The step is over."""
        self._copies = {}

    def clear(self) -> None:
        """Nothing is to be copied in the next step."""
        self._copies, self._kept = {}, {}


def _is_plain(t: Tensor) -> bool:
    return type(t) is Tensor and t.device.type == "cpu" and t.layout == torch.strided


def _alike(room: Tensor, t: Tensor | None) -> bool:
    return t is not None and room.shape == t.shape and room.dtype == t.dtype


def _room_for(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    """Uninitialised tensors like these, those of a dtype in one stretch of memory."""
    room: dict[int, Tensor] = {}
    for dtype in {t.dtype for t in tensors.values()}:
        same = {i: t for i, t in tensors.items() if t.dtype == dtype}
        parts = torch.empty(sum(t.numel() for t in same.values()), dtype=dtype).split(
            [t.numel() for t in same.values()]
        )
        room.update({i: part.view(t.shape) for (i, t), part in zip(same.items(), parts, strict=True)})
    return room


class Undo:
    """Weights, state and group numbers as they are now, to be put back after an error.

    A base moves weights and state in place and may fail at any of them, so all of them are copied.

    Args:
        copies: makes the copies.
        base: its groups' numbers and its state are remembered.
        parameters: those that the step may move.
        pending: slots that are not in ``state`` (see `SlotStore`).
        written: whether anything writes a state tensor of that name; others need no copy.
    """

    def __init__(
        self,
        copies: Copies,
        base: torch.optim.Optimizer,
        parameters: Iterable[Tensor],
        pending: Mapping[Tensor, dict[str, Tensor]],
        written: Callable[[Any], bool],
    ) -> None:
        self._copies = copies
        # Some keep the optimizer that does the work within: SAM, ZeroRedundancyOptimizer.
        within = [v for v in vars(base).values() if isinstance(v, torch.optim.Optimizer)]
        self._groups = [(group, dict(group)) for o in (base, *within) for group in o.param_groups]
        self._numbers = [(vars(o), _numbers_in(vars(o))) for o in (base, *within)]
        # The version tells whether somebody moved the weight meanwhile.
        self._weights = {p: p._version for p in parameters if not lost_memory(p)}
        for p in self._weights:
            copies.ask(p)
        self._containers: list[Callable[[], Any]] = []  # put back what was in lists and dicts
        self._states = [
            (o.state, self._entries(o.state, filter(o.state.__contains__, self._weights), written))
            for o in (base, *within)
        ]
        self._pending = self._entries(pending, pending, written)
        for _, numbers in self._groups:
            for key, value in numbers.items():
                if key != "params":  # some count in a tensor there
                    self._remember(value)
        copies.take()

    def _entries(
        self,
        state: Mapping[Tensor, dict[str, Any]],
        parameters: Iterable[Tensor],
        written: Callable[[Any], bool],
    ) -> dict[Tensor, dict[str, Any]]:
        entries = {p: dict(state[p]) for p in parameters}
        for entry in entries.values():
            for key, value in entry.items():
                if written(key):
                    self._remember(value)
        return entries

    def _remember(self, value: Any) -> None:
        """What is in a tensor, and in the lists and dicts that some bases keep."""
        if isinstance(value, Tensor):
            if not lost_memory(value):  # nothing could be read from it, nor written
                self._copies.ask(value)
        elif isinstance(value, dict | list):
            within = dict(value) if isinstance(value, dict) else list(value)
            for part in within.values() if isinstance(within, dict) else within:
                self._remember(part)
            self._containers.append(lambda: _refill(value, within))
        elif isinstance(value, tuple):
            for part in value:
                self._remember(part)

    def moved(self, parameters: Iterable[Tensor]) -> bool:
        """Whether anything has written one of these weights since."""
        return any(p._version != self._weights.get(p, p._version) for p in parameters)

    def weight(self, p: Tensor) -> Tensor:
        """What a weight was."""
        return self._copies.of(p)

    def forget(self) -> None:
        """The step has been taken."""
        self._copies.release()

    def restore(self, pending: dict[Tensor, dict[str, Tensor]]) -> None:
        """Put everything back into the tensors that held it."""
        with torch.no_grad():
            for p in self._weights:
                self._copies.put_back(p)
            for put_back in self._containers:
                put_back()
            for state, entries in self._states:
                for p in self._weights:
                    if p in entries:
                        _refill(state[p], self._held(entries[p]))
                    else:
                        state.pop(p, None)
            _refill(pending, {p: self._held(slots) for p, slots in self._pending.items()})
            for group, numbers in self._groups:
                _refill(group, {k: v if k == "params" else self._given_back(v) for k, v in numbers.items()})
        for attributes, numbers in self._numbers:
            attributes.update(numbers)

    def _held(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {k: self._given_back(v) for k, v in entry.items()}

    def _given_back(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copies.put_back(value)
        if isinstance(value, dict | list):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in list(parts):
                value[key] = self._given_back(part)
        elif type(value) is tuple:
            return tuple(map(self._given_back, value))
        return value


def _numbers_in(attributes: dict[str, Any]) -> dict[str, Any]:
    """Counts that a base keeps in itself."""
    return {k: v for k, v in attributes.items() if isinstance(v, int | float) or v is None}


def _refill(target: Any, contents: Any) -> None:
    target.clear()
    target.extend(contents) if isinstance(target, list) else target.update(contents)
