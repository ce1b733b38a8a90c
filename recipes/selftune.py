"""Self-tuning: dropout and augmentation tuned in one run, against the best of a grid.

A perceptron learns to read handwritten digits from 300 examples, so that regularisation matters: a dropout
rate and the strength of noise on its input. Self-tuning networks (Delta-STN) tune both in one run, from too
little of both and from too much. A grid of fixed values is the other way: with as many training steps in all
as the one run, with as much time in all, and with as many steps for each of its points, which costs as many
runs. All choose by the same 600 validation examples; the rest tests.

Source: STN, arXiv 1903.03088, and Delta-STN, arXiv 2010.13514.
"""

from __future__ import annotations

import itertools
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import optx

from . import _selftune_report
from ._handwriting import batches
from ._options import SEEDS, positive, rate
from ._run import Run, SettingsError, chosen, clock, device, parser, settings_of
from ._selftune_parts import Data, digits, losses, noisy

GRID = [*itertools.product((0.05, 0.3, 0.6), (0.05, 0.3, 0.6))]  # dropout, noise
STARTS = {"stn": (0.05, 0.05), "stn from above": (0.8, 0.8)}
ARMS = (*STARTS, "untuned", "grid of equal steps", "grid of equal time", "grid of whole runs")


def network(drop: float) -> nn.Sequential:
    """64-256-256-10 with dropout."""
    sizes = [nn.Linear(64, 256), nn.Linear(256, 256)]
    hidden = [module for layer in sizes for module in (layer, nn.ReLU(), nn.Dropout(drop))]
    return nn.Sequential(*hidden, nn.Linear(256, 10)).to(device())


def self_tuned(arm: str, seed: int, data: Data, args: Any, run: Run) -> dict[str, Any] | None:
    """One run that tunes itself; the lines that begin with stn are what it takes."""
    torch.manual_seed(seed)
    model, (drop, noise) = network(0.5), STARTS[arm]
    hparams = optx.HParams(drop=optx.hp(drop, (0, 0.9), sigma=1.0), noise=optx.hp(noise, (0, 1), sigma=1.0))
    stn = optx.attach(
        model,
        optx.STN(hparams, delta=True, dropout="drop", lr=args.hyper_lr, sigma_lr=0, warmup=50),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    train, valid = batches(data["train"], seed), batches(data["valid"], seed + 1, 200)
    start = clock()
    for _ in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        x, y = next(train)
        with stn.train_batch(x):
            loss = F.cross_entropy(model(noisy(x, hparams["noise"].value)), y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(stn.due):
            x, y = next(valid)
            with stn.valid_batch(x):
                F.cross_entropy(model(x), y).backward()
            stn.step_hparams()
        run.live(loss, handle=stn)
    seconds = clock() - start
    if run.interrupt.wanted:
        return None
    return {
        **losses(model, data),
        "seconds": seconds,
        "history": _selftune_report.thinned(stn.history),
        **hparams.values(),
    }


def fixed(
    drop: float, noise: float, seed: int, data: Data, args: Any, more: Callable[[int, float], bool]
) -> dict[str, Any]:
    """An ordinary run for as long as there is more to do."""
    torch.manual_seed(seed)
    model, train = network(drop), batches(data["train"], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    steps, start = 0, clock()
    while more(steps, time.perf_counter() - start):
        x, y = next(train)
        F.cross_entropy(model(noisy(x, noise)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return {**losses(model, data), "seconds": clock() - start, "steps": steps, "drop": drop, "noise": noise}


def grid(arm: str, seed: int, data: Data, args: Any, run: Run) -> dict[str, Any] | None:
    """The point of the grid that validates best, and what all of them took."""
    points = [STARTS["stn"]] if arm == "untuned" else GRID
    budget = args.steps // len(points) if arm == "grid of equal steps" else args.steps
    most: Callable[[int, float], bool] = lambda steps, _: steps < budget  # noqa: E731
    if arm == "grid of equal time":
        share = run.results["arms"][f"stn/{seed}"]["seconds"] / len(points)
        most = lambda _, seconds: seconds < share  # noqa: E731
    found = [
        fixed(*points[i], seed, data, args, most) for i in run.steps(f"{arm}, seed {seed}", 0, len(points))
    ]
    if run.interrupt.wanted:
        return None
    best = min(found, key=lambda one: one["valid"])
    return {**best, "seconds": sum(one["seconds"] for one in found), "grid": [one["valid"] for one in found]}


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "selftune",
        __doc__ or "",
        steps=1200,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        size={"type": positive, "default": 300, "help": "examples to train on, and twice as many validate"},
        lr={"type": rate, "default": 0.03, "help": "SGD's rate for weights, with momentum 0.9"},
        hyper_lr={"type": rate, "default": 0.02, "help": "Adam's rate for hyperparameters"},
        model={"help": "has no meaning here: the model is a small perceptron, trained from scratch"},
        data={"help": "has no meaning here: the data is scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("selftune brings its own model and data; --model and --data have no meaning here.")
    arms = chosen(args.arms, ARMS)
    if 3 * args.size >= 1797:
        raise SettingsError(f"--size {args.size}: of 1797 digits none would be left to test on; at most 598.")
    if "grid of equal time" in arms and "stn" not in arms:
        raise SettingsError("--arms: 'grid of equal time' takes the time of 'stn', so it needs that arm too.")
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        data = digits(seed, args.size)
        for arm in (one for one in ARMS if one in arms):
            work = self_tuned if arm in STARTS else grid
            run.part(f"{arm}/{seed}", work, arm, seed, data, args, run)
    _selftune_report.report(run)


if __name__ == "__main__":
    main()
