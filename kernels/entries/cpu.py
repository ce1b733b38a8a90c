"""A tensor's numbers at the entries of a mask on CPU: counted, gathered, put back, without a list of places.

A mask is bits, entry i being bit ``i % 8`` of byte ``i // 8``, or bytes of 0 or 1. It is read 64 entries at a
time, twice: once to count each chunk's entries, which tells where in the compact vector a chunk begins, and
once to move numbers. Work is split over torch's threads (`optx.kernels.cpu`); numbers are moved as they are,
so the split never shows.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import ctypes
import functools
import hashlib
from enum import IntEnum
from types import ModuleType
from typing import Any

import numba.core.types as nt
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from optx._errors import ShapeError
from optx.kernels import cpu, words
from optx.kernels.generated import load_module, source

WORDS = 1 << 10  # of 64 entries, in a chunk
_PACKAGE = "optx.kernels.entries"
_I64 = ir.IntType(64)


class Args(IntEnum):
    """Positions in the argument block, in units of 8 bytes; addresses unless said otherwise."""

    NEXT = 0  # atomic counter: the next chunk
    NUMEL = 1  # number
    MASK = 2
    BOOLS = 3  # number: the mask is bytes
    STARTS = 4  # int64, one more than chunks: where each begins in the compact vector
    DENSE = 5
    COMPACT = 6


def starts(mask: Tensor, numel: int) -> Tensor:
    """Where in the compact vector each chunk begins, and as the last number how many entries there are.

    Args:
        mask: contiguous, on the CPU; uint8, 8 entries in each, or bool.
        numel: entries that it is of.
    """
    made = torch.zeros(1 + -(-numel // (64 * WORDS)), dtype=torch.int64)
    _run("count", mask, numel, made, None, None)
    return made.cumsum_(0)


def gather(dense: Tensor, mask: Tensor) -> Tensor:
    """The numbers at the entries, one dimension.

    Args:
        dense: contiguous, on the CPU, of any dtype of 2, 4 or 8 bytes.
        mask: of as many entries; see `starts`.
    """
    begins = starts(mask, dense.numel())
    compact = torch.empty(int(begins[-1]), dtype=dense.dtype)
    _run("gather", mask, dense.numel(), begins, dense, compact)
    return compact


def scatter(dense: Tensor, mask: Tensor, compact: Tensor) -> None:
    """Write so many numbers there, in place.

    Args:
        dense: see `gather`.
        mask: see `starts`.
        compact: contiguous, on the CPU, of the same dtype, with a number for each entry.

    Raises:
        ShapeError: it has more or fewer.
    """
    begins = starts(mask, dense.numel())
    if compact.numel() != int(begins[-1]):
        raise ShapeError(f"{compact.numel()} numbers for the {int(begins[-1])} entries of a mask.")
    _run("scatter", mask, dense.numel(), begins, dense, compact)


def _run(
    name: str, mask: Tensor, numel: int, begins: Tensor, dense: Tensor | None, compact: Tensor | None
) -> None:
    block = (ctypes.c_int64 * len(Args))(
        *(0, numel, mask.data_ptr(), int(mask.dtype == torch.bool), begins.data_ptr()),
        *(0 if t is None else t.data_ptr() for t in (dense, compact)),
    )
    kernel: int = vars(_compiled(4 if dense is None else dense.element_size()))[name].address
    cpu.run(kernel, ctypes.addressof(block), parallel=begins.numel() > 4)


@functools.cache
def _compiled(width: int) -> ModuleType:
    """The loops for numbers of so many bytes, compiled, from the disk cache where they were before."""
    default = "WIDTH = 4\n"
    text = source(_PACKAGE, "entries_loops.py")
    assert text.count(default) == 1
    text = text.replace(default, f"WIDTH = {width}\n")
    # The compiler's cache is kept by the text, so what it imports has to be part of that.
    imported = hashlib.sha256((words.digest() + source(_PACKAGE, "cpu.py")).encode()).hexdigest()
    return load_module("entries", f"{text}# imports {imported}\n")


# ---- what the loops need --------------------------------------------------------------------------------


def _at(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [index])


@functools.cache
def copier(width: int) -> Any:
    """An intrinsic ``(to, i, source, j)`` that moves a number of so many bytes."""
    kind = ir.IntType(8 * width)

    @intrinsic
    def copy(_context: Any, _to: Any, _i: Any, _source: Any, _j: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            to, i, start, j = values
            builder.store(builder.load(_at(builder, start, j, kind)), _at(builder, to, i, kind))
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, nt.int64, nt.int64), codegen

    return copy


@intrinsic
def put_i64(_context: Any, _base: Any, _index: Any, _value: Any) -> Any:
    """``((int64*)base)[index] = value``."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        builder.store(values[2], _at(builder, values[0], values[1], _I64))
        return context.get_dummy_value()

    return nt.void(nt.int64, nt.int64, nt.int64), codegen


@intrinsic
def get_byte(_context: Any, _base: Any, _index: Any) -> Any:
    """``((uint8*)base)[index]``, widened."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.zext(builder.load(_at(builder, values[0], values[1], ir.IntType(8))), _I64)

    return nt.int64(nt.int64, nt.int64), codegen


@intrinsic
def word_of_bits(_context: Any, _base: Any) -> Any:
    """8 bytes of bits as one number."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        word = builder.load(builder.inttoptr(values[0], _I64.as_pointer()))
        word.align = 1  # a mask from a file may begin anywhere
        return word

    return nt.int64(nt.int64), codegen


@intrinsic
def word_of_bools(_context: Any, _base: Any) -> Any:
    """64 bytes, 0 or not, as the bits of one number."""
    many = ir.VectorType(ir.IntType(8), 64)

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        held = builder.load(builder.inttoptr(values[0], many.as_pointer()))
        held.align = 1
        return builder.bitcast(builder.icmp_unsigned("!=", held, ir.Constant(many, [0] * 64)), _I64)

    return nt.int64(nt.int64), codegen
