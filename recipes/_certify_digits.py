"""The certify recipe's part "digits": handwriting read by networks of one Lipschitz constant.

A digit is certified at eps if no image within that distance (l2, pixels from 0 to 1) is read differently: its
margin, the largest logit minus the next, is above sqrt(2) L eps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import optx

from ._handwriting import batches, handwriting
from ._options import rate, strength
from ._report import COLOURS, Table, by_seed, ranged
from ._run import Run

ARMS = ["LDLT", "spectral norm", "orthogonal", "SLL blocks"]
ONCE = False
TITLE, AXES = "Digits certified, by distance", ("l2 distance", "share of held-out digits")
EPS = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
SIZES = (64, 64, 64, 10)
OPTIONS: dict[str, dict[str, Any]] = {
    "constant": {"type": rate, "default": 6.0, "help": "part digits: the Lipschitz constant of every arm"},
    "margin": {"type": strength, "default": 0.25, "help": "part digits: the distance that the loss asks for"},
    "lr": {"type": rate, "default": 2e-3, "help": "part digits: Adam's rate"},
}


class Times(nn.Module):
    """A fixed factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Block(nn.Module):
    """x + B relu(C x + b), which `optx.LDLT` makes SLL's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.enter(x).relu())


def network(arm: str, L: float) -> tuple[nn.Sequential, list[optx.LDLTHandle]]:
    """A network of this constant, and handles that can tell it."""
    if arm == "SLL blocks":
        model = nn.Sequential(Times(L), Block(SIZES[0]), Block(SIZES[0]), nn.Linear(SIZES[0], SIZES[-1]))
        blocks = [[f"{i}.enter", f"{i}.leave"] for i in (1, 2)]
        handles = [optx.attach(model, optx.LDLT(1.0, residual=True), targets) for targets in blocks]
        return model, [*handles, optx.attach(model, optx.LDLT(1.0), "3")]
    each = L ** (1 / (len(SIZES) - 1))
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(SIZES):
        linear = nn.Linear(before, after)
        if arm == "LDLT":
            layers += [linear, nn.ReLU()]
        else:
            layers += [spectral_norm(linear) if arm == "spectral norm" else orthogonal(linear), Times(each)]
            layers.append(nn.ReLU())
    model = nn.Sequential(*layers[:-1])
    if arm == "LDLT":
        return model, [optx.attach(model, optx.LDLT(L), ["0", "2", "4"])]  # all there is to it
    return model, []


def constant(model: nn.Sequential, handles: Sequence[optx.LDLTHandle]) -> float:
    """What can be said of the trained network: certificates, or the product of the norms that there are."""
    found = 1.0
    for handle in handles:
        certificate = handle.certificate()
        if not certificate.holds:
            raise SystemExit(f"certify: the certificate does not hold: {certificate}")
        found *= certificate.L
    for layer in model:
        if isinstance(layer, Times):
            found *= layer.factor
        elif isinstance(layer, nn.Linear) and not handles:
            found *= float(torch.linalg.svdvals(layer.weight.detach().double())[0])
    return found


def prepared(args: Any) -> tuple[Tensor, Tensor]:
    """All digits, flat."""
    x, y = handwriting()
    return x.flatten(1), y


def train(arm: str, seed: int, data: tuple[Tensor, Tensor], args: Any, run: Run) -> dict[str, Any] | None:
    """Held-out accuracy, clean (eps 0) and certified at each distance."""
    torch.manual_seed(seed)
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    learn, test = order[:1200], order[1200:]
    model, handles = network(arm, args.constant)
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    offset = math.sqrt(2.0) * args.constant * args.margin
    drawn = batches((data[0][learn], data[1][learn]), seed)
    for step in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        for group in opt.param_groups:
            group["lr"] = args.lr * (1.0 - step / args.steps)
        x, y = next(drawn)
        loss = F.cross_entropy(model(x) - offset * F.one_hot(y, SIZES[-1]), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    if run.interrupt.wanted:
        return None
    model.eval()
    L = constant(model, handles)
    with torch.no_grad():
        logits, y = model(data[0][test]), data[1][test]
    first, second = logits.topk(2).values.unbind(1)
    sure = (first - second) / (math.sqrt(2.0) * L)
    right = logits.argmax(1) == y
    return {"L": L, "certified": [float((right & (sure > eps)).float().mean()) for eps in EPS]}


# ---- what is told ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """A row an arm."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [
        (
            arm,
            ranged([log["L"] for log in arms[arm]], "{:.2f}"),
            *(_at(arms[arm], eps) for eps in (0.0, 0.25, 0.5)),
        )
        for arm in ARMS
        if arm in arms
    ]
    return [
        Table(
            ("network", "constant", "clean", "certified at 0.25", "at 0.5"),
            rows,
            f"Digits, {'-'.join(map(str, SIZES))}, {settings['steps']} steps, constant "
            f"{settings['constant']:g}",
            "Per cent of 597 held-out digits. Constant: of LDLT and SLL certified by LipSDP's matrix, of the "
            "others the product of the trained layers' norms (spectral norm's own estimate runs low).",
        )
    ]


def _at(logs: Sequence[dict[str, Any]], eps: float) -> str:
    return ranged([100 * log["certified"][EPS.index(eps)] for log in logs], "{:.1f}")


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Certified accuracy by distance, the mean over seeds."""
    arms = by_seed(results["arms"])
    for colour, arm in zip(COLOURS, ARMS, strict=False):
        if arm in arms:
            curves = [log["certified"] for log in arms[arm]]
            axes.plot(
                EPS, [sum(at) / len(at) for at in zip(*curves, strict=True)], "o-", color=colour, label=arm
            )
    axes.legend()
