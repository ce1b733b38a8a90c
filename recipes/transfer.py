"""Tune narrow, train wide: how far the best learning rate and weight decay move as a transformer grows wider.

Llama-style models of several widths learn Shakespeare's characters from scratch, each with a range of
learning rates and, at the narrowest model's best rate, of weight decays. In the standard parametrisation the
numbers are the optimizer's own; muP's multipliers keep the best learning rate where it was; and with
``mup-sqrt`` the weight decay of matrices grows as the square root of the width. At the narrowest width all
arms are the same run. What counts is where each width's optimum lies, and what it costs to take the narrowest
model's numbers.

Source: "Tensor Programs V", arXiv 2203.03466; "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
arXiv 2510.15262.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch

import optx

from . import _assets, _transfer_report
from ._characters import Characters, loss_of
from ._options import SEEDS, positive, rate
from ._run import Run, SettingsError, chosen, device, parser, settings_of, warmed_up
from ._side_by_side import Processes, cores
from ._transfer_curves import Point
from ._transfer_sweeps import run_all

ARMS: dict[str, str | None] = {  # how weight decay goes with width
    "standard": None,
    "mup": "none",
    "mup-sqrt": "sqrt",
    "mup-linear": "linear",
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"widths": [32, 64, 128, 256], "steps": 200, "batch": 8, "length": 32, "wide_seeds": 2},
    "large": {"widths": [128, 256, 512, 1024], "steps": 2000, "batch": 32, "length": 128, "wide_seeds": 3},
}


def config(width: int, args: Namespace, letters: int) -> Any:
    """A model's; heads keep their size, so that attention needs no other scale (else: MuAttention)."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=letters,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=args.layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=16,
        max_position_embeddings=args.length,
        initializer_range=args.widths[0] ** -0.5,
        tie_word_embeddings=False,
        use_cache=False,
    )


def train(point: Point, seed: int, args: Namespace, data: Characters) -> dict[str, Any]:
    """One run: the held-out loss at its end, and the top singular values of the hidden matrices."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(point.width, args, data.letters)).to(device())
    base, wider = (config(n * args.widths[0], args, data.letters) for n in (1, 2))
    shapes = optx.scaling.shapes(model, base=base, delta=wider)
    optx.scaling.init_(model, shapes, "standard" if point.arm == "standard" else "mup")

    named = list(model.named_parameters())
    hidden = [(name, p) for name, p in named if shapes[name].kind == "matrix"]
    others = [(name, p) for name, p in named if shapes[name].kind != "matrix"]
    groups: list[Any] = [{"params": hidden, "weight_decay": point.decay}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, point.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if (decay := ARMS[point.arm]) is not None:
        optx.attach(model, optx.MuReadout(shapes))
        optimizer = optx.scaling.mup(optimizer, shapes, decay=decay)  # in optx.wrap: optx.MuAdamW
    schedule = warmed_up(optimizer, args.steps)

    for step in range(args.steps):
        loss = loss_of(model, *data.batch(step, args.batch, seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(found := data.loss(model)):
        return {"loss": None}  # diverged
    top = optx.scaling.sublayer_gain(model).top
    return {"loss": found, "top": [top[name].value for name, _ in hidden]}


def prepare(args: Namespace) -> tuple[Namespace, Characters]:
    """What all runs of a process are given besides."""
    return args, Characters(_assets.text(args.data), args.length)


def options(size: str = "small") -> ArgumentParser:
    """The recipe's command line, with the defaults of a size."""
    usual = SIZES[size]
    return parser(
        "transfer",
        __doc__ or "",
        steps=usual["steps"],
        size={"choices": list(SIZES), "default": size, "help": "large: a GPU and some hours"},
        seeds={"default": 3} | SEEDS,
        wide_seeds={"type": positive, "default": usual["wide_seeds"], "help": "so many at the widest"},
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        widths={"type": positive, "nargs": "+", "default": usual["widths"], "help": "rising multiples of 16"},
        layers={"type": positive, "default": 2, "help": "of the models"},
        lr={"type": rate, "default": 2.0**-5, "help": "where sweeps of the rate begin"},
        decay={"type": rate, "default": 1.0, "help": "weight decay in those, where its own sweep begins"},
        batch={"type": positive, "default": usual["batch"], "help": "sequences a step"},
        length={"type": positive, "default": usual["length"], "help": "characters a sequence"},
        workers={"type": positive, "default": cores(), "help": "runs side by side, of one thread each"},
        model={"help": "has no meaning here: the models are small, and trained from scratch"},
        data={"help": "text file or folder (default: Shakespeare's works)"},
        resume={"action": "store_true", "help": "keep the finished runs of an interrupted one"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Make all runs and report."""
    args = options(options().parse_args(argv).size).parse_args(argv)
    if args.model:
        raise SettingsError("transfer trains its own models from scratch; --model has no meaning here.")
    if sorted({w for w in args.widths if w % 16 == 0}) != args.widths or len(args.widths) < 2:
        raise SettingsError(f"--widths {args.widths}: give two or more multiples of 16, from the least on.")
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    with Processes(args.workers, prepare, args) as processes:
        run_all(run, arms, args, train, processes)
    _transfer_report.report(run)


if __name__ == "__main__":
    main()
