"""What the merge recipe measures of fine-tuned encoders: pruned ones, and merged ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optx

from ._experts import Expert, size
from ._run import Run

LAMBDAS = [1 / 3, 0.5, 0.7, 1.0]
"""Scales that are tried for every merge; with the first, task arithmetic is the average of three models."""

Pruning = Callable[[Expert, float, int], optx.Delta]
Merging = Callable[[float], optx.MergeMethod]


def prune(methods: Mapping[str, Pruning], expert: Expert, label: str, args: Any, run: Run) -> Any:
    """Accuracy of one expert with its change pruned, by every method at every rate; None if interrupted."""
    found: dict[str, Any] = {
        "full": expert.accuracy(expert.delta.apply(expert.base)),
        "pretrained": expert.accuracy(expert.base),
        "change": size(expert.delta),
    }
    trials = [(method, p) for method in methods for p in args.rates]
    for i in run.steps(label, 0, len(trials)):
        method, p = trials[i]
        # The search for q has seen masks 0 and 1; magnitude and Wanda have no masks.
        seeds = range(100, 100 + args.masks) if method.startswith("DARE") else [0]
        pruned = [methods[method](expert, p, seed) for seed in seeds]
        found[f"{method}/{p}"] = [expert.accuracy(delta.apply(expert.base)) for delta in pruned]
    found["q"] = {str(p): q for p, q in expert.found_q.items()}
    return None if run.interrupt.wanted else found


def merge(methods: Mapping[str, Merging], experts: Mapping[str, Expert], label: str, run: Run) -> Any:
    """Accuracy of one merged encoder on every task, by every method; None if interrupted."""
    files = [expert.file for expert in experts.values()]
    base, inside = next((expert.base, expert.inside) for expert in experts.values())

    def merged(method: str, lam: float) -> Any:
        return optx.merge(base, files, methods[method](lam), include=inside)

    def tested(encoder: Any) -> dict[str, float]:
        return {task: expert.accuracy(encoder) for task, expert in experts.items()}

    alone = {task: expert.accuracy(expert.delta.apply(base)) for task, expert in experts.items()}
    found: dict[str, Any] = {"pretrained": {"accuracy": tested(base)}, "experts": {"accuracy": alone}}
    names = list(methods)
    for i in run.steps(label, 0, len(names)):

        def score(lam: float, method: str = names[i]) -> float:
            encoder = merged(method, lam)
            return sum(expert.accuracy(encoder, expert.valid) for expert in experts.values())

        best = optx.search(score, {"lam": LAMBDAS}, budget=len(LAMBDAS)).best["lam"]
        found[names[i]] = {"lam": best, "accuracy": tested(merged(names[i], best))}
    return None if run.interrupt.wanted else found
