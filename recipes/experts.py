"""Experts in training: several that become one (EWA), and one mixture for all blocks (WideNet).

A small vision transformer (scikit-learn's digits in 16 patches, 4 blocks of width 32) learns from 600 digits.
From scratch: as it is (dense) and with FFNs twice as wide; with EWA in every second block, drawn together
more and more, and the same experts left apart until the end; with all blocks sharing attention and FFN
(shared), and with WideNet: of a mixture of 4 experts a token has 2, as much work as the wide one's FFNs.
Then the dense one is tuned on 300 digits that are turned and paler: as it is, by EWA from copies, and by such
copies left apart. What becomes of EWA costs what the dense model does.

Source: EWA, arXiv 2308.06093; WideNet, arXiv 2107.11817.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

import optx

from . import _experts_report
from ._experts_parts import BATCH, Data, Transformer, accuracy, apart, ffn_work, load, pretrained
from ._handwriting import batches
from ._options import SEEDS, positive, rate, share
from ._run import Run, SettingsError, chosen, clock, device, parser, settings_of

SCRATCH = ("dense", "wide", "ewa", "apart", "shared", "widenet")
TUNED = ("tuned", "tuned ewa", "tuned apart")
ARMS = (*SCRATCH, *TUNED)


def attached(arm: str, model: Transformer, steps: int, beta: float) -> Any:
    """What the arm attaches; None: nothing."""
    if arm == "ewa":
        return optx.attach(model, optx.EWA(experts=4, beta=beta, total_steps=steps, init="fresh"))
    if arm == "apart":
        return optx.attach(model, optx.EWA(experts=4, beta=0, init="fresh"))
    if arm == "tuned ewa":
        return optx.attach(model, optx.EWA(experts=4, beta=beta))
    if arm == "tuned apart":
        return optx.attach(model, optx.EWA(experts=4, beta=0))
    if arm == "shared":
        return optx.attach(model, optx.WideNet(experts=1, top_k=1, capacity=None, balance=0, noise=0))
    if arm == "widenet":
        return optx.attach(model, optx.WideNet(experts=4, top_k=2, init="fresh"))
    return None


def train(arm: str, model: Transformer, seed: int, data: Data, args: Any, run: Run) -> dict[str, Any] | None:
    """One run from a model; None if interrupted."""
    tuned = arm in TUNED
    steps = args.steps // 2 if tuned else args.steps
    torch.manual_seed(seed)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=args.lr / 2 if tuned else args.lr)
    handle = attached(arm, model, steps, args.beta)
    if handle is not None:
        optimizer = optx.wrap(optimizer, handle)  # its parameters, and EWA's averaging after each step
    mixture = isinstance(handle, optx.WideHandle)
    stream = batches(data["tune" if tuned else "learn"], seed, BATCH)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spreads: list[tuple[int, float]] = []
    start = clock()
    for step in run.steps(f"{arm}, seed {seed}", 0, steps):
        x, y = next(stream)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if mixture:
            loss = loss + handle.loss()
        loss.backward()
        optimizer.step()
        if isinstance(handle, optx.ExpertHandle) and (step + 1) % max(steps // 40, 1) == 0:
            spreads.append((step + 1, sum(handle.spread().values()) / len(handle)))
        run.live(loss, optimizer)
    seconds = clock() - start
    if run.interrupt.wanted:
        return None
    found: dict[str, Any] = {"seconds": seconds, "numbers": numbers, "spread": spreads}
    if isinstance(handle, optx.ExpertHandle):
        handle.merge_and_unload()  # one FFN again, of the model's own class
    elif mixture and arm == "widenet":
        found["loads apart"] = apart(handle)
    tests = ("test turned", "test") if tuned else ("test",)
    return {
        **found,
        **{name: accuracy(model, data[name]) for name in tests},
        "kept": sum(p.numel() for p in model.parameters()),
        "work": ffn_work(model),
    }


def all_arms(arms: Sequence[str], seed: int, args: Any, run: Run) -> None:
    """Every arm of a seed; the tuned ones go on from one dense model."""
    data = load(seed, args.size, args.angle)
    base: Transformer | None = None
    for arm in (one for one in ARMS if one in arms):
        torch.manual_seed(seed)
        if arm in TUNED:
            base = base or pretrained(seed, data, args.steps, args.lr)
            model = copy.deepcopy(base)
        else:
            model = Transformer(128 if arm == "wide" else 64).to(device())
        run.part(f"{arm}/{seed}", train, arm, model, seed, data, args, run)


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "experts",
        __doc__ or "",
        steps=210,
        seeds={"default": 5} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        size={"type": positive, "default": 600, "help": "digits to learn from; half as many to tune on"},
        lr={"type": rate, "default": 3e-3, "help": "AdamW's rate; half of it to tune"},
        beta={"type": share, "default": 0.5, "help": "EWA's share rate, at its end or all the time"},
        angle={"type": float, "default": 45.0, "help": "by which digits are turned to tune, in degrees"},
        model={"help": "has no meaning here: the model is a small transformer, trained from scratch"},
        data={"help": "has no meaning here: the data is scikit-learn's digits"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("experts brings its own model and data; --model and --data have no meaning here.")
    arms = chosen(args.arms, ARMS)
    try:
        optx.EWA(experts=4, beta=args.beta)
    except optx.OptxError as error:
        raise SettingsError(f"--beta: {error}") from None
    if args.size > 800:
        raise SettingsError(
            f"--size {args.size}: of 1797 digits 597 test, and half as many tune; at most 800."
        )
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        all_arms(arms, seed, args, run)
    _experts_report.report(run)


if __name__ == "__main__":
    main()
