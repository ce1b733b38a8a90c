"""The explain recipe's part "digits": handwriting by a network 64-48-48-10, cut to fewer directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import optx

from . import _explain_cuts, _handwriting
from ._explain_cuts import KINDS, Trained
from ._options import whole
from ._report import Table, by_seed, ranged
from ._run import Run

CUTS = [f"digits, {kind}" for kind in KINDS]
FREE = "digits, free weights"
ARMS = [*CUTS, FREE]
ONCE = False
TITLE, AXES = "Digits", ("directions kept", "accuracy, %")
TEST = 360
OPTIONS: dict[str, dict[str, Any]] = {
    "nodes": {"type": whole(0), "default": 0, "help": "of the integral in edges; 0: gradients as they are"},
}


def prepared(args: Any) -> dict[int, Trained]:
    """The networks by seed: none yet."""
    return {}


def trained(seed: int, known: dict[int, Trained], args: Any, run: Run) -> Trained | None:
    """The network of this seed; None if interrupted."""
    if seed in known:
        return known[seed]
    x, y = _handwriting.handwriting()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x.flatten(1)[order], y[order]
    torch.manual_seed(seed)
    model = _explain_cuts.network((64, 48, 48, 10))
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    draws = _handwriting.batches((x[TEST:], y[TEST:]), seed)
    for _ in run.steps(f"digits, seed {seed}", 0, args.steps):
        images, labels = next(draws)
        loss = F.cross_entropy(model(images), labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
    if run.interrupt.wanted:
        return None
    known[seed] = Trained(model, x[TEST:], (x[:TEST], y[:TEST]))
    return known[seed]


def train(arm: str, seed: int, known: dict[int, Trained], args: Any, run: Run) -> dict[str, Any] | None:
    """What one basis tells of a seed's network; None if interrupted."""
    if (one := trained(seed, known, args, run)) is None:
        return None
    if arm == FREE:
        found = optx.analysis.degeneracy(one.model, one.inputs.split(256))
        return {
            path: {
                "weights": layer.outputs * layer.inputs,
                "rank_gram": layer.rank_gram,
                "rank_jacobian": layer.rank_jacobian,
                "free": layer.free,
                "dead": layer.dead,
                "blocks": list(layer.blocks),
            }
            for path, layer in found.items()
        }
    return _explain_cuts.measure(one, arm.partition(", ")[2], args.nodes)


# ---- what is told ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """Directions and edges, and free weights."""
    there = by_seed(results["arms"])
    found: list[Table] = []
    if any(arm in there for arm in CUTS):
        title = f"Digits, {results['settings']['steps']} steps"
        found.append(_explain_cuts.table(CUTS, results, title))
    if FREE in there:
        found.append(_free(there[FREE]))
    return found


def _free(logs: list[dict[str, Any]]) -> Table:
    rows: list[tuple[str, ...]] = []
    for path, name in zip(logs[0], ("first", "second", "output"), strict=True):
        each = [one[path] for one in logs]
        cells = [
            ranged([one[key] for one in each], "{:.0f}") for key in ("weights", "rank_gram", "rank_jacobian")
        ]
        share = ranged([100 * one["free"] / one["weights"] for one in each], "{:.1f}")
        dead = "-" if name == "output" else ranged([one["dead"] for one in each], "{:.0f}")
        blocks = "-" if name == "output" else ranged([len(one["blocks"]) for one in each], "{:.0f}")
        rows.append((name, *cells, share, dead, blocks))
    return Table(
        ("linear layer", "weights", "r_G", "r_K", "free, %", "dead ReLUs", "blocks"),
        rows,
        "Digits: weights that are free",
        "Weights, with biases. r_G, r_K: independent inputs, and outputs by their influence. Free: weights "
        "less r_G r_K. Blocks: groups of ReLUs that are on for the same digits.",
    )


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Accuracy by directions."""
    _explain_cuts.draw(axes, CUTS, results, 30)
