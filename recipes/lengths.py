"""Lengths: trained on short texts, tested on longer ones, by softmax and by softplus attention (LSSA, LSSAR).

A small transformer with rotary positions learns Shakespeare's characters from scratch, from sequences of one
length, and is measured on held-out text in sequences of 1 to 8 times that. Softmax spreads over more keys the
more there are; LSSAR weighs those above the row's mean, by a power p, whatever their number.

Source: LSSA and LSSAR, arXiv 2501.13428.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch

import optx

from . import _assets, _lengths_report
from ._characters import Characters
from ._lengths_parts import Transformer, measured, step_loss
from ._options import SEEDS, positive, rate
from ._run import Run, chosen, device, parser, settings_of, warmed_up

ATTENTION = {
    "softmax": None,
    "LSSA": optx.LSSA(),
    "LSSAR p=3": optx.LSSAR(p=3),
    "LSSAR p=15": optx.LSSAR(p=15),
}
TIMES = (1, 2, 4, 8)


def train(arm: str, seed: int, text: str, args: Any, run: Run) -> dict[str, Any] | None:
    """One run, and what it says of longer texts; None if interrupted."""
    torch.manual_seed(seed)
    data = Characters(text, args.length)
    model = Transformer(data.letters, args.width, args.heads, args.layers).to(device())
    injection = ATTENTION[arm]
    if injection is not None:
        optx.attach(model, injection)  # the line that the arms differ in
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = warmed_up(optimizer, args.steps)
    for step in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        loss = step_loss(model, data, step, args.batch, seed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.live(loss, optimizer)
    if run.interrupt.wanted:
        return None
    return {str(times): measured(model, text, times * args.length, args.characters) for times in TIMES}


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "lengths",
        __doc__ or "",
        steps=500,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ATTENTION), "help": "which, comma-separated"},
        length={"type": positive, "default": 64, "help": "characters of a training sequence"},
        batch={"type": positive, "default": 16, "help": "sequences in a batch"},
        width={"type": positive, "default": 64, "help": "of the model"},
        heads={"type": positive, "default": 2, "help": "of attention"},
        layers={"type": positive, "default": 2, "help": "of the model"},
        characters={"type": positive, "default": 16384, "help": "held-out ones at each length"},
        lr={"type": rate, "default": 3e-3, "help": "AdamW's highest rate"},
        model={"help": "has no meaning here: the model is a small transformer, trained from scratch"},
        data={"help": "a text file; default: Shakespeare's works"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model:
        raise SystemExit("lengths trains its own model; --model has no meaning here.")
    arms, text = chosen(args.arms, ATTENTION), _assets.text(args.data)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in (one for one in ATTENTION if one in arms):
            run.part(f"{arm}/{seed}", train, arm, seed, text, args, run)
    _lengths_report.report(run)


if __name__ == "__main__":
    main()
