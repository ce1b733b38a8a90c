"""The modes recipe's peaks and networks, and its runs side by side."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import optx

from ._run import Run
from ._side_by_side import Processes

PEAKS = torch.tensor([[x, y] for x in (-0.6, 0.6) for y in (-0.6, 0.6)])
WIDTH = 0.15


def reward(actions: Tensor) -> Tensor:
    """Four equal peaks in the plane: (..., 2) to (...), at most 1."""
    return torch.exp(-(actions.unsqueeze(-2) - PEAKS).square().sum(-1) / (2 * WIDTH**2)).sum(-1)


@torch.no_grad()
def covered(mixture: optx.policy.ActionMixture) -> dict[str, Any]:
    """What a policy of one state does: peaks that a primitive is at, those that get actions, and reward."""
    actions = mixture.sample()
    apart = (actions.unsqueeze(-2) - PEAKS).norm(dim=-1)
    centres = (mixture.centres[0].unsqueeze(-2) - PEAKS).norm(dim=-1)
    return {
        "at": int((centres < WIDTH).any(0).sum()),
        "shares": (apart < 2 * WIDTH).float().mean(0).tolist(),
        "reward": float(reward(actions).mean()),
        "w": mixture.w[0].tolist(),
    }


def network(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Two hidden layers; its last Linear is called ``out``."""
    made = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    made.add_module("out", nn.Linear(width, outputs))
    return made


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """On what is trained."""
    return torch.optim.Adam([p for p in parameters if p.requires_grad], lr=lr, fused=True)


def run_all(run: Run, keys: Sequence[str], train: Callable[..., Any], args: Namespace) -> None:
    """Train what the folder has not yet, side by side, and write each when it ends."""
    if not args.resume:  # what an earlier run there has kept is not this one's
        shutil.rmtree(run.folder / "work", ignore_errors=True)
    jobs = [(key,) for key in keys if not run.finished(key)]
    with Processes(min(args.workers, max(1, len(jobs))), _given, args) as processes:
        ends = processes.each(train, jobs)
        for _ in run.steps("modes", 0, len(jobs)):
            place, run.results["arms"][jobs[place][0]] = next(ends)
            run.write()
        if run.interrupt.wanted:
            raise SystemExit(130)
    arms = run.results["arms"]
    run.results["arms"] = {key: arms[key] for key in dict.fromkeys([*keys, *arms])}
    run.write()


def _given(args: Namespace) -> tuple[Namespace]:
    return (args,)
