"""Prune SmolLM2-135M in one go, and train it on without one zero coming back.

Half of the weights of each layer go, by magnitude, Wanda or SparseGPT: any half, or two of every four. A few
steps then bring a model back: PERP trains the norms alone, or low-rank changes under the mask too; with
KeepMask all weights that are left are trained. Each has as many steps, at its best learning rate by
validation text. For each: perplexity on held-out Shakespeare and on general English, how much was trained,
and that every zero is still there, also in what plain transformers load. The arm ``digits`` is a perceptron
at 90 to 98 %, in seconds.

Setting: rank 16, alpha 32, as PERP's authors have it; AdamW without weight decay, a warm-up of a tenth, then
    linearly down. Pruned by a few thousand tokens of the training text.

Source: PERP, arXiv 2312.15230; Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import optx

from . import _assets, _prune_digits, _prune_report, _text
from ._options import SEEDS, positive, whole
from ._prune_parts import MASKS, Texts, as_loaded, folder_of, losses, run_all, run_jobs, texts
from ._run import Run, chosen, clock, device, median_ms, parser, settings_of, state_bytes, warmed_up
from ._side_by_side import Processes, cores

METHODS = {
    "magnitude 50%": optx.Magnitude(0.5),
    "wanda 50%": optx.Wanda(0.5),
    "sparsegpt 50%": optx.SparseGPT(0.5),
    "magnitude 2:4": optx.Magnitude(pattern="2:4"),
    "wanda 2:4": optx.Wanda(pattern="2:4"),
    "sparsegpt 2:4": optx.SparseGPT(pattern="2:4"),
}
PERP = {
    "norm": optx.Perp(),  # biases too, where a model has any
    "mask": optx.Perp(adapter="mask"),
    "scale": optx.Perp(adapter="scale"),
}
RATES = {
    "norm": [3e-3, 1e-2, 3e-2],
    "mask": [3e-4, 1e-3, 3e-3, 1e-2],
    "scale": [1e-4, 3e-4, 1e-3],
    "rebuilt": [3e-4, 1e-3, 3e-3],
    "all": [3e-5, 1e-4, 3e-4, 1e-3],
    "tuned": [3e-5, 1e-4, 3e-4],
}
ARMS = [*(f"magnitude 50% + {kind}" for kind in ("norm", "mask", "all")), "digits"]
MORE = [f"{method} + {kind}" for method in METHODS for kind in RATES if kind != "tuned"]
MORE = ["dense + tuned", *(arm for arm in MORE if arm not in ARMS)]
"""Arms that only ``--arms`` runs: other methods, ScaleLoRA, blocks rebuilt, the dense model trained on."""


def prune(name: str, args: Namespace, data: Texts) -> dict[str, Any]:
    """A pruned model, written to its folder with its masks; and what it is worth."""
    model, tokenizer = _assets.language_model(args.model)
    model.to(device())
    if name == "dense":
        return losses(model, data) | {"parameters": sum(p.numel() for p in model.parameters())}
    began = clock()
    masks = optx.prune(model, METHODS[name], data.calibration, progress=False)
    seconds = clock() - began

    folder = folder_of(args, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    masks.save(folder / MASKS)
    total = masks.report().total
    found = {"sparsity": total.sparsity, "pattern": total.pattern, "served": total.shape[0]}
    return losses(model, data) | found | {"seconds": seconds}


def train(arm: str, lr: float, seed: int, trial: bool, args: Namespace, data: Texts) -> dict[str, Any]:
    """A pruned model trained on; of a trial, only the loss on validation text."""
    name, kind = arm.split(" + ")
    if kind == "rebuilt":
        return rebuild(name, lr, seed, trial, args, data)

    torch.manual_seed(seed)
    source = args.model if name == "dense" else str(folder_of(args, name))
    model = _assets.language_model(source)[0].to(device())
    masks = None if name == "dense" else optx.Masks.load(Path(source) / MASKS)

    handle = None
    if kind in ("all", "tuned"):
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
        if masks is not None:
            optimizer = optx.wrap(optimizer, optx.KeepMask(masks, model))
    else:
        handle = optx.attach(model, PERP[kind], masks=masks)
        optx.trainable_only(model, handle)
        optimizer = torch.optim.AdamW(handle.parameters(), lr, weight_decay=0.0, fused=True)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    if kind == "all" and masks is not None:
        trained -= masks.report().total.zeros
    schedule = warmed_up(optimizer, args.steps)

    seconds: list[float] = []
    for step in range(args.steps):
        began = clock()
        tokens = data.batch(step, args.batch, seed)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(clock() - began)

    kept = state_bytes(optimizer)
    if handle is not None:
        model = handle.merge_and_unload()
    if trial:
        return {"valid": _text.loss_on(model, data.valid)}
    found: dict[str, Any] = losses(model, data) | {
        "trained": trained,
        "step_ms": median_ms(seconds),
        "state_bytes": kept,
    }
    if masks is not None:
        masks.verify(model)  # raises if one zero has gone
        found["sparsity"] = optx.Masks.of(model, list(masks)).sparsity
        if kind == "mask" and seed == args.seed:
            found["as_loaded"] = as_loaded(model, masks, data)
    return found


def rebuild(name: str, lr: float, seed: int, trial: bool, args: Namespace, data: Texts) -> dict[str, Any]:
    """A dense model pruned block by block, each fitted to its dense outputs in as many steps; no labels."""
    model = _assets.language_model(args.model)[0].to(device())
    batches = [data.batch(step, args.batch, seed) for step in range(args.steps)]
    options: dict[str, Any] = {"steps": args.steps, "lr": lr, "seed": seed, "progress": False}
    done = optx.reconstruct(model, METHODS[name], PERP["mask"], batches, **options)
    done.masks.verify(model)
    if trial:
        return {"valid": _text.loss_on(model, data.valid)}
    trained, seconds = sum(one.trained for one in done.blocks), sum(one.seconds for one in done.blocks)
    cost = {"trained": trained, "step_ms": 1e3 * seconds / args.steps}
    return losses(model, data) | cost | {"sparsity": optx.Masks.of(model, list(done.masks)).sparsity}


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "prune",
        __doc__ or "",
        steps=10,
        seeds={"default": 3} | SEEDS,
        model={"help": "hub name or folder of a causal language model (default: SmolLM2-135M-Instruct)"},
        data={"help": "text file, folder of *.txt or hub data set to train on (default: Shakespeare)"},
        general={"help": "the same, of text that the model knew (default: 300 news articles)"},
        arms={"default": ",".join(ARMS), "help": "which, comma-separated; more: METHOD + KIND"},
        batch={"type": positive, "default": 1, "help": "blocks a step"},
        length={"type": whole(4), "default": 128, "help": "tokens of a block"},
        calibration={"type": positive, "default": 32, "help": "blocks that Wanda and SparseGPT look at"},
        eval_blocks={"type": positive, "default": 6, "help": "blocks of each text to measure losses on"},
        workers={"type": positive, "default": cores(), "help": "trainings side by side, of one thread each"},
        resume={"action": "store_true", "help": "keep the finished parts of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prune, choose rates, train and report."""
    args = options().parse_args(argv)
    arms = chosen(args.arms, [*ARMS, *MORE])
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    seeds = range(args.seed, args.seed + args.seeds)
    if "digits" in arms:
        with Processes(args.workers, tuple) as processes:
            jobs = {f"digits/{seed}": (seed,) for seed in seeds}
            run_jobs(run, "digits", _prune_digits.measure, jobs, processes, run.results["arms"])
    if models := [arm for arm in arms if arm != "digits"]:
        with Processes(args.workers, texts, args) as processes:
            run_all(run, models, seeds, args, (prune, train, RATES), list(METHODS), processes)
    _prune_report.report(run)


if __name__ == "__main__":
    main()
