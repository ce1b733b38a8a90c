"""The certify recipe's part "depth": what LipSDP proves of networks as they were trained, by depth.

Digits of 4 x 4 pixels, so that semidefinite programs take seconds. Between the product of the layers' norms,
which nothing is needed for, and the steepest pair that a search finds, LipSDP's bound
(`optx.analysis.lipschitz`) says how much of the product is the bound's own looseness.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx

from ._handwriting import handwriting
from ._options import positive
from ._report import COLOURS, Table, by_seed, ranged
from ._run import Run, clock

ARMS = ["ReLU", "MaxMin"]
ONCE = False
TITLE, AXES = "LipSDP's bound of trained networks", ("hidden layers", "share of the product of norms")
INPUTS = 16
ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "MaxMin": optx.MaxMin}
OPTIONS: dict[str, dict[str, Any]] = {
    "depths": {"type": positive, "default": 4, "help": "part depth: hidden layers, from 1 to this"},
    "width": {"type": positive, "default": 16, "help": "part depth: of hidden layers, even"},
    "depth_epochs": {"type": positive, "default": 60, "help": "part depth: passes over 1,200 digits"},
}


def network(arm: str, depth: int, width: int) -> nn.Sequential:
    """Hidden layers of one width."""
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Linear(width if k else INPUTS, width), ACTIVATIONS[arm]()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def prepared(args: Any) -> tuple[Tensor, Tensor]:
    """All digits, halved in size, flat."""
    x, y = handwriting()
    return F.avg_pool2d(x, 2).flatten(1), y


def train(arm: str, seed: int, data: tuple[Tensor, Tensor], args: Any, run: Run) -> dict[str, Any] | None:
    """Bounds, the steepest pair found, accuracy and seconds, by depth."""
    found: dict[str, Any] = {name: [] for name in ("bound", "product", "lower", "accuracy", "seconds")}
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    learn, test = order[:1200], order[1200:]
    for i in run.steps(f"{arm}, seed {seed}", 0, args.depths):
        torch.manual_seed(1000 * seed + i)
        model = network(arm, i + 1, args.width)
        opt = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(args.depth_epochs):
            for index in learn[torch.randperm(len(learn))].split(32):
                opt.zero_grad()
                F.cross_entropy(model(data[0][index]), data[1][index]).backward()
                opt.step()
        start = clock()
        told = optx.analysis.lipschitz(model, norm="l2")  # all there is to it
        found["seconds"].append(clock() - start)
        if not told.certified:
            raise SystemExit(f"certify: the bound is not certified: {told}")
        found["bound"].append(told.bound)
        found["product"].append(told.product_bound)
        found["lower"].append(told.lower_bound)
        with torch.no_grad():
            right = model(data[0][test]).argmax(1) == data[1][test]
        found["accuracy"].append(float(right.float().mean()))
    return None if run.interrupt.wanted else found


# ---- what is told ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for each activation and depth."""
    settings, arms = results["settings"], by_seed(results["arms"])
    rows = [
        (
            arm,
            str(k + 1),
            ranged([100 * log["accuracy"][k] for log in arms[arm]], "{:.1f}"),
            ranged([log["product"][k] for log in arms[arm]], "{:.1f}"),
            ranged([log["bound"][k] / log["product"][k] for log in arms[arm]], "{:.2f}"),
            ranged([log["bound"][k] / log["lower"][k] for log in arms[arm]], "{:.2f}"),
        )
        for arm in ARMS
        if arm in arms
        for k in range(len(arms[arm][0]["bound"]))
    ]
    return [
        Table(
            (
                "activation",
                "hidden layers",
                "accuracy, %",
                "product of norms",
                "bound / product",
                "bound / found",
            ),
            rows,
            f"LipSDP by depth: {INPUTS} inputs, hidden layers of {settings['width']}, "
            f"{settings['depth_epochs']} epochs",
            "Layers: hidden ones. Bound: certified; networks are trained without it. Found: by a search.",
        )
    ]


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Bound and steepest pair as shares of the product, means over seeds."""
    arms = by_seed(results["arms"])
    for colour, arm in zip(COLOURS, ARMS, strict=False):
        logs = arms.get(arm, [])
        for name, style in (("bound", "o-"), ("lower", "x--")) if logs else ():
            shares = [[a / b for a, b in zip(log[name], log["product"], strict=True)] for log in logs]
            means = [sum(at) / len(at) for at in zip(*shares, strict=True)]
            label = f"{arm}, {'certified' if name == 'bound' else 'found'}"
            axes.plot(range(1, len(means) + 1), means, style, color=colour, label=label)
    axes.set_ylim(0)
    axes.legend()
