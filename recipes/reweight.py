"""Pretraining on text with a noisy and a duplicated part: sequences weighted by their losses, or alike.

A small transformer learns Shakespeare's characters from scratch. Of the sequences it sees, some are noise
(half of their characters are drawn at random) and some come from a few passages, over and over. LossReweight
weights each by its loss in the batch: what is learnt by heart counts less, and so does, by some strategies,
what can't be learnt. What counts is the loss on clean text that was held out.

Source: "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
arXiv 2502.06733.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from . import _assets, _parallel, _reweight_report
from ._options import SEEDS, number, positive, rate
from ._reweight_parts import KINDS, Characters, Transformer, cost
from ._run import Run, SettingsError, chosen, device, parser, settings_of, warmed_up

ARMS: dict[str, str | None] = {
    "adamw": None,  # the mean, as cross_entropy has it
    "linupper": "linupper",
    "quadratic": "quadratic",
    "extremes": "extremes",
}


def reweighting(arm: str, args: Any) -> optx.LossReweight | None:
    """What an arm puts in the place of the mean."""
    strategy = ARMS[arm]
    return None if strategy is None else optx.LossReweight(strategy, r=args.r, warmup=args.steps // 20)


def train(arm: str, seed: int, args: Any, run: Run, data: Characters) -> dict[str, Any] | None:
    """One run; curves, the weights that each kind of text got, and seconds; None if interrupted."""
    torch.manual_seed(seed)
    team = run.team

    def batch(step: int) -> list[Tensor]:
        return [team.share(part) for part in data.mixed(step, args.batch, seed)]

    model = Transformer(data.letters, args.length, args.width, args.layers).to(device())
    ratio = cost(model, reweighting(arm, args), batch(0), args.steps)
    trained = team.spread(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = warmed_up(optimizer, args.steps)
    reweight = reweighting(arm, args)  # weights are those of all processes' batch

    log: dict[str, Any] = {"step": [], "held_out": [], "cost": ratio}
    log |= {"weights": {kind: [] for kind in KINDS}, "losses": {kind: [] for kind in KINDS}}
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        x, y, kinds = batch(step)
        losses = F.cross_entropy(trained(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        loss = reweight(losses) if reweight else losses.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        run.live(loss, optimizer)

        weights = reweight.last_weights if reweight else torch.full((len(x),), 1 / args.batch)
        seen.append((kinds, weights.cpu() * args.batch, losses.detach().mean(1).cpu()))
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            log["step"].append(step + 1)
            with team.whole(model):
                log["held_out"].append(data.loss(model))
            note(log, [one for part in team.gathered(seen) for one in part])
            seen.clear()
    return None if run.interrupt.wanted else log


def note(log: dict[str, Any], seen: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Mean weight (1 is the mean's) and mean loss of each kind, since the last time."""
    kinds, weights, losses = (torch.cat(column) for column in zip(*seen, strict=True))
    for place, kind in enumerate(KINDS):
        log["weights"][kind].append(float(weights[kinds == place].mean()))
        log["losses"][kind].append(float(losses[kinds == place].mean()))


def options() -> ArgumentParser:
    """The recipe's command line."""
    part = number("a share above 0, at most 0.4", lambda x: 0 < x <= 0.4)
    return parser(
        "reweight",
        __doc__ or "",
        steps=500,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        r={"type": rate, "default": 0.4, "help": "temperature of the weights"},
        noisy={"type": part, "default": 0.15, "help": "share of noisy sequences"},
        duplicated={"type": part, "default": 0.3, "help": "share of duplicated ones"},
        passages={"type": positive, "default": 64, "help": "how many these are"},
        batch={"type": positive, "default": 32, "help": "sequences a step, of all processes together"},
        length={"type": positive, "default": 64, "help": "characters a sequence"},
        width={"type": positive, "default": 64, "help": "of the model; a multiple of 4"},
        layers={"type": positive, "default": 2, "help": "of the model"},
        lr={"type": rate, "default": 3e-3, "help": "highest learning rate of all arms"},
        every={"type": positive, "default": 50, "help": "steps between two measurements"},
        model={"help": "has no meaning here: the model is small, and trained from scratch"},
        data={"help": "text file or folder (default: Shakespeare's works)"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
        fsdp=_parallel.FSDP,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report; under torchrun, on all of its processes."""
    with _parallel.team(options(), argv) as (team, args):
        if args.model:
            raise SettingsError("reweight trains its own model from scratch; --model has no meaning here.")
        if args.width % 4:
            raise SettingsError(f"--width {args.width}: the model has 4 heads; give a multiple of 4.")
        team.divides(args.batch)
        arms = chosen(args.arms, ARMS)
        run = Run(args.out, settings_of(args), args.resume, args.overwrite, team)
        with team.in_turn():
            text = _assets.text(args.data)
        data = Characters(text, args)
        for seed in range(args.seed, args.seed + args.seeds):
            for arm in arms:
                run.part(f"{arm}/{seed}", train, arm, seed, args, run, data)
        if team.leads:
            _reweight_report.report(run)


if __name__ == "__main__":
    main()
