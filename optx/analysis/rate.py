"""Bits per parameter: what a model's weights take once they are rounded to steps and coded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_above_0, check_choice
from optx.delta import _golomb as golomb
from optx.delta._checkpoint_source import Checkpoint, open_source
from optx.inject._followed import replaced

_LIMIT = 2.0**52  # levels that float64 tells apart, and their codes too

Coder = Literal["exp-golomb", "golomb", "entropy"]


@torch.no_grad()
def rate(model: Checkpoint, step: float = 2**-13, coder: Coder = "exp-golomb") -> float:
    """Bits that each number of a model takes, once it is rounded to a multiple of a step and coded.

    What `BackSlash` lowers. Nothing is written or changed; a million numbers are in memory at a time.

    Args:
        model: a module, of which parameters count, each once, without those in whose place others were added
            (by `StableRPS`, say); a state dict, a safetensors file, or a folder of them, of which all
            floating-point tensors do.
        step: what numbers are rounded to multiples of, half to even.
        coder: ``"exp-golomb"``: the paper's measure, Exp-Golomb codes of order 0, for any whole number and
            without a table. ``"golomb"``: where the levels are that are not 0 and their signs, in the Golomb
            and Huffman codes of `ComPEFT`'s files, then their sizes less 1 by Exp-Golomb. ``"entropy"``: what
            the best code of single levels would take without its table, whatever tensor they are in.

    Paper values:
        ``step=2**-13, coder="exp-golomb"``: 13 fractional bits (the default).

    Limits: Shapes, names and steps are not counted. A step is for all tensors alike. Whether a model is still
    right after the rounding is for you to try: ``torch.round(w / step) * step``.

    Keywords: compression, bits per weight, Exp-Golomb, entropy, bitrate, quantisation,
    quantization.

    Evidence: ``optx run compress``; ``test_rate.py``.

    Source: "It Takes a Good Model to Train a Good Model", arXiv 2506.00486; its code's Exp-Golomb codec.

    Raises:
        OptxError: there are no numbers, or one is infinite, nan or more than 2^52 steps large; or an argument
            out of range.
        FileError: a file is missing or damaged.

    Example:
        >>> import torch, optx
        >>> optx.rate({"w": torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 2.0, -3.0, 0.0])}, step=1.0)
        2.5
    """
    check_choice("rate", "coder", coder, ("exp-golomb", "golomb", "entropy"))
    bits, count = _CODERS[coder](_levels(model, check_above_0("rate", "step", step)))
    if not count:
        raise OptxError("rate: there are no floating-point numbers to count the bits of.")
    return bits / count


def _levels(model: Checkpoint, step: float) -> Iterator[Tensor]:
    """Whole numbers in float64, piece by piece."""
    if isinstance(model, nn.Module):
        gone = replaced(model)
        model = {name: p for name, p in model.named_parameters() if p not in gone}
        for name, p in model.items():
            if p.is_meta:
                raise OptxError(f"rate: {name!r} is on the meta device and has no numbers.")
    source = open_source(model, "rate: model")
    for name, entry in source.entries.items():
        if not entry.dtype.is_floating_point:
            continue
        for piece in source.pieces(name):
            levels = (piece.to("cpu", torch.float64) / step).round()
            if not bool((levels.abs() < _LIMIT).all()):
                raise OptxError(
                    f"rate: {name!r} has a number that is infinite, nan or more than 2^52 steps of {step:g} "
                    "large."
                )
            yield levels


def _exp_golomb(levels: Iterator[Tensor]) -> tuple[float, int]:
    """0, 1, -1, 2, -2 ... are 1, 2, 3, 4, 5 ..., and x takes 2 floor(log2 x) + 1 bits."""
    bits = count = 0
    for piece in levels:
        bits += _code_lengths(torch.where(piece > 0, 2 * piece, 1 - 2 * piece))
        count += len(piece)
    return bits, count


def _code_lengths(x: Tensor) -> int:
    """Exp-Golomb's of whole numbers from 1 on, summed."""
    exponent = torch.frexp(x).exponent  # x is 0.5 to 1 times this power of two
    return int(2 * exponent.sum(dtype=torch.int64)) - len(x)


def _golomb(levels: Iterator[Tensor]) -> tuple[float, int]:
    """Positions and signs as ComPEFT's files have them, then sizes; a piece is whole blocks."""
    from optx.kernels.ternary import cpu as ternary

    bits = count = 0
    for piece in levels:
        masks = torch.zeros(2, -(-len(piece) // 64), dtype=torch.int64)
        ternary.pack(piece.sign().to(torch.float32), masks, 1)
        bits += 8 * golomb.layout(masks, len(piece))[1]
        bits += _code_lengths(piece[piece != 0].abs())
        count += len(piece)
    return bits, count


def _entropy(levels: Iterator[Tensor]) -> tuple[float, int]:
    """From how often each level is there."""
    counts: dict[float, int] = {}
    for piece in levels:
        values, times = np.unique(piece.numpy(), return_counts=True)
        for value, n in zip(values.tolist(), times.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + n
    count = sum(counts.values())
    return math.fsum(n * math.log2(count / n) for n in counts.values()), count


_CODERS: dict[str, Callable[[Iterator[Tensor]], tuple[float, int]]] = {
    **{"exp-golomb": _exp_golomb, "golomb": _golomb, "entropy": _entropy},
}
