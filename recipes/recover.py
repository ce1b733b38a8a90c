"""Recovering a low-rank matrix from measurements of which many are grossly wrong: SubGM and others.

A positive semidefinite matrix of rank 2 in 20 dimensions is measured by random Gaussian matrices; 30 % of the
measurements are off by errors ten times their size. Nobody knows the rank: U has 20 columns. SubGM takes
sub-gradient steps of geometrically falling length on the mean absolute residual from a start near 0; beside
it the start's scale and the number of columns are varied, and steps that do not fall, least squares, Adam on
the same loss and SciPy's Huber regression take its place. Then clean data, with steps in proportion to the
loss, and Gaussian noise.

Source: Ma, Fattahi, "Global Convergence of Sub-gradient Method for Robust Matrix Recovery", arXiv 2202.08788.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import optx

from . import _recover_report
from ._options import SEEDS, positive, rate, share
from ._recover_parts import ARMS, Arm, Problem, by_huber, drawn, squares
from ._run import Run, chosen, parser, settings_of


def start(arm: Arm, problem: Problem, loss: optx.RobustRecoveryLoss) -> torch.nn.Parameter:
    """A small U along the measurements' own directions."""
    direction = loss.spectral(arm.rank)
    return torch.nn.Parameter(optx.scaling.small_init_(torch.empty_like(direction), arm.alpha, direction))


def recover(name: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """The relative error along the way; None if interrupted."""
    arm = ARMS[name]
    problem = drawn(arm.data, seed, args)
    loss = optx.RobustRecoveryLoss(problem.A, problem.y)
    U = start(arm, problem, loss)
    if arm.method == "huber":
        return {"step": [0, args.steps], "error": by_huber(problem, U, args.steps)}
    if arm.method == "subgm":
        optimizer: Any = optx.wrap(
            torch.optim.SGD([U], lr=1.0), optx.SubGM(arm.eta0, arm.rho, arm.mode, loss=loss)
        )
    else:
        kind = torch.optim.Adam if arm.method == "adam" else torch.optim.SGD
        optimizer = kind([U], lr=arm.eta0)
    schedule = CosineAnnealingLR(optimizer, args.steps) if arm.method == "adam" else None
    found: dict[str, Any] = {"step": [], "error": []}
    for step in run.steps(f"{name}, seed {seed}", 0, args.steps):
        value = squares(problem, U) if arm.method == "l2" else loss(U)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            found["step"].append(step + 1)
            found["error"].append(problem.error(U))
    return None if run.interrupt.wanted else found


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "recover",
        __doc__ or "",
        steps=400,
        seeds={"default": 5} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        size={"type": positive, "default": 20, "help": "rows of the matrix"},
        rank={"type": positive, "default": 2, "help": "of the matrix"},
        measurements={"type": positive, "default": 1000, "help": "how many"},
        share={"type": share, "default": 0.3, "help": "of the measurements that are outliers"},
        outlier={"type": rate, "default": 10.0, "help": "standard deviation of their errors"},
        every={"type": positive, "default": 10, "help": "steps between two measurements of the error"},
        model={"help": "has no meaning here: what is trained is a matrix"},
        data={"help": "has no meaning here: the measurements are drawn"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit(
            "recover draws its own data and has no model; --model and --data have no meaning here."
        )
    if args.rank > args.size:
        raise SystemExit(f"recover: --rank {args.rank} is above --size {args.size}.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        for name in arms:
            run.part(f"{name}/{seed}", recover, name, seed, args, run)
    _recover_report.report(run)


if __name__ == "__main__":
    main()
