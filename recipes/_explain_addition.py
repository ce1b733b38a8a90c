"""The explain recipe's part "addition": a + b mod p by a network that has grokked it, cut to directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import optx

from . import _explain_cuts
from ._explain_cuts import KINDS, Trained
from ._options import positive, rate, whole
from ._report import Table
from ._run import Run
from .grokking import pairs

ARMS = [f"addition, {kind}" for kind in KINDS]
ONCE = False
TITLE, AXES = "Addition mod p", ("directions kept", "accuracy, %")
OPTIONS: dict[str, dict[str, Any]] = {
    "addition_steps": {"type": positive, "default": 600, "help": "part addition: epochs of all pairs"},
    "addition_lr": {"type": rate, "default": 0.01, "help": "part addition: its rate"},
    "p": {"type": whole(2), "default": 59, "help": "part addition: the modulus"},
    "width": {"type": positive, "default": 128, "help": "part addition: of the hidden layers"},
}


def prepared(args: Any) -> dict[int, Trained]:
    """The networks by seed: none yet."""
    return {}


def trained(seed: int, known: dict[int, Trained], args: Any, run: Run) -> Trained | None:
    """The network of this seed, trained on 40 % of all pairs; None if interrupted."""
    if seed in known:
        return known[seed]
    x, y, x_test, y_test = pairs(args.p, 0.4, seed)
    torch.manual_seed(seed)
    model = _explain_cuts.network((2 * args.p, args.width, args.width, args.p), bias=False).to(x.device)
    adamw = torch.optim.AdamW(
        model.parameters(), lr=args.addition_lr, betas=(0.9, 0.99), eps=1e-25, weight_decay=0
    )
    opt = optx.wrap(adamw, optx.PerpGrad())
    for _ in run.steps(f"addition, seed {seed}", 0, args.addition_steps):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    if run.interrupt.wanted:
        return None
    known[seed] = Trained(model, torch.cat([x, x_test]), (x_test, y_test))
    return known[seed]


def train(arm: str, seed: int, known: dict[int, Trained], args: Any, run: Run) -> dict[str, Any] | None:
    """What one basis tells of a seed's network; None if interrupted."""
    if (one := trained(seed, known, args, run)) is None:
        return None
    return _explain_cuts.measure(one, arm.partition(", ")[2], args.nodes)


def tables(results: dict[str, Any]) -> list[Table]:
    """Directions and edges."""
    settings = results["settings"]
    title = f"Addition mod {settings['p']}, {settings['addition_steps']} epochs"
    return [_explain_cuts.table(ARMS, results, title)]


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Accuracy by directions."""
    _explain_cuts.draw(axes, ARMS, results, 50)
