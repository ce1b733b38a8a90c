"""What moments and weights in fewer bits cost in quality: the same training, kept in float32 and in less.

A small transformer learns Shakespeare's characters from scratch, and SmolLM2-135M is fine-tuned on the same
text: by AdamW without transforms, through `optx.wrap`, whose ``state`` and ``master`` are all that differs
between arms. Arms of a seed have the same first weights and the same batches in the same order. What counts
is the held-out loss at the end: its difference from float32's, beside how far float32's seeds lie apart.

Setting: as FlashOptim's paper asks (the loss of float32 is kept), in models and steps that two cores can do.

Keywords: 8-bit optimizer, low-bit state, bfloat16 moments, split weights, quantised moments.

Source: "FlashOptim", arXiv 2602.23349.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import optx

from . import _assets, _formats, _formats_report, _text
from ._characters import Characters, loss_of
from ._options import SEEDS, positive, rate, whole
from ._reweight_parts import Transformer
from ._run import Run, SettingsError, chosen, device, parser, settings_of, warmed_up

FORMATS: dict[str, tuple[Any, Any]] = {  # state and master
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "8bit": ("8bit", None),
    "8bit+split": ("8bit", "split"),
}


class Task(NamedTuple):
    """What is trained.

    Attributes:
        model: a new one, from torch's random state.
        loss: of a model, in the batch of a step and a seed.
        held_out: a model's loss on text that it is not trained on.
        steps: of an arm.
        lr: peak learning rate.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int, int], Tensor]
    held_out: Callable[[nn.Module], float]
    steps: int
    lr: float


def characters(args: Namespace) -> Task:
    """A transformer from scratch."""
    data = Characters(_assets.text(args.data), args.length)

    def model() -> nn.Module:
        return Transformer(data.letters, args.length, args.width, args.layers)

    def loss(model: nn.Module, step: int, seed: int) -> Tensor:
        return loss_of(model, *data.batch(step, args.batch, seed))

    return Task(model, loss, data.loss, args.steps, args.lr)


def tuning(args: Namespace) -> Task:
    """A pretrained language model, as `finetune` has it."""
    tokenizer = _assets.language_model(args.model)[1]
    data = _text.learned(tokenizer, _assets.text(args.data), args.tuning_length, args.eval_blocks)

    def loss(model: nn.Module, step: int, seed: int) -> Tensor:
        tokens = data.batch(step, 1, seed)
        return model(input_ids=tokens, labels=tokens).loss

    def held_out(model: nn.Module) -> float:
        return _text.loss_on(model, data.held_out)

    def model() -> nn.Module:
        return _assets.language_model(args.model)[0]

    return Task(model, loss, held_out, args.tuning_steps, args.tuning_lr)


TASKS = {"characters": characters, "tuning": tuning}
ARMS = (*(f"characters/{kept}" for kept in FORMATS), "tuning/float32", "tuning/8bit+split")
EVERY = (*ARMS, "tuning/bfloat16", "tuning/8bit")


def train(kept: str, seed: int, task: Task, run: Run, key: str) -> dict[str, Any] | None:
    """One run: losses on the way, the held-out loss at its end, bytes a parameter; None if interrupted."""
    torch.manual_seed(seed)
    state, master = FORMATS[kept]
    model = _formats.cast(task.model().to(device()), master)
    adamw = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.0)
    optimizer = optx.wrap(adamw, state=state, master=master, fused=True)  # the line that the arms differ in
    schedule = warmed_up(optimizer, task.steps)

    losses: list[float] = []
    for step in run.steps(key, 0, task.steps):
        loss = task.loss(model, step, seed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.live(loss, optimizer)
        losses.append(loss.item())
    if run.interrupt.wanted:
        return None
    every = max(1, task.steps // 50)  # of thousands of losses, the means of fifty parts
    return {
        "held_out": task.held_out(model),
        "loss": [sum(part) / len(part) for part in _parts(losses, every)],
        "resident_bytes": _formats.resident_bytes(model, optimizer),
    }


def _parts(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def options(quick: bool = False) -> ArgumentParser:
    """The recipe's command line; with a quick run's defaults, if that is wanted."""
    return parser(
        "formats",
        __doc__ or "",
        steps=100 if quick else 2000,
        quick={"action": "store_true", "help": "one seed and few steps: a minute, and no answer"},
        seeds={"default": 1 if quick else 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": f"which of {', '.join(EVERY)}"},
        width={"type": whole(4), "default": 64, "help": "of the transformer; a multiple of 4"},
        layers={"type": positive, "default": 2, "help": "of it"},
        batch={"type": positive, "default": 4, "help": "its sequences a step"},
        length={"type": positive, "default": 64, "help": "characters a sequence"},
        lr={"type": rate, "default": 2e-3, "help": "its peak learning rate"},
        tuning_steps={"type": positive, "default": 4 if quick else 16, "help": "of the language model"},
        tuning_length={"type": whole(4), "default": 128, "help": "tokens of its blocks, one a step"},
        tuning_lr={"type": rate, "default": 1e-4, "help": "its peak learning rate"},
        eval_blocks={"type": positive, "default": 8, "help": "blocks to measure its held-out loss on"},
        model={"help": "hub name or folder of a causal language model (default: SmolLM2-135M-Instruct)"},
        data={"help": "text file or folder (default: Shakespeare's works)"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options(options().parse_args(argv).quick).parse_args(argv)
    arms = chosen(args.arms, EVERY)
    if args.width % 4:
        raise SettingsError(f"--width {args.width}: the transformer has 4 heads; give a multiple of 4.")
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    tasks: dict[str, Task] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in arms:
            if run.finished(key := f"{arm}/{seed}"):
                continue
            name, _, kept = arm.partition("/")
            task = tasks.setdefault(name, tasks.get(name) or TASKS[name](args))
            run.part(key, train, kept, seed, task, run, key)
    _formats_report.report(run)


if __name__ == "__main__":
    main()
