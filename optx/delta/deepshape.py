"""DeepShape: a checkpoint's weights moved to a distribution with a higher peak, which takes fewer bits.

Source: arXiv 2506.00486v3, section 4; the authors' ``deepshape.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx._buffers import PIECE
from optx._errors import OptxError, check_range, check_whole, shown, warn
from optx._generalised_gaussian import fit_scale, fit_shape
from optx.delta._checkpoint_output import plan_of, write_checkpoint
from optx.delta._checkpoint_source import Checkpoint, Files, Source, open_source
from optx.delta._name_filter import floating
from optx.delta._refusals import check_not_quantised
from optx.kernels.available import demand

MOST = 1 << 16
"""Levels on either side of 0 that are counted; what is further out is in the tails."""
_Ints = npt.NDArray[np.int64]
Bar = Callable[[Iterable[str]], Iterable[str]]


def deepshape(
    target: Checkpoint,
    shape_scale: float = 0.8,
    std_scale: float = 0.6,
    *,
    min_count: int = 1000,
    step: float = 2**-13,
    include: str | None = None,
    exclude: str | None = None,
    out: str | PathLike[str] | None = None,
    progress: Bar = lambda names: names,
) -> dict[str, Tensor] | Path:
    """Move weights, rank by rank, to a generalised Gaussian with a higher peak (DeepShape).

    All weights together are rounded to levels, multiples of ``step``. Those that are no further from the mean
    than the first positive level with few weights are sorted, and the lowest of them get the lowest level, as
    many as the new distribution gives it, and so on: they keep their order, and the histogram becomes that of
    the generalised Gaussian that was fitted, with ``shape_scale`` times its shape and ``std_scale`` times its
    scale. Entropy coders take fewer bits for it; fine-tune shortly afterwards.

    The checkpoint is read twice, a few tensors at a time in memory; it stays as it is.

    Args:
        target: a module, a state dict, a safetensors file, or a folder of shards.
        shape_scale: of the shape nu; below 1 the peak is higher and the tails longer.
        std_scale: of the scale alpha; below 1 weights are smaller.
        min_count: where the tails begin: at the smallest positive level that occurs, and so often at most.
            1000 is for models of a hundred million weights.
        step: between two levels.
        include: regex of the names that are pooled and moved (full match); None: floating tensors of two
            dimensions or more. The authors' code pools every parameter: ``include=".*"``.
        exclude: regex of the names that are left as they are.
        out: a ``.safetensors`` file or a new folder, for what is on the disk. It is written under a hidden
            name and renamed; killed, the same call goes on where it stopped.
        progress: wraps the names that are written, as ``tqdm.tqdm`` does.

    Returns:
        A new state dict, or the path that was written. Tensors keep their dtypes.

    Paper values:
        ``shape_scale=0.8``, ``std_scale=0.6``, ``min_count=1000``, ``step=2**-13``: the authors' code (the
            defaults).

    Limits: With the paper's scales a shape above 0.8 saves bits (0.5 a weight at 2, 0.2 at 1); below, the
        longer tails outweigh the higher peak, and a warning says so. Weights in the tails, and the few
        highest that are left over because numbers of weights are whole, are rounded to levels and not
        moved, as in the authors' code. Where weights of one level go to several, the first (by tensor and
        position) go to the lowest. A dtype of 16 bits rounds large levels once more.

    Keywords: compression, quantisation, quantization, entropy coding, generalised Gaussian, generalized
    Gaussian, histogram.

    Evidence: ``optx run compress``; ``test_deepshape.py``.

    Raises:
        OptxError: an option out of range; inf or nan among the weights (names the tensor); no level has so
            few weights; or ``out`` is needed, or exists.
        FileError: a file is missing or damaged.

    Example:
        >>> import torch, optx
        >>> weights = {"w": 0.05 * torch.randn(512, 64, generator=torch.Generator().manual_seed(0))}
        >>> moved = optx.deepshape(weights, min_count=10, step=2**-9)
        >>> bool(moved["w"].std() < 0.8 * weights["w"].std())
        True

    Source: arXiv 2506.00486v3, section 4.
    """
    options = (shape_scale, std_scale, min_count, step)
    _check(*options)
    demand("numba", "DeepShape's histograms")
    source = open_source(target, "target")
    if out is None and isinstance(source, Files):
        raise OptxError("deepshape: target is on the disk; give out=, where the result is written to.")
    names = floating("deepshape", source.entries, include, exclude)
    check_not_quantised("deepshape", source.entries, source.label, set(names).__contains__)
    job = _Job(source, names, step, _ranks(source, names, *options))
    if out is None:
        made = {
            name: job.tensor(name) if name in names else source.read(name).clone() for name in source.entries
        }
        return {**made, **{name: made[first] for name, first in source.tied.items()}}
    plan = plan_of("deepshape", source.label, source.state, options, names)
    return write_checkpoint(
        Path(out).expanduser(), source, source.entries, job.write, plan=plan, progress=progress
    )


def _check(shape_scale: float, std_scale: float, min_count: int, step: float) -> None:
    for name, value in (("shape_scale", shape_scale), ("std_scale", std_scale), ("step", step)):
        check_range("deepshape", name, value, 0.0)
        if not 0 < value < math.inf:
            raise OptxError(f"deepshape: {name} is {shown(value)}; it must be above 0 and finite.")
    check_whole("deepshape", "min_count", min_count, 1)


@dataclass(frozen=True)
class Ranks:
    """Which levels are moved, and where to.

    Attributes:
        first: the lowest of them.
        begins: int64, by level: how many weights are on lower ones.
        ends: int64, by new level, from ``first`` on: how many weights are on it and on lower ones afterwards.
    """

    first: int
    begins: _Ints
    ends: _Ints


@functools.cache
def _loops() -> ModuleType:
    from optx.kernels.generated import load_module, source

    return load_module("delta_levels", source("optx.delta", "_levels_loops.py"))


def _pieces(flat: Tensor) -> Iterable[Tensor]:
    return (flat[at : at + PIECE].to("cpu", torch.float64) for at in range(0, flat.numel(), PIECE))


def _ranks(
    source: Source, names: list[str], shape_scale: float, std_scale: float, min_count: int, step: float
) -> Ranks:
    """The first pass: all levels counted, the fit, and the new distribution."""
    counts, sums = np.zeros(2 * MOST + 1, np.int64), np.zeros((MOST + 1, 2, 4))
    for name in names:
        for piece in source.pieces(name):
            if not _loops().count(piece.to("cpu", torch.float64).numpy(), step, counts, sums):
                raise OptxError(f"deepshape: {name!r} has inf or nan among its weights.")
    few = np.flatnonzero((counts[MOST + 1 :] > 0) & (counts[MOST + 1 :] <= min_count))
    if not len(few):
        raise OptxError(
            f"deepshape: no positive level occurs, and at most min_count={min_count} times, so there is no "
            "end of what is moved. Raise min_count, or lower step."
        )
    reach = int(few[0]) + 1
    return _planned(counts, sums, reach, shape_scale, std_scale, min_count, step)


def _planned(
    counts: _Ints,
    sums: npt.NDArray[np.float64],
    reach: int,
    shape_scale: float,
    std_scale: float,
    min_count: int,
    step: float,
) -> Ranks:
    total, mean, absolute, square = sums[:reach].sum((0, 1)) + sums[reach, 0]
    if not total:
        raise OptxError(
            f"deepshape: level {reach} occurs min_count={min_count} times at most, and no weight is nearer "
            "to 0, so there is nothing to fit a shape to. Lower min_count, or raise step."
        )
    shape = fit_shape(absolute, square, total)
    fitted = fit_scale(shape, square, total) / step
    scale = std_scale * fitted
    middle = int(mean / total / step)  # towards 0, as the authors' code has it
    first = middle - reach
    own = counts[max(first + MOST, 0) : middle + reach + MOST + 1]
    if len(own) < 2 * reach + 1:
        raise OptxError(f"deepshape: what is moved reaches beyond {MOST} levels; raise step or min_count.")
    moved = int(own.sum())
    if 2 * moved < int(counts.sum()):
        warn(
            f"deepshape: {moved:,} of {int(counts.sum()):,} weights are moved, those up to {reach} levels "
            f"from the mean, since level {reach} occurs {min_count} times at most; the others are only "
            "rounded. Lower min_count, or raise step."
        )
    more = _bits(shape_scale * shape, scale) - _bits(shape, fitted)
    if more > 0:
        warn(
            f"deepshape: the weights' own shape is {shape}; with shape_scale={shape_scale} and "
            f"std_scale={std_scale} the new distribution takes {more:.2f} bits a weight more than that, not "
            "fewer. Lower std_scale."
        )
    away = np.abs(np.arange(-reach, reach + 1)) / max(scale, 1e-300)
    with np.errstate(over="ignore"):
        mass = np.exp(-(away ** (shape_scale * shape)))
    ends = np.floor(moved * (mass / mass.sum())).astype(np.int64).cumsum()
    return Ranks(first, own.cumsum() - own, ends)


def _bits(shape: float, scale: float) -> float:
    """The entropy of a generalised Gaussian, up to what depends on the step alone."""
    inside = math.log(2 * max(scale, 1e-300) / shape) + math.lgamma(1 / shape)
    return (1 / shape + inside) / math.log(2)


class _Job:
    """The second pass: tensors moved one after the other, in the order in which they were counted.

    Args:
        source: of the tensors.
        names: of those that are moved, in order.
        step: between two levels.
        ranks: where to.
    """

    def __init__(self, source: Source, names: list[str], step: float, ranks: Ranks) -> None:
        self._source, self._names, self._step, self._ranks = source, names, step, ranks
        self._done = len(names)  # whoever asks for the first begins anew
        self._places: Any = None
        self._targets: Any = None

    def _begin(self) -> None:
        self._done, self._places = 0, np.array(self._ranks.begins)
        self._targets = np.zeros_like(self._ranks.begins)

    def write(self, name: str) -> Tensor | Callable[[int, int], Tensor]:
        """A tensor of the result, or what gives its pieces."""
        if name in self._names:
            return self.tensor(name)
        return lambda begin, end: self._source.piece(name, begin, end)

    def tensor(self, name: str) -> Tensor:
        """A tensor that is moved. Those before it, which another run had written, are gone through again."""
        at = self._names.index(name)
        if at < self._done:
            self._begin()
        for before in self._names[self._done : at]:
            self._move(before)
        made = self._move(name)
        self._done = at + 1
        return made

    def _move(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        flat, made = tensor.reshape(-1), torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        at, room = 0, made.view(-1)
        for piece in _pieces(flat):
            moved: Any = np.empty(len(piece))
            ranks = self._ranks
            _loops().move(
                piece.numpy(), self._step, ranks.first, self._places, self._targets, ranks.ends, moved
            )
            room[at : at + len(piece)] = torch.as_tensor(moved).to(tensor.device, tensor.dtype)
            at += len(piece)
        return made
