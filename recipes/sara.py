"""Train the smallest weights: digits read upright first, then turned, by a fifth of the network's numbers.

A perceptron that reads upright digits (scikit-learn's, 8 x 8) learns to read them turned. The arms train all
weights; the smallest fifth, of which those that are no longer small leave half-way (SaRA); as many entries
chosen blindly; and a LoRA of as many numbers. Each has every learning rate, and takes that which reads
kept-back turned digits best. What counts is how turned digits are read, and how much of the upright ones is
kept. Before that: what setting the smallest weights to 0 costs.

Source: SaRA, arXiv 2409.06633.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import optx

from . import _sara_report
from ._options import SEEDS, positive, rate, share
from ._run import Run, chosen, clock, median_ms, parser, settings_of, state_bytes
from ._sara_parts import Blind, accuracy, load, pretrained, step, zeroed

ARMS = ("adamw", "sara", "blind", "lora")


def prepared(arm: str, model: nn.Module, lr: float, args: Any) -> torch.optim.Optimizer:
    """The arm's optimizer; LoRA's has about as many numbers as the selections."""
    if arm == "lora":
        numbers = args.fraction * sum(p.numel() for p in model.parameters())
        rank = max(1, round(numbers / (64 + 3 * 256)))
        handle = optx.attach(model, optx.LoRA(rank=rank, alpha=rank), targets=["0", "2"])
        optx.trainable_only(model, handle)
        return torch.optim.AdamW(handle.parameters(), lr=lr)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if arm == "sara":
        half = args.steps // 2 or 1
        return optx.wrap(optimizer, optx.SaRA(fraction=args.fraction, reselect_at=half, compact=True))
    return optx.wrap(optimizer, Blind(fraction=args.fraction, compact=True)) if arm == "blind" else optimizer


def train(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """By learning rate, how both views are read on the way; None if interrupted."""
    views = load(seed, args.angle)
    base = pretrained(seed, views)
    found: dict[str, Any] = {
        "rates": {},
        "before": {v: accuracy(base, views[f"test {v}"]) for v in ("old", "new")},
    }
    for n in run.steps(f"{arm}, seed {seed}", 0, len(args.lr) * args.steps):
        which, now = divmod(n, args.steps)
        if now == 0:
            model = copy.deepcopy(base)
            optimizer: Any = prepared(arm, model, args.lr[which], args)
            selected = [optimizer.sara.density().share] if arm in ("sara", "blind") else []
            log: dict[str, Any] = {
                "step": [0],
                "seconds": [],
                **{v: [found["before"][v]] for v in ("old", "new")},
            }
            torch.manual_seed(seed + 1)
        started = clock()
        step(model, optimizer, views["learn new"], args.batch)
        log["seconds"].append(clock() - started)
        run.live(None, optimizer)
        if (now + 1) % args.every == 0 or now == args.steps - 1:
            log["step"].append(now + 1)
            for view in ("old", "new"):
                log[view].append(accuracy(model, views[f"test {view}"]))
        if now == args.steps - 1:
            log["choose"] = accuracy(model, views["choose new"])
            log["step_ms"] = median_ms(log.pop("seconds"))
            log["state_bytes"] = state_bytes(optimizer)
            log["selected"] = selected + ([optimizer.sara.density().share] if selected else [])
            found["rates"][f"{args.lr[which]:g}"] = log
    return None if run.interrupt.wanted else found


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "sara",
        __doc__ or "",
        steps=200,
        seeds={"default": 5} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        fraction={"type": share, "default": 0.2, "help": "share of the entries that are trained"},
        angle={"type": float, "default": 60.0, "help": "degrees that digits are turned by"},
        lr={
            "type": rate,
            "nargs": "+",
            "default": [1e-3, 3e-3, 1e-2, 3e-2],
            "help": "learning rates of all arms",
        },
        batch={"type": positive, "default": 32, "help": "digits a step"},
        every={"type": positive, "default": 10, "help": "steps between two measurements"},
        model={"help": "has no meaning here: the model is a small network, trained from scratch"},
        data={"help": "has no meaning here: the data is scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds, and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("sara brings its own model and data; --model and --data have no meaning here.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    seeds = range(args.seed, args.seed + args.seeds)
    for seed in seeds:
        for arm in arms:
            run.part(f"{arm}/{seed}", train, arm, seed, args, run)
    if "zeroed" not in run.results:
        run.results["zeroed"] = [zeroed(seed, args.angle) for seed in seeds]
    run.write()
    _sara_report.report(run)


if __name__ == "__main__":
    main()
