"""Merging entry by entry in one pass over the numbers, compiled by Numba.

Not to be imported: `optx.delta._entrywise` runs its text. Numbers are taken `BLOCK` at a time through a few
short loops whose vectors stay in the first-level cache, so that one text serves any number of models. Every
operation, and the order of them, is that of the torch operations it stands for.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.delta._entrywise import BLOCK, CHUNK, ROW, Args, Factor, Model, Number
from optx.kernels.cpu import (
    add_any_order,
    add_lanes,
    address,
    get_f64,
    get_i64,
    load,
    mix,
    put_f64,
    store,
    take,
)
from optx.kernels.jit import cfunc, part

F = np.float32
ZERO, ONE, NONE = F(0), F(1), np.int32(0)
NOTHING = F(-0.0)  # plus x is x, also where that is -0
POSITIVE = 0x7FFFFFFFFFFFFFFF
MODEL, NUMBER = 8 * len(Model), 8 * len(Number)
# Where a thread's blocks are, behind the base's.
SUMMED, MADE, MASS, BALLOTS = (4 * BLOCK * i for i in range(1, 5))
FAST = {"error_model": "numpy"}

# Blocks share a role, so that no loop takes another's numbers for elsewhere.
in_float32, in_bfloat16, in_float16 = load("float32", 0), load("bfloat16", 0), load("float16", 0)
out_float32, out_bfloat16, out_float16 = store("float32", 1), store("bfloat16", 1), store("float16", 1)
get, put = load("float32", 2), store("float32", 2)


@part(**FAST)
def widen(kind, source, at, a, n):
    """A block of numbers as float32."""
    if kind == 0:
        for i in range(n):
            put(a, i, in_float32(source, at + i), NONE)
    elif kind == 1:
        for i in range(n):
            put(a, i, in_bfloat16(source, at + i), NONE)
    else:
        for i in range(n):
            put(a, i, in_float16(source, at + i), NONE)


@part(**FAST)
def narrow(kind, a, out, at, n):
    """The other way."""
    if kind == 0:
        for i in range(n):
            out_float32(out, at + i, get(a, i), NONE)
    elif kind == 1:
        for i in range(n):
            out_bfloat16(out, at + i, get(a, i), NONE)
    else:
        for i in range(n):
            out_float16(out, at + i, get(a, i), NONE)


@part(**FAST)
def less(a, b, n):
    """a -= b."""
    for i in range(n):
        put(a, i, get(a, i) - get(b, i), NONE)


@part(**FAST)
def plus(a, b, n):
    """a += b."""
    for i in range(n):
        put(a, i, get(a, i) + get(b, i), NONE)


@part(**FAST)
def times(a, n, factor):
    """a *= factor."""
    if factor != ONE:
        for i in range(n):
            put(a, i, get(a, i) * factor, NONE)


@part(**FAST)
def over(a, n, divisor):
    """a /= divisor."""
    if divisor != ONE:
        for i in range(n):
            put(a, i, get(a, i) / divisor, NONE)


@part(**FAST)
def lacks(a, n, scale):
    """Not 0 if a number of the block, times a scale, isn't finite."""
    total = ZERO
    for i in range(n):
        total = add_lanes(total, get(a, i) * scale * ZERO)
    return 0 if total == ZERO else 1


@part(**FAST)
def size_of(a, n):
    """The sum of magnitudes."""
    total = 0.0
    for i in range(n):
        total = add_any_order(total, np.float64(abs(get(a, i))))
    return total


@part(**FAST)
def drop(a, n, place, key, threshold):
    """0 where SplitMix64's output, in units of 2**-63, is not below the threshold."""
    for i in range(n):
        x = get(a, i)
        put(a, i, x if ((mix(key, place + i) >> 1) & POSITIVE) < threshold else ZERO, NONE)


@part(**FAST)
def trim(a, n, place, size, stop):
    """0 where the magnitude is below a size, or equals it from a place on."""
    until = min(max(stop - place, 0), n)
    for i in range(until):
        x = get(a, i)
        put(a, i, x if abs(x) >= size else ZERO, NONE)
    for i in range(until, n):
        x = get(a, i)
        put(a, i, x if abs(x) > size else ZERO, NONE)


@part(**FAST)
def elect(ballot, summed, made, mass, n, least, weight):
    """Counts a ballot where it has the sign of the sum; a sum of 0 is positive where ``least`` is 0."""
    for i in range(n):
        x = get(ballot, i)
        total = get(summed, i)
        positive = total > ZERO or (total == ZERO and least == 0)
        agrees = ONE if (x > ZERO) == positive and x != ZERO else ZERO
        put(made, i, get(made, i) + x * agrees, NONE)
        put(mass, i, get(mass, i) + weight * agrees, NONE)


@part(**FAST)
def mean(made, mass, n):
    """made /= mass, where there is any."""
    for i in range(n):
        m = get(mass, i)
        put(made, i, get(made, i) / (m if m != ZERO else ONE), NONE)


@part(**FAST)
def fill(a, n, value):
    """a = value."""
    for i in range(n):
        put(a, i, value, NONE)


@part(**FAST)
def number(row, index):
    """A float32 of a row of numbers."""
    return F(get_f64(row, index))


@part(**FAST)
def prune(row, numbers, place, n, a):
    """What is kept of a change."""
    by = get_i64(row, Model.BY)
    if by == 1:
        drop(a, n, place, get_i64(row, Model.KEY), get_i64(row, Model.LIMIT))
    elif by == 2:
        trim(a, n, place, number(numbers, Number.SIZE), get_i64(row, Model.LIMIT))


@part(**FAST)
def finish(args, at, n, room):
    """A block of the result, of the ballots' sum; not 0 if it isn't finite."""
    factors, elects = get_i64(args, Args.FACTORS), get_i64(args, Args.ELECTS)
    before, made, mass = room, room + SUMMED, room + MASS
    if elects == 0:
        over(made, n, number(factors, Factor.MASS))
    else:
        made = room + MADE
        fill(made, n, ZERO)
        fill(mass, n, ZERO)
        for m in range(get_i64(args, Args.COUNT)):
            weight = number(get_i64(args, Args.NUMBERS) + m * NUMBER, Number.WEIGHT)
            elect(room + BALLOTS + 4 * BLOCK * m, room + SUMMED, made, mass, n, elects - 1, weight)
        if get_f64(factors, Factor.MASS) != 0.0:
            mean(made, mass, n)
    times(made, n, number(factors, Factor.LAM))
    plus(before, made, n)
    narrow(get_i64(args, Args.OUT_KIND), before, get_i64(args, Args.OUT), at, n)
    return lacks(before, n, number(factors, Factor.ROOM))


@part(**FAST)
def block(args, at, n, room):
    """One of the result, or its magnitudes added to its row's; not 0 if a number on the way isn't finite."""
    models, place = get_i64(args, Args.COUNT), get_i64(args, Args.BEGIN) + at
    measures, elects = get_i64(args, Args.MEASURES), get_i64(args, Args.ELECTS)
    bad = 0
    fill(room + SUMMED, n, NOTHING)
    for m in range(-1, models):  # the base is the one before the first
        a = room + BALLOTS + (4 * BLOCK * m if elects != 0 else 0) if m >= 0 else room
        row = get_i64(args, Args.MODELS) + m * MODEL
        widen(get_i64(row, Model.KIND), get_i64(row, Model.FROM), at, a, n)
        if m < 0:
            continue
        numbers = get_i64(args, Args.NUMBERS) + m * NUMBER
        less(a, room, n)
        bad |= lacks(a, n, ONE)
        for when in range(2):
            if measures != 0:
                sums = get_i64(args, Args.OUT) + (at // ROW * models + m) * 16
                put_f64(sums, when, get_f64(sums, when) + size_of(a, n))
            if when == 0:
                prune(row, numbers, place, n, a)
        if measures == 0:
            over(a, n, number(numbers, Number.DIVISOR))
            for factor in range(Number.FACTOR, Number.WEIGHT + 1):
                times(a, n, number(numbers, factor))
            plus(room + SUMMED, a, n)
    return bad if measures != 0 else bad | finish(args, at, n, room)


@cfunc(types.void(types.voidptr), error_model="numpy", cache=True)
def run(pointer):
    """Takes chunks until none is left."""
    args = address(pointer)
    numel = get_i64(args, Args.NUMEL)
    room = get_i64(args, Args.ROOM) + take(args + 8 * Args.SLOT) * get_i64(args, Args.STRIDE)
    bad = 0
    while True:
        first = take(args + 8 * Args.NEXT) * CHUNK
        if first >= numel:
            break
        for at in range(first, min(first + CHUNK, numel), BLOCK):
            bad |= block(args, at, min(BLOCK, numel - at), room)
    if bad != 0:
        put_f64(get_i64(args, Args.FACTORS), Factor.BAD, 1.0)
