"""Runs a `Program` on torch tensors: the reference, and the path for every base, device and layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._errors import TransformError
from optx._names import is_dtensor
from optx.kernels.step.program import AXES, NUMBER_KINDS, W0, Call, G, Level, Program, Ref, W
from optx.step.along import Along, applied
from optx.step.bits import Packed
from optx.step.rounding import step_key, write
from optx.step.sharded import Shards, Share, alike, here
from optx.step.tensor_list import PerTensor, TensorList


class GroupRun:
    """One step of one param group: holds the registers, numbers and state a program's calls refer to.

    Args:
        program: what to compute.
        weights: the parameters that have a gradient.
        grads: their gradients.
        state: per slot name, scalar or not, one tensor per weight; written in place.
        hypers: numbers of the group.
        cols: numbers per tensor known from the start: ``numel``, ``step``, ``fresh``.
        key: gives that of this step's random draws, for slots in bfloat16; asked only where one is written.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Mapping[str, Sequence[Tensor]],
        hypers: Mapping[str, Any],
        cols: Mapping[str, Sequence[float]],
        key: Callable[[], int] = int,
    ) -> None:
        self.program = program
        self.weights = list(weights)
        self.state, self.hypers = state, hypers
        self.totals: dict[str, Tensor] = {}
        device = weights[0].device
        sharded = any(map(is_dtensor, weights))
        self.number_device = torch.device("cpu") if sharded else device
        self._as_floats = self.number_device.type == "cpu"
        # Only where a launch costs more than a pass over memory.
        self._lists = device.type not in ("cpu", "meta") and not sharded
        self._piecewise = device.type == "cpu" and not sharded
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self.cols = {k: torch.tensor(v, dtype=self._wide, device=self.number_device) for k, v in cols.items()}
        # What rules per element compute in; a float64 weight asks for its own precision throughout.
        self._math = [self._wide if w.dtype == torch.float64 else torch.float32 for w in weights]
        self._key = key
        self.gradients = list(grads)
        self.along = Along(weights, self._wide, self._math)
        # Slots as rules wrote them in this step, where that is more than what could be stored.
        self._written: dict[Ref, list[Tensor]] = {}
        self._looked: list[Share] = []  # of gradients that are shards: to be completed with what is observed

    def _registers(self, start: Sequence[Tensor] | None = None) -> dict[Ref, list[Tensor]]:
        return {W: self.weights, W0: list(start or self.weights), G: self.gradients, **self._written}

    # ---- levels ------------------------------------------------------------------------------------

    def sum(self, level: Level, start: Sequence[Tensor] | None = None) -> list[Share]:
        """A level's sums; returns what of them is of shards, to be completed before `measure`.

        Args:
            level: whose.
            start: the weights as they were when the step began, once it has moved them.
        """
        if not level.sums:
            return []
        registers = self._registers(start)
        for call in level.prefix:
            self._elementwise(call, registers)
        return [share for call in level.sums for share in self._sum(call, registers)]

    def measure(self, level: Level) -> dict[str, Tensor]:
        """The scalars that follow from a level's sums; returns this group's share of its totals."""
        for call in level.scalars:
            self._scalar(call) if call.axis is None else self._run_along(call)
        return {ref.name: self.cols[ref.name].sum() for ref in level.totals}

    def look(self) -> None:
        """Before anything is written: what is metered of the gradients that the step is given."""
        for call in self.program.meter:
            if G not in call.args:
                continue
            if any(map(is_dtensor, self.gradients)):
                self._looked += self._sum(call, {G: self.gradients})
                continue
            norms = torch._foreach_norm(self.gradients, 2, dtype=self._wide)  # pyright: ignore
            (ref,) = call.writes
            self.cols[ref.name] = torch.stack([n.to(self.number_device) for n in norms]).square()

    def finish(self, level: Level) -> None:
        """The scalars that waited for totals, which the caller has put into ``totals``."""
        for call in level.finish:
            self._scalar(call)

    def _sum(self, call: Call, registers: Mapping[Ref, list[Tensor]]) -> list[Share]:
        rows: list[list[Tensor]] = []
        for i, row in enumerate(self._rows(call, registers)):
            pieces = [self._results(call, i, piece) for piece in self._pieces(call, i, row, self._wide)]
            if call.writes[0].kind in AXES:
                self.along.keep(call.writes, i, pieces[0])
                continue
            sums = ([part.sum(dtype=self._wide) for part in column] for column in zip(*pieces, strict=True))
            rows.append([s[0] if len(s) == 1 else torch.stack(s).sum() for s in sums])
        shares: list[Share] = []
        for column, ref in enumerate(call.writes if rows else ()):
            sums = [row[column] for row in rows]
            self.cols[ref.name] = made = torch.stack([here(one).to(self.number_device) for one in sums])
            over = map(Shards.summed_over, sums)
            shares += [(made[i], shards) for i, shards in enumerate(over) if shards is not None]
        return shares

    def _scalar(self, call: Call) -> None:
        results = applied(call, [self._number(ref) for ref in call.args])
        for ref, value in zip(call.writes, results, strict=True):
            filled = torch.as_tensor(value, dtype=self._wide, device=self.number_device)
            if ref.name in self.program.kept:
                filled = _as_kept(filled, self.state[ref.name][0].dtype).to(self._wide)
            self.cols[ref.name] = filled.expand(len(self.weights))

    def _run_along(self, call: Call) -> None:
        """A rule per row or column."""
        numbers = {ref: self._number(ref) for ref in call.args if ref.kind in ("col", "cell", *NUMBER_KINDS)}
        sums = self.along.run(call, numbers, self.state)
        for ref in (ref for ref in call.writes if ref.kind == "col"):
            self.cols[ref.name] = torch.stack(sums[ref]).to(self.number_device, self._wide)

    def _number(self, ref: Ref) -> Any:
        if ref.kind == "col":
            return self.cols[ref.name]
        if ref.kind == "total":
            return self.totals[ref.name]
        if ref.kind == "cell":
            return torch.stack([c.to(self._wide) for c in self.state[ref.name]]).to(self.number_device)
        return self.hypers[ref.name]

    # ---- elements ----------------------------------------------------------------------------------

    def rewrite_gradients(self) -> list[Tensor]:
        """Run the gradient rules; the new gradients, in the old ones' dtypes."""
        registers = self._registers()
        for call in self.program.gradient:
            self._elementwise(call, registers, store=True)
        old, new = self.gradients, registers[G]
        given = [n.to(g.dtype) for n, g in zip(new, old, strict=True)]
        if G in self.program.reads((*self.program.weight, *self.program.later, *self.program.observe)):
            self.gradients = new
        return given

    def keep_gradients(self) -> None:
        """Before the base's step, which may overwrite the gradients: later rules read what it was given."""
        if G in self.program.reads((*self.program.later, *self.program.observe)):
            self.gradients = [g.clone() for g in self.gradients]

    def edit_weights(self, calls: Sequence[Call], start: list[Tensor] | None = None) -> list[Tensor] | None:
        """Run rules that write weights; the new weights in full precision, None if no rule writes."""
        if not calls:
            return None
        registers = self._registers(start)
        for call in calls:
            self._elementwise(call, registers, store=True)
        return [w.to(math) for w, math in zip(registers[W], self._math, strict=True)]

    def observe(self, start: list[Tensor] | None = None) -> list[Share]:
        """The step is done: the sums over what was stored; those of shards to be completed before `keep`."""
        self._written.clear()
        registers = self._registers(start)
        calls = [
            call
            for call in (*self.program.observe, *self.program.meter)
            if G not in call.args or call not in self.program.meter
        ]
        return self._looked + [share for call in calls for share in self._sum(call, registers)]

    def keep(self) -> None:
        """Put what scalars wrote, and what was observed, into the cells."""
        cells = [*self.program.kept, *(ref.name for call in self.program.observe for ref in call.writes)]
        for name in dict.fromkeys(cells):
            for cell, value in zip(self.state[name], self.cols[name].unbind(), strict=True):
                cell.copy_(value)
        for name, axis in self.program.kept_vectors:
            for kept, value in zip(self.state[name], self.along.found[Ref(axis, name)], strict=True):
                kept.copy_(value)

    def _elementwise(self, call: Call, registers: dict[Ref, list[Tensor]], store: bool = False) -> None:
        """Run one rule; what it writes is in ``registers`` then, and what it stores in the slots."""
        if self._lists and not any(r.name in self.program.packed or r.kind in AXES for r in call.args):
            arguments = [self._list(ref, registers) for ref in call.args]
            columns = [self._column(v) for v in applied(call, arguments)]
        else:
            rows = [self._one(call, i, row) for i, row in enumerate(self._rows(call, registers))]
            columns = [[row[c] for row in rows] for c in range(len(call.writes))]
        for number, (ref, values) in enumerate(zip(call.writes, columns, strict=True)):
            if ref.kind != "slot":
                registers[ref] = values
                continue
            slots = self.state[ref.name]
            registers[ref] = read = [_as_kept(v, s.dtype) for v, s in zip(values, slots, strict=True)]
            if store:
                for i, (slot, value) in enumerate(zip(slots, read, strict=True)):
                    if slot.dtype == torch.bfloat16:
                        write(slot, value.to(torch.float32), True, abs(step_key(self._key(), i, number)))
                    else:
                        slot.copy_(value)
                # What was stored exactly is read from there.
                exact = all(s.dtype == v.dtype for s, v in zip(slots, read, strict=True))
                self._written.pop(ref, None)
                if exact or ref not in self._reread:
                    del registers[ref]
                else:
                    self._written[ref] = read

    @functools.cached_property
    def _reread(self) -> frozenset[Ref]:
        """What a rule reads that an earlier one wrote."""
        reread: set[Ref] = set()
        written: set[Ref] = set()
        for call in (*self.program.gradient, *self.program.weight, *self.program.later):
            reread |= written.intersection(call.args)
            written.update(call.writes)
        return frozenset(reread)

    def _one(self, call: Call, i: int, row: Sequence[Any]) -> Sequence[Tensor]:
        """A rule's results for one tensor."""
        results = [self._results(call, i, piece) for piece in self._pieces(call, i, row, None)]
        if len(results) == 1:
            return results[0]
        return [torch.cat(parts).view(self.weights[i].shape) for parts in zip(*results, strict=True)]

    def _results(self, call: Call, i: int, arguments: Sequence[Any]) -> list[Tensor]:
        """What a rule makes of one tensor's elements (or a piece of them), one value per element."""
        like = next((a for a, ref in zip(arguments, call.args, strict=True) if ref.kind in _ELEMENTS), None)
        like = self.weights[i].detach() if like is None else like
        values: list[Tensor] = []
        along = any(ref.kind in AXES for ref in call.args)
        for value in applied(call, arguments):
            if along and isinstance(value, Tensor):
                value = alike(value.broadcast_to(like.shape), like)
            if isinstance(value, Tensor) and value.numel() not in (1, like.numel()):
                raise TransformError(
                    f"{call.rule!r} returns a tensor of shape {tuple(value.shape)} for elements of shape "
                    f"{tuple(like.shape)}; it must return one value per element."
                )
            if not isinstance(value, Tensor) or value.shape != like.shape:  # a number for all elements
                value = torch.zeros_like(like, dtype=self._math[i], requires_grad=False) + value
            values.append(value)
        return values

    def _column(self, value: Any) -> list[Tensor]:
        """A rule's result on lists as one tensor per weight."""
        if isinstance(value, TensorList) and not isinstance(value, PerTensor):
            return value.tensors
        numbers = value.tensors if isinstance(value, PerTensor) else [value] * len(self.weights)
        return [
            torch.zeros_like(w, dtype=math, requires_grad=False) + number
            for w, math, number in zip(self.weights, self._math, numbers, strict=True)
        ]

    def _rows(self, call: Call, registers: Mapping[Ref, list[Tensor]]) -> Iterator[list[Any]]:
        """A call's arguments, tensor after tensor."""
        columns: list[list[Any]] = []
        for ref in call.args:
            if ref.kind == "slot" and ref.name in self.program.packed:
                columns.append(list(map(Packed, self.state[ref.name], self.weights)))
            elif ref.kind in _ELEMENTS:
                tensors = registers[ref] if ref in registers else self.state[ref.name]
                columns.append([t.detach() for t in tensors])
            elif ref.kind in AXES:
                columns.append(self.along.beside(ref))
            elif ref.kind in ("col", "cell"):
                values = self._number(ref)
                columns.append(values.tolist() if self._as_floats else list(values.unbind()))
            else:
                columns.append([self._group_number(ref)] * len(self.weights))
        for i in range(len(self.weights)):
            yield [column[i] for column in columns]

    def _pieces(
        self, call: Call, i: int, row: Sequence[Any], dtype: torch.dtype | None
    ) -> Iterator[list[Any]]:
        """One tensor's arguments in the dtype of the arithmetic, or in ``dtype``.

        On a CPU a large tensor comes in pieces, so that what a rule makes on its way stays in cache.
        """
        elements = [ref.kind in _ELEMENTS for ref in call.args]
        tensors = [a for a, is_element in zip(row, elements, strict=True) if is_element]

        def full(value: Any, is_element: bool) -> Any:
            return self._full(value, i, dtype) if is_element else value

        if (
            self._piecewise
            and tensors
            and tensors[0].numel() > _PIECE
            and not any(ref.kind in AXES for ref in (*call.args, *call.writes))
            and all(t.is_contiguous() for t in tensors)
        ):
            split = [
                (a if isinstance(a, Packed) else a.view(-1)).split(_PIECE) if is_element else None
                for a, is_element in zip(row, elements, strict=True)
            ]
            count = -(-tensors[0].numel() // _PIECE)
            for k in range(count):
                yield [
                    full(a if part is None else part[k], part is not None)
                    for a, part in zip(row, split, strict=True)
                ]
        else:
            yield [full(a, is_element) for a, is_element in zip(row, elements, strict=True)]

    def _full(self, t: Tensor, i: int, dtype: torch.dtype | None = None) -> Tensor:
        """The ``i``-th tensor's elements in the dtype of the arithmetic: see `Slot`."""
        if dtype is None:
            dtype = self._wide if t.dtype in _WIDE else self._math[i]
        return t if t.dtype == dtype else t.to(dtype)

    def _list(self, ref: Ref, registers: Mapping[Ref, list[Tensor]]) -> Any:
        if ref.kind in _ELEMENTS:
            tensors = registers[ref] if ref in registers else self.state[ref.name]
            return TensorList(self._full(t.detach(), i) for i, t in enumerate(tensors))
        if ref.kind in ("col", "cell"):
            numbers = self._number(ref).unbind()
            return PerTensor(n.to(math) for n, math in zip(numbers, self._math, strict=True))
        return self._group_number(ref)

    def _group_number(self, ref: Ref) -> Any:
        value = self._number(ref)
        return value.item() if isinstance(value, Tensor) and self._as_floats else value


_PIECE = 65536  # elements
_ELEMENTS = ("reg", "slot")
_WIDE = (torch.float64, torch.int32, torch.int64)  # read in float64


def _as_kept(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What a later rule reads of a value written into a slot: whole numbers are made at once."""
    if dtype.is_floating_point:
        return value
    return value != 0 if dtype == torch.bool else value.to(dtype)
