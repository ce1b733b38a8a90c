"""The explain recipe's part "halves": two networks glued into one by rotations, and found again.

Each reads the upper or the lower half of a digit of its own, and says which of five pairs of digits it is (0
or 1, 2 or 3, ...). The glued network has every layer's activations rotated at random, so that each neuron has
something of both. A feature belongs to the half that has more of it; a group of features is pure if they all
belong to one half.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from . import _handwriting
from ._explain_cuts import KINDS
from ._options import positive
from ._report import COLOURS, Table, by_seed, ranged
from ._run import Run

PAIRS = (1500, 24000)  # of digits that are looked at: halves correlate by chance, the less the more there are
ARMS = [f"halves, {kind}, {n} pairs" for kind in KINDS for n in PAIRS]
ONCE = False
TITLE, AXES = "Glued halves", ("", "share, %")
GLUED = ("0", "3", "5")  # inputs, hidden layer and outputs, each rotated
OPTIONS: dict[str, dict[str, Any]] = {
    "half_steps": {"type": positive, "default": 600, "help": "part halves: steps of each half"},
}


class Glued(NamedTuple):
    """The glued network, its inputs, the rotation of each layer, and accuracy of both halves in percent."""

    model: nn.Module
    inputs: Tensor
    rotations: dict[str, Tensor]
    accuracy: tuple[float, float]


def prepared(args: Any) -> dict[int, Glued]:
    """The networks by seed: none yet."""
    return {}


def glued(seed: int, known: dict[int, Glued], args: Any, run: Run) -> Glued | None:
    """Both halves, trained and glued; None if interrupted."""
    if seed in known:
        return known[seed]
    x, y = _handwriting.handwriting()
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draws)
    x, y = x.flatten(1)[order], y[order] // 2
    torch.manual_seed(seed)
    halves = [nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)) for _ in range(2)]
    reached: list[float] = []
    for i, half in enumerate(halves):
        opt = torch.optim.Adam(half.parameters(), lr=3e-3)
        seen = x[:, 32 * i : 32 * (i + 1)]
        data = _handwriting.batches((seen[360:], y[360:]), seed)
        for _ in run.steps(f"half {i + 1}, seed {seed}", 0, args.half_steps):
            images, labels = next(data)
            loss = F.cross_entropy(half(images), labels)
            opt.zero_grad()
            loss.backward()
            opt.step()
        if run.interrupt.wanted:
            return None
        with torch.no_grad():
            reached.append(100 * float((half(seen[:360]).argmax(1) == y[:360]).float().mean()))
    rows = [torch.randint(360, len(x), (max(PAIRS),), generator=draws) for _ in range(2)]
    inputs = torch.cat([x[rows[0], :32], x[rows[1], 32:]], 1)
    model, rotations = glue(*halves, draws)
    known[seed] = Glued(model, inputs, rotations, (reached[0], reached[1]))
    return known[seed]


@torch.no_grad()
def glue(a: nn.Sequential, b: nn.Sequential, draws: torch.Generator) -> tuple[nn.Module, dict[str, Tensor]]:
    """One network that computes both, with activations rotated at its inputs, hidden layer and outputs."""
    Q = [torch.linalg.qr(torch.randn(n, n, generator=draws))[0] for n in (64, 32, 10)]
    model = nn.Sequential(
        nn.Linear(64, 64, bias=False),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 32, bias=False),
        nn.Linear(32, 10),
        nn.Linear(10, 10, bias=False),
    )
    for at, rotation in zip((0, 3, 5), Q, strict=True):
        model[at].weight.copy_(rotation)
    for at, layer, before in ((1, 0, Q[0]), (4, 2, Q[1])):
        both = torch.block_diag(a[layer].weight, b[layer].weight)
        model[at].weight.copy_(both @ before.T)
        model[at].bias.copy_(torch.cat([a[layer].bias, b[layer].bias]))
    return model, dict(zip(GLUED, Q, strict=True))


def train(arm: str, seed: int, known: dict[int, Glued], args: Any, run: Run) -> dict[str, Any] | None:
    """How well groups of edges find the halves; None if interrupted."""
    if (one := glued(seed, known, args, run)) is None:
        return None
    _, kind, pairs = arm.split(", ")
    inputs = one.inputs[: int(pairs.split()[0])]
    ib = optx.analysis.interaction_basis(one.model, inputs.split(256), list(GLUED), KINDS[kind])
    edges = ib.edges(args.nodes)
    shares = {layer: upper_share(one.rotations[layer], ib[layer].C) for layer in GLUED}
    free, two = ib.modularity(edges), ib.modularity(edges, clusters=2)
    every = torch.cat([*shares.values()])
    return {
        "accuracy": list(one.accuracy),
        "features": len(every),
        "of one half": 100 * float(torch.maximum(every, 1 - every).mean()),
        "Q": free.Q,
        "groups": free.number,
        "purity": purity(shares, free.clusters),
        "purity of two": purity(shares, two.clusters),
    }


def upper_share(rotation: Tensor, C: Tensor) -> Tensor:
    """Of each feature's direction, the share that lies in the first half."""
    energy = (rotation.T.double() @ C).square()
    return energy[: len(energy) // 2].sum(0) / energy.sum(0)


def purity(shares: dict[str, Tensor], clusters: Any) -> float:
    """The share of features that belong to the half that most of their group do, in percent."""
    upper = torch.cat([shares[layer] > 0.5 for layer in shares])
    groups = torch.cat([clusters[layer] for layer in shares])
    upper, groups = upper[groups >= 0], groups[groups >= 0]
    sizes = [(int(upper[groups == g].sum()), int((groups == g).sum())) for g in groups.unique()]
    return 100 * sum(max(first, size - first) for first, size in sizes) / len(groups)


# ---- what is told ---------------------------------------------------------------------------------------

_COLUMNS = {
    "features": ("features", "{:.0f}"),
    "of one half, %": ("of one half", "{:.1f}"),
    "groups": ("groups", "{:.0f}"),
    "modularity": ("Q", "{:.2f}"),
    "purity, %": ("purity", "{:.1f}"),
    "purity of two, %": ("purity of two", "{:.1f}"),
}


def tables(results: dict[str, Any]) -> list[Table]:
    """A row for each basis."""
    there = by_seed(results["arms"])
    arms = [arm for arm in ARMS if arm in there]
    rows = [
        (
            arm.partition(", ")[2],
            *(ranged([one[key] for one in there[arm]], form) for key, form in _COLUMNS.values()),
        )
        for arm in arms
    ]
    reached = [value for one in there[arms[0]] for value in one["accuracy"]]
    return [
        Table(
            ("basis", *_COLUMNS),
            rows,
            "Two networks 32-16-5, glued by rotations",
            "Of one half: how much of a feature's direction lies in one half, the mean over features; 50 to "
            "100. Groups: that Louvain's method finds in the edges of all layers, and their modularity. "
            "Purity: the share of features that are of the same half as most of their group; of two: merged "
            f"greedily into two groups. Halves are right on {ranged(reached, '{:.1f}')} % of other digits.",
        )
    ]


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Purity and how much of one half features are, the means over seeds."""
    there = by_seed(results["arms"])
    arms = [arm for arm in ARMS if arm in there]
    for i, key in enumerate(("of one half", "purity of two")):
        found = [sum(one[key] for one in there[arm]) / len(there[arm]) for arm in arms]
        axes.bar(
            [at + 0.3 * (i - 0.5) for at in range(len(arms))], found, width=0.28, color=COLOURS[i], label=key
        )
    names = [arm.partition(", ")[2].replace(" ", "\n", 1).replace(", ", "\n") for arm in arms]
    axes.set_xticks(range(len(arms)), names, fontsize=7)
    axes.set_ylim(50, 112)
    axes.legend(frameon=False, fontsize=7)
