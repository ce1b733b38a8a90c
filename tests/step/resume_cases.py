"""The runs of test_resume.py; ``resume_cases.py FOLDER PATH WHICH`` is the process in which they go on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import optx

HALF, WHOLE = 5, 10
FILES = ("torch", "safetensors")

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
}
TRANSFORMS: dict[str, Callable[[nn.Module], list[optx.Transform]]] = {
    "perp": lambda _: [optx.PerpGrad()],
    "l2": lambda _: [optx.AdamR(weight=0.05)],
    "l1": lambda _: [optx.AdamR(weight=0.01, norm="l1")],
    "plain": lambda _: [optx.AdamR(weight=0.5, normalize=False)],
    "hft": lambda m: [optx.HFT(m, rounds_every=4, seed=3)],
    "all": lambda m: [optx.PerpGrad(), optx.AdamR(weight=0.05), optx.HFT(m, rounds_every=4, seed=3)],
}
DTYPES = {"fp32": torch.float32, "bf16-stochastic": torch.bfloat16, "bf16-kahan": torch.bfloat16}
# Each pair of these is a kernel of its own to compile; with AdamW in float32 all are.
KERNELS = {
    "fp32": ("SGD:perp", "SGD:plain", "SGD:hft", "Adam:l2", "Adam:all", "amsgrad:all"),
    "bf16-stochastic": ("AdamW:all", "SGD:perp"),
    "bf16-kahan": ("AdamW:all", "SGD:plain"),
}
# On the foreach path, bases with every transform; the others with all at once, or what they can have.
FOREACH_BASES = {"fp32": ("AdamW", "NAdam"), "bf16-stochastic": ("AdamW",), "bf16-kahan": ()}
FOREACH_ALL = {
    "fp32": ("SGD:perp", "SGD:plain", "SGD:hft", "Adam:all", "amsgrad:all", "RAdam:all"),
    "bf16-stochastic": ("SGD:perp", "NAdam:all"),
    "bf16-kahan": (),  # it rounds stochastically then
}
# Of all cases, those of ordinary runs of the tests: each transform, base and way to round is in one of them.
FEW = {
    "fused": ("AdamW-l2-fp32", "AdamW-all-bf16-stochastic", "SGD-plain-bf16-kahan", "amsgrad-all-fp32"),
    "foreach": (
        *("AdamW-l2-fp32", "AdamW-l1-fp32", "AdamW-all-fp32", "SGD-plain-fp32", "SGD-hft-fp32"),
        *("Adam-all-fp32", "NAdam-all-fp32", "RAdam-all-fp32", "NAdam-all-bf16-stochastic"),
    ),
}


@dataclass(frozen=True)
class Case:
    """One run: which base and transforms, on which path."""

    base: str
    transforms: str
    dtype: str
    fused: bool

    def __str__(self) -> str:
        return f"{self.base}-{self.transforms}-{self.dtype}-{self.path}"

    @property
    def path(self) -> str:
        """How its steps run."""
        return "fused" if self.fused else "foreach"

    def model(self, seed: int = 0) -> Net:
        """The model, by seed."""
        torch.manual_seed(seed)
        return Net().to(DTYPES[self.dtype])

    def wrap(self, model: nn.Module) -> optx.Wrapped:
        """The optimizer of this run."""
        # What is not fused rounds as its base does; there a rounding that is asked for is refused.
        rounding: Any = (self.dtype.partition("-")[2] if self.fused else "") or None
        base, transforms = BASES[self.base](model.parameters()), TRANSFORMS[self.transforms](model)
        return optx.wrap(base, *transforms, fused=self.fused, rounding=rounding)


class Net(nn.Module):
    """Residual blocks (HFT looks for them), a norm, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + 0.3 * block(x)
        return self.head(self.norm(x)) * self.scale


def cases(path: str, which: str) -> list[Case]:
    """Those of a path, all or a few."""
    mine = [case for case in every_case() if case.path == path]
    return [case for case in mine if which == "all" or str(case).removesuffix(f"-{path}") in FEW[path]]


def every_case() -> Iterator[Case]:
    """Every transform on each path in float32, every base with some, and a part of them in bfloat16."""
    for dtype in DTYPES:
        for base in BASES:
            for name in TRANSFORMS:
                if base == "SGD" and name in ("l2", "l1", "all"):
                    continue  # SGD has no second moment to normalise with
                pair = f"{base}:{name}"
                if base in FOREACH_BASES[dtype] or pair in FOREACH_ALL[dtype]:
                    yield Case(base, name, dtype, fused=False)
                if pair in KERNELS[dtype] or (base, dtype) == ("AdamW", "fp32"):
                    yield Case(base, name, dtype, fused=True)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    """An ordinary loop; a step's batch depends on its number."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 5, generator=g), torch.randint(3, (16,), generator=g)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y).backward()
        opt.step()


def start(case: Case, folder: Path) -> dict[str, Any]:
    """The uninterrupted run's end; and files of the same run, stopped half-way, in ``folder``."""
    model = case.model()
    opt = case.wrap(model)
    train(model, opt, range(HALF))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, folder / f"{case}.pt")
    optx.save_optimizer(opt, folder / f"{case}.safetensors")
    whole = case.model()
    opt = case.wrap(whole)
    train(whole, opt, range(WHOLE))
    return {"model": whole.state_dict(), "opt": opt.state_dict()}


def resume(case: Case, kind: str, folder: Path) -> dict[str, Any]:
    """Go on from a file, as a script that starts anew does."""
    saved = torch.load(folder / f"{case}.pt", weights_only=True)
    model = case.model(seed=7)
    if kind == "torch":  # wrapped around the resumed weights: they must not become anchors
        model.load_state_dict(saved["model"])
        opt = case.wrap(model)
        opt.load_state_dict(saved["opt"])
    else:
        opt = case.wrap(model)
        optx.load_optimizer(opt, folder / f"{case}.safetensors")
        model.load_state_dict(saved["model"])
    train(model, opt, range(HALF, WHOLE))
    return {"model": model.state_dict(), "opt": opt.state_dict()}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "AdamR: param group", UserWarning)  # some bases decay weights too
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    mine = cases(*sys.argv[2:])
    ends = {f"{case}:{kind}": resume(case, kind, here) for case in mine for kind in FILES}
    torch.save(ends, here / "ends.pt")
