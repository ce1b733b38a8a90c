"""What the loops of shared weights have in common: the choice of a hash, and runs of consecutive slots."""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportMissingTypeStubs=false

from __future__ import annotations

import functools
from typing import Any

import numba.core.types as nt
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from optx.kernels.cpu import I32, ITEMSIZE, load, mix, spread, store
from optx.kernels.jit import part

NONE = np.int32(0)  # no random bits: round to nearest


@part(error_model="numpy", inline="always")
def chosen(key, value, of):
    """One of ``of`` values, by the top 31 bits of a hash."""
    return (((mix(key, value) >> 33) & 0x7FFFFFFF) * of) >> 31


@intrinsic
def flipped(_context: Any, value: Any, _word: Any, _bit: Any) -> Any:
    """A float, or minus it where a bit of a word is set."""
    kind = ir.IntType(value.bitwidth)

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        number, word, bit = values
        word = builder.lshr(word, builder.trunc(bit, I32))  # Numba would make 64 bits of it
        word = word if value.bitwidth == 32 else builder.zext(word, kind)
        sign = builder.shl(word, ir.Constant(kind, value.bitwidth - 1))
        return builder.bitcast(builder.xor(builder.bitcast(number, kind), sign), number.type)

    return value(value, nt.uint32, nt.int64), codegen


@functools.cache
def whole_word(dtype: str, adds: bool) -> Any:
    """An intrinsic ``(to, s, at, j, word, scale)``: 32 weights of a word, where both sides have one dtype.

    As vectors: of a loop of 32 turns LLVM makes 32 times the same.
    """
    size = 8 * ITEMSIZE[dtype]
    number: Any = ir.DoubleType() if size == 64 else ir.FloatType()
    floats, ints, words = (ir.VectorType(kind, 32) for kind in (number, ir.IntType(size), I32))
    out = nt.float64 if size == 64 else nt.float32

    @intrinsic
    def move(_context: Any, _to: Any, _s: Any, _at: Any, _j: Any, _word: Any, _scale: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, values: Any) -> Any:
            to, s, at, j, word, scale = values
            short, long = (
                b.bitcast(b.gep(b.inttoptr(base, number.as_pointer()), [index]), floats.as_pointer())
                for base, index in ((to, s), (at, j))
            )
            bits = b.lshr(spread(b, word, 32), ir.Constant(words, list(range(32))))
            signs = b.shl(bits if size == 32 else b.zext(bits, ints), ir.Constant(ints, [size - 1] * 32))
            loaded = b.fmul(b.load(long if adds else short, align=size // 8), spread(b, scale, 32))
            term = b.bitcast(b.xor(b.bitcast(loaded, ints), signs), floats)
            if adds:
                term = b.fadd(b.load(short, align=size // 8), term)
            b.store(term, short if adds else long, align=size // 8)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, nt.int64, nt.int64, nt.uint32, out), codegen

    return move


def runs(short: str, long: str, adds: bool) -> Any:
    """A function that moves ``count`` consecutive weights, whose slots are consecutive too.

    Args:
        short: dtype of the array.
        long: dtype of the weights.
        adds: weights are added to slots, not read from them.
    """
    F = np.float64 if short == "float64" else np.float32
    read_short, write_short = load(short, 0), store(short, 0)
    read_long, write_long = load(long, 1), store(long, 1)

    @part(error_model="numpy")
    def lanes(to, s, at, j, count, word, scale):
        for bit in range(count):
            if adds:
                term = flipped(F(read_long(at, j + bit)) * scale, word, bit)
                write_short(to, s + bit, read_short(to, s + bit) + term, NONE)
            else:
                write_long(at, j + bit, flipped(read_short(to, s + bit) * scale, word, bit), NONE)

    word_of_weights = whole_word(long, adds) if short == long else None

    @part(error_model="numpy", inline="always")
    def whole(to, s, at, j, word, scale):
        if word_of_weights is None:
            lanes(to, s, at, j, 32, word, scale)
        else:
            word_of_weights(to, s, at, j, word, scale)

    @part(error_model="numpy")
    def run(to, s, at, j, i, count, key, scale, signed):
        """Slots from s on, weights from j on, which are numbers i and on of the long vector."""
        done = 0
        while done < count:
            lane = (i + done) & 63
            word = mix(key, (i + done) >> 6) * signed
            if lane == 0 and count - done >= 64:
                whole(to, s + done, at, j + done, np.uint32(word), scale)
                whole(to, s + done + 32, at, j + done + 32, np.uint32(word >> 32), scale)
                done += 64
                continue
            few = min(32, min(64 - lane, count - done))
            lanes(to, s + done, at, j + done, few, np.uint32(word >> lane), scale)
            done += few

    return run


@part(error_model="numpy", inline="always")
def zeroed(write, to, first, last, zero):
    """Slots from ``first`` to before ``last``, set to 0."""
    for s in range(first, last):
        write(to, s, zero, NONE)
