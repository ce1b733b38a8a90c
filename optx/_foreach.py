"""Runs a `Program` on torch tensors: the reference, and the path for every base, device and layout."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._names import is_dtensor, whole
from optx.kernels.program import W0, Call, G, Level, Program, Ref, W

Operand = Any  # a TensorList, a number, or one number or 0-dim tensor per tensor


class PerTensor(list[Any]):
    """One number (or 0-dim tensor) per tensor of a `TensorList`."""


class TensorList:
    """A list of tensors with the arithmetic of one, by torch's ``_foreach`` functions where they exist.

    It is what a rule is called on where launches cost more than memory: one launch per operation serves
    all tensors of a group.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def _map(self, op: Callable[..., Tensor], *others: Operand) -> TensorList:
        columns = [o.tensors if isinstance(o, TensorList) else o for o in others]
        columns = [c if isinstance(c, list) else [c] * len(self.tensors) for c in columns]
        return TensorList(op(*row) for row in zip(self.tensors, *columns, strict=True))

    def _fast(self, name: str, op: Callable[..., Tensor], other: Operand) -> TensorList:
        operand = other.tensors if isinstance(other, TensorList) else other
        if isinstance(operand, PerTensor) and operand and isinstance(operand[0], Tensor):
            return self._map(op, other)
        return TensorList(getattr(torch, f"_foreach_{name}")(self.tensors, operand))

    def _unary(self, name: str) -> TensorList:
        return TensorList(getattr(torch, f"_foreach_{name}")(self.tensors))

    def __add__(self, other: Operand) -> TensorList:
        return self._fast("add", operator.add, other)

    def __sub__(self, other: Operand) -> TensorList:
        return self._fast("sub", operator.sub, other)

    def __mul__(self, other: Operand) -> TensorList:
        return self._fast("mul", operator.mul, other)

    def __truediv__(self, other: Operand) -> TensorList:
        return self._fast("div", operator.truediv, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Operand) -> TensorList:
        return self._map(lambda a, b: b - a, other)

    def __rtruediv__(self, other: Operand) -> TensorList:
        return self._map(lambda a, b: b / a, other)

    def __pow__(self, other: Operand) -> TensorList:
        return self._map(operator.pow, other)

    def __neg__(self) -> TensorList:
        return self._unary("neg")

    def __abs__(self) -> TensorList:
        return self._unary("abs")

    def __gt__(self, other: Operand) -> TensorList:
        return self._map(operator.gt, other)

    def __lt__(self, other: Operand) -> TensorList:
        return self._map(operator.lt, other)

    def __ge__(self, other: Operand) -> TensorList:
        return self._map(operator.ge, other)

    def __le__(self, other: Operand) -> TensorList:
        return self._map(operator.le, other)

    def sqrt(self) -> TensorList:
        """Square roots."""
        return self._unary("sqrt")

    def exp(self) -> TensorList:
        """Exponentials."""
        return self._unary("exp")

    def log(self) -> TensorList:
        """Logarithms."""
        return self._unary("log")

    def sign(self) -> TensorList:
        """Signs."""
        return self._unary("sign")

    def where_(self, a: Operand, b: Operand) -> TensorList:
        """``a`` where this (boolean) list holds, else ``b``."""
        return self._map(torch.where, a, b)


class GroupRun:
    """One step of one param group: holds the registers, numbers and state a program's calls refer to.

    Args:
        program: what to compute.
        weights: the parameters that have a gradient.
        grads: their gradients.
        state: per slot name, scalar or not, one tensor per weight; written in place.
        hypers: numbers of the group.
        cols: numbers per tensor known from the start: ``numel``, ``step``, ``fresh``.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Mapping[str, Sequence[Tensor]],
        hypers: Mapping[str, Any],
        cols: Mapping[str, Sequence[float]],
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
        self.registers: dict[Ref, list[Tensor]] = {G: list(grads)}

    # ---- levels ------------------------------------------------------------------------------------

    def measure(self, level: Level) -> dict[str, Tensor]:
        """Sums and scalars of a level; returns this group's share of its totals."""
        if level.sums:
            registers = {W: self.weights, W0: self.weights, G: self.registers[G]}
            for call in level.prefix:
                self._elementwise(call, registers)
            for call in level.sums:
                self._sum(call, registers)
        for call in level.scalars:
            self._scalar(call)
        return {ref.name: self.cols[ref.name].sum() for ref in level.totals}

    def finish(self, level: Level) -> None:
        """The scalars that waited for totals, which the caller has put into ``totals``."""
        for call in level.finish:
            self._scalar(call)

    def _sum(self, call: Call, registers: Mapping[Ref, list[Tensor]]) -> None:
        rows: list[list[Tensor]] = []
        for row in self._rows(call, registers):
            pieces = [call.rule.values(*piece) for piece in self._pieces(call, row, self._wide)]
            sums = ([summand.sum() for summand in column] for column in zip(*pieces, strict=True))
            rows.append([whole(s[0] if len(s) == 1 else torch.stack(s).sum()) for s in sums])
        for column, ref in enumerate(call.writes):
            self.cols[ref.name] = torch.stack([row[column].to(self.number_device) for row in rows])

    def _scalar(self, call: Call) -> None:
        results = call.rule.values(*(self._number(ref) for ref in call.args))
        for ref, value in zip(call.writes, results, strict=True):
            filled = torch.as_tensor(value, dtype=self._wide, device=self.number_device)
            self.cols[ref.name] = filled.expand(len(self.weights))

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
        registers = {W: self.weights, W0: self.weights, G: self.registers[G]}
        for call in self.program.gradient:
            self._elementwise(call, registers)
        old = self.registers[G]
        return [new.to(g.dtype) for new, g in zip(registers[G], old, strict=True)]

    def edit_weights(self, calls: Sequence[Call], start: list[Tensor] | None = None) -> list[Tensor] | None:
        """Run rules that write weights; the new weights in full precision, None if no rule writes."""
        if not calls:
            return None
        registers = {W: self.weights, W0: start or self.weights, G: self.registers[G]}
        for call in calls:
            self._elementwise(call, registers)
        return registers[W]

    def observe(self) -> None:
        """Sum what was written into the scalar slots."""
        registers = {W: self.weights, W0: self.weights, G: self.registers[G]}
        for call in self.program.observe:
            self._sum(call, registers)
            for ref in call.writes:
                for cell, value in zip(self.state[ref.name], self.cols[ref.name].unbind(), strict=True):
                    cell.copy_(value)

    def _elementwise(self, call: Call, registers: dict[Ref, list[Tensor]]) -> None:
        if self._lists:
            arguments = [self._list(ref, registers) for ref in call.args]
            columns = [v.tensors for v in call.rule.values(*arguments)]
        else:
            rows = [self._one(call, row) for row in self._rows(call, registers)]
            columns = [[row[c] for row in rows] for c in range(len(call.writes))]
        for ref, values in zip(call.writes, columns, strict=True):
            if ref.kind == "reg":
                registers[ref] = values
            else:
                for slot, value in zip(self.state[ref.name], values, strict=True):
                    slot.copy_(value)

    def _one(self, call: Call, row: Sequence[Any]) -> Sequence[Tensor]:
        """A rule's results for one tensor."""
        results = [call.rule.values(*piece) for piece in self._pieces(call, row, None)]
        if len(results) == 1:
            return results[0]
        shape = next(a.shape for a in row if isinstance(a, Tensor))
        return [torch.cat(parts).view(shape) for parts in zip(*results, strict=True)]

    def _rows(self, call: Call, registers: Mapping[Ref, list[Tensor]]) -> Iterator[list[Any]]:
        """A call's arguments, tensor after tensor."""
        columns: list[list[Any]] = []
        for ref in call.args:
            if ref.kind == "reg":
                columns.append([t.detach() for t in registers[ref]])
            elif ref.kind == "slot":
                columns.append([t.detach() for t in self.state[ref.name]])
            elif ref.kind == "col":
                values = self.cols[ref.name]
                columns.append(
                    values.tolist() if self._as_floats else list(values.to(torch.float32).unbind())
                )
            else:
                columns.append([self._group_number(ref)] * len(self.weights))
        for i in range(len(self.weights)):
            yield [column[i] for column in columns]

    def _pieces(self, call: Call, row: Sequence[Any], dtype: torch.dtype | None) -> Iterator[list[Any]]:
        """One tensor's arguments in at least float32 (or in ``dtype``).

        On a CPU a large tensor comes in pieces, so that what a rule makes on its way stays in cache.
        """
        elements = [ref.kind in ("reg", "slot") for ref in call.args]
        tensors = [a for a, is_element in zip(row, elements, strict=True) if is_element]
        if (
            self._piecewise
            and tensors
            and tensors[0].numel() > _PIECE
            and all(t.is_contiguous() for t in tensors)
        ):
            split = [
                a.view(-1).split(_PIECE) if is_element else None
                for a, is_element in zip(row, elements, strict=True)
            ]
            count = -(-tensors[0].numel() // _PIECE)
            for k in range(count):
                yield [
                    _full(a if part is None else part[k], part is not None, dtype)
                    for a, part in zip(row, split, strict=True)
                ]
        else:
            yield [_full(a, is_element, dtype) for a, is_element in zip(row, elements, strict=True)]

    def _list(self, ref: Ref, registers: Mapping[Ref, list[Tensor]]) -> Any:
        if ref.kind in ("reg", "slot"):
            tensors = registers[ref] if ref.kind == "reg" else self.state[ref.name]
            return TensorList(_full(t.detach(), True, None) for t in tensors)
        if ref.kind == "col":
            return PerTensor(self.cols[ref.name].to(torch.float32).unbind())
        return self._group_number(ref)

    def _group_number(self, ref: Ref) -> Any:
        value = self._number(ref)
        return value.item() if isinstance(value, Tensor) and self._as_floats else value


_PIECE = 65536  # elements


def _full(value: Any, is_element: bool, dtype: torch.dtype | None) -> Any:
    """A tensor in full precision; numbers as they are."""
    if not is_element:
        return value
    low = value.dtype in (torch.bfloat16, torch.float16)
    return value.to(dtype or (torch.float32 if low else value.dtype))
