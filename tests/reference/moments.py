"""The table in the documentation of `optx.Moments`, acted out number by number in Python's floats.

Slow and plain: a loop over transforms, tensors and elements for each moment, and a dictionary lookup for each
argument. The base's own step is torch's, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Numbers = list[float]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class Part:
    """One transform: functions of Python numbers by moment, with the names of arguments and results.

    Args:
        name: of the transform.
        rules: by moment.
        slots: dtypes of what it keeps per element; None for the weight's.
        cells: dtypes of what it keeps per tensor.
        first: what a slot or cell starts with, where that is not 0.
        options: its numbers.
        totals: what is added over all tensors, before the base's step ("") and after it ("after_").
        counters: those of the cells that count steps.
    """

    name: str
    rules: Mapping[str, tuple[Callable[..., Any], Sequence[str], Sequence[str]]]
    slots: Mapping[str, torch.dtype | None] = field(default_factory=dict[str, Any])
    cells: Mapping[str, torch.dtype] = field(default_factory=dict[str, Any])
    first: Mapping[str, float] = field(default_factory=dict[str, float])
    options: Mapping[str, float] = field(default_factory=dict[str, float])
    totals: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Any])
    counters: Sequence[str] = ()


def kept(value: Any, dtype: torch.dtype | None) -> float:
    """What a later rule of the same step reads of what was written."""
    if dtype == torch.bool:
        return 1.0 if value != 0 else 0.0
    return float(int(value)) if dtype in INTEGERS else float(value)


def stored(value: float, dtype: torch.dtype | None) -> float:
    """What the next step reads."""
    value = kept(value, dtype)
    low = dtype in (torch.float16, torch.bfloat16)
    return float(torch.tensor(value, dtype=torch.float64).to(dtype)) if low else value


class Acted:
    """A wrapped optimizer as the table has it.

    Args:
        weights: flat; copied.
        parts: the transforms, in order.
        base: makes the optimizer for some parameters.
        dtype: of the weights; what is stored in float32 is kept in float64 here.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        parts: Sequence[Part],
        base: Callable[[list[Any]], torch.optim.Optimizer],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parts, self.dtype = parts, dtype
        self.weights: list[Numbers] = [w.flatten().tolist() for w in weights]
        self.parameters = [torch.nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in self.weights]
        self.base = base(self.parameters)
        self.slots: dict[tuple[str, str], list[Numbers]] = {}
        self.cells: dict[tuple[str, str], Numbers] = {}
        for part in parts:
            for name, kind in part.slots.items():
                start = stored(part.first.get(name, 0.0), kind)
                self.slots[part.name, name] = [[start] * len(w) for w in self.weights]
            for name, kind in part.cells.items():
                self.cells[part.name, name] = [stored(part.first.get(name, 0.0), kind)] * len(weights)
        self.steps = 0

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step."""
        self.w0 = [list(w) for w in self.weights]
        self.w = [list(w) for w in self.weights]
        self.g: list[Numbers] = [g.flatten().tolist() for g in gradients]
        self.made: dict[tuple[str, str], Numbers] = {}  # sums, scalars, totals, squares of the gradient
        self.news: dict[tuple[str, str], Numbers] = {}  # cells that scalars wrote
        for part in self.parts:
            self._measure(part)
            self._elements(part, "gradient")
        for part in self.parts:
            self._elements(part, "weight")
        self._run_base()
        for part in self.parts:
            self._sum(part, "after_sums", self.made)
            self._numbers(part, "after_")
            self._elements(part, "after")
        self._store()
        for part in self.parts:
            self._observe(part)
        self.cells.update(self.news)
        self.steps += 1

    # ---- moments -----------------------------------------------------------------------------------

    def _measure(self, part: Part) -> None:
        self._sum(part, "sums", self.made)
        squares = [sum(x * x for x in g) for g in self.g]
        self.made[part.name, "grad_sq"] = squares
        for name in part.counters:
            self.news[part.name, name] = [count + 1.0 for count in self.cells[part.name, name]]
        self._numbers(part, "")

    def _numbers(self, part: Part, when: str) -> None:
        tensors = range(len(self.weights))
        self._per_tensor(part, f"{when}scalars")
        for name in part.totals.get(when, ()):
            column = [self._number(part, name, t) for t in tensors]
            self.made[part.name, f"total_{name}"] = [sum(column)] * len(tensors)
        self._per_tensor(part, f"{when}finish")

    def _sum(self, part: Part, moment: str, into: dict[tuple[str, str], Numbers]) -> None:
        if moment not in part.rules:
            return
        function, reads, writes = part.rules[moment]
        columns: list[Numbers] = [[0.0] * len(self.weights) for _ in writes]
        for t, w in enumerate(self.weights):
            for i in range(len(w)):
                results = _several(function(*(self._element(part, n, t, i) for n in reads)), writes)
                for column, result in zip(columns, results, strict=True):
                    column[t] += float(result)
        for name, column in zip(writes, columns, strict=True):
            into[part.name, name] = column

    def _per_tensor(self, part: Part, moment: str) -> None:
        if moment not in part.rules:
            return
        function, reads, writes = part.rules[moment]
        columns: dict[str, Numbers] = {name: [] for name in writes}
        for t in range(len(self.weights)):
            results = _several(function(*(self._number(part, n, t) for n in reads)), writes)
            for name, result in zip(writes, results, strict=True):
                columns[name].append(float(result))
        for name, column in columns.items():
            if name in part.cells:
                self.news[part.name, name] = [kept(x, part.cells[name]) for x in column]
            elif name != "grad_sq":  # a promise to later transforms, which take the sum themselves here
                self.made[part.name, name] = column

    def _elements(self, part: Part, moment: str) -> None:
        if moment not in part.rules:
            return
        function, reads, writes = part.rules[moment]
        for t, w in enumerate(self.weights):
            for i in range(len(w)):
                results = _several(function(*(self._element(part, n, t, i) for n in reads)), writes)
                for name, result in zip(writes, results, strict=True):
                    if name in part.slots:
                        self.slots[part.name, name][t][i] = kept(result, part.slots[name])
                    else:
                        {"w": self.w, "g": self.g}[name][t][i] = float(result)

    def _run_base(self) -> None:
        for p, w, g in zip(self.parameters, self.w, self.g, strict=True):
            p.data = torch.tensor(w, dtype=torch.float64)
            p.grad = torch.tensor(g, dtype=torch.float64)
        self.base.step()
        self.w = [p.tolist() for p in self.parameters]

    def _store(self) -> None:
        self.w = [[stored(x, self.dtype) for x in w] for w in self.w]
        self.weights = [list(w) for w in self.w]
        for part in self.parts:
            for name, dtype in part.slots.items():
                rows = self.slots[part.name, name]
                rows[:] = [[stored(x, dtype or self.dtype) for x in row] for row in rows]

    def _observe(self, part: Part) -> None:
        sums: dict[tuple[str, str], Numbers] = {}
        self._sum(part, "observe", sums)
        for (owner, name), column in sums.items():
            self.news[owner, name] = [stored(x, part.cells[name]) for x in column]

    # ---- names -------------------------------------------------------------------------------------

    def _element(self, part: Part, name: str, t: int, i: int) -> float:
        if name in ("w", "g", "w0"):
            return {"w": self.w, "g": self.g, "w0": self.w0}[name][t][i]
        if name in part.slots:
            return self.slots[part.name, name][t][i]
        state = self.base.state.get(self.parameters[t], {})
        if name.startswith(("exp_avg", "max_exp", "momentum_")):
            return float(state[name][i]) if name in state else 0.0
        return self._number(part, name, t)

    def _number(self, part: Part, name: str, t: int) -> float:
        if (part.name, name) in self.made:
            return self.made[part.name, name][t]
        if name in part.cells:
            return self.news.get((part.name, name), self.cells[part.name, name])[t]
        if name in part.options:
            return part.options[name]
        if name == "numel":
            return float(len(self.weights[t]))
        if name == "step":
            return self.steps + 1.0
        group = self.base.param_groups[0]
        return float(group["betas"][int(name[-1]) - 1] if name.startswith("beta") else group[name])


def _several(results: Any, writes: Sequence[str]) -> Sequence[Any]:
    return results if len(writes) > 1 else (results,)
