"""Pruning of what fine-tuning changed: at random (DARE, DAREx-q), by importance, by whole columns.

Sources: DARE, arXiv 2311.03099; DAREx-q, importance and structural pruning, "DARE the Extreme: Revisiting
Delta-Parameter Pruning For Fine-Tuned Models", arXiv 2410.09344; Wanda's score, arXiv 2306.11695.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_range, near
from optx.delta._input_stats import InputStats
from optx.delta._random_mask import Dropout, key_of, ranks

Rescale: TypeAlias = float | Mapping[str, float] | None
"""What kept elements are divided by: None, 1 - p; a number; or one per tensor."""

_ROWS = 1 << 22  # numbers of a matrix that are sorted together


def check_p(owner: str, p: float, q: Rescale = None) -> None:
    """Refuse a share outside [0, 1); 1 is one if the rescaling is given, as 1 - p would be 0.

    Raises:
        OptxError: ``p`` or ``q`` is out of range.
    """
    if not isinstance(p, int | float) or not (0.0 <= p < 1.0 or (p == 1.0 and q is not None)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"{owner}: p is {p!r}; the share that is dropped must be at least 0 and below 1.")
    for number in q.values() if isinstance(q, Mapping) else [] if q is None else [q]:
        # A little below 1 - p comes from rounding: 1 - 0.9 is not 0.1.
        check_range(owner, "q", number, (1.0 - p) * (1 - 1e-6), 1.0)


def rescales(owner: str, names: Iterable[str], p: float, q: Rescale) -> Callable[[str], float]:
    """q by tensor name. One without its own has its weight's, if it is a bias, else the mean of all.

    Raises:
        OptxError: ``q`` names no tensor.
    """
    if not isinstance(q, Mapping):
        number = 1.0 - p if q is None else float(q)
        return lambda _name: number
    known = set(names)
    for name in q:
        if name not in known:
            raise OptxError(f"{owner}: q has {name!r}, which is no tensor to prune. {near(name, known)}")
    if not q:
        raise OptxError(f"{owner}: q is empty; give None, a number, or a number for each tensor.")
    own, mean = dict(q), sum(q.values()) / len(q)
    return lambda name: own.get(name, own.get(name.removesuffix("bias") + "weight", mean))


def dropouts(
    owner: str, names: Iterable[str], p: float, q: Rescale, seed: int
) -> tuple[Callable[[str], Dropout], tuple[Any, ...]]:
    """DARE's mask and rescaling by tensor name, and a description in plain values.

    Raises:
        OptxError: ``p`` or ``q`` is out of range, or ``q`` names no tensor.
    """
    check_p(owner, p, q)
    factor = rescales(owner, names, p, q)
    plain = tuple(sorted(q.items())) if isinstance(q, Mapping) else q
    return lambda name: Dropout(key_of(seed, name), p, factor(name)), (p, plain, seed)


def drop_smallest(change: Tensor, score: Tensor, count: int) -> Tensor:
    """A copy in which the ``count`` elements of the lowest score are 0; of equals, the first go first.

    Args:
        change: any shape.
        score: as many, not negative.
        count: how many go.
    """
    if count <= 0:
        return change.clone()
    kept = kept_largest(score, count)
    return change.masked_fill(~kept.view(change.shape).to(change.device), 0)


def kept_largest(score: Tensor, count: int) -> Tensor:
    """A mask without the ``count`` lowest scores; of equals, the first go first.

    Args:
        score: any shape, not negative.
        count: how many go.

    Returns:
        bool of the scores' shape: True where one is kept.
    """
    if not 0 < count < score.numel():
        return torch.full(score.shape, count <= 0, device=score.device)
    scores = score.reshape(-1)
    flat = scores.cpu().numpy().copy()
    flat.partition(count - 1)  # in place: torch.kthvalue would carry an index of 8 bytes per element
    threshold = float(flat[count - 1])
    del flat
    kept = scores > threshold
    spare = count - int((scores < threshold).sum())
    equal = (scores == threshold).nonzero()[spare:]
    kept[equal.flatten()] = True
    return kept.view(score.shape)


def magnitude(change: Tensor, p: float) -> Tensor:
    """The int(n p) smallest changes are 0; exactly as many, also among equals."""
    return drop_smallest(change, change.abs(), int(change.numel() * p))


def wanda(change: Tensor, p: float, stats: InputStats) -> Tensor:
    """In each output row the int(d_in p) inputs with the lowest |change| * |x| are 0.

    Args:
        change: (d_out, d_in), or (d_in, d_out) if ``stats.axis`` is 0.
        p: share dropped.
        stats: of the inputs; its norm has shape (d_in,).
    """
    matrix = change if stats.axis == 1 else change.t()
    count = int(matrix.shape[1] * p)
    norm = stats.norm.to(matrix.device, matrix.dtype)
    pruned = matrix.clone()
    for rows in pruned.split(max(1, _ROWS // matrix.shape[1])):  # a sort's indices take 8 bytes a number
        lowest = torch.argsort(rows.abs() * norm, dim=1, stable=True)[:, :count]
        rows.scatter_(1, lowest, 0.0)
    return pruned if stats.axis == 1 else pruned.t().contiguous()


def check_stats(entries: Mapping[str, Any], stats: Mapping[str, InputStats], owner: str) -> None:
    """Refuse statistics of another model.

    Raises:
        OptxError: a name that the delta lacks.
        ShapeError: another number of inputs; names the tensor.
    """
    if not stats:
        raise OptxError(f"{owner}: stats is empty; make it with optx.analysis.input_stats(model, batches).")
    for name, one in stats.items():
        if name not in entries:
            raise OptxError(f"{owner}: stats has {name!r}, which the delta lacks. {near(name, entries)}")
        shape = entries[name].shape
        if len(shape) != 2 or shape[one.axis] != one.norm.numel():
            raise ShapeError(
                f"{owner}: {name!r} has shape {shape} in the delta, and the statistics are of "
                f"{one.norm.numel()} inputs along dimension {one.axis}."
            )


def structural(name: str, change: Tensor, p: float, q: float | None, seed: int, axis: int) -> Tensor:
    """Only round((1-p) d_in) random columns, the same for all rows, over q.

    Args:
        name: of the tensor: it and the seed choose the columns.
        change: two or more dimensions; with fewer it is given back as it is.
        p: share dropped.
        q: None divides by the share that is kept in truth.
        seed: of the choice.
        axis: the dimension that runs over inputs.
    """
    if change.ndim < 2 or change.shape[axis] == 0:
        return change
    width = change.shape[axis]
    count = max(1, round((1.0 - p) * width))
    columns = torch.from_numpy(np.sort(ranks(seed, name, width)[:count])).to(change.device)
    kept = change.index_select(axis, columns) / (count / width if q is None else q)
    return torch.zeros_like(change).index_copy_(axis, columns, kept)
