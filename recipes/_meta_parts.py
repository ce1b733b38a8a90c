"""What the meta recipe learns: tasks of sine curves, and of telling two of Shakespeare's plays apart."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx

from . import _assets
from ._run import device

Inputs = tuple[Tensor, ...]

SPARE, TRAINING = 50_000, 100_000
"""Tasks from the first number on choose the rate of adaptation, from the second on they train."""

SAMPLES = 40
"""Draws of the posterior in tests."""


@dataclass(frozen=True)
class Examples:
    """What a model is called with, and what it is to say."""

    inputs: Inputs
    target: Tensor

    def and_also(self, other: Examples) -> Examples:
        """All of both."""
        both = tuple(map(torch.cat, zip(self.inputs, other.inputs, strict=True)))
        return Examples(both, torch.cat([self.target, other.target]))


class Adapted(Protocol):
    """What training gives: outputs for a query after adaptation, (1 or samples, ...)."""

    def __call__(self, support: Examples, query: Examples, lr: float, samples: int) -> Tensor:
        """Adapts to the support set at a rate."""
        ...


@dataclass(frozen=True)
class Domain:
    """Tasks of one kind, and the frozen model that adapters learn them with.

    Attributes:
        name: of the kind.
        model: makes one, the same for all arms of a seed.
        targets: the modules that adapters are attached to.
        task: support and query set of a task, by its number.
        loss: of outputs.
        inner_lr: the rate of adaptation in training.
        c: the deviation of weights at ABMLL's start.
    """

    name: str
    model: Callable[[], nn.Module]
    targets: str
    task: Callable[[int], tuple[Examples, Examples]]
    loss: Callable[[Tensor, Tensor], Tensor]
    inner_lr: float
    c: float

    def training(self, step: int, tasks: int) -> list[tuple[Examples, Examples]]:
        """Those of one step."""
        return [self.task(TRAINING + tasks * step + i) for i in range(tasks)]


def loss_of(domain: Domain, model: nn.Module, examples: Examples) -> Tensor:
    """The mean over examples."""
    return domain.loss(model(*examples.inputs), examples.target)


def judged(domain: Domain, adapted: Adapted, tests: int) -> dict[str, Any]:
    """How tasks are done after adaptation, at the rate that is best on a quarter as many other tasks."""
    rates = [domain.inner_lr * factor for factor in (0.3, 1.0, 3.0)]
    others = [domain.task(SPARE + i) for i in range(max(1, tests // 4))]
    score = {lr: sum(_error(domain, adapted, task, lr) for task in others) for lr in rates}
    lr = min(rates, key=lambda one: score[one])
    draws, targets = [], []
    for number in range(tests):
        support, query = domain.task(number)
        draws.append(adapted(support, query, lr, SAMPLES))
        targets.append(query.target)
    found, target = torch.cat(draws, 1), torch.cat(targets)
    if target.is_floating_point():
        ends = torch.tensor([0.05, 0.95], device=found.device)
        low, high = found.quantile(ends, dim=0)
        inside = ((target >= low) & (target <= high)).float().mean()
        error = F.mse_loss(found.mean(0), target)
        return {
            "lr": lr,
            "error": float(error),
            "covered": float(inside),
            "width": float((high - low).mean()),
        }
    probs = found.softmax(-1).mean(0)
    nll = F.nll_loss(probs.clamp_min(1e-9).log(), target)
    right = (probs.argmax(1) == target).float().mean()
    ece = optx.analysis.calibration_error(probs, target)
    return {"lr": lr, "accuracy": float(right), "ece": ece, "nll": float(nll)}


def _error(domain: Domain, adapted: Adapted, task: tuple[Examples, Examples], lr: float) -> float:
    try:
        found = adapted(*task, lr, 1).mean(0)
    except optx.OptxError:  # ABMLL tells of losses that are not finite
        return math.inf
    loss = float(domain.loss(found, task[1].target))
    return loss if math.isfinite(loss) else math.inf


# ---- sine curves ------------------------------------------------------------------------------------


def curves(seed: int, support: int = 10, query: int = 20) -> Domain:
    """y = a sin(x + b), a in [0.5, 2] and b in [0, pi], on [-5, 5]; the network has learnt their mean."""
    torch.manual_seed(seed)
    layers = [nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
    base = nn.Sequential(*layers).to(device())
    optimizer = torch.optim.Adam(base.parameters(), lr=3e-3)
    x = torch.linspace(-5, 5, 200, device=device())[:, None]
    for _ in range(600):
        optimizer.zero_grad()
        F.mse_loss(base(x), 2.5 / math.pi * x.cos()).backward()  # the mean over a and b
        optimizer.step()

    def task(number: int) -> tuple[Examples, Examples]:
        g = torch.Generator().manual_seed(number)
        a, b = 0.5 + 1.5 * torch.rand((), generator=g), math.pi * torch.rand((), generator=g)
        x = 10 * torch.rand(support + query, 1, generator=g) - 5
        x, y = x.to(device()), (a * (x + b).sin()).to(device())
        return Examples((x[:support],), y[:support]), Examples((x[support:],), y[support:])

    return Domain("curves", lambda: copy.deepcopy(base), "2", task, F.mse_loss, inner_lr=0.1, c=0.03)


# ---- plays ------------------------------------------------------------------------------------------


def passages(folder: str | None) -> dict[str, list[str]]:
    """Some paragraphs of each text file of a folder that has as many; of Shakespeare's works if None."""
    where = _assets.unpacked(_assets.SHAKESPEARE) if folder is None else Path(folder).expanduser()
    found: dict[str, list[str]] = {}
    for file in sorted(where.glob("*.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")
        parts = [re.sub(r"\s+", " ", part) for part in re.split(r"\n\s*\n", text)]
        # Who speaks is said in capitals, and would give the play away.
        spoken = [re.sub(r"\[.*?\]|\b[A-Z]{2,}\b\.?", "", part).strip() for part in parts]
        long = [part for part in spoken if len(part.split()) >= WORDS]
        if len(long) >= EACH:
            order = torch.randperm(len(long), generator=torch.Generator().manual_seed(0))[:EACH]
            found[file.stem] = [long[i] for i in order.tolist()]
    if len(found) < 6:
        raise _assets.AssetError(
            f"--data: {folder} has {len(found)} files *.txt of at least {EACH} paragraphs; it takes 6."
        )
    return found


@functools.cache
@torch.no_grad()
def embedded(model: str | None, folder: str | None) -> tuple[nn.Module, Tensor]:
    """An encoder's pooling layer, and its embeddings of passages (texts, passages, width): mean states."""
    classifier, tokenizer = _assets.classifier(model, 2)
    encoder = classifier.base_model.eval().to(device())
    found: list[Tensor] = []
    for one in passages(folder).values():
        batch = tokenizer(one, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        mask = batch.attention_mask.to(device())
        states = encoder(batch.input_ids.to(device()), attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found.append(F.normalize(mean, dim=1) * mean.shape[1] ** 0.5)
    return encoder.pooler.dense, torch.stack(found)


def plays(seed: int, model: str | None, folder: str | None, shots: int = 5) -> Domain:
    """Which of two plays a passage is from: no class has a name, and plays of tests are not in training."""
    dense, texts = embedded(model, folder)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    head = nn.Linear(dense.out_features, 2, bias=False)  # pyright: ignore[reportArgumentType, reportUnknownMemberType]
    nn.init.orthogonal_(head.weight)
    top = nn.Sequential(copy.deepcopy(dense), nn.Tanh(), head.to(device())).requires_grad_(True)

    def task(number: int) -> tuple[Examples, Examples]:
        g = torch.Generator().manual_seed(number)
        among = order[: len(order) // 3] if number < TRAINING else order[len(order) // 3 :]
        two = among[torch.randperm(len(among), generator=g)[:2]]
        rows = [texts[play][torch.randperm(EACH, generator=g)[: 3 * shots]] for play in two.tolist()]
        parts = [torch.cat([one[part] for one in rows]) for part in (slice(shots), slice(shots, None))]
        labels = [torch.arange(2, device=device()).repeat_interleave(len(part) // 2) for part in parts]
        support, query = (Examples((x,), y) for x, y in zip(parts, labels, strict=True))
        return support, query

    return Domain("plays", lambda: copy.deepcopy(top), "0", task, F.cross_entropy, inner_lr=0.1, c=0.01)


EACH, WORDS, LENGTH = 20, 40, 64
"""Passages of a text, their words at least, and their tokens at most."""
