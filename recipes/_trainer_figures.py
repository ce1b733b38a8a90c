"""What optx costs inside transformers' Trainer: ``python -m optx.recipes._trainer_figures``.

LoRA on SmolLM2. A checkpoint's bytes are set beside the adapter's own and the optimizer's state. Time is the
median over steps: of a whole step, and of what is not arithmetic in it. That is the callback (its events, and
what it adds to a log, here at every step) and the bookkeeping of `optx.wrap`, which is the time of a step of
the same groups and tensors with one number in each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import optx

from ._assets import language_model


class Clock(TrainerCallback):
    """Seconds from the start of each step to its end, the log included."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def on_log(self, *_: Any, **__: Any) -> None:
        """A step ends."""
        self.steps.append(time.perf_counter() - self._began)


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """The same function; what each call took goes into a list."""

    def run(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            into.append(time.perf_counter() - began)

    return run


def tiny(opt: optx.Wrapped) -> optx.Wrapped:
    """As many groups and tensors, of one number each."""
    groups = [
        {
            **{k: group[k] for k in ("lr", "weight_decay")},
            "params": [nn.Parameter(torch.ones(1, 1)) for _ in group["params"]],
        }
        for group in opt.param_groups
    ]
    made = optx.wrap(torch.optim.AdamW(groups), optx.PerpGrad())
    for group in groups:
        for p in group["params"]:
            p.grad = torch.ones(1, 1)
    return made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure and print the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, two in a batch")
    args = parser.parse_args(arguments)
    model, _ = language_model(args.model)
    handle = optx.attach(model, optx.LoRA(rank=8))
    optx.trainable_only(model, handle)
    ids = torch.randint(0, 1000, (2 * args.steps, args.length), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    clock, callback = Clock(), optx.integrations.transformers.OptxCallback(handle)
    events: list[float] = []
    for name in ("on_train_begin", "on_epoch_begin", "on_step_end"):
        setattr(callback, name, timed(getattr(callback, name), events))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=args.steps,
                save_steps=args.steps,
                per_device_train_batch_size=2,
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=data,  # pyright: ignore[reportArgumentType]
            optimizer_cls_and_kwargs=optx.integrations.transformers.optimizer(
                torch.optim.AdamW, optx.PerpGrad()
            ),
            callbacks=[clock, callback],
        )
        trainer.train()
        return told(trainer, handle, clock, events[1:], Path(folder) / f"checkpoint-{args.steps}")


def told(
    trainer: Any, handle: optx.Handle, clock: Clock, events: list[float], checkpoint: Path
) -> dict[str, Any]:
    """The figures, printed."""
    opt: optx.Wrapped = trainer.optimizer.optimizer
    adapter = sum(p.numel() * p.element_size() for p in handle.parameters())
    tensors = [t for state in opt.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    optimizer = sum(t.numel() * t.element_size() for t in tensors)
    held = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    logs: list[float] = []
    collected = timed(lambda: {**opt.metrics(), **handle.metrics()}, logs)
    bare, steps = tiny(opt), list[float]()
    step = timed(bare.step, steps)
    for _ in range(50):
        collected()
        step()
    whole, median = statistics.median(clock.steps), statistics.median
    own = sum(events) / len(clock.steps) + median(logs) + median(steps)
    found = {
        "checkpoint_bytes": held,
        "adapter_bytes": adapter,
        "optimizer_bytes": optimizer,
        "checkpoint_ratio": round(held / (adapter + optimizer), 4),
        "model_bytes": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        "step_seconds": round(whole, 4),
        "events_seconds": round(sum(events) / len(clock.steps), 6),
        "metrics_seconds": round(median(logs), 6),
        "bookkeeping_seconds": round(median(steps), 6),
        "overhead": round(own / whole, 5),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
