"""Ternary masks on CPU: decode, compare, vote.

A ternary vector of n numbers is two bit masks, which of them are +1 and which -1, each of ceil(n / 64) words
of 64 bits: number i is bit ``i % 64`` of word ``i // 64``, and bits past the last number are 0. Work is split
over torch's threads (`optx.kernels.cpu`); the split never shows in the result.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportMissingTypeArgument=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false
# ruff: noqa: E402

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from types import ModuleType
from typing import Any

from optx.kernels.available import demand

demand("numba", "Compressed deltas")  # before Numba's own imports fail in their ways

import numba.core.types as nt
import torch
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic
from torch import Tensor

from optx.kernels import cpu, words
from optx.kernels.generated import load_module, source
from optx.kernels.jit import part

BLOCK = 1 << 16  # numbers whose sums are one piece
COARSE, FINE = 1 << 16, 1 << 15  # upper and lower halves of a float32 magnitude's 31 bits
SPAN = 1 << 17  # numbers that share one Golomb stream
THIRDS, DROPPED, FOURS = 32, 64, 128  # flags of a code; its lower five bits are a number of bits
_CHUNK = 1 << 13  # words of 32 numbers in one piece of work: 256 k numbers


class Dense(IntEnum):
    """Positions in the argument block of `add` and `fill`, in units of 8 bytes; 0 is always the counter."""

    NUMEL = 1
    STEP = 2  # words of 32 numbers in a chunk
    TO = 3  # address of the tensor
    PLUS = 4  # addresses of the masks
    MINUS = 5
    SCALE = 6  # float64


class Select(IntEnum):
    """Those of `survey`, `refine`, `pack` and `take_ties`."""

    NUMEL = 1
    BLOCKS = 2
    STEP = 3  # blocks in a piece
    PIECES = 4
    VALUES = 5  # float32, as their bits
    SUMS = 6  # float64 (blocks, 2)
    COUNTS = 7  # int64, (pieces, COARSE or FINE); of ties: how many are left to take
    THRESHOLD = 8  # bits of a magnitude, or their upper half
    PLUS = 9
    MINUS = 10


class Compare(IntEnum):
    """Those of `overlap`."""

    WORDS = 1
    STEP = 2
    PLUS_A = 3
    MINUS_A = 4
    PLUS_B = 5
    MINUS_B = 6
    RESULT = 7  # int64 (pieces, 4)


class Vote(IntEnum):
    """Those of `vote`."""

    NUMEL = 1
    STEP = 2
    ELECT = 3  # 0: the sum; 1: the mean of the winning side
    MANY = 4
    MASKS = 5  # addresses: int64 (many, 2)
    WEIGHTS = 6  # float32 (many,)
    TO = 7  # float32


class Codec(IntEnum):
    """Those of `measure`, `encode` and `decode`."""

    NUMEL = 1
    BLOCKS = 2
    PLUS = 3
    MINUS = 4
    TABLE = 5  # int64 (blocks, 3): kept, code, bits of the gaps
    STARTS = 6  # int64 (blocks + 1,): first word of each stream
    STREAM = 7  # uint32


# ---- what the loops need --------------------------------------------------------------------------------


@intrinsic
def _pointer(_context: Any, _address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return nt.voidptr(nt.int64), codegen


@part(error_model="numpy", inline="always")
def array(address: Any, count: Any, dtype: Any) -> Any:
    """The memory at an address, as a NumPy array."""
    return carray(_pointer(address), (count,), dtype)


@intrinsic
def peek(_context: Any, _address: Any, _index: Any) -> Any:
    """A uint32 from memory. Arrays handed from function to function cost a count of references each."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], ir.IntType(32).as_pointer())
        return builder.load(builder.gep(pointer, [values[1]]))

    return nt.uint32(nt.int64, nt.int64), codegen


@intrinsic
def poke(_context: Any, _address: Any, _index: Any, _value: Any) -> Any:
    """A uint32 to memory."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], ir.IntType(32).as_pointer())
        builder.store(values[2], builder.gep(pointer, [values[1]]))
        return context.get_dummy_value()

    return nt.void(nt.int64, nt.int64, nt.uint32), codegen


@intrinsic
def value_of(_context: Any, _bits: Any) -> Any:
    """The float32 with these bits."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return nt.float32(nt.uint32), codegen


# ---- dense tensors --------------------------------------------------------------------------------------


def add(to: Tensor, masks: Tensor, scale: float) -> None:
    """``to += scale * t`` for the ternary t: summed in float32 (float64 for such), rounded once.

    Args:
        to: contiguous, on the CPU, float16, bfloat16, float32 or float64.
        masks: int64 (2, words), on the CPU: +1s, -1s.
        scale: rounded to float32 (float64) first.
    """
    _run("add", to, masks, scale)


def fill(to: Tensor, masks: Tensor, scale: float) -> None:
    """``to = scale * t``; see `add`."""
    _run("fill", to, masks, scale)


def _run(name: str, to: Tensor, masks: Tensor, scale: float) -> None:
    values = {
        Dense.NUMEL: to.numel(),
        Dense.STEP: _CHUNK,
        Dense.TO: to,
        Dense.PLUS: masks[0],
        Dense.MINUS: masks[1],
        Dense.SCALE: struct.unpack("q", struct.pack("d", scale))[0],
    }
    _call(_dense(str(to.dtype).removeprefix("torch.")), name, Dense, values, to.numel() > 32 * _CHUNK)


def _call(
    module: ModuleType, name: str, layout: type[IntEnum], values: Mapping[Any, int | Tensor], parallel: bool
) -> None:
    """Run a kernel with its argument block; tensors are given as their addresses."""
    plain = {at: value.data_ptr() if isinstance(value, Tensor) else value for at, value in values.items()}
    block = (ctypes.c_int64 * (1 + max(layout)))(*(plain.get(at, 0) for at in range(1 + max(layout))))
    cpu.run(vars(module)[name].address, ctypes.addressof(block), parallel)


_PACKAGE = "optx.kernels.ternary"


@functools.cache
def _dense(dtype: str) -> ModuleType:
    """`dense_loops` for one dtype, compiled, from the disk cache where it was compiled before."""
    default = 'DTYPE = "float32"\n'
    text = source(_PACKAGE, "dense_loops.py")
    assert text.count(default) == 1
    return _compiled("ternary_dense", text.replace(default, f'DTYPE = "{dtype}"\n'))


@functools.cache
def _loops(name: str) -> ModuleType:
    """`masks_loops` or `golomb_loops`, likewise."""
    return _compiled(f"ternary_{name}", source(_PACKAGE, f"{name}_loops.py"))


def _compiled(kind: str, text: str) -> ModuleType:
    # The compiler's cache is kept by the text, so what it imports has to be part of that.
    imported = hashlib.sha256((words.digest() + source(_PACKAGE, "cpu.py")).encode()).hexdigest()
    return load_module(kind, f"{text}# imports {imported}\n")


# ---- choosing what is kept ------------------------------------------------------------------------------


def survey(pieces: Iterable[Tensor], counts: Tensor) -> tuple[int, float, float]:
    """Number, mean, and sum of squared distances from it, in float64; adds to the counts of magnitudes.

    Args:
        pieces: of one tensor, float32, contiguous, on the CPU; all but the last of whole BLOCKs.
        counts: int64 (threads, COARSE): how often each upper half of a magnitude occurred.
    """
    found: list[Tensor] = []
    for values in pieces:
        sums = torch.empty(-(-values.numel() // BLOCK), 2, dtype=torch.float64)
        _select("survey", values, {Select.SUMS: sums, Select.COUNTS: counts}, len(counts))
        sizes = torch.full((len(sums), 1), float(BLOCK), dtype=torch.float64)
        sizes[-1] = values.numel() - BLOCK * (len(sums) - 1)
        found.append(torch.cat([sums, sizes], 1))
    totals, spreads, sizes = torch.cat(found).unbind(1)
    number = int(sizes.sum())
    mean = float(totals.sum()) / number
    between = sizes * (totals / sizes - mean).square()
    return number, mean, float(spreads.sum() + between.sum())


def refine(values: Tensor, counts: Tensor, upper: int) -> None:
    """Adds to the counts, (pieces, FINE), of lower halves among magnitudes with this upper half."""
    _select("refine", values, {Select.COUNTS: counts, Select.THRESHOLD: upper}, len(counts))


def pack(values: Tensor, masks: Tensor, threshold: int) -> Tensor:
    """Fill the masks with the magnitudes whose bits are at least ``threshold`` (1 or more); gives their sums.

    Args:
        values: float32, contiguous, on the CPU.
        masks: int64 (2, words), each row contiguous.
        threshold: of the bits.

    Returns:
        (blocks, 2) float64; the first column is the sum of each BLOCK's kept magnitudes.
    """
    sums = torch.zeros(-(-values.numel() // BLOCK), 2, dtype=torch.float64)
    places = {Select.SUMS: sums, Select.PLUS: masks[0], Select.MINUS: masks[1]}
    _select("pack", values, {**places, Select.THRESHOLD: threshold}, torch.get_num_threads())
    return sums


def take_ties(values: Tensor, masks: Tensor, threshold: int, most: int) -> int:
    """Add to the masks the first ``most`` entries whose magnitude has exactly these bits; how many it was."""
    left = torch.tensor([most])
    places = {Select.COUNTS: left, Select.PLUS: masks[0], Select.MINUS: masks[1]}
    _select("take_ties", values, {**places, Select.THRESHOLD: threshold}, 1)
    return most - int(left)


def _select(name: str, values: Tensor, more: Mapping[Select, int | Tensor], pieces: int) -> None:
    blocks = -(-values.numel() // BLOCK)
    places = {
        Select.NUMEL: values.numel(),
        Select.BLOCKS: blocks,
        Select.STEP: -(-blocks // pieces),
        Select.PIECES: pieces,
        Select.VALUES: values,
    }
    _call(_loops("masks"), name, Select, {**places, **more}, pieces > 1 and blocks > 4)


# ---- two vectors, many vectors --------------------------------------------------------------------------


def overlap(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    """Nonzeros of a, of b, of both with the same sign, of both with opposite signs."""
    words, step = a.shape[1], 1 << 14
    result = torch.zeros(max(1, -(-words // step)), 4, dtype=torch.int64)
    places = {
        Compare.WORDS: words,
        Compare.STEP: step,
        Compare.PLUS_A: a[0],
        Compare.MINUS_A: a[1],
        Compare.PLUS_B: b[0],
        Compare.MINUS_B: b[1],
        Compare.RESULT: result,
    }
    _call(_loops("masks"), "overlap", Compare, places, words > 4 * step)
    of_a, of_b, agree, clash = result.sum(0).tolist()
    return of_a, of_b, agree, clash


def vote(to: Tensor, masks: Sequence[Tensor], weights: Tensor, elect: bool) -> None:
    """``to = sum of weight * t``; or, elected, the mean of weight * t over those with the sum's sign.

    Args:
        to: float32, contiguous, on the CPU.
        masks: of each vector.
        weights: float32, one per vector.
        elect: a sum of 0 elects +, as mergekit has it.
    """
    table = torch.tensor([[m[0].data_ptr(), m[1].data_ptr()] for m in masks])
    places = {
        Vote.NUMEL: to.numel(),
        Vote.STEP: _CHUNK,
        Vote.ELECT: int(elect),
        Vote.MANY: len(masks),
        Vote.MASKS: table,
        Vote.WEIGHTS: weights,
        Vote.TO: to,
    }
    _call(_loops("masks"), "vote", Vote, places, to.numel() > 32 * _CHUNK)


# ---- Golomb codes ---------------------------------------------------------------------------------------


def measure(masks: Tensor, numel: int) -> Tensor:
    """By block of SPAN numbers: how many are kept, the shortest code, the bits of the gaps; (blocks, 3)."""
    table = torch.empty(-(-numel // SPAN), 3, dtype=torch.int64)
    _codec("measure", masks, numel, table, {})
    return table


def encode(masks: Tensor, numel: int, table: Tensor, starts: Tensor) -> Tensor:
    """The streams, as int32 words. ``starts``: (blocks + 1,), the first word of each."""
    stream = torch.empty(int(starts[-1]), dtype=torch.int32)
    _codec("encode", masks, numel, table, {Codec.STARTS: starts, Codec.STREAM: stream})
    return stream


def decode(numel: int, table: Tensor, starts: Tensor, stream: Tensor) -> Tensor | None:
    """The masks of streams, or None where a stream makes no sense. See `encode`."""
    masks = torch.empty(2, -(-numel // 64), dtype=torch.int64)
    table = table.clone()
    _codec("decode", masks, numel, table, {Codec.STARTS: starts, Codec.STREAM: stream})
    return masks if bool((table[:, 2] == 1).all()) else None


def _codec(name: str, masks: Tensor, numel: int, table: Tensor, more: Mapping[Codec, Tensor]) -> None:
    places = {
        Codec.NUMEL: numel,
        Codec.BLOCKS: len(table),
        Codec.PLUS: masks[0],
        Codec.MINUS: masks[1],
        Codec.TABLE: table,
    }
    _call(_loops("golomb"), name, Codec, {**places, **more}, len(table) > 1)
