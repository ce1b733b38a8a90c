"""Share: the weights of a network read from one short array, and how much the array's first size matters.

A perceptron learns to read handwritten digits. Its two hidden matrices are read from an array of 1, 0.1 or
0.02 numbers per weight, which begins small or large: STABLE-RPS (the fold with its gradient scaler), the fold
alone, HashedNet, ROAST. Beside it, at as many numbers in these matrices, are a narrower dense network and one
whose smallest first weights are pruned and stay 0.

Source: STABLE-RPS, arXiv 2310.11611.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import optx

from . import _share_report
from ._handwriting import batches, handwriting
from ._options import SEEDS, positive, rate
from ._run import Run, SettingsError, chosen, device, parser, settings_of
from ._selftune_parts import Data

SHARED = {
    "STABLE-RPS": ("fold", "v1"),
    "fold without scaler": ("fold", "none"),
    "HashedNet": ("hashed", "none"),
    "ROAST": ("roast", "none"),
}
ARMS = (*SHARED, "smaller dense", "pruned at the start", "dense")
COMPRESSIONS = (1.0, 0.1, 0.02)
SIZES = (0.001, 0.01, 0.1, 1.0)  # of the array at first
HIDDEN = ["0", "3"]


def digits(seed: int, size: int) -> Data:
    """scikit-learn's 1,797 digits of 8 x 8: so many to train on, the rest to test."""
    images, y = handwriting()
    x = images.flatten(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = ((x - x.mean()) / x.std())[order].to(device()), y[order].to(device())
    return {"train": (x[:size], y[:size]), "test": (x[size:], y[size:])}


def network(width: int = 128) -> nn.Sequential:
    """64-width-width-10 with LayerNorm and ReLU."""
    sizes = [nn.Linear(64, width), nn.Linear(width, width)]
    hidden = [module for layer in sizes for module in (layer, nn.LayerNorm(width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10)).to(device())


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """What all are trained with."""
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=lr, momentum=0.9)


def shared(arm: str, compression: float, size: float, seed: int, lr: float) -> tuple[nn.Module, Any]:
    """A network that reads its hidden matrices from an array; these lines are what it takes."""
    mapping, scaler = SHARED[arm]
    model = network()
    rps: Any = optx.StableRPS(compression, mapping=mapping, init_std=size, scaler=scaler, seed=seed)  # type: ignore[arg-type]
    handle = optx.attach(model, rps, targets=HIDDEN)
    return model, optx.wrap(sgd(model, lr), handle)


def other(arm: str, compression: float, lr: float) -> tuple[nn.Module, Any]:
    """A dense one: narrower, so that its hidden matrices have as many numbers, or pruned to as many."""
    if arm == "smaller dense":
        model = network(max(1, round(math.sqrt(32**2 + compression * (64 + 128) * 128) - 32)))
        return model, sgd(model, lr)
    model = network()
    if arm == "dense":
        return model, sgd(model, lr)
    masks = optx.prune(model, optx.Magnitude(1 - compression), targets=HIDDEN, progress=False)
    return model, optx.wrap(sgd(model, lr), optx.KeepMask(masks, model))


def trained(model: nn.Module, optimizer: Any, data: Data, seed: int, steps: int) -> float:
    """The share of test digits that it reads right in the end, in per cent."""
    train = batches(data["train"], seed)
    for _ in range(steps):
        x, y = next(train)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = data["test"]
    with torch.no_grad():
        return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def measure(arm: str, seed: int, data: Data, args: Any, run: Run) -> dict[str, Any] | None:
    """Accuracy by compression and by the array's first size; the others have no such size."""
    tries = [(c, size) for c in COMPRESSIONS for size in (SIZES if arm in SHARED else SIZES[:1])]
    tries = [(c, size) for c, size in tries if arm != "pruned at the start" or c < 1]
    tries = tries[:1] if arm == "dense" else tries
    found: dict[str, dict[str, float]] = {}
    for i in run.steps(f"{arm}, seed {seed}", 0, len(tries)):
        c, size = tries[i]
        torch.manual_seed(seed)
        model, optimizer = shared(arm, c, size, seed, args.lr) if arm in SHARED else other(arm, c, args.lr)
        found.setdefault(str(c), {})[str(size)] = trained(model, optimizer, data, seed, args.steps)
    return None if run.interrupt.wanted else {"accuracy": found}


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "share",
        __doc__ or "",
        steps=500,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        size={"type": positive, "default": 1437, "help": "examples to train on; the others test"},
        lr={"type": rate, "default": 0.05, "help": "SGD's rate, with momentum 0.9"},
        model={"help": "has no meaning here: the model is a small perceptron, trained from scratch"},
        data={"help": "has no meaning here: the data is scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("share brings its own model and data; --model and --data have no meaning here.")
    if args.size >= 1797:
        raise SettingsError(f"--size {args.size}: of 1797 digits none is left to test on.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        data = digits(seed, args.size)
        for arm in (one for one in ARMS if one in arms):
            run.part(f"{arm}/{seed}", measure, arm, seed, data, args, run)
    _share_report.report(run)


if __name__ == "__main__":
    main()
