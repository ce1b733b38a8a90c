"""Rotated digits, one angle held out: DSP-Reg beside plain training, a uniform decay and CORAL.

Real handwritten digits (scikit-learn's, 8 x 8), each turned by one of six angles: every angle is a domain, as
in RotatedMNIST. A small convolutional network learns five of them and is tested on the sixth, each in its
turn. The arms see the same mini-batches: plain training on all domains' samples (ERM); the same with a
decoupled decay (L2); CORAL, which pulls the domains' features to one mean and covariance; and DSP-Reg. The
penalties' strengths were chosen by accuracy on kept-back samples of the five training angles (DomainBed's
rule), with another seed; DSP-Reg's is the best above zero, which was a little behind none at all.

Then a toy whose answer is known: logistic regression on features of which half follow the label in some
domains only.

Source: DSP-Reg, arXiv 2601.19394; CORAL as DomainBed has it, arXiv 2007.01434.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import optx

from . import _domains_report, _spurious
from ._options import SEEDS, positive, rate, strength
from ._report import by_seed
from ._rotated import ANGLES, Domain, accuracy, coral, load, network
from ._run import Run, chosen, clock, device, median_ms, parser, settings_of

ARMS = ("erm", "l2", "coral", "dsp")


def prepared(arm: str, model: nn.Module, args: Any) -> Any:
    """The arm's optimizer."""
    decay = args.l2 if arm == "l2" else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=decay)
    if arm == "dsp":
        warmup = args.steps // 10
        optimizer = optx.wrap(optimizer, optx.DSPReg(len(ANGLES) - 1, weight=args.weight, warmup=warmup))
    return optimizer


def step(arm: str, model: nn.Sequential, optimizer: Any, batches: Sequence[Domain], args: Any) -> None:
    """One step on a mini-batch of every domain."""
    optimizer.zero_grad()
    if arm == "dsp":
        for d, (x, y) in enumerate(batches):
            with optimizer.dsp_reg.domain(d):
                F.cross_entropy(model(x), y).backward()
    else:
        features = model[:-1](torch.cat([x for x, _ in batches]))
        loss = F.cross_entropy(model[-1](features), torch.cat([y for _, y in batches]))
        if arm == "coral":
            loss = loss + args.coral * coral(features.chunk(len(batches)))
        loss.backward()
    optimizer.step()


def train(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """By the angle held out: accuracy there and on kept-back digits of the others; None if interrupted."""
    learn, kept = load(seed)
    found: dict[str, Any] = {"step": [], "unseen": {str(a): [] for a in ANGLES}, "seen": {}}
    for n in run.steps(f"{arm}, seed {seed}", 0, len(ANGLES) * args.steps):
        held, now = divmod(n, args.steps)
        if now == 0:
            torch.manual_seed(seed)
            model = network().to(device())
            optimizer = prepared(arm, model, args)
            draws = torch.Generator().manual_seed(seed)
        others = [d for i, d in enumerate(learn) if i != held]
        picks = [torch.randint(len(y), (args.batch,), generator=draws) for _, y in others]
        step(arm, model, optimizer, [(x[i], y[i]) for (x, y), i in zip(others, picks, strict=True)], args)
        if (now + 1) % args.every == 0 or now == args.steps - 1:
            found["unseen"][str(ANGLES[held])].append(accuracy(model, [learn[held], kept[held]]))
            found["step"] += [now + 1] if held == 0 else []
        if now == args.steps - 1:
            seen = accuracy(model, [d for i, d in enumerate(kept) if i != held])
            found["seen"][str(ANGLES[held])] = seen
    return None if run.interrupt.wanted else found


def step_times(arms: Sequence[str], args: Any) -> dict[str, float]:
    """Milliseconds of a training step, by arm; the arms take turns."""
    batches = [(x[: args.batch], y[: args.batch]) for x, y in load(0)[0][1:]]
    models = {arm: network().to(device()) for arm in arms}
    optimizers = {arm: prepared(arm, model, args) for arm, model in models.items()}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(max(10, min(200, args.steps))):
        for arm, model in models.items():
            started = clock()
            step(arm, model, optimizers[arm], batches, args)
            times[arm].append(clock() - started)
    return {arm: median_ms(seconds[5:]) for arm, seconds in times.items()}


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "domains",
        __doc__ or "",
        steps=300,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        batch={"type": positive, "default": 16, "help": "digits of each domain in a step"},
        lr={"type": rate, "default": 0.002, "help": "learning rate of all arms (AdamW)"},
        weight={"type": strength, "default": 0.01, "help": "DSP-Reg's strength"},
        l2={"type": strength, "default": 0.3, "help": "the uniform decay's strength"},
        coral={"type": strength, "default": 1.0, "help": "CORAL's strength"},
        every={"type": positive, "default": 10, "help": "steps between two measurements"},
        model={"help": "has no meaning here: the model is a small network, trained from scratch"},
        data={"help": "has no meaning here: the data is scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds, the toy, and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("domains brings its own model and data; --model and --data have no meaning here.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in arms:
            run.part(f"{arm}/{seed}", train, arm, seed, args, run)
    if "spurious" not in run.results:
        seeds = range(args.seed, args.seed + 5)
        run.results["spurious"] = {
            arm: [_spurious.fit(arm, seed) for seed in seeds] for arm in _spurious.ARMS
        }
    if set(run.results.get("step_ms", ())) != set(by_seed(run.results["arms"])):
        run.results["step_ms"] = step_times(list(by_seed(run.results["arms"])), args)
    run.write()
    _domains_report.report(run)


if __name__ == "__main__":
    main()
