"""Modular addition: AdamW memorises, AdamW + perpGrad generalises, StableMax does not collapse.

An MLP learns a + b mod p from 40 % of all pairs in full batches, without weight decay. AdamW alone fits the
training set and then only scales its logits up, until float32 rounds one softmax after the other to 0 and 1
("softmax collapse") and its gradient to 0. perpGrad removes that direction from every gradient. StableMax is
a loss that collapses much later. (It generalises after some 80,000 epochs, not shown here.)

Setting: as the paper's figure 1 (MLP 2p-200-200-p without biases, AdamW, lr 0.01, betas 0.9, 0.99, float32),
with p = 59 instead of 113, and StableMax under the same optimizer as the others.

Source: "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import optx
from optx.analysis import nlm_alignment, softmax_collapse

from . import _grokking_report
from ._options import SEEDS, positive, rate, share, whole
from ._run import Run, SettingsError, chosen, device, parser, settings_of


def to_softmax(logits: Tensor) -> Tensor:
    """The logits whose softmax is the StableMax of these (the paper's proposition 1)."""
    return logits.sign() * logits.abs().log1p()


# Each arm is the same loop with another optimizer or loss; the third entry gives the softmax in that loss.
Arm = tuple[Callable[[Optimizer], Optimizer], nn.Module, Callable[[Tensor], Tensor]]
ARMS: dict[str, Arm] = {
    "adamw": (lambda adamw: adamw, nn.CrossEntropyLoss(), lambda z: z),
    "adamw+perpgrad": (lambda adamw: optx.wrap(adamw, optx.PerpGrad()), nn.CrossEntropyLoss(), lambda z: z),
    "stablemax": (lambda adamw: adamw, optx.StableMaxCrossEntropy(), to_softmax),
}


def pairs(p: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs (a, b) as two one-hot vectors, and a + b mod p: train inputs and targets, test ones."""
    ab = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    ab = ab[torch.randperm(len(ab), generator=torch.Generator().manual_seed(seed))].to(device())
    x, y = F.one_hot(ab, p).flatten(1).float(), ab.sum(1) % p
    cut = int(share * len(ab))
    return x[:cut], y[:cut], x[cut:], y[cut:]


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of samples whose largest logit is the right one."""
    return float((logits.argmax(1) == y).float().mean())


def train(arm: str, seed: int, args: Any, run: Run) -> dict[str, list[float]] | None:
    """One training run; curves by name, or None if interrupted."""
    x, y, x_test, y_test = pairs(args.p, args.share, seed)
    torch.manual_seed(seed)
    sizes = (2 * args.p, args.width, args.width, args.p)
    layers = [nn.Linear(i, o, bias=False) for i, o in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).to(device())

    wrap, criterion, seen = ARMS[arm]
    # Adam's usual eps, 1e-8, would hide gradients as small as these become; 1e-25 is the paper's.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.99), eps=1e-25, weight_decay=0
    )
    optimizer = wrap(optimizer)

    log: dict[str, list[float]] = {"epoch": []}
    for epoch in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        logits = model(x)
        loss = criterion(logits, y)
        optimizer.zero_grad()
        loss.backward()
        if epoch % args.every == 0 or epoch == args.steps - 1:
            with torch.no_grad():
                now = {
                    "epoch": epoch,
                    "loss": loss.item(),
                    "train": accuracy(logits, y),
                    "test": accuracy(model(x_test), y_test),
                    "collapse": softmax_collapse(seen(logits), y),
                    "alignment": nlm_alignment(model)["4.weight"],
                    "gradient": float(nn.utils.get_total_norm([w.grad for w in model.parameters()])),
                }
            for name, value in now.items():
                log.setdefault(name, []).append(value)
        optimizer.step()
        run.live(loss, optimizer)
    return None if run.interrupt.wanted else log


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "grokking",
        __doc__ or "",
        steps=2000,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        p={"type": whole(2), "default": 59, "help": "the modulus (the paper's: 113, 5 times the work)"},
        share={"type": share, "default": 0.4, "help": "share of the pairs to train on"},
        width={"type": positive, "default": 200, "help": "of the hidden layers"},
        lr={"type": rate, "default": 0.01, "help": "learning rate of all arms"},
        every={"type": positive, "default": 10, "help": "epochs between two measurements"},
        model={"help": "has no meaning here: the model is a small MLP, trained from scratch"},
        data={"help": "has no meaning here: the data is all of modular addition"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    if args.model or args.data:
        raise SystemExit("grokking brings its own model and data; --model and --data have no meaning here.")
    arms = chosen(args.arms, ARMS)
    if int(args.share * args.p**2) == 0:
        raise SettingsError(f"--share {args.share}: of {args.p**2} pairs that is none to train on.")
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for arm in arms:
        for seed in range(args.seed, args.seed + args.seeds):
            run.part(f"{arm}/{seed}", train, arm, seed, args, run)
    _grokking_report.report(run)


if __name__ == "__main__":
    main()
