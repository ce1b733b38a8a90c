"""Teach a sentence encoder to tell good film reviews from bad ones, with full fine-tuning and with adapters.

all-MiniLM-L6-v2 (BERT, 22M) on sentences that people rated; every arm has the same data, batches and number
of steps, and trains a new head. For each: accuracy on held-out sentences, numbers trained, bytes on disk, and
the time of a training step as a ratio to full fine-tuning. Learning rates are each arm's best of three or
four, a factor of three apart, by --sweep: with another seed, on sentences that are not in the table.

Source: BitFit, arXiv 2106.10199; LoRA, arXiv 2106.09685; SVFit, arXiv 2409.05926; MAM, arXiv 2110.04366;
FLoRA, arXiv 2405.14739.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import optx

from . import _adapt_report, _assets
from ._options import SEEDS, positive, rate, whole
from ._report import by_seed
from ._reviews import Sentences, accuracy, load
from ._run import Run, chosen, clock, device, median_ms, parser, settings_of, warmed_up

HEAD = "classifier"

# Each arm is the same loop; this is the line that changes, and the learning rate that --sweep found best.
ARMS: dict[str, tuple[Callable[[], optx.Injection] | None, float]] = {
    "full": (None, 5e-5),
    "bitfit": (optx.BitFit, 3e-3),
    "lora": (lambda: optx.LoRA(rank=8, alpha=16), 3e-3),
    "svfit": (optx.SVFit, 9e-2),
    "mam": (lambda: optx.MAM(prefix=16, rank=16, scale=2.0), 3e-3),
    "flora": (lambda: optx.FLoRA(rank=8), 3e-3),
}


def start(arm: str, seed: int, args: Any, labels: int) -> tuple[nn.Module, optx.Handle | None]:
    """The pretrained model with a new head, and what the arm attaches to it."""
    torch.manual_seed(seed)
    model = _assets.classifier(args.model, labels)[0].to(device()).train()
    injection, _ = ARMS[arm]
    if injection is None:
        return model, None
    handle = optx.attach(model, injection(), modules_to_save=[HEAD])
    optx.trainable_only(model, handle)
    return model, handle


def train(arm: str, seed: int, lr: float, data: Sentences, test: Sentences, args: Any, run: Run) -> Any:
    """Train one arm with one seed; what was measured, or None if interrupted."""
    model, handle = start(arm, seed, args, int(data.labels.max()) + 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    scheduler = warmed_up(optimizer, args.steps)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    losses: list[float] = []
    for step in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        index = order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        loss = model(**data.batch(index)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        run.live(losses[-1], optimizer, handle)
    if run.interrupt.wanted:
        return None
    return {
        "loss": losses,
        "accuracy": accuracy(model, test),
        "trainable": sum(p.numel() for p in parameters),
        "bytes": bytes_on_disk(model, handle),
    }


def bytes_on_disk(model: Any, handle: optx.Handle | None) -> int:
    """What one keeps of a run: the adapter's folder, or the whole model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        if handle is None:
            model.save_pretrained(folder)
        else:
            handle.save(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def step_times(arms: Sequence[str], data: Sentences, args: Any, rounds: int = 12) -> dict[str, float]:
    """Milliseconds of a training step, by arm; the arms take turns on one batch."""
    models = {arm: start(arm, 0, args, int(data.labels.max()) + 1)[0] for arm in arms}
    groups = {arm: [p for p in model.parameters() if p.requires_grad] for arm, model in models.items()}
    optimizers = {arm: torch.optim.AdamW(group, lr=0.0) for arm, group in groups.items()}
    batch = data.batch(torch.arange(args.batch))
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, model in models.items():
            started = clock()
            model(**batch).loss.backward()
            optimizers[arm].step()
            optimizers[arm].zero_grad()
            times[arm].append(clock() - started)
    return {arm: median_ms(seconds[2:]) for arm, seconds in times.items()}


def factors(text: str) -> str:
    """The type of --sweep: factors on a rate, with commas between."""
    for factor in text.split(","):
        rate(factor)
    return text


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "adapt",
        __doc__ or "",
        steps=120,
        seeds={"default": 3} | SEEDS,
        model={"help": "hub name or folder of a BERT-like encoder (default: all-MiniLM-L6-v2)"},
        data={"help": "file of class<TAB>sentence lines (default: film reviews)"},
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        batch={"type": positive, "default": 16, "help": "sentences a step"},
        length={"type": whole(3), "default": 32, "help": "tokens of a sentence, at most"},
        test={"type": positive, "default": 500, "help": "sentences kept for testing"},
        sweep={
            "type": factors,
            "help": "factors on the rates, as 0.3,1,3: a run each, seed 100, and a table",
        },
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    data, test = load(_assets.classifier(args.model, 2)[1], args.data, args.test, args.length)
    if args.sweep:  # rates are chosen on sentences that are neither trained on nor in the table
        data, test = data.cut(args.test)
    factors = [float(f) for f in args.sweep.split(",")] if args.sweep else [1.0]
    seeds = [100] if args.sweep else range(args.seed, args.seed + args.seeds)
    for arm in arms:
        for seed in seeds:
            for lr in (factor * ARMS[arm][1] for factor in factors):
                key = f"{arm}/{lr:g}/{seed}" if args.sweep else f"{arm}/{seed}"
                run.part(key, train, arm, seed, lr, data, test, args, run)
    if args.sweep:
        _adapt_report.sweep(run, arms)
        return
    measured = list(by_seed(run.results["arms"]))
    if set(run.results.get("step_ms", ())) != set(measured):
        run.results["step_ms"] = step_times(measured, data, args)
        run.write()
    _adapt_report.report(run)


if __name__ == "__main__":
    main()
