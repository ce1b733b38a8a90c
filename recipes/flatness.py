"""Flat minima: SAF and MESA against SGD, AdamW and SAM, on digits of which 40 % have a random label.

A network that fits wrong labels has left what it said before, in steep steps. SAM looks for flat minima by a
second pass of each step; SAF keeps the outputs of each sample near those of three epochs before, from a
table, and MESA near those of a running average of the weights. All at equal steps, and again in the time that
SGD takes; and SGD at the few steps that SAM then has, as ending early is a cure for wrong labels by itself.

Setting: the papers' tau, lookback and start epoch; lambda 0.3 (and 1) for SAF, 0.8 for MESA, whose beta is
    0.98, about six of these epochs; SAM from pytorch_optimizer, with its rho, 0.05; AdamW at a 50th of SGD's
    rate.

Source: "Sharpness-Aware Training for Free", arXiv 2205.14083.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optx

from . import _flatness_report
from ._flatness_parts import TRAIN, accuracy, in_turn, network, noisy_digits, sharpness
from ._options import SEEDS, positive, rate, share, whole
from ._run import Run, SettingsError, chosen, parser, settings_of

KINDS = ("sgd", "adamw", "saf", "saf 1.0", "mesa", "sam")
ARMS = (*KINDS, *(f"{kind} of equal time" for kind in ("saf", "mesa", "sam")), "sgd of sam's steps")


class Loop:
    """One arm's step: the same forward pass, loss, backward pass and SGD, and what the arm adds."""

    def __init__(self, kind: str, model: nn.Module, lr: float, start_epoch: int = 5) -> None:
        self.model, self.saf, self.mesa, self.sam = model, None, None, None
        options: dict[str, Any] = {"lr": lr, "momentum": 0.9, "weight_decay": 5e-4}
        self.optimizer = torch.optim.SGD(model.parameters(), **options)
        if kind.startswith("saf"):
            weight = float(kind.partition(" ")[2] or 0.3)
            self.saf = optx.SAF(TRAIN, weight=weight, start_epoch=start_epoch)
        elif kind == "mesa":
            self.mesa = optx.MESA(model, beta=0.98, dtype=torch.bfloat16, start_epoch=start_epoch)
        elif kind == "adamw":
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr / 50, weight_decay=0.05)
        elif kind == "sam":
            from pytorch_optimizer import SAM

            self.sam = SAM(model.parameters(), torch.optim.SGD, rho=0.05, foreach=True, **options)
            self.optimizer = self.sam.base_optimizer

    def set_epoch(self, epoch: int) -> None:
        """Tell who needs to know."""
        for loss in filter(None, (self.saf, self.mesa)):
            loss.set_epoch(epoch)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        if self.saf:
            loss = loss + self.saf(logits, index)
        if self.mesa:
            loss = loss + self.mesa(logits, x)
        loss.backward()
        if self.sam:
            self.sam.step(lambda: self.again(x, y))
        else:
            self.optimizer.step()

    def again(self, x: Tensor, y: Tensor) -> Tensor:
        """SAM's second pass."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    @property
    def nbytes(self) -> int:
        """What the loss of an arm holds from step to step."""
        held = self.saf or self.mesa
        return held.nbytes if held else 0


def train(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """One training run; None if interrupted."""
    kind, _, equal = arm.partition(" of ")
    slower = run.results["step"][kind if equal == "equal time" else "sam"] if equal else 1.0
    steps = round(args.steps / slower)
    x, y, x_test, y_test = noisy_digits(seed, args.wrong)
    torch.manual_seed(seed)
    loop = Loop(kind, network(args.width), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, steps)
    loader = DataLoader(optx.with_index(TensorDataset(x, y)), args.batch, shuffle=True)
    curve: list[float] = []
    batches = iter(())
    for step in run.steps(f"{arm}, seed {seed}", 0, steps):
        if step % len(loader) == 0:
            loop.set_epoch(step // len(loader))
            batches = iter(loader)
            curve.append(accuracy(loop.model, x_test, y_test))
        loop.step(*next(batches))
        schedule.step()
    if run.interrupt.wanted:
        return None
    eigenvalue, rise = sharpness(loop.model, x, y)
    return {
        "steps": steps,
        "test": accuracy(loop.model, x_test, y_test),
        "train": accuracy(loop.model, x, y),
        "eigenvalue": eigenvalue,
        "rise": rise,
        "bytes": loop.nbytes,
        "curve": curve,
    }


def seconds(args: Any) -> dict[str, float]:
    """A step's time by kind, as a ratio to SGD's, all losses on and steps in turn."""
    x, y, _, _ = noisy_digits(args.seed, args.wrong)
    loops: dict[str, Loop] = {}
    for kind in KINDS:
        torch.manual_seed(args.seed)
        if kind != "saf 1.0":
            loops[kind] = Loop(kind, network(args.width), args.lr, start_epoch=2)
    ratios = in_turn(loops, x, y, args.batch, args.rounds)
    return {**ratios, "saf 1.0": ratios["saf"]}


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "flatness",
        __doc__ or "",
        steps=280,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        width={"type": positive, "default": 48, "help": "channels of the first convolutions"},
        wrong={"type": share, "default": 0.4, "help": "share of the training labels that are drawn"},
        lr={"type": rate, "default": 0.1, "help": "learning rate, AdamW's a 50th, down to 0 by a cosine"},
        batch={"type": whole(2, TRAIN), "default": 125, "help": "digits a step"},
        rounds={"type": positive, "default": 100, "help": "steps of each kind that are timed"},
        model={"help": "has no meaning here: the model is a small convolutional network"},
        data={"help": "has no meaning here: the data is scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SettingsError("flatness brings its own model and data; --model and --data mean nothing here.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    if "step" not in run.results:
        run.results["step"] = seconds(args)
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in arms:
            run.part(f"{arm}/{seed}", train, arm, seed, args, run)
    _flatness_report.report(run)


if __name__ == "__main__":
    main()
