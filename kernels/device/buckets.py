"""Tensors for any step program, made from its description alone, and the steps over them."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optx.kernels.audit.kernels import Case
from optx.kernels.step.layout import EIGHT, FRESH, GROUP, STEP, Columns

# Numbers of a param group, by the last part of their names; others are a half.
_NUMBERS = {
    **{"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "momentum": 0.9},
    **{"dampening": 0.0, "advances": 1.0, "max_norm": 1.0},
}
_WHOLE = {"bool": 2, "uint8": 2, "int8": 9, "int16": 99, "int32": 99, "int64": 99}


class Bucket:
    """The tensors of a case in some sizes, the same in each place, and a runner pointed at them.

    Args:
        case: the program and its layout.
        sizes: of the tensors.
        device: where they are.
        runner: makes the runner from program, layout, sizes and numbers.
    """

    def __init__(self, case: Case, sizes: Sequence[int], device: str, runner: Callable[..., Any]) -> None:
        self.program, self.layout = case.program, case.layout
        columns = Columns.of(self.program, self.layout)
        if "bits" in self.layout.dtypes:
            sizes = [-(-n // 8) * 8 for n in sizes]  # others are kept as bools
        if columns.tiled:
            sizes = [n - n % _wide(n) for n in sizes]
        generator = torch.Generator().manual_seed(0)
        named = dict(zip(("w", "g", *self.program.slots), self.layout.dtypes, strict=False))
        named |= self.layout.beside(self.program.slots)
        self.tensors: list[dict[str, Tensor]] = []
        for n in sizes:
            made = {role: _values(role, named[role], n, generator) for role in columns.roles}
            made |= {cell: self._cell(cell, n, generator) for cell in columns.cells}
            self.tensors.append({name: t.to(device) for name, t in made.items()})
        shapes = list(map(_shape, sizes)) if columns.tiled else None
        self.runner = runner(self.program, self.layout, list(sizes), list(range(len(sizes))), shapes=shapes)
        for row, tensors in enumerate(self.tensors):
            names = (*columns.roles, *columns.cells)
            self.runner.tensors[row, : len(names)] = [tensors[name].data_ptr() for name in names]
        self.runner.hypers[: len(columns.hypers)] = [number(name) for name in columns.hypers]
        self.runner.cols[:, FRESH] = 0.0
        self.runner.cols[:, STEP] = 4.0
        self.runner.set_key(7)
        self.columns = columns

    def _cell(self, name: str, n: int, generator: torch.Generator) -> Tensor:
        if name == "step":
            return torch.full((), 3.0)
        dtype = self.program.cell_dtype(name, self.layout.dtypes[0])
        if axis := dict(self.program.vectors).get(name):
            return _values(name, dtype, _shape(n)[axis == "column"], generator)
        return torch.full((), 0.01 * n + 0.5, dtype=getattr(torch, dtype))

    def step(self) -> None:
        """A whole step; totals are those of this bucket."""
        runner = self.runner
        for level, what in enumerate(self.program.levels):
            runner.measure(level)
            if what.totals:
                at = self.columns.totals.index
                runner.receive({ref.name: runner.totals[at(ref.name)] for ref in what.totals})
            runner.finish(level)
        runner.update()
        runner.commit()

    def kept(self) -> list[tuple[str, Tensor]]:
        """What a step writes, by name; a weight's rest goes round where the weight's last bit does."""
        named = [(t, name) for t in self.tensors for name in t if name not in ("g", "rest")]
        return [(f"{name} of {t['w'].numel()}", t[name]) for t, name in named]


def _wide(n: int) -> int:
    """Columns of a matrix of about ``n`` elements: as many as whose accesses are aligned, if it is large."""
    wide = next((width for width in (4096, 48) if n >= 64 * width), 0)
    return wide or next((width for width in (7, 5, 3) if n and n % width == 0), max(n, 1))


def _shape(n: int) -> tuple[int, int]:
    return n // _wide(n), _wide(n)


def number(name: str) -> float:
    """A plausible value of a param group's number."""
    return _NUMBERS.get(name.rpartition(".")[2], 0.5)


def _values(role: str, dtype: str, n: int, generator: torch.Generator) -> Tensor:
    if dtype == "ones":
        return torch.ones(1, dtype=torch.bool)
    if dtype == "bits":
        return torch.randint(256, (-(-n // 8),), generator=generator, dtype=torch.uint8)
    if role in ("kahan", "rest"):  # what goes with a weight is nothing yet
        return torch.zeros(n, dtype=getattr(torch, dtype))
    if dtype in EIGHT:
        low, kind = (-127, torch.int8) if dtype == "signed8" else (0, torch.uint8)
        return torch.randint(low, 128, (n,), generator=generator).to(kind)
    if role.endswith(".scale"):
        return torch.full((-(-n // GROUP),), 0.125, dtype=torch.bfloat16)
    if dtype in _WHOLE:
        return torch.randint(_WHOLE[dtype], (n,), generator=generator).to(getattr(torch, dtype))
    kind: Any = getattr(torch, dtype)
    x = 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    # Second moments are squares, whatever they are called; nothing minds another slot without a sign.
    return (x if role in ("w", "g", "exp_avg", "momentum_buffer") else x.abs()).to(kind)
