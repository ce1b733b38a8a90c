"""Lists of tensors with the arithmetic of one, which rules are called on where launches are dear."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optx._errors import TransformError
from optx.ops import Several

Operand = Any  # a TensorList, a number, or one number or 0-dim tensor per tensor


class TensorList(Several):
    """A list of tensors with the arithmetic of one, by torch's ``_foreach`` functions where they exist.

    It is what a rule is called on where launches cost more than memory: one launch per operation serves
    all tensors of a group.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def _map(self, op: Callable[..., Tensor], *others: Operand) -> TensorList:
        columns = [o.tensors if isinstance(o, TensorList) else [o] * len(self.tensors) for o in others]
        kinds = {type(o) for o in (self, *others) if isinstance(o, TensorList)}
        kind = PerTensor if kinds == {PerTensor} else TensorList
        return kind(op(*row) for row in zip(self.tensors, *columns, strict=True))

    def _fast(self, name: str, op: Callable[..., Tensor], other: Operand) -> TensorList:
        if isinstance(self, PerTensor) or isinstance(other, PerTensor):
            return self._map(op, other)
        operand = other.tensors if isinstance(other, TensorList) else other
        return TensorList(getattr(torch, f"_foreach_{name}")(self.tensors, operand))

    def _unary(self, name: str) -> TensorList:
        return type(self)(getattr(torch, f"_foreach_{name}")(self.tensors))

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

    def __eq__(self, other: Operand) -> TensorList:  # type: ignore[override]
        return self._map(operator.eq, other)

    def __ne__(self, other: Operand) -> TensorList:  # type: ignore[override]
        return self._map(operator.ne, other)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Operand) -> TensorList:
        return self._map(operator.and_, other)

    def __or__(self, other: Operand) -> TensorList:
        return self._map(operator.or_, other)

    __rand__ = __and__
    __ror__ = __or__

    def __invert__(self) -> TensorList:
        return self._map(lambda a: ~a)

    def __rpow__(self, other: Operand) -> TensorList:
        return self._map(lambda a, b: b**a, other)

    def __bool__(self) -> bool:
        raise TransformError("a rule asks many elements for one answer; use optx.ops.where(condition, a, b).")

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


class PerTensor(TensorList):
    """One number per tensor of a `TensorList`, as 0-dim tensors."""
