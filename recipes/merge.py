"""Fine-tune one encoder on three tasks, prune what that changed, and merge the three encoders into one.

all-MiniLM-L6-v2 (BERT, 22M) learns whether film reviews are good or bad, the same of tweets, and what kind
of text a sentence is from; with AdamW, and with AdamW + AdamR, which keeps weights near the pretrained ones.
Prune: accuracy with a share p of the change dropped, by DARE, DAREx-q, magnitude and Wanda. Merge: accuracy
of one encoder on all three tasks, by every method, its scale chosen on other sentences. Patch: a network that
reads digits is made robust against a corruption by a signature of its first layers.

Source: DARE, arXiv 2311.03099; DAREx-q and AdamR, arXiv 2410.09344; task arithmetic, arXiv 2212.04089; TIES,
arXiv 2306.01708; PCB-Merging, arXiv 2410.02396; Robust Weight Signatures, arXiv 2302.12480.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import optx

from . import _assets, _digits, _merge_report, _reviews
from ._experts import Expert
from ._merge_parts import Merging, Pruning, merge, prune
from ._options import SEEDS, positive, rate, share, strength, whole
from ._run import Run, chosen, parser, settings_of, warmed_up

PARTS = ("prune", "merge", "patch")
TASKS = ("films", "tweets", "kind")

# Each is the same training loop, pruning or merge; these are the lines that change.
TRAINED: dict[str, Callable[[Optimizer, float], Optimizer]] = {
    "AdamW": lambda adamw, pull: adamw,
    "AdamR": lambda adamw, pull: optx.wrap(adamw, optx.AdamR(weight=pull)),
}
PRUNED: dict[str, Pruning] = {
    "DARE": lambda expert, p, seed: expert.delta.dare(p, seed=seed),
    "DAREx-q": lambda expert, p, seed: expert.delta.dare(p, q=expert.q(p), seed=seed),
    "magnitude": lambda expert, p, seed: expert.delta.magnitude(p),
    "Wanda": lambda expert, p, seed: expert.delta.wanda(p, expert.stats),
}
MERGED: dict[str, Merging] = {
    "task arithmetic": lambda lam: optx.TaskArithmetic(lam=lam),
    "TIES": lambda lam: optx.TIES(density=0.2, lam=lam),
    "DARE": lambda lam: optx.DARELinear(p=0.9, lam=lam),
    "DARE-TIES": lambda lam: optx.DARETIES(p=0.9, lam=lam),
    "PCB": lambda lam: optx.PCB(ratio=0.1, lam=lam),
}

# Keys of a whole run's results, without the seed.
ARMS = [
    *(f"prune/{trained}/{task}" for trained in TRAINED for task in TASKS),
    *(f"merge/{trained}" for trained in TRAINED),
    "patch",
]


def fine_tune(expert: Expert, trained: str, label: str, seed: int, args: Any, run: Run) -> bool:
    """Train an expert and write it to its file; False if interrupted."""
    encoder, head = expert.encoder_and_head()
    # The head is new: there are no pretrained weights that AdamR could keep it near.
    groups = [{"params": encoder}, {"params": head, "lr": args.head_lr, "adamr": False}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0)
    optimizer = TRAINED[trained](optimizer, args.pull)
    scheduler = warmed_up(optimizer, args.steps)
    order = torch.randperm(len(expert.train), generator=torch.Generator().manual_seed(seed))
    expert.model.train()
    for step in run.steps(label, 0, args.steps):
        index = order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        loss = expert.model(**expert.train.batch(index)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.live(loss, optimizer)
    if not run.interrupt.wanted:
        expert.save()
    return not run.interrupt.wanted


def experts_of(seed: int, trained: str, data: Any, args: Any, run: Run) -> dict[str, Expert]:
    """A seed's expert for each task, trained if its file is not there."""
    experts: dict[str, Expert] = {}
    for task, (train, test) in data.items():
        train, valid = train.cut(args.valid)
        torch.manual_seed(seed)
        model = _assets.classifier(args.model, int(train.labels.max()) + 1)[0]
        file = Path(run.folder, "experts", str(seed), f"{trained}-{task}.safetensors")
        expert = Expert(model, file, train, valid, test)
        label = f"{trained}, {task}, seed {seed}"
        if not (run.resume and file.exists()) and not fine_tune(expert, trained, label, seed, args, run):
            raise SystemExit(130)
        experts[task] = expert.load()
    return experts


def of_seed(seed: int, trained: str, data: Any, args: Any, run: Run) -> None:
    """Train, prune and merge, as far as it is not in the results; then the experts' files are deleted."""
    pruned = {f"prune/{trained}/{task}/{seed}": task for task in data if "prune" in args.parts}
    merged = [f"merge/{trained}/{seed}"] if "merge" in args.parts else []
    if all(run.finished(key) for key in (*pruned, *merged)):
        return
    experts = experts_of(seed, trained, data, args, run)
    for key, task in pruned.items():
        run.part(key, prune, PRUNED, experts[task], key, args, run)
    for key in merged:
        run.part(key, merge, MERGED, experts, key, run)
    for expert in experts.values():
        expert.file.unlink()


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "merge",
        __doc__ or "",
        steps=120,
        seeds={"default": 3} | SEEDS,
        model={"help": "hub name or folder of a BERT-like encoder (default: all-MiniLM-L6-v2)"},
        data={"help": "folder with TASK.tsv files of class<TAB>sentence lines (default: three tasks)"},
        parts={"default": ",".join(PARTS), "help": "which, comma-separated"},
        lr={"type": rate, "default": 3e-4, "help": "peak learning rate of the encoder"},
        head_lr={"type": rate, "default": 1e-3, "help": "of the new head"},
        pull={"type": strength, "default": 0.05, "help": "AdamR's weight"},
        rates={"type": share, "nargs": "+", "default": [0.5, 0.9, 0.99, 0.999], "help": "shares dropped"},
        masks={"type": positive, "default": 2, "help": "random masks each"},
        batch={"type": positive, "default": 16, "help": "sentences a step"},
        length={"type": whole(3), "default": 32, "help": "tokens of a sentence, at most"},
        valid={"type": positive, "default": 120, "help": "sentences of each task kept to choose scales by"},
        test={"type": positive, "default": 300, "help": "sentences of each task kept for testing"},
        resume={"action": "store_true", "help": "keep the finished parts of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts with all seeds and report."""
    args = options().parse_args(argv)
    args.parts = chosen(args.parts, PARTS, "--parts")
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    data = _reviews.tasks(_assets.classifier(args.model, 2)[1], args.data, args.test, args.length)
    for seed in range(args.seed, args.seed + args.seeds):
        for trained in TRAINED:
            of_seed(seed, trained, data, args, run)
        if "patch" in args.parts:
            run.part(f"patch/{seed}", _digits.measure, seed, _digits.EPOCHS, run)
    _merge_report.report(run)


if __name__ == "__main__":
    main()
