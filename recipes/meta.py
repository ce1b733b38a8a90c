"""Learn to learn: priors over LoRA updates (ABMLL), against LoRA and Reptile, on sine curves and on plays.

A task has a few examples, to which adapters on a frozen model take five steps of SGD. What they start from
is learnt from other tasks: by ABMLL, as a normal prior; by the same with deviations next to 0 and no
divergence (point: first-order MAML); by Reptile; or by a LoRA on all examples of all tasks (lora). Tasks are
to fit a sine curve (a perceptron that has learnt their mean), and to tell which of two of Shakespeare's plays
a passage is from (all-MiniLM-L6-v2's embeddings, its pooling layer adapts). All have as many tasks and steps;
each takes the rate of adaptation in tests that is best on tasks which are not in the table.

Source: ABMLL, arXiv 2508.14285; Reptile, arXiv 1803.02999.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch

import optx

from . import _meta_report
from ._meta_parts import Adapted, Domain, curves, judged, loss_of, plays
from ._options import SEEDS, positive, rate
from ._run import Run, chosen, parser, settings_of

WAYS = ("abmll", "point", "lora", "reptile")
ARMS = tuple(f"{kind}-{way}" for kind in ("curves", "plays") for way in WAYS)


def bayesian(arm: str, domain: Domain, seed: int, args: Any, run: Run) -> Adapted:
    """ABMLL; the lines that begin with ab are what it takes."""
    model = domain.model()
    prior = {"c": domain.c} if arm == "abmll" else {"c": 1e-8, "beta": 0.0}
    ab = optx.attach(model, optx.ABMLL(rank=args.rank, seed=seed, **prior), domain.targets)
    optx.trainable_only(model, ab)
    outer = torch.optim.Adam(ab.parameters(), lr=args.lr)
    for step in run.steps(f"{domain.name}-{arm}, seed {seed}", 0, args.steps):
        for support, query in domain.training(step, args.tasks):
            with ab.task(inner_steps=args.inner_steps, inner_lr=domain.inner_lr, tasks=args.tasks) as t:
                t.adapt(lambda support=support: loss_of(domain, model, support))
                t.outer(loss_of(domain, model, query)).backward()
        outer.step()
        outer.zero_grad()
        run.live(None, outer, ab)

    def adapted(support: Any, query: Any, lr: float, samples: int) -> torch.Tensor:
        with ab.task(inner_steps=args.inner_steps, inner_lr=lr) as t:
            t.adapt(lambda: loss_of(domain, model, support))
            return ab.draws(lambda: model(*query.inputs), samples)

    return adapted


def plain(arm: str, domain: Domain, seed: int, args: Any, run: Run) -> Adapted:
    """A LoRA, trained on all examples together, or by Reptile: towards where each task's steps lead."""
    model = domain.model()
    handle = optx.attach(model, optx.LoRA(rank=args.rank, alpha=args.rank), domain.targets)
    optx.trainable_only(model, handle)
    theta = handle.parameters()
    outer = torch.optim.Adam(theta, lr=args.lr)

    def steps(examples: Any, count: int, lr: float) -> list[torch.Tensor]:
        """So many steps of SGD; what the parameters were before them."""
        before = [p.detach().clone() for p in theta]
        for _ in range(count):
            grads = torch.autograd.grad(loss_of(domain, model, examples), theta)
            for p, grad in zip(theta, grads, strict=True):
                p.data -= lr * grad
        return before

    for step in run.steps(f"{domain.name}-{arm}, seed {seed}", 0, args.steps):
        for support, query in domain.training(step, args.tasks):
            both = support.and_also(query)
            if arm == "lora":
                (loss_of(domain, model, both) / args.tasks).backward()
                continue
            before = steps(both, args.inner_steps + 1, domain.inner_lr)  # as many backward passes as ABMLL
            for p, old in zip(theta, before, strict=True):
                away = (old - p.detach()) / (domain.inner_lr * args.tasks)
                p.grad = away if p.grad is None else p.grad + away
                p.data.copy_(old)
        outer.step()
        outer.zero_grad()
        run.live(None, outer, handle)

    def adapted(support: Any, query: Any, lr: float, samples: int) -> torch.Tensor:
        before = steps(support, args.inner_steps, lr)
        with torch.no_grad():
            found = model(*query.inputs)[None]
        for p, old in zip(theta, before, strict=True):
            p.data.copy_(old)
        return found

    return adapted


def measured(arm: str, domain: Domain, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """How one arm does on tasks that it was not trained on; None if interrupted."""
    torch.manual_seed(seed)
    learn = bayesian if arm in ("abmll", "point") else plain
    adapted = learn(arm, domain, seed, args, run)
    return None if run.interrupt.wanted else judged(domain, adapted, args.tests)


def options() -> ArgumentParser:
    """The recipe's command line."""
    return parser(
        "meta",
        __doc__ or "",
        steps=300,
        seeds={"default": 3} | SEEDS,
        arms={"default": ",".join(ARMS), "help": "which, comma-separated"},
        tasks={"type": positive, "default": 2, "help": "tasks of a step"},
        inner_steps={"type": positive, "default": 5, "help": "steps of SGD that adapt to a task"},
        tests={"type": positive, "default": 30, "help": "tasks to be tested on"},
        rank={"type": positive, "default": 4, "help": "of all adapters"},
        lr={"type": rate, "default": 0.01, "help": "Adam's rate for what tasks start from"},
        model={"help": "hub name or folder of a BERT-like encoder (default: all-MiniLM-L6-v2)"},
        data={"help": "a folder of text files, to be told apart (default: Shakespeare's works)"},
        resume={"action": "store_true", "help": "keep the finished arms and seeds of an interrupted run"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run all arms with all seeds and report."""
    args = options().parse_args(argv)
    arms = chosen(args.arms, ARMS)
    run = Run(args.out, settings_of(args), args.resume, args.overwrite)
    for seed in range(args.seed, args.seed + args.seeds):
        domains = {"curves": lambda: curves(seed), "plays": lambda: plays(seed, args.model, args.data)}  # noqa: B023
        for kind, made in domains.items():
            mine = [arm for arm in ARMS if arm in arms and arm.startswith(kind)]
            domain = made() if mine else None
            for arm in mine:
                run.part(f"{arm}/{seed}", measured, arm.removeprefix(f"{kind}-"), domain, seed, args, run)
    _meta_report.report(run)


if __name__ == "__main__":
    main()
