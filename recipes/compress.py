"""Weights that take fewer bits: BackSlash in training, then DeepShape, RF8 and three ways to count.

A perceptron reads scikit-learn's digits, and a small transformer learns Shakespeare's characters from
scratch: by Adam alone (kappa 0), and under BackSlash of several strengths for the first three quarters of the
steps. What counts is bits a weight, once weights are rounded to multiples of 2^-8, beside what is left of
accuracy (digits) or loss (characters) after that rounding. Each trained model is then moved to fewer bits by
DeepShape and trained on for a little, and, apart from that, rounded to RF8's eight bits.

Keywords: compression, bits per weight, rate-distortion, quantisation.

Source: BackSlash, arXiv 2504.16968; arXiv 2506.00486.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import optx

from . import _compress_report
from ._compress_parts import TASKS, Task, counted, deepshaped, rf8
from ._options import SEEDS, positive, rate, share, strength
from ._run import Run, chosen, parser, settings_of

ARMS = tuple(TASKS)


def train(task: Task, model: nn.Module, kappa: float, args: Namespace, run: Run, label: str) -> list[float]:
    """The model trained in place; the shape that its weights had, on the way."""
    adam = torch.optim.Adam(model.parameters(), lr=args.lr)
    optimizer = optx.wrap(adam, optx.BackSlash(kappa, until=args.until, total_steps=args.steps))
    every, shapes = max(1, args.steps // 40), []
    for step in run.steps(label, 0, args.steps):
        loss = task.loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.live(loss, optimizer)
        if kappa and step % every == 0:
            shapes.append(optimizer.metrics()["backslash/shape"])
    return shapes


def work(arm: str, seed: int, args: Namespace, run: Run) -> dict[str, Any] | None:
    """All strengths, from the same first weights and with the same batches; None if interrupted."""
    task, found = TASKS[arm](seed, args), dict[str, Any]()
    for kappa in args.kappa:
        torch.manual_seed(seed)
        model = task.model()
        shapes = train(task, model, kappa, args, run, f"{arm}, kappa {kappa:g}, seed {seed}")
        if run.interrupt.wanted:
            return None
        found[f"{kappa:g}"] = {
            "trained": {"shapes": shapes, **counted(task, model, args.step)},
            "deepshape": deepshaped(task, model, args),
            "rf8": rf8(task, model),
        }
    return found


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "compress",
        __doc__ or "",
        steps=920,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        kappa={"type": strength, "nargs": "+", "default": [0.0, 5.0, 20.0, 60.0], "help": "of BackSlash"},
        until={"type": share, "default": 0.75, "help": "share of the steps that BackSlash acts in"},
        step={"type": rate, "default": 2**-8, "help": "what weights are rounded to multiples of"},
        tune={"type": positive, "default": 46, "help": "steps after DeepShape, at a tenth of the rate"},
        lr={"type": rate, "default": 1e-3, "help": "Adam's learning rate"},
        batch={"type": positive, "default": 64, "help": "digits a step"},
        sequences={"type": positive, "default": 8, "help": "sequences of characters a step"},
        length={"type": positive, "default": 64, "help": "characters a sequence"},
        model={"help": "has no meaning here: both models are small, and trained from scratch"},
        data={"help": "text file or folder for the characters (default: Shakespeare's works)"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run both tasks with all seeds, and report."""
    args = options().parse_args(argv)
    if args.model:
        raise SystemExit("compress brings its own models; --model has no meaning here.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in arms:
            run.part(f"{arm}/{seed}", work, arm, seed, args, run)
    _compress_report.report(run)


if __name__ == "__main__":
    main()
