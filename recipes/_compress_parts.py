"""What the compress recipe trains, and what it does to trained weights."""

from __future__ import annotations

import copy
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx
from optx._generalised_gaussian import fit_shape, pooled_sums

from . import _assets
from ._characters import Characters, loss_of
from ._handwriting import handwriting
from ._reweight_parts import Transformer

RARE = 10  # DeepShape's tails begin at a level with so few weights; the paper's 1000 is for 124 M weights


class Task(NamedTuple):
    """What is trained.

    Attributes:
        model: a new one, from torch's random state.
        loss: of a model, in the batch of a step.
        score: what counts, on what is not trained on.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    score: Callable[[nn.Module], float]


def digits(seed: int, args: Namespace) -> Task:
    """A perceptron, 64-256-256-10, of scikit-learn's digits; its score is accuracy."""
    images, y = handwriting()
    x = images.flatten(1)
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draws)
    learn, test = order[:1437], order[1437:]
    rows: list[Tensor] = []

    def loss(model: nn.Module, step: int) -> Tensor:
        while len(rows) <= step:  # epoch after epoch; a later model is given the same batches
            rows.extend(learn[torch.randperm(len(learn), generator=draws)].split(args.batch))
        return F.cross_entropy(model(x[rows[step]]), y[rows[step]])

    def model() -> nn.Module:
        layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        return nn.Sequential(*layers)

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return float((model(x[test]).argmax(1) == y[test]).float().mean())

    return Task(model, loss, score)


def characters(seed: int, args: Namespace) -> Task:
    """A transformer of two layers, 64 wide; its score is held-out loss, nats a character."""
    data = Characters(_assets.text(args.data), args.length)
    return Task(
        lambda: Transformer(data.letters, args.length, 64, 2),
        lambda model, step: loss_of(model, *data.batch(step, args.sequences, seed)),
        data.loss,
    )


TASKS: dict[str, Callable[[int, Namespace], Task]] = {"digits": digits, "characters": characters}


@torch.no_grad()
def counted(task: Task, model: nn.Module, step: float) -> dict[str, Any]:
    """Its score, as it is and rounded to steps; its bits a weight by each coder; its weights' shape."""
    small = copy.deepcopy(model)
    for p in small.parameters():
        p.copy_(torch.round(p / step) * step)
    return {
        "score": task.score(model),
        "rounded": task.score(small),
        "bits": {coder: optx.rate(model, step, coder) for coder in ("exp-golomb", "golomb", "entropy")},
        "zeros": float(torch.cat([(p == 0).flatten() for p in small.parameters()]).double().mean()),
        "shape": fit_shape(*pooled_sums(model.parameters())),
    }


def deepshaped(task: Task, model: nn.Module, args: Namespace) -> dict[str, Any]:
    """A copy whose weights were moved, counted at once and after some steps more."""
    moved = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it costs bits below a shape of 0.8: the table shows it
        weights = optx.deepshape(moved, min_count=RARE, step=args.step, include=".*")
    assert isinstance(weights, dict)
    moved.load_state_dict(weights)
    found: dict[str, Any] = {"at once": counted(task, moved, args.step)}
    optimizer = torch.optim.Adam(moved.parameters(), lr=args.lr / 10)
    for step in range(args.tune):
        optimizer.zero_grad()
        task.loss(moved, step).backward()
        optimizer.step()
    return found | {"tuned": counted(task, moved, args.step)}


def rf8(task: Task, model: nn.Module) -> dict[str, float]:
    """The score with every parameter packed to 8 bits and unpacked."""
    small = copy.deepcopy(model)
    small.load_state_dict(optx.rf8.unpack(optx.rf8.pack(model.state_dict(), include=".*")))
    return {"score": task.score(small)}
