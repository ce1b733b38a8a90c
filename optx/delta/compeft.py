"""ComPEFT: keep the signs of the largest changes and one scale for all; drop every magnitude.

Source: ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and
Quantization, arXiv 2311.13171, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from optx._buffers import PIECE
from optx._errors import OptxError, check_range
from optx._safetensors import Entry
from optx.delta import _bitmask as bitmask
from optx.delta._checkpoint_source import Checkpoint, open_source
from optx.delta._compressed import About, Compressed
from optx.delta._delta import Delta
from optx.delta._float32_sums import wide
from optx.delta._refusals import check_not_quantised, whole_names

Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class ComPEFT:
    """How to compress a delta to signs and one scale (ComPEFT).

    Of all numbers of the whole delta, the share ``density`` with the largest magnitudes becomes
    ``±alpha * sigma``, the rest 0; sigma is the standard deviation of all numbers before that. At a density
    of 0.2 a file takes 0.93 bits per number, 17 times less than 16-bit weights.

    Source: arXiv 2311.13171, algorithm 1.

    Args:
        density: share of the numbers that is kept, in (0, 1]. The paper tries 0.05 to 0.5.
        alpha: of the scale. 1 does for models from 13 B; for smaller ones try 0.5 to 10 on validation data:
            `Compressed.scaled` costs nothing.
        compat: "paper" keeps exactly ``max(1, int(density * n))`` numbers (fewer only if fewer aren't 0); of
            equal magnitudes the first, by tensor name and position. "repo" keeps what the authors' code
            keeps: everything from the next magnitude on, one number more and all its equals.

    Paper values:
        ``density=0.2``: the authors' code (the default); ``density=0.05`` to ``density=0.5`` are tried.
        ``alpha=1.0``: models from 13 B (the default); for smaller ones ``alpha=0.5`` to ``alpha=10`` are
            tried on validation data.

    Limits: One scale for the whole delta: where changes are large (a weak base), much of them is lost.

    Keywords: compression, sparse, ternary, quantisation, memory.

    Evidence: ``test_compeft.py``, ``test_golomb.py``; no recipe.

    Raises:
        OptxError: an option out of range.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.zeros(10)}
        >>> tuned = {"w": torch.tensor([0.5, -0.1, 0.2, -0.9, 0.05, 0.3, -0.4, 0.7, -0.6, 0.15])}
        >>> small = optx.compress(optx.Delta.between(base, tuned), optx.ComPEFT(density=0.3, alpha=2))
        >>> small.delta()["w"][2:5]
        tensor([ 0.0000, -0.9964,  0.0000])
    """

    density: float = 0.2
    alpha: float = 1.0
    compat: Literal["paper", "repo"] = "paper"

    def __post_init__(self) -> None:
        check_range("ComPEFT", "density", self.density, 0.0, 1.0)
        if self.density == 0 or isinstance(self.density, bool):
            raise OptxError(f"ComPEFT: density is {self.density!r}; it must be above 0 and at most 1.")
        check_range("ComPEFT", "alpha", self.alpha, 0.0)
        if not math.isfinite(self.alpha):
            raise OptxError(f"ComPEFT: alpha is {self.alpha!r}; it must be finite.")
        if self.compat not in ("paper", "repo"):
            raise OptxError(f"ComPEFT: compat is {self.compat!r}; it must be 'paper' or 'repo'.")

    def rank(self, numel: int) -> int:
        """Which magnitude, counted from the largest, is the threshold."""
        count = int(self.density * numel)
        if self.compat == "paper":
            return max(1, count)
        if count + 1 > numel:
            raise OptxError(
                f"ComPEFT: compat='repo' keeps one number more than density={self.density} asks for, and "
                f"there are only {numel}. Lower the density, or use compat='paper'."
            )
        return count + 1


def compress(
    what: Delta | Checkpoint,
    options: ComPEFT | None = None,
    *,
    start: float = 0.0,
    progress: Progress = lambda names: names,
) -> Compressed:
    """Compress a delta, or an adapter's own tensors, to signs and one scale.

    Every tensor is read three times (for sigma and the coarse order of magnitudes, for the threshold, for the
    masks). In memory are a few megabytes and the masks, 2 bits per number; of a delta that can't be made by
    pieces (pruned by importance), one tensor. The threshold is exact, over all tensors together.

    Args:
        what: a delta; or a state dict, module, file or folder of an adapter, whose tensors are themselves
            the change from ``start``.
        options: None for the defaults of `ComPEFT`.
        start: of an adapter's numbers before training: 0 for LoRA (its random A is compressed as it is, as
            the paper does), 1 for (IA)³. Not for a delta.
        progress: wraps the names that are read, as ``tqdm.tqdm`` does.

    Paper values:
        ``start=0.0``: LoRA's factors (the default).
        ``start=1.0``: (IA)³'s scales. `ComPEFT` has the others.

    Limits: As of `ComPEFT`.

    Keywords: ComPEFT, compression, sparse, ternary, quantisation, memory.

    Evidence: ``test_compeft.py``, ``test_golomb.py``; no recipe.

    Raises:
        OptxError: a number isn't finite (names the tensor), or there are fewer than two.

    Example:
        >>> import torch, optx
        >>> adapter = {"lora_A": torch.randn(8, 1024), "lora_B": torch.randn(1024, 8)}
        >>> small = optx.compress(adapter, optx.ComPEFT(density=0.1))
        >>> small
        <Compressed: 16,384 numbers, 0.1 kept, 0.67 bits each on the disk>
        >>> {name: tuple(tensor.shape) for name, tensor in small.decode().items()}
        {'lora_A': (8, 1024), 'lora_B': (1024, 8)}

    Source: arXiv 2311.13171, algorithm 1.
    """
    options = options or ComPEFT()
    adapter = not isinstance(what, Delta)
    if not adapter and start != 0.0:
        raise OptxError(f"compress: start is {start!r}; a delta is the change itself, leave start out.")
    delta, entries = _as_delta(what, start)
    names = sorted(name for name in delta.floating if delta.entries[name].numel)
    total = sum(delta.entries[name].numel for name in names)
    if total < 2:
        raise OptxError(f"compress: there are {total} floating numbers; sigma needs at least 2.")
    rank = options.rank(total)

    def values(name: str) -> Iterator[tuple[int, Tensor]]:
        read, numel = delta.reader(name), delta.entries[name].numel
        for begin in range(0, numel, PIECE):
            piece = read(begin, min(begin + PIECE, numel))
            yield begin, piece.to("cpu", torch.float32).contiguous()

    for base in delta.bases:
        base.watch()  # the survey reads all of it
    sigma, upper, above = _survey(names, values, rank, progress)
    threshold, above, equal = _refine(names, values, upper, rank, above, progress)
    ties = equal if options.compat == "repo" else min(equal, rank - above)
    sizes = {name: delta.entries[name].numel for name in names}
    masks, kept_mean = _pack(sizes, values, threshold, ties, equal, progress)
    whole = {name: delta[name] for name, entry in entries.items() if not entry.dtype.is_floating_point}
    for name in delta.floating:
        if name not in masks:  # no numbers
            masks[name] = torch.empty(2, 0, dtype=torch.int64)
    about = About(
        sigma=sigma,
        alpha=float(options.alpha),
        density=options.density,
        kept_mean=kept_mean,
        compat=options.compat,
        start=float(start) if adapter else None,
        fingerprints=delta.fingerprints,
        tied=delta.tied,
        contents={name: found for name in names if (found := delta.content(name))},
    )
    recipe = ("compeft", options.density, options.compat, delta.recipe)
    return Compressed(entries, {n: masks[n] for n in entries if n in masks}, whole, about, recipe)


def _as_delta(what: Delta | Checkpoint, start: float) -> tuple[Delta, dict[str, Entry]]:
    """What changed, and the entries as they are to be decoded."""
    if isinstance(what, Delta):
        if what.whole:
            raise OptxError(
                f"compress: {whole_names(what.whole)} are taken whole from the tuned model: no change to "
                "compress. Leave them out with delta.subset(exclude=...), and keep them beside."
            )
        return what, what.entries
    source = open_source(what, "what")
    check_not_quantised("compress", source.entries, "what", lambda _name: True)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        change = tensor.to(wide(tensor.dtype))
        return change - start if start else change

    made = Delta(
        source.entries,
        lambda name: moved(source.read(name)),
        recipe=("start", source.label, source.state, start),
        tied=source.tied,
        piece=lambda name, begin, end: moved(source.piece(name, begin, end)),
    )
    return made, source.entries


Values = Callable[[str], Iterable[tuple[int, Tensor]]]
"""By name, a tensor's flat pieces in float32, each with its place."""


def _survey(names: list[str], values: Values, rank: int, progress: Progress) -> tuple[float, int, int]:
    """Sigma; the upper half of the threshold's bits; and how many magnitudes have a larger one."""
    from optx.kernels.ternary import cpu as ternary_cpu

    counts = torch.zeros(torch.get_num_threads(), ternary_cpu.COARSE, dtype=torch.int64)
    number, mean, spread = 0, 0.0, 0.0
    for name in progress(names):
        size, own_mean, own_spread = ternary_cpu.survey((piece for _, piece in values(name)), counts)
        if not math.isfinite(own_spread):
            raise OptxError(
                f"compress: {name!r} has a change that is not finite in float32. Leave it out with "
                "delta.subset(exclude=...), or look at how it was trained."
            )
        # Means and spreads of two sets, joined (Chan, Golub and LeVeque 1979): no large sums cancel.
        joined = number + size
        apart = own_mean - mean
        spread += own_spread + apart * apart * number * size / joined
        mean += apart * size / joined
        number = joined
    sigma = float(np.float32(math.sqrt(spread / (number - 1))))
    upper, above = _from_top(counts.sum(0), rank)
    return sigma, upper, above


def _refine(
    names: list[str], values: Values, upper: int, rank: int, above: int, progress: Progress
) -> tuple[int, int, int]:
    """The threshold's bits; how many magnitudes are larger; how many are equal."""
    from optx.kernels.ternary import cpu as ternary_cpu

    counts = torch.zeros(torch.get_num_threads(), ternary_cpu.FINE, dtype=torch.int64)
    for name in progress(names):
        for _, piece in values(name):
            ternary_cpu.refine(piece, counts, upper)
    total = counts.sum(0)
    lower, more = _from_top(total, rank - above)
    return upper * ternary_cpu.FINE + lower, above + more, int(total[lower])


def _from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The place of the rank-th from the top, and how many are at higher places."""
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, rank))
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0


def _pack(
    sizes: Mapping[str, int], values: Values, threshold: int, ties: int, equal: int, progress: Progress
) -> tuple[dict[str, Tensor], float]:
    """The masks, with so many of the numbers that equal the threshold; the mean magnitude kept."""
    from optx.kernels.ternary import cpu as ternary_cpu

    left = 0 if threshold == 0 or ties == equal else ties
    from_bits = threshold if threshold > 0 and ties == equal else threshold + 1
    masks: dict[str, Tensor] = {}
    total = float(np.uint32(threshold).view(np.float32)) * left
    for name in progress(list(sizes)):
        masks[name] = torch.empty(2, bitmask.words(sizes[name]), dtype=torch.int64)
        sums: list[Tensor] = []
        for begin, piece in values(name):
            part = masks[name][:, begin // 64 :]
            sums.append(ternary_cpu.pack(piece, part, from_bits))
            if left:
                left -= ternary_cpu.take_ties(piece, part, threshold, left)
        total += float(torch.cat(sums)[:, 0].sum())
    number = sum(bitmask.overlap(mask, mask).a for mask in masks.values())
    return masks, total / max(number, 1)
