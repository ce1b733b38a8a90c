"""Numbers per row and column of some weights, on torch tensors: see `per_row` for what these are.

Of a weight that is spread over a mesh, every process has all of its rows' and columns' numbers, completed
over the mesh however it is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._names import replicated, whole
from optx.kernels.step.program import Call, Ref
from optx.kernels.step.tiles import matrix


class Along:
    """Those of one step.

    Args:
        weights: whose.
        wide: the dtype of sums and of rules per row.
        math: for each weight, the dtype of rules per element.

    Attributes:
        found: what was computed, weight by weight, in the dtype of rules per element.
    """

    def __init__(self, weights: Sequence[Tensor], wide: torch.dtype, math: Sequence[torch.dtype]) -> None:
        self._weights, self._wide, self._math = weights, wide, math
        self._shapes = [w.shape for w in weights]
        self.found: dict[Ref, list[Tensor]] = {}

    def keep(self, refs: Sequence[Ref], i: int, values: Sequence[Tensor]) -> None:
        """Sum values per element of the ``i``-th weight over its rows or columns."""
        shape = matrix(self._shapes[i])
        for ref, value in zip(refs, values, strict=True):
            over = value.reshape(shape).sum(1 if ref.kind == "row" else 0, dtype=self._wide)
            self._put(ref, i, whole(over))

    def _put(self, ref: Ref, i: int, value: Tensor) -> None:
        self.found.setdefault(ref, [value] * len(self._shapes))[i] = value.to(self._math[i])

    def beside(self, ref: Ref) -> list[Tensor]:
        """Numbers as rules per element read them: of each weight's dimensions."""
        shaped = (self._shaped(ref, i) for i in range(len(self._shapes)))
        return [replicated(one, w) for one, w in zip(shaped, self._weights, strict=True)]

    def _shaped(self, ref: Ref, i: int) -> Tensor:
        one, shape = self.found[ref][i], self._shapes[i]
        if len(shape) < 2:
            return one.reshape(()) if ref.kind == "row" else one.reshape(shape)
        return one.reshape(-1, *[1] * (len(shape) - 1)) if ref.kind == "row" else one.reshape(1, *shape[1:])

    def run(
        self, call: Call, numbers: Mapping[Ref, Any], state: Mapping[str, Sequence[Tensor]]
    ) -> dict[Ref, list[Tensor]]:
        """A rule per row or column; what it writes as numbers of the weights.

        Args:
            call: the rule.
            numbers: of the weights, each one for all or a tensor of one for each.
            state: by name, what is kept per row or column.
        """
        sums: dict[Ref, list[Tensor]] = {}
        for i, shape in enumerate(self._shapes):
            arguments: list[Any] = []
            for ref in call.args:
                if ref in numbers:
                    value: Any = numbers[ref]
                    value = value[i] if ref.kind in ("col", "cell") else value
                else:
                    value = (self.found[ref] if ref in self.found else state[ref.name])[i].to(self._wide)
                arguments.append(value)
            length = matrix(shape)[call.axis == "column"]
            device = next((a.device for a in arguments if isinstance(a, Tensor) and a.ndim), None)
            for ref, value in zip(call.writes, applied(call, arguments), strict=True):
                full = torch.as_tensor(value, dtype=self._wide, device=device).expand(length)
                if ref.kind == "col":
                    sums.setdefault(ref, []).append(full.sum())
                else:
                    self._put(ref, i, full)
        return sums


def applied(call: Call, arguments: Sequence[Any]) -> Sequence[Any]:
    """A rule's results. Python raises where a tensor or a kernel has inf or nan: ``1.0 / limit`` with 0."""
    try:
        return call.rule.values(*arguments)
    except ArithmeticError:
        numbers = (
            torch.tensor(a, dtype=torch.float64) if isinstance(a, int | float) else a for a in arguments
        )
        return call.rule.values(*numbers)
