"""The loops of `optx.kernels.entries.cpu`, compiled by Numba for one width of numbers.

Not to be imported: `optx.kernels.entries.cpu` runs its text. A chunk's numbers begin, in the compact vector,
where the counts of those before it add up to; so chunks are taken in any order.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false, reportCallIssue=false

from __future__ import annotations

from numba import types

from optx.kernels.cpu import address, get_i64, take
from optx.kernels.entries.cpu import (
    WORDS,
    Args,
    copier,
    get_byte,
    put_i64,
    word_of_bits,
    word_of_bools,
)
from optx.kernels.jit import cfunc, part
from optx.kernels.words import count_ones, first_one

WIDTH = 4
copy = copier(WIDTH)
KERNEL = types.void(types.voidptr)


@part(error_model="numpy", inline="always")
def word_at(mask, bools, n, i):
    """The mask's bits 64 i to 64 i + 63, as one number; those from n on are 0."""
    start = 64 * i
    if start + 64 <= n:
        return word_of_bools(mask + start) if bools != 0 else word_of_bits(mask + 8 * i)
    word = 0
    for j in range(n - start):
        at = start + j
        bit = get_byte(mask, at) != 0 if bools != 0 else (get_byte(mask, at >> 3) >> (at & 7)) & 1
        word |= int(bit) << j
    return word


@cfunc(KERNEL, error_model="numpy", cache=True)
def count(pointer):
    """How many entries each chunk has, behind one place more."""
    args = address(pointer)
    n, mask, bools = get_i64(args, Args.NUMEL), get_i64(args, Args.MASK), get_i64(args, Args.BOOLS)
    starts = get_i64(args, Args.STARTS)
    words = (n + 63) // 64
    while True:
        chunk = take(args)
        if chunk * WORDS >= words:
            break
        total = 0
        for i in range(chunk * WORDS, min(chunk * WORDS + WORDS, words)):
            total += count_ones(word_at(mask, bools, n, i))
        put_i64(starts, chunk + 1, total)


@part(error_model="numpy", inline="always")
def move(pointer, back):
    """Numbers from the dense tensor's entries to the compact vector, or back."""
    args = address(pointer)
    n, mask, bools = get_i64(args, Args.NUMEL), get_i64(args, Args.MASK), get_i64(args, Args.BOOLS)
    starts, dense, compact = (
        get_i64(args, Args.STARTS),
        get_i64(args, Args.DENSE),
        get_i64(args, Args.COMPACT),
    )
    words = (n + 63) // 64
    while True:
        chunk = take(args)
        if chunk * WORDS >= words:
            break
        at = get_i64(starts, chunk)
        for i in range(chunk * WORDS, min(chunk * WORDS + WORDS, words)):
            word = word_at(mask, bools, n, i)
            while word != 0:
                place = 64 * i + first_one(word)
                if back:
                    copy(dense, place, compact, at)
                else:
                    copy(compact, at, dense, place)
                word &= word - 1
                at += 1


@cfunc(KERNEL, error_model="numpy", cache=True)
def gather(pointer):
    """The dense tensor's numbers at the entries, one behind the other."""
    move(pointer, False)


@cfunc(KERNEL, error_model="numpy", cache=True)
def scatter(pointer):
    """The other way."""
    move(pointer, True)
