"""Bases, transforms and dtypes that the step paths are tested on, and how far each may be off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from reference import Reference, spacing
from torch import Tensor

import optx

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# 0-dim, empty, one element, odd, and a tensor of two chunks (65536 each), whose sums go by float32 lanes.
SHAPES: list[tuple[int, ...]] = [(3, 5), (), (0,), (1,), (257,), (33, 2111)]


@dataclass(frozen=True)
class BaseCase:
    """One of torch's optimizers, and what the reference calls it."""

    make: Callable[..., torch.optim.Optimizer]
    kind: str
    numbers: dict[str, Any]


def _sgd(**numbers: Any) -> BaseCase:
    return BaseCase(torch.optim.SGD, "sgd", {"lr": 0.1, **numbers})


def _adam(**numbers: Any) -> BaseCase:
    return BaseCase(torch.optim.Adam, "adam", {"lr": 0.01, **numbers})


def _adamw(**numbers: Any) -> BaseCase:
    return BaseCase(torch.optim.AdamW, "adamw", {"lr": 0.01, "weight_decay": 0.1, **numbers})


BASES = {
    "sgd": _sgd(),
    "sgd momentum dampening": _sgd(momentum=0.9, dampening=0.2, weight_decay=0.01),
    "sgd nesterov maximize": _sgd(momentum=0.9, nesterov=True, weight_decay=0.01, maximize=True),
    "adam": _adam(),
    "adam l2": _adam(weight_decay=0.1),
    "adam l2 amsgrad": _adam(weight_decay=0.1, amsgrad=True, betas=(0.8, 0.99)),
    "adamw": _adamw(),
    "adamw amsgrad maximize": _adamw(amsgrad=True, maximize=True, betas=(0.8, 0.95), eps=1e-6),
}
L2 = {"weight": 0.05, "norm": "l2"}


@dataclass(frozen=True)
class Chain:
    """What is wrapped around the base, as the reference's arguments."""

    perp: bool | None = None
    adamr: dict[str, Any] | None = None

    def build(self, anchors: Sequence[Tensor]) -> list[optx.Transform]:
        transforms: list[optx.Transform] = [] if self.perp is None else [optx.PerpGrad(self.perp)]
        if self.adamr is not None:
            transforms.append(optx.AdamR(anchor={str(i): a for i, a in enumerate(anchors)}, **self.adamr))
        return transforms


CHAINS = {
    "none": Chain(),
    "perp": Chain(perp=True),
    "perp as in the paper": Chain(perp=False),
    "adamr": Chain(adamr=L2),
    "adamr l1": Chain(adamr={**L2, "norm": "l1"}),
    "adamr plain": Chain(adamr={**L2, "normalize": False}),
    "perp adamr": Chain(True, L2),
    "perp adamr plain": Chain(True, {**L2, "normalize": False}),
}


@dataclass(frozen=True)
class Case:
    """A composition, on tensors of some dtypes, on one path."""

    base: str = "adamw"
    chain: str = "perp adamr"
    weights: torch.dtype = F32
    grads: torch.dtype = F32
    rounding: str = "nearest"
    fused: Any = True

    def on(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in (self.weights, self.grads)]
        path = "fused" if self.fused else "foreach"
        return f"{path}, {self.chain}, {self.base}, {'/'.join(names)} {self.rounding}"


def draw(shapes: Sequence[tuple[int, ...]] | None, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, the same for the same seed in every dtype."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=F64).to(dtype) for shape in shapes or ()]


@dataclass
class Steps:
    """A wrapped optimizer and its reference, side by side."""

    case: Case
    shapes: Sequence[tuple[int, ...]] | None = None
    groups: int = 1
    numbers: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shapes is None:
            self.shapes = SHAPES if self.case.fused else [*SHAPES[:-1], (33, 211)]
        base, chain = BASES[self.case.base], CHAINS[self.case.chain]
        numbers = {**base.numbers, **self.numbers}
        self.params = [torch.nn.Parameter(w) for w in draw(self.shapes, self.seed, self.case.weights)]
        for p in self.params:
            p.grad_dtype = self.case.grads
        anchors = draw(self.shapes, self.seed + 1, self.case.weights)
        named = [(str(i), p) for i, p in enumerate(self.params)]
        members = [named[k :: self.groups] for k in range(self.groups)]
        split = [{"params": m} for m in members if m]
        inner = base.make(split, **numbers)
        self.opt = optx.wrap(inner, *chain.build(anchors), fused=self.case.fused, rounding=self.case.rounding)
        self.reference = Reference(self.params, base.kind, numbers, chain.perp, chain.adamr, anchors)
        self.count = 0

    def step(self, missing: Sequence[int] = (), scale: float = 1.0) -> None:
        """One step on random gradients; the reference starts from where the optimizer stands."""
        self.count += 1
        grads = draw(self.shapes, 1000 * (self.seed + 1) + self.count, self.case.grads)
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            p.grad = None if i in missing else g * scale
        self.reference.load(self.opt, self.params)
        self.opt.step()
        self.reference.step([p.grad for p in self.params])

    def check(self) -> None:
        """Weights and base state are where the reference is, within the tolerances below."""
        r = self.reference
        for i, p in enumerate(self.params):
            state = self.opt.state.get(p, {})
            value = p.detach().double() + state.get("optx.kahan", torch.zeros_like(p)).double()
            write = self._write(r.weights[i], p.dtype) + self._scale_error(i) + self._moved_error(i)
            self._near(f"weight {i}", value, r.weights[i], write, r.reach[i])
            for name, wanted in r.states[i].items():
                if name == "step":
                    assert float(state["step"]) == wanted
                    continue
                write = 0.0 if p.dtype in (F32, F64) else spacing(wanted, p.dtype)
                if p.dtype == F16:
                    write = write / 2
                reach = r.state_reach[i][name]
                write = write + self._decayed_error(i, name, reach)
                self._near(f"{name} {i}", state[name].double(), wanted, write, reach)

    def _near(self, what: str, actual: Tensor, wanted: Tensor, write: Any, reach: Tensor) -> None:
        rounding = ROUNDINGS[what.split()[0]] * EPS.get(self.case.weights, EPS[F32]) * reach
        over = (actual - wanted).abs() - (rounding + write)
        assert not over.numel() or float(over.max()) <= 0.0, (
            f"{what}: off by {float((actual - wanted).abs().max()):.3g}, {float(over.max()):.3g} too much"
        )

    def _scale_error(self, i: int) -> Any:
        """With amsgrad, AdamR's r is known to 1e-5 only: ``1 - beta2`` in its sums is one of float32s."""
        adamr, r = CHAINS[self.case.chain].adamr, self.reference
        if "amsgrad" not in self.case.base or adamr is None or not adamr.get("normalize", True):
            return 0.0
        rate = r.numbers[i]["lr"] * adamr["weight"] / r.scale
        # An L1 pull is as long wherever the weight is.
        return 1e-5 * rate * (1.0 if adamr["norm"] == "l1" else r.reach[i] + r.anchors[i].abs())

    def _decayed(self, i: int) -> Any:
        """What r's error makes of the gradient: an L2 decay takes the weight as AdamR has left it."""
        n = self.reference.numbers[i]
        return 0.0 if n["decoupled"] else n.get("weight_decay", 0.0) * self._scale_error(i)

    def _decayed_error(self, i: int, name: str, reach: Tensor) -> Any:
        """The same of a moment."""
        beta1, beta2 = self.reference.numbers[i].get("betas", (0.9, 0.999))
        gradient = self._decayed(i)
        return (1 - beta1) * gradient if name == "exp_avg" else 2 * gradient * ((1 - beta2) * reach).sqrt()

    def _moved_error(self, i: int) -> Any:
        """The same of Adam's move: lr m / sqrt(v), of which m and v are each off by it."""
        n, state = self.reference.numbers[i], self.reference.states[i]
        largest = state.get("max_exp_avg_sq")
        if largest is None:
            return 0.0  # r is exact without amsgrad
        v_hat = largest / (1 - n["betas"][1] ** state["step"])
        return 3 * n["lr"] * self._decayed(i) / (v_hat.sqrt() + n.get("eps", 1e-8))

    def _write(self, wanted: Tensor, dtype: torch.dtype) -> Any:
        """What storing the weight may add."""
        if dtype in (F32, F64):
            return 0.0
        ulp = spacing(wanted, dtype)
        if dtype == F16 or self.case.rounding == "nearest":
            return ulp / 2 * 1.001  # the rounding happens after the arithmetic's own error
        # The compensation is at most half an ulp of the weight, and itself rounded to 8 bits.
        return ulp if self.case.rounding == "stochastic" else ulp * 2**-10


# In epsilons (2^-23) of the sum of magnitudes that a step adds up (Reference.reach).
# Measured over the tables: 2.4 for weights (3.01 on drawn examples), 2.2 for first moments and momentum, 4.4
# for second moments (they square a projected gradient).
# In float64 the sums (70,000 terms, in the same precision) add theirs: measured 5, 15 and 29.
EPS = {F32: 2.0**-23, F64: 8 * 2.0**-52}
ROUNDINGS = {"weight": 4.0, "momentum_buffer": 3.0, "exp_avg": 3.0, "exp_avg_sq": 6.0, "max_exp_avg_sq": 6.0}
