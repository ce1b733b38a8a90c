"""Tune SmolLM2-135M on Shakespeare with its linear modules in 4 bits (QLoRA), by optx's LoRA and PEFT's.

Both arms have one base (bitsandbytes' nf4, scales quantised again), the same A and B to begin with, the same
batches and rate, so their losses should be the same too: the largest difference is shown. Then the adapter is
merged into the codes, which rounds them anew: what that costs is measured in the same way for both, as the
error of the merged weights and as the loss on held-out text. Memory is that of a process of its own for each
arm, and for LoRA on the model in float32: the most that it held while training, loading left out.

Source: QLoRA, arXiv 2305.14314; LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import optx

from . import _four_bits, _qlora_report
from ._four_bits import TARGETS, Adapted, Arm
from ._options import SEEDS, positive, rate, whole
from ._run import Run, chosen, clock, median_ms, parser, settings_of


def with_optx(model: nn.Module, args: Namespace) -> Adapted:
    """The line that this recipe is about."""
    handle = optx.attach(model, optx.LoRA(rank=args.rank, alpha=args.alpha), targets=TARGETS)
    optx.trainable_only(model, handle)
    return _four_bits.of_handle(model, handle)


def with_peft(model: nn.Module, args: Namespace) -> Adapted:
    """The same by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=TARGETS)
    return _four_bits.of_peft(get_peft_model(model, config))  # type: ignore[arg-type]


ARMS: dict[str, Arm] = {"optx": with_optx, "peft": with_peft}


def train(arm: str, seed: int, args: Namespace, run: Run) -> dict[str, Any] | None:
    """Tune with one arm and merge; None if interrupted."""
    model, tokenizer = _four_bits.load(args.model)
    data = _four_bits.text(tokenizer, args)
    adapted = ARMS[arm](model, args)
    adapted.start(seed)  # the same A for both; B is zero
    optimizer = torch.optim.AdamW(adapted.parameters, lr=args.lr, weight_decay=0.0)
    losses: list[float] = []
    seconds: list[float] = []
    for step in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        tokens = data.batch(step, args.batch, seed)
        started = clock()
        loss = adapted.model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        run.live(losses[-1])
        seconds.append(clock() - started)
    if len(losses) < args.steps:
        return None
    held_out = _four_bits.loss_on(adapted.model, data.held_out)
    error = adapted.merge_error()
    return {
        "loss": losses,
        "held_out": held_out,
        "merged": _four_bits.loss_on(adapted.model, data.held_out),
        "merge": error,
        "trainable": sum(p.numel() for p in adapted.parameters),
        "bytes": adapted.bytes_on_disk(),
        "step_ms": median_ms(seconds),
    }


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "qlora",
        __doc__ or "",
        steps=20,
        seeds={"default": 3} | SEEDS,
        model={"help": "hub name or folder of a causal language model (default: SmolLM2-135M-Instruct)"},
        data={"help": "text file, folder of *.txt or hub data set to train on (default: Shakespeare)"},
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        rank={"type": positive, "default": 8, "help": "of A and B"},
        alpha={"type": positive, "default": 16, "help": "times B A / rank is what is added to a weight"},
        lr={"type": rate, "default": 5e-4, "help": "learning rate"},
        batch={"type": positive, "default": 4, "help": "blocks a step"},
        length={"type": whole(4), "default": 32, "help": "tokens of a block"},
        eval_blocks={"type": positive, "default": 16, "help": "blocks of held-out text"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run both arms with all seeds, measure memory, and report."""
    args = options().parse_args(argv)
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in arms:
            run.part(f"{arm}/{seed}", train, arm, seed, args, run)
    if "memory" not in run.results:
        run.results["memory"] = {arm: _four_bits.measured(arm, args) for arm in ("float32", *arms)}
        run.write()
    _qlora_report.report(run)


if __name__ == "__main__":
    main()
