"""The skip recipe's first half: FTWT on handwritten digits, and a ResNet-18's time with filters skipped."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from ._flatness_parts import TRAIN, accuracy, noisy_digits
from ._report import COLOURS, Table, by_seed, ranged
from ._run import Run, clock, device

SHARES = ("1", "0.95", "0.85", "0.7")
ARMS = ("dense", *(f"ftwt r={r}" for r in SHARES), "ftwt r=0.85 at 0.1")
"""The last has the paper's rate for predictors, which learn faster in all others."""
KEPT = (0.5, 0.25)
"""Of every layer's filters, where time is measured."""


def network(width: int) -> nn.Sequential:
    """Four convolutions with batch norms, for 8 x 8 images."""
    layers: list[nn.Module] = []
    sizes = (1, width, 2 * width, 2 * width, 4 * width)
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number == 1 else []
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*layers, *head).to(device())


def train(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """Half of the steps dense, and half with predictors, or dense as well; None if interrupted."""
    x, y, x_test, y_test = noisy_digits(seed, 0.0)
    torch.manual_seed(seed)
    model, half = network(args.width), args.steps // 2
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    handle: optx.FilterPruning | None = None
    agreed: list[float] = []
    start, batches = 0.0, iter(())
    for step in run.steps(f"{arm}, seed {seed}", 0, args.steps):
        if step == half:
            start = accuracy(model, x_test, y_test)
            optimizer = torch.optim.SGD(model.parameters(), args.tune_lr, momentum=0.9, weight_decay=5e-4)
            if arm != "dense":
                r, _, slow = arm.partition("=")[2].partition(" at ")
                handle = optx.attach(model, optx.FTWT(r=float(r)))
                for group in handle.param_groups(lr=float(slow or args.predictor_lr)):
                    optimizer.add_param_group(group)
        if handle and step == half + half // 2:
            handle.freeze()
        if step % (TRAIN // args.batch) == 0:
            batches = iter(torch.randperm(TRAIN).split(args.batch))
        index = next(batches)
        loss = F.cross_entropy(model(x[index]), y[index])
        if handle:
            loss = loss + handle.loss()
            if not handle.frozen:
                agreed.append(handle.agreement())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if run.interrupt.wanted:
        return None
    found = {"start": start, "test": accuracy(model, x_test, y_test), "kept": 1.0}
    return {**found, **_skipped(handle, model, x_test, y_test, agreed)} if handle else found


def _skipped(
    handle: optx.FilterPruning, model: nn.Module, x: Tensor, y: Tensor, agreed: Sequence[float]
) -> dict[str, float]:
    """What is kept, how the model does with as many filters at random, and how much masks differ."""
    handle.flops(reset=True)
    accuracy(model, x, y)
    work, masks = handle.flops(reset=True), handle.masks()
    varied = [(mask.any(0) & ~mask.all(0)).float().mean() for mask in masks.values()]
    handle.force("random")
    random = accuracy(model, x, y)
    handle.force()
    return {
        "kept": work.share,
        "predictor": work.predictor / work.total,
        "filters": torch.stack([mask.float().mean() for mask in masks.values()]).mean().item(),
        "varied": torch.stack(varied).mean().item(),
        "random": random,
        "agreement": statistics.mean(agreed[-20:]),
    }


def seconds(args: Any) -> dict[str, Any]:
    """A ResNet-18's time for one image, in turn: dense, and with so many filters masked or skipped."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = [args.timed_width * 2**i for i in range(4)]
    config = ResNetConfig(
        embedding_size=sizes[0], hidden_sizes=sizes, depths=[2, 2, 2, 2], layer_type="basic"
    )
    torch.manual_seed(args.seed)
    dense = ResNetForImageClassification(config).eval()
    model = ResNetForImageClassification(config).eval()
    model.load_state_dict(dense.state_dict())
    handle = optx.attach(model, optx.FTWT())
    x = torch.randn(1, 3, args.size, args.size)
    return {str(share): _timed(dense, model, handle, x, share, args.rounds) for share in KEPT}


@torch.inference_mode()
def _timed(
    dense: nn.Module, model: nn.Module, handle: optx.FilterPruning, x: Tensor, share: float, rounds: int
) -> dict[str, float]:
    for weight, bias in zip(*2 * [iter(handle.parameters())], strict=True):
        weight.zero_()
        bias.fill_(-1.0)[torch.randperm(len(bias))[: int(share * len(bias))]] = 1.0
    found: dict[str, list[float]] = {"dense": [], "skipped": []}
    for _ in range(rounds + 2):
        for name, one in (("dense", dense), ("skipped", model)):
            began = clock()
            one(x)
            found[name].append(1e3 * (clock() - began))
    work = handle.flops(reset=True)
    times = {name: statistics.median(each[2:]) for name, each in found.items()}
    return {**times, "kept": work.share, "predictor": work.predictor / work.total}


# ---- what came out -------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[Table]:
    """How each arm ended, and what time skipping takes."""
    settings = results["settings"]
    arms = {arm: logs for arm, logs in by_seed(results["arms"]).items() if arm in ARMS}
    headers = ("", "test, %", "multiply-adds", "filters", "of them varied", "random, %", "predicted")
    ends = Table(
        headers,
        [(arm, *_cells(logs)) for arm, logs in arms.items()],
        f"Filters of four convolutions, {settings['steps']} steps of {settings['batch']} digits",
        "Mean and, in brackets, range over seeds. Half of the steps are dense, and half with predictors, "
        "which are frozen after half of those. Test: 797 digits. Multiply-adds of convolutions: share of "
        "the dense. Filters: share that is kept, mean over layers. Varied: share of all filters that are "
        "kept for some digits and not for others. Random: test with as many filters, any of them. "
        "Predicted: share of the targets' bits, in the last 20 batches before the freeze. At 0.1: predictors "
        f"learn at the paper's rate, and not at {settings['predictor_lr']:g}.",
    )
    times = Table(
        ("filters kept", "dense, ms", "skipped, ms", "speed", "multiply-adds", "as a speed"),
        [
            (
                f"{100 * float(share):.0f} %",
                f"{one['dense']:.1f}",
                f"{one['skipped']:.1f}",
                f"{one['dense'] / one['skipped']:.2f}",
                f"{100 * one['kept']:.1f} %",
                f"{1 / one['kept']:.2f}",
            )
            for share, one in results.get("seconds", {}).items()
        ],
        f"A ResNet-18 (width {settings['timed_width']}) on one image of {settings['size']} x "
        f"{settings['size']}",
        f"Medians of {settings['rounds']} calls in turn, with random weights: time does not depend on them.",
    )
    return [ends, times] if arms else []


def _cells(logs: Sequence[dict[str, float]]) -> tuple[str, ...]:
    names = ("test", "kept", "filters", "varied", "random", "agreement")
    return tuple(
        ranged([100 * log[name] for log in logs], "{:.1f}") if name in logs[0] else "" for name in names
    )


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Accuracy against work, a point for each seed; hollow: as many filters at random."""
    logs_by_arm = by_seed(results["arms"])
    for colour, marker, arm in zip(COLOURS, "o^sDvP", ARMS, strict=False):
        if logs := logs_by_arm.get(arm):
            points = [(log["kept"], log["test"]) for log in logs]
            axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=24, label=arm)
            random = [(log["kept"], log["random"]) for log in logs if "random" in log]
            if random:
                hollow = {"facecolors": "none", "edgecolors": colour, "marker": marker, "s": 24}
                axes.scatter(*zip(*random, strict=True), **hollow)
