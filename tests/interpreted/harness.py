"""One bucket of tensors, each inside a band of NaN, and a step runner pointed at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optx.kernels.step.layout import Layout
from optx.kernels.step.program import Program
from optx.step.bases import base_rules, init_base_state
from optx.step.group_numbers import base_numbers
from optx.step.pipeline import build
from optx.step.transform import Transform

BAND = 64  # elements on either side: a multiple of 16 bytes for every dtype
NEXT = 2.5  # the first element behind a tensor: of a NaN, what is written over it would be one too
NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
Base = Callable[[list[Tensor]], torch.optim.Optimizer]


class Banded:
    """Hands out tensors that lie between NaNs, and tells whether all around them is as it was."""

    def __init__(self, offsets: Sequence[int]) -> None:
        self.offsets = offsets  # elements by which tensors, in turn, miss their alignment
        self.buffers: list[tuple[Tensor, int, int]] = []

    def like(self, values: Tensor, number: int = 0) -> Tensor:
        """A copy of ``values``, which go with the tensor of that number, in a band."""
        low, n = BAND + self.offsets[number % len(self.offsets)], values.numel()
        buffer = torch.full((n + 2 * BAND,), float("nan"), dtype=values.dtype)
        buffer[low : low + n] = values.flatten()
        buffer[low + n] = NEXT
        self.buffers.append((buffer, low, low + n))
        return buffer[low : low + n]

    def intact(self) -> bool:
        """No write outside the tensors."""
        return all(
            bool(b[:low].isnan().all() and b[high] == NEXT and b[high + 1 :].isnan().all())
            for b, low, high in self.buffers
        )


@dataclass
class Setup:
    """What to compute, on what."""

    base: Base
    sizes: Sequence[int]
    transforms: Sequence[Transform] = ()
    w: torch.dtype = torch.float32
    g: torch.dtype | None = None
    moments: torch.dtype | None = None
    rounding: str = "nearest"
    offsets: Sequence[int] = (0,)
    seed: int = 0
    ids: Sequence[int] | None = None
    weights: Sequence[Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of TritonStep


class Bucket:
    """Weights, gradients and state of a setup, and the runner that steps them.

    Args:
        setup: what to compute, on what.
        runner: makes a `TritonStep` or `CpuStep` from (program, layout, numels, ids).
    """

    def __init__(self, setup: Setup, runner: Callable[..., Any]) -> None:
        self.setup = setup
        self.band = Banded(setup.offsets)
        generator = torch.Generator().manual_seed(setup.seed)
        values = setup.weights or [torch.randn(n, generator=generator) for n in setup.sizes]
        self.weights = [self.band.like(v.to(setup.w), t) for t, v in enumerate(values)]
        self.base = setup.base([torch.nn.Parameter(w) for w in self.weights])
        self.group = self.base.param_groups[0]
        self.rules = base_rules(self.base, self.group)
        assert self.rules is not None
        self.program = self._program()
        self.state = [self._state(w, t) for t, w in enumerate(self.weights)]
        zeros = [torch.zeros_like(w, dtype=setup.g or setup.w) for w in self.weights]
        self.grads = [self.band.like(g, t) for t, g in enumerate(zeros)]
        slots = [NAMES[self.state[0][name].dtype] for name in self.program.slots]
        dtypes = (NAMES[setup.w], NAMES[setup.g or setup.w], *slots)
        self.layout = Layout(dtypes, setup.rounding, self.rules.counts_tensors)
        ids = range(len(values)) if setup.ids is None else setup.ids
        self.runner = runner(self.program, self.layout, [v.numel() for v in values], ids)
        self.point()
        numbers = {k: float(v) for k, v in base_numbers(self.group).items()}
        for t in setup.transforms:
            numbers.update({f"{t.name}.{k}": float(v) for k, v in t.options.items()})
        numbers["optx.advances"] = 1.0
        columns = self.runner.columns
        self.runner.hypers[: len(columns.hypers)] = [numbers[n] for n in columns.hypers]
        self.runner.cols[:, columns.cols.index("fresh")] = 1.0
        self.steps = 0

    def _program(self) -> Program:
        base, group = self.base, self.group
        moments = {t.name: t.moments(group, base) for t in self.setup.transforms}
        assert self.rules is not None
        return build(self.setup.transforms, moments, self.rules, self.rules.elements, base_numbers(group))

    def _state(self, w: Tensor, number: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        assert self.rules is not None
        init_base_state(state, w, self.rules, self.group)
        for name in self.rules.elements:
            state[name] = state[name].to(self.setup.moments or w.dtype)
        for t in self.setup.transforms:
            for name, slot in t.slots.items():
                state[f"{t.name}.{name}"] = w.to(torch.float32) if name == "anchor" else slot.zeros(w)
        if self.setup.rounding == "kahan":
            state["kahan"] = torch.zeros_like(w)
        kept = {k: v for k, v in state.items() if isinstance(v, Tensor)}  # a plain count is `step`'s
        return {k: v if v.ndim == 0 else self.band.like(v, number) for k, v in kept.items()}

    def point(self) -> None:
        """Write the addresses into the runner's table."""
        names = (*self.runner.columns.roles[2:], *self.runner.columns.cells)
        for t, (w, g, state) in enumerate(zip(self.weights, self.grads, self.state, strict=True)):
            self.runner.tensors[t, :-1] = [x.data_ptr() for x in (w, g, *(state[n] for n in names))]

    def step(self, gradients: Sequence[Tensor], key: int | None = 0) -> None:
        """One step on these gradients."""
        for g, value in zip(self.grads, gradients, strict=True):
            g.copy_(value)
        if key is not None:
            self.runner.set_key(key)
        if self.rules is not None and not self.rules.counts_tensors:
            self.runner.cols[:, self.runner.columns.cols.index("step")] = self.steps + 1
        if not self.program.has_totals:
            self.runner.step()
        else:
            self._step_with_totals()
        self.runner.cols[:, self.runner.columns.cols.index("fresh")] = 0.0
        self.steps += 1

    def _step_with_totals(self) -> None:
        runner, columns = self.runner, self.runner.columns
        for level, what in enumerate(self.program.levels):
            runner.totals[:] = 0.0
            runner.measure(level)
            shares = {r.name: runner.totals[columns.totals.index(r.name)] for r in what.totals}
            if hasattr(runner, "receive"):
                runner.receive(shares)
            else:
                for name, share in shares.items():
                    runner.hypers[len(columns.hypers) + columns.totals.index(name)] = share
            runner.finish(level)
        runner.update()
        runner.commit()

    def gradients(self, scale: float = 1.0) -> list[Tensor]:
        """Gradients that depend on the seed and the number of the step only."""
        generator = torch.Generator().manual_seed(1000 * self.setup.seed + self.steps)
        return [scale * torch.randn(w.numel(), generator=generator) for w in self.weights]
