"""What the prune recipe measures with, and how its trainings are run side by side."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optx

from . import _assets, _text
from ._run import Run, device
from ._side_by_side import Processes

TRIED, TRIAL = "magnitude 50%", 100
"""Where each kind's rates are tried, and with which seed."""
MASKS = "masks.safetensors"
CALLED_WITH = 8
"""Blocks of one call of the model in calibration."""


@dataclass(frozen=True)
class Texts:
    """Blocks of tokens, none in two places.

    Attributes:
        text: to train on and to measure on.
        valid: to choose rates by; and
        calibration: to prune by, in batches; both taken out of the training text.
    """

    text: _text.TextData
    valid: Tensor
    calibration: list[Tensor]

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The blocks of one step."""
        return self.text.batch(step, size, seed)


def texts(args: Namespace) -> tuple[Namespace, Texts]:
    """What all jobs of a process are given besides."""
    text = _text.load(_assets.language_model(args.model)[1], args)
    count = min(args.eval_blocks + args.calibration, len(text.train) - 1)
    taken = torch.linspace(0, len(text.train) - 1, count).long()
    rest = torch.ones(len(text.train), dtype=torch.bool).index_fill(0, taken, False)
    first = torch.arange(count) % max(1, count // args.eval_blocks) == 0
    apart = torch.ones_like(first).masked_fill(first.cumsum(0) <= args.eval_blocks, False) | ~first
    calibration = list(text.train[taken[apart]].to(device()).split(CALLED_WITH))
    return args, Texts(text._replace(train=text.train[rest]), text.train[taken[~apart]], calibration)


def losses(model: nn.Module, data: Texts) -> dict[str, float]:
    """Mean loss per token on text of the kind that was trained on, and on general English."""
    found = {"held_out": data.text.held_out, "general": data.text.general}
    return {name: _text.loss_on(model, blocks) for name, blocks in found.items()}


def folder_of(args: Namespace, name: str) -> Path:
    """Where a pruned model is: a folder that transformers load, with the masks beside it."""
    return Path(args.out, "pruned", name.replace("%", "").replace(" ", "-").replace(":", "of"))


def best(rates: Mapping[str, Any], kind: str) -> float:
    """The rate of a kind with the least loss on validation text."""
    tried = {key: one["valid"] for key, one in rates.items() if key.split("/")[0] == kind}
    return float(min(tried, key=lambda key: tried[key]).split("/")[1])


def as_loaded(model: Any, masks: optx.Masks, data: Texts) -> dict[str, float]:
    """Save the model, load it by transformers alone, and look whether it is the same one.

    Raises:
        OptxError: a zero has gone on the way.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").to(device())
    masks.verify(loaded)
    with torch.no_grad(), _text.evaluated(model):
        tokens = data.text.held_out[:1].to(device())
        apart = (loaded.eval()(tokens).logits - model(tokens).logits).abs().max()
    return {"sparsity": optx.Masks.of(loaded, list(masks)).sparsity, "apart": float(apart)}


def run_jobs(
    run: Run,
    title: str,
    work: Callable[..., Any],
    jobs: Mapping[str, tuple[Any, ...]],
    processes: Processes,
    found: dict[str, Any],
) -> None:
    """Do the jobs that `found` lacks, by key, and write each when it ends."""
    left = {key: job for key, job in jobs.items() if key not in found}
    keys, ends = list(left), processes.each(work, list(left.values()))
    for _ in run.steps(title, 0, len(left)):
        place, result = next(ends)
        found[keys[place]] = result
        run.write()
    if run.interrupt.wanted:
        raise SystemExit(130)


def run_all(
    run: Run,
    arms: Sequence[str],
    seeds: Sequence[int],
    args: Namespace,
    ways: tuple[Callable[..., Any], Callable[..., Any], Mapping[str, Sequence[float]]],
    methods: Sequence[str],
    processes: Processes,
) -> None:
    """Prune, find each kind's best rate, and train.

    Args:
        run: where to.
        arms: which, as ``method + kind``.
        seeds: of each.
        args: the recipe's options.
        ways: what prunes, what trains, and rates by kind.
        methods: that prune; all do, as what they leave without training is compared too.
        processes: where.
    """
    prune, train, tried = ways
    pruned, rates = (run.results.setdefault(part, {}) for part in ("pruned", "rates"))
    kinds = dict.fromkeys(arm.split(" + ")[1] for arm in arms)
    for name in list(pruned):
        if name != "dense" and not (folder_of(args, name) / MASKS).exists():
            del pruned[name]  # its folder was thrown away
    run_jobs(run, "prune", prune, {name: (name,) for name in ("dense", *methods)}, processes, pruned)
    at = dict.fromkeys(kinds, TRIED) | {"tuned": "dense"}
    trials = {f"{k}/{lr:g}": (f"{at[k]} + {k}", lr, TRIAL, True) for k in kinds for lr in tried[k]}
    run_jobs(run, "rates", train, trials, processes, rates)
    jobs = {
        f"{arm}/{seed}": (arm, best(rates, arm.split(" + ")[1]), seed, False)
        for arm in arms
        for seed in seeds
    }
    run_jobs(run, "train", train, jobs, processes, run.results["arms"])
