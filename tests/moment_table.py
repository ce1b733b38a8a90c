"""A chain of `moment_rules` on one path beside the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fused_cases import draw
from moment_rules import parts
from reference import Acted
from torch import nn

import optx

SHAPES = [(5,), (), (0,), (3, 7)]
Make = Callable[[list[Any]], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "sgd nesterov maximize l2": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, maximize=True, weight_decay=0.1
    ),
    "adam l2 amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adam l2 maximize": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.05, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1),
}


class Table:
    """One chain, base, path and dtype of weights."""

    def __init__(
        self,
        chain: Sequence[type[optx.Transform]],
        base: str,
        fused: Any,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.transforms = [make() for make in chain]
        self.weights = [nn.Parameter(w) for w in draw(SHAPES, 3, dtype)]
        self.opt = optx.wrap(BASES[base](self.weights), *self.transforms, fused=fused, **options)
        wanted = {False: "foreach", "cpu": "fused cpu", "triton": "fused triton"}[fused]
        assert self.opt.plan()[0].path == wanted
        self.acted = Acted(self.weights, parts(self.transforms), BASES[base], dtype)
        self.tolerance = 1e-12 if dtype == torch.float64 else 2e-5

    def run(self, steps: int = 3) -> Table:
        """Some steps on random gradients."""
        for seed in range(steps):
            gradients = draw(SHAPES, 100 + seed, self.weights[0].dtype)
            for p, g in zip(self.weights, gradients, strict=True):
                p.grad = g.clone()
            self.opt.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(self.weights, gradients, strict=True))  # type: ignore[arg-type]
            self.acted.step(gradients)
        return self

    def check(self) -> None:
        """Weights, slots and cells are the reference's."""
        for t, p in enumerate(self.weights):
            self._near(f"weight {t}", p, self.acted.weights[t])
            for transform in self.transforms:
                for name, slot in transform.slots.items():
                    got = self.opt.slot(p, transform, name)
                    assert got.dtype == (slot.dtype or p.dtype)
                    where = self.acted.cells if slot.scalar else self.acted.slots
                    wanted = where[transform.name, name][t]
                    self._near(f"{transform.name}.{name} of {t}", got, wanted)

    def _near(self, what: str, got: torch.Tensor, wanted: Any) -> None:
        value = got.detach().double().flatten()
        target = torch.tensor(wanted, dtype=torch.float64).flatten()
        whole = not got.dtype.is_floating_point
        allowed = 0.0 if whole else self.tolerance * (1.0 + target.abs())
        off = (value - target).abs() - allowed
        assert not off.numel() or float(off.max()) <= 0.0, f"{what}: {value.tolist()} != {target.tolist()}"
