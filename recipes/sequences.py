"""Sequences: how S4D begins, and what is left of something heard long ago.

A small network of two layers reads a sequence and says its class from the last token on: handwritten digits,
dot after dot, and noise in front of which one of eight signals was heard. Its mixer is a diagonal state space
(S4D) in the place of attention, with its frequencies begun in five ways, and once with one learning rate for
all; beside it are a GRU and the attention itself.

Source: S4D, arXiv 2206.11893.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import optx

from . import _sequences_report
from ._options import SEEDS, positive, rate
from ._run import Run, SettingsError, chosen, device, parser, settings_of
from ._sequences_parts import TASKS, Data, Recurrent, Tagger

SPACES = {"LegS": "legs", "Inv": "inv", "Lin": "lin", "Real": "real", "random": "random"}
ARMS = (*(f"S4D-{name}" for name in SPACES), "S4D-LegS at one rate", "GRU", "attention")


def built(arm: str, data: Data, args: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An arm's network and its optimizer; of S4D, these lines are what it takes."""
    model = Tagger(data.inputs, data.classes, args.width, arm == "attention").to(device())
    if arm == "GRU":
        for block in model.blocks:
            block.attn = Recurrent(args.width, args.width, batch_first=True).to(device())
    if not arm.startswith("S4D"):
        return model, torch.optim.AdamW(model.parameters(), lr=args.baseline_lr, weight_decay=0.01)
    init: Any = SPACES[arm.removeprefix("S4D-").partition(" ")[0]]
    space = optx.S4D(d_state=args.state, init=init, bidirectional=False)
    optx.attach(model, space, targets=r"blocks\.\d+\.attn")
    if arm.endswith("one rate"):
        return model, torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    return model, torch.optim.AdamW(optx.param_groups(model, lr=args.lr, weight_decay=0.01))


def trained(arm: str, data: Data, seed: int, args: Any, run: Run, key: str) -> dict[str, Any] | None:
    """An arm on a task: accuracy on what it has not seen, in per cent, as it goes."""
    torch.manual_seed(seed)
    model, optimizer = built(arm, data, args)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    draws = torch.Generator().manual_seed(seed)
    curve: dict[str, float] = {}
    begun = time.perf_counter()
    for step in run.steps(key, 0, args.steps):
        x, y = data.batch(draws, args.batch)
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, args.steps // 2) == 0:
            curve[str(step + 1)] = accuracy(model, data)
    if run.interrupt.wanted:
        return None
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spent = time.perf_counter() - begun
    return {"curve": curve, "accuracy": accuracy(model, data), "numbers": numbers, "seconds": spent}


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of the test's sequences whose class it says, in per cent."""
    model.eval()
    right = [(model(x).argmax(1) == y).float().mean() for x, y in data.test]
    model.train()
    return 100 * float(torch.stack(right).mean())


def measure(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """An arm on all tasks."""
    found: dict[str, Any] = {}
    for name, task in TASKS.items():
        found[name] = trained(arm, task(seed, args.length), seed, args, run, f"{arm}, {name}, seed {seed}")
        if found[name] is None:
            return None
    return found


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "sequences",
        __doc__ or "",
        steps=100,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        length={"type": positive, "default": 100, "help": "tokens of the noise with a signal in front"},
        width={"type": positive, "default": 32, "help": "of the network's two layers"},
        state={"type": positive, "default": 32, "help": "N of S4D's channels; an even number"},
        batch={"type": positive, "default": 32, "help": "sequences a step"},
        lr={"type": rate, "default": 0.01, "help": "S4D's; of its steps and its A, 0.001"},
        baseline_lr={"type": rate, "default": 0.003, "help": "of GRU and attention"},
        model={"help": "has no meaning here: the model is a small network, trained from scratch"},
        data={"help": "has no meaning here: scikit-learn's digits, and noise"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("sequences brings its own model and data; --model and --data have no meaning here.")
    if args.state % 2:
        raise SettingsError(f"--state {args.state}: S4D's modes come in pairs, so it must be even.")
    if args.length < 16:
        raise SettingsError(f"--length {args.length}: the signal alone has 8 tokens; give at least 16.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in (one for one in ARMS if one in arms):
            run.part(f"{arm}/{seed}", measure, arm, seed, args, run)
    _sequences_report.report(run)


if __name__ == "__main__":
    main()
