"""What optx costs inside transformers' Trainer: ``python -m optx.recipes._trainer_figures``.

Two Trainers train a model whole, in one process and step by step in turn: a plain one with torch's fused
AdamW (``optim="adamw_torch_fused"``), and one with PerpGrad and AdamR on it and `OptxCallback`, which logs at
every step. What of optx's step is no arithmetic is measured in these steps: its optimizer's step without the
kernels that it runs (bookkeeping), the callback's events, and the numbers that it adds to the log. Beside it
stands a step of torch's fused AdamW, and of optx's, on as many tensors of one number each.

A checkpoint of LoRA is set beside the bytes of the adapter and of its optimizer's state.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import optx
from optx.integrations import _trainer_hooks
from optx.kernels import cpu

from ._assets import language_model
from ._options import positive

WARM = 2
"""Steps that are not counted: they compile, and make state."""


class Turns:
    """Lets Trainers that run in threads take their steps in turn, from the first of each on."""

    def __init__(self, count: int) -> None:
        self._all_there = threading.Barrier(count)
        self._open = [threading.Semaphore(int(i == 0)) for i in range(count)]

    def begin(self, number: int) -> None:
        """Wait for all to be ready, and then for one's turn."""
        self._all_there.wait()
        self._open[number].acquire()

    def next(self, number: int) -> None:
        """Let the others take a step each."""
        self.end(number)
        self._open[number].acquire()

    def end(self, number: int) -> None:
        """Leave the others alone."""
        self._open[(number + 1) % len(self._open)].release()


class Clock(TrainerCallback):
    """Seconds of each step, from its beginning to that of the next; and those of parts of it.

    Attributes:
        steps: whole ones.
        parts: seconds of each part in each step, by name.
    """

    def __init__(self, turns: Turns, number: int) -> None:
        self.steps: list[float] = []
        self.parts: dict[str, list[float]] = {}
        self._turns, self._number, self._began = turns, number, 0.0
        self._now: dict[str, float] = {}

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls count for a part of the step that they are in."""

        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - began

        return run

    def _ends(self) -> None:
        self.steps.append(time.perf_counter() - self._began)
        for part, seconds in self._now.items():
            self.parts.setdefault(part, []).append(seconds)

    def on_step_begin(self, *_: Any, **options: Any) -> None:
        """The step before is over; the next begins when it is this one's turn."""
        if self._began:
            self._ends()
            self._turns.next(self._number)
        else:
            inner = options["optimizer"].optimizer
            inner.step = self.timed("optimizer", inner.step)
            self._turns.begin(self._number)
        self._now, self._began = {}, time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """So is the last one."""
        self._ends()
        self._turns.end(self._number)


def arguments_of(folder: str, steps: int, batch: int, **options: Any) -> TrainingArguments:
    """Of all Trainers here."""
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


def sequences(count: int, length: int) -> Any:
    """Rows of random tokens."""
    rows = torch.randint(0, 1000, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


# ---- time -------------------------------------------------------------------------------------------------


def in_turn(model: nn.Module, args: argparse.Namespace) -> tuple[Clock, Clock]:
    """The clocks of a plain Trainer and of one with optx."""
    turns = Turns(2)
    clocks = Clock(turns, 0), Clock(turns, 1)
    callback = optx.integrations.transformers.OptxCallback()
    for name in ("on_epoch_begin", "on_step_end"):
        setattr(callback, name, clocks[1].timed("events", getattr(callback, name)))
    _trainer_hooks.collect = clocks[1].timed("metrics", _trainer_hooks.collect)  # pyright: ignore
    cpu.run = clocks[1].timed("kernels", cpu.run)
    made = optx.integrations.transformers.optimizer(
        torch.optim.AdamW, optx.PerpGrad(), optx.AdamR(weight=0.01)
    )
    arms: list[dict[str, Any]] = [
        {"callbacks": [clocks[0]]},
        {"callbacks": [clocks[1], callback], "optimizer_cls_and_kwargs": made},
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        trainers: list[Any] = []
        for arm, own in zip(arms, (model, copy.deepcopy(model)), strict=True):
            fused = {} if "optimizer_cls_and_kwargs" in arm else {"optim": "adamw_torch_fused"}
            given = arguments_of(folder, args.steps + WARM, args.batch, save_strategy="no", **fused)
            data = sequences(args.batch * (args.steps + WARM), args.length)
            trainers.append(Trainer(own, given, train_dataset=data, **arm))
        for done in [threads.submit(one.train) for one in trainers]:
            done.result()
    return clocks


def tiny(count: int, ours: bool) -> Callable[[], Any]:
    """A step of so many tensors of one number each."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(1)
    base: Any = torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True)
    if not ours:
        return base.step
    opt = optx.wrap(base, optx.PerpGrad(), optx.AdamR(weight=0.01), metrics=True)
    return opt.step


def least_and_median(seconds: Sequence[float]) -> dict[str, float]:
    """Of a list, in milliseconds."""
    return {"min": round(1e3 * min(seconds), 3), "median": round(1e3 * statistics.median(seconds), 3)}


def overhead(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """What of a step with optx is no arithmetic, in milliseconds and as a share of the step."""
    count = sum(1 for _ in model.parameters())
    plain, ours = in_turn(model, args)
    parts = {name: seconds[-args.steps :] for name, seconds in ours.parts.items()}
    whole = ours.steps[-args.steps :]
    parts["bookkeeping"] = [
        all_of_it - kernels for all_of_it, kernels in zip(parts["optimizer"], parts["kernels"], strict=True)
    ]
    beyond = [sum(one) for one in zip(parts["bookkeeping"], parts["events"], parts["metrics"], strict=True)]
    steps: dict[str, list[float]] = {"torch": [], "optx": []}
    calls = {"torch": tiny(count, ours=False), "optx": tiny(count, ours=True)}
    for _ in range(200):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            steps[name].append(time.perf_counter() - began)
    return {
        "tensors": count,
        "plain": {
            "step": least_and_median(plain.steps[-args.steps :]),
            "optimizer": least_and_median(plain.parts["optimizer"][-args.steps :]),
        },
        "optx": {"step": least_and_median(whole)}
        | {name: least_and_median(seconds) for name, seconds in parts.items()},
        "beyond arithmetic": least_and_median(beyond),
        "beyond arithmetic, share of a step": {
            "min": round(min(beyond) / min(whole), 5),
            "median": round(statistics.median(beyond) / statistics.median(whole), 5),
        },
        "metrics, share of a step": round(statistics.median(parts["metrics"]) / statistics.median(whole), 5),
        "a step of as many numbers": {name: least_and_median(each[5:]) for name, each in steps.items()},
    }


# ---- bytes ------------------------------------------------------------------------------------------------


def checkpoint(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint of LoRA beside the adapter's own bytes and its optimizer's."""
    handle = optx.attach(model, optx.LoRA(rank=8))
    frozen = [p for p in model.parameters() if p.requires_grad]
    optx.trainable_only(model, handle)
    callback = optx.integrations.transformers.OptxCallback(handle)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = Trainer(
            model,
            arguments_of(folder, 1, args.batch, save_steps=1),
            train_dataset=sequences(args.batch, args.length),
            optimizer_cls_and_kwargs=optx.integrations.transformers.optimizer(
                torch.optim.AdamW, optx.PerpGrad()
            ),
            callbacks=[callback],
        )
        trainer.train()
        files = [file for file in Path(folder, "checkpoint-1").rglob("*") if file.is_file()]
        held = sum(file.stat().st_size for file in files)
    adapter = sum(p.numel() * p.element_size() for p in handle.parameters())
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    optimizer = sum(t.numel() * t.element_size() for t in states if isinstance(t, torch.Tensor))
    callback.remove()
    handle.remove()
    for p in frozen:
        p.requires_grad_(True)
    return {
        "checkpoint_bytes": held,
        "adapter_bytes": adapter,
        "optimizer_bytes": optimizer,
        "checkpoint_ratio": round(held / (adapter + optimizer), 4),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure and print the figures as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m optx.recipes._trainer_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--steps", type=positive, default=20, help="of each Trainer, in turn")
    parser.add_argument("--batch", type=positive, default=1, help="sequences")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a sequence")
    args = parser.parse_args(arguments)
    model, _ = language_model(args.model)
    found = {**checkpoint(model, args), **overhead(model, args)}
    found |= {
        "milliseconds of": f"{args.steps} steps of {args.batch} x {args.length} tokens",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
