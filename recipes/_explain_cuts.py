"""What the explain recipe's parts "digits" and "addition" measure: a network cut to fewer directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import optx

from ._report import COLOURS, Table, band, by_seed, ranged

KINDS: dict[str, Any] = {"interaction basis": "local", "principal components": "pca"}
LAYERS = ("1", "3", "4")  # both hidden layers after their ReLU, and the output
HIDDEN = {"1": "first", "3": "second"}
SLACK, STRONG = 0.5, 0.01  # of accuracy, in points; of the largest edge


class Trained(NamedTuple):
    """A network, the inputs that its bases are of, and others with what they are."""

    model: nn.Module
    inputs: Tensor
    test: tuple[Tensor, Tensor]


def network(sizes: Sequence[int], bias: bool = True) -> nn.Sequential:
    """Three linear layers with ReLUs between them."""
    a, b, c = (nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes))
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """In percent."""
    return 100 * float((model(test[0]).argmax(1) == test[1]).float().mean())


def measure(known: Trained, kind: str, nodes: int) -> dict[str, Any]:
    """By hidden layer, accuracy with its first 0, 1, ... directions; and the edges that are strong."""
    model, batches = known.model, known.inputs.split(256)
    ib = optx.analysis.interaction_basis(model, batches, list(LAYERS), KINDS[kind])
    found: dict[str, Any] = {"full": accuracy(model, known.test)}
    for layer, name in HIDDEN.items():
        curve: list[float] = []
        for keep in range(ib[layer].dim + 1):
            with optx.attach(model, ib.project(layer, keep)):
                curve.append(accuracy(model, known.test))
        # From there on it stays within the slack, whatever is added.
        short = [keep for keep, value in enumerate(curve) if value < found["full"] - SLACK]
        found[name] = {"dim": ib[layer].dim, "curve": curve, "needed": short[-1] + 1 if short else 0}
    edges = ib.edges(nodes)
    found["edges"] = [int((STRONG * E.max() < E).sum()) for E in edges.values()]
    return found


def rows(arms: Iterable[str], results: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each basis."""
    there = by_seed(results["arms"])
    made: list[tuple[str, ...]] = []
    for arm in (arm for arm in arms if arm in there):
        logs = there[arm]
        cells = [
            ranged([one[layer][what] for one in logs], "{:.0f}")
            for layer in HIDDEN.values()
            for what in ("dim", "needed")
        ]
        edges = [ranged([one["edges"][i] for one in logs], "{:.0f}") for i in (0, 1)]
        made.append((arm.partition(", ")[2], *cells, *edges))
    return made


def table(arms: Iterable[str], results: dict[str, Any], title: str) -> Table:
    """Directions there are and are needed, and edges."""
    there = by_seed(results["arms"])
    arms = [arm for arm in arms if arm in there]
    full = ranged([one["full"] for one in there[arms[0]]], "{:.1f}")
    sizes = ("first: dim", "first: needed", "second: dim", "second: needed")
    return Table(
        ("basis", *sizes, "edges first-second", "edges second-output"),
        rows(arms, results),
        title,
        f"First, second: the hidden layers. Dim: directions in the basis. Needed: how many, from the largest "
        f"Lambda, keep accuracy on what was not trained on within {SLACK} points of the whole network's "
        f"{full} %, the rest at their means. Edges: to the next layer's features, above "
        f"{100 * STRONG:.0f} % of the largest.",
    )


def draw(axes: Any, arms: Iterable[str], results: dict[str, Any], most: int) -> None:
    """Accuracy by how many directions of each hidden layer are kept, over those of all seeds."""
    there = by_seed(results["arms"])
    styles = dict(zip(HIDDEN.values(), ("-", ":"), strict=True))
    for colour, arm in zip(COLOURS, arms, strict=False):
        for layer, style in styles.items() if arm in there else ():
            curves = [one[layer]["curve"] for one in there[arm]]
            # With all directions kept, more change nothing.
            curves = [[*curve, *curve[-1:] * most][: most + 1] for curve in curves]
            name = f"{arm.partition(', ')[2]}, {layer} layer"
            band(axes, range(most + 1), curves, colour, name, style)
    axes.legend(frameon=False, fontsize=7)
