"""What the counterfactuals recipe asks about: a table of numbers, models of it, and rows to be explained."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from . import _assets
from ._run import Run, device

BATCH = 64
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What all arms of a seed have in common.

    Attributes:
        data: training rows, all features in [0, 1].
        wanted: those of class 1.
        factuals: test rows that the model gives class 0.
        model: whose decisions are explained.
        others: models trained anew, by what differed, their weights stacked.
        accuracy: on test rows: the model's, and the mean of each kind of the others.
    """

    data: Tensor
    wanted: Tensor
    factuals: Tensor
    model: nn.Module
    others: dict[str, Weights]
    accuracy: dict[str, float]


def network(features: int) -> nn.Sequential:
    """Two hidden layers of 64."""
    return nn.Sequential(
        *(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    )


def table(file: str | None) -> tuple[Tensor, Tensor]:
    """Features and classes: of a CSV file, or of scikit-learn's tumours, of which benign is 1."""
    if file is None:
        from sklearn.datasets import load_breast_cancer

        x, y = load_breast_cancer(return_X_y=True)
    else:
        try:
            rows = np.loadtxt(Path(file).expanduser(), delimiter=",", skiprows=1, ndmin=2)
        except (OSError, ValueError) as error:
            raise _assets.AssetError(f"--data: {file} cannot be read as numbers: {error}") from None
        x, y = rows[:, :-1], rows[:, -1]
    if not (np.isfinite(x).all() and x.shape[1] and set(np.unique(y)) == {0, 1}):
        raise _assets.AssetError(f"--data: {file} must have features, and 0 and 1 in its last column.")
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)


_made: dict[str, Setting] = {}
"""The last one: arms of a seed come one after the other."""


def setting(seed: int, args: Any, run: Run) -> Setting | None:
    """That of a seed, all models trained; None if interrupted."""
    key = repr((seed, run.settings))
    if key not in _made:
        _made.clear()
        if (made := _setting(seed, args, run)) is None:
            return None
        _made[key] = made
    return _made[key]


def _setting(seed: int, args: Any, run: Run) -> Setting | None:
    x, y = table(args.data)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    train, test = order[: (3 * len(x)) // 4], order[(3 * len(x)) // 4 :]
    low, high = x[train].amin(0), x[train].amax(0)
    x = ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).to(device())
    y = y.to(device())
    n = args.others
    everything = train.expand(1 + n, -1)
    again = train[torch.randint(len(train), (n, len(train)), generator=g)]  # with replacement
    weights = trained(x, y, torch.cat([everything, again]), seed, args, run)
    if weights is None:
        return None
    kinds = {"model": slice(0, 1), "new": slice(1, 1 + n), "resampled": slice(1 + n, 1 + 2 * n)}
    parts = {kind: {name: w[some] for name, w in weights.items()} for kind, some in kinds.items()}
    right = {kind: float((voted(one, x[test]) == y[test]).double().mean()) for kind, one in parts.items()}
    model = network(x.shape[1]).to(x.device)
    model.load_state_dict({name: w[0] for name, w in parts.pop("model").items()})
    rows = x[test][model(x[test]).argmax(1) == 0][: args.factuals]
    if not len(rows):
        raise _assets.AssetError(
            "--data: the model gives class 0 to no test row: there is nothing to explain."
        )
    return Setting(x[train], x[train][y[train] == 1], rows, model, parts, right)


def trained(x: Tensor, y: Tensor, rows: Tensor, seed: int, args: Any, run: Run) -> Weights | None:
    """As many networks as there are rows of row numbers, all at once; None if interrupted."""
    torch.manual_seed(seed)
    networks = [network(x.shape[1]).to(x.device) for _ in rows]
    stacked, _ = stack_module_state(networks)
    weights = {name: w.detach().requires_grad_() for name, w in stacked.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=args.lr)
    call = vmap(functools.partial(functional_call, networks[0]))
    batches: list[Tensor] = []
    for _ in run.steps(f"{len(rows)} models, seed {seed}", 0, args.steps):
        if not batches:
            mixed = torch.stack([row[torch.randperm(len(row))] for row in rows])
            batches = list(mixed.to(x.device).split(BATCH, 1))
        batch = batches.pop()
        logits = call(weights, x[batch])
        optimizer.zero_grad()
        # A mean over rows and a sum over networks, whose gradients are their own.
        (
            F.cross_entropy(logits.flatten(0, 1), y[batch].flatten(), reduction="sum") / batch.shape[1]
        ).backward()
        optimizer.step()
    return None if run.interrupt.wanted else {name: w.detach() for name, w in weights.items()}


def voted(weights: Weights, x: Tensor) -> Tensor:
    """The classes that stacked networks give rows, (networks, rows)."""
    call = vmap(functools.partial(functional_call, network(x.shape[1])), in_dims=(0, None))
    return call(weights, x).argmax(-1)


def agreeing(weights: Weights, x: Tensor) -> Tensor:
    """Which share of networks gives each row class 1."""
    return (voted(weights, x) == 1).double().mean(0)


def outliers(setting: Setting, x: Tensor) -> Tensor:
    """The local outlier factor among training rows of class 1: about 1 where it is as dense as there."""
    from sklearn.neighbors import LocalOutlierFactor

    among = setting.wanted.cpu().numpy()
    factor = LocalOutlierFactor(min(20, len(among) - 1), novelty=True).fit(among)
    return torch.tensor(-factor.score_samples(x.cpu().numpy()))
