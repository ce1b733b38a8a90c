"""Ternary masks on CPU: the loops that choose, compare and vote, compiled by Numba.

Not to be imported: `optx.kernels.ternary.cpu` runs its text. Every kernel
takes pieces of work from a counter until none is left; a piece has places of its own for its results.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import types

from optx.kernels.cpu import address, get_i64, take
from optx.kernels.jit import cfunc, part
from optx.kernels.ternary.cpu import (
    BLOCK,
    COARSE,
    FINE,
    Compare,
    Select,
    Vote,
    array,
    value_of,
)
from optx.kernels.words import count_ones

U = np.uint64
MAGNITUDE = np.uint32(0x7FFFFFFF)
SHIFT, LOWER = np.uint32(15), np.uint32(FINE - 1)  # of the halves of a magnitude
KERNEL = types.void(types.voidptr)
# Sums may be regrouped into lanes; which grouping is fixed at compile time.
_lanes = part(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
_plain = part(error_model="numpy")


# ---- choosing what is kept ----------------------------------------------------------------------------


@_lanes
def _sum(bits, start, stop):
    total = 0.0
    for i in range(start, stop):
        total += np.float64(value_of(bits[i]))
    return total


@_lanes
def _spread(bits, start, stop, mean):
    total = 0.0
    for i in range(start, stop):
        d = np.float64(value_of(bits[i])) - mean
        total += d * d
    return total


@cfunc(KERNEL, error_model="numpy", cache=True)
def survey(pointer):
    """Sum and squared spread of every block; how often each upper half of a magnitude occurs."""
    args = address(pointer)
    n, blocks = get_i64(args, Select.NUMEL), get_i64(args, Select.BLOCKS)
    step, pieces = get_i64(args, Select.STEP), get_i64(args, Select.PIECES)
    bits = array(get_i64(args, Select.VALUES), n, np.uint32)
    sums = array(get_i64(args, Select.SUMS), 2 * blocks, np.float64)
    counts = array(get_i64(args, Select.COUNTS), pieces * COARSE, np.int64)
    while True:
        piece = take(args)
        if piece >= pieces:
            break
        for block in range(piece * step, min(piece * step + step, blocks)):
            start, stop = block * BLOCK, min(block * BLOCK + BLOCK, n)
            total = _sum(bits, start, stop)
            sums[2 * block] = total
            sums[2 * block + 1] = _spread(bits, start, stop, total / (stop - start))
            for i in range(start, stop):
                counts[piece * COARSE + np.int64((bits[i] & MAGNITUDE) >> SHIFT)] += 1


@cfunc(KERNEL, error_model="numpy", cache=True)
def refine(pointer):
    """How often each lower half occurs among the magnitudes with one upper half."""
    args = address(pointer)
    n = get_i64(args, Select.NUMEL)
    step, pieces = get_i64(args, Select.STEP), get_i64(args, Select.PIECES)
    bits = array(get_i64(args, Select.VALUES), n, np.uint32)
    counts = array(get_i64(args, Select.COUNTS), pieces * FINE, np.int64)
    upper = np.uint32(get_i64(args, Select.THRESHOLD))
    while True:
        piece = take(args)
        if piece >= pieces:
            break
        for i in range(piece * step * BLOCK, min((piece * step + step) * BLOCK, n)):
            if np.uint32((bits[i] & MAGNITUDE) >> SHIFT) == upper:
                counts[piece * FINE + np.int64(bits[i] & LOWER)] += 1


@_plain
def _word(bits, start, count, threshold, low_negative):
    """Two words of 32 bits: what reaches the threshold, and is positive or negative."""
    plus, minus = np.uint32(0), np.uint32(0)
    for i in range(count):
        value = bits[start + i]
        one = np.uint32(np.uint32(1) << np.uint32(i))
        # As unsigned numbers, all negative floats are above all positive ones.
        plus = np.uint32(plus | (one if threshold <= value <= MAGNITUDE else np.uint32(0)))
        minus = np.uint32(minus | (one if value >= low_negative else np.uint32(0)))
    return plus, minus


@_lanes
def _kept_sum(bits, start, stop, threshold):
    total = 0.0
    for i in range(start, stop):
        magnitude = bits[i] & MAGNITUDE
        total += np.float64(value_of(magnitude)) if magnitude >= threshold else 0.0
    return total


@cfunc(KERNEL, error_model="numpy", cache=True)
def pack(pointer):
    """The masks of all magnitudes from a threshold on; their sum by block."""
    args = address(pointer)
    n, blocks = get_i64(args, Select.NUMEL), get_i64(args, Select.BLOCKS)
    bits = array(get_i64(args, Select.VALUES), n, np.uint32)
    sums = array(get_i64(args, Select.SUMS), 2 * blocks, np.float64)
    words = (n + 63) // 64 * 2
    plus = array(get_i64(args, Select.PLUS), words, np.uint32)
    minus = array(get_i64(args, Select.MINUS), words, np.uint32)
    threshold = np.uint32(get_i64(args, Select.THRESHOLD))
    low_negative = np.uint32(threshold | np.uint32(0x80000000))
    while True:
        block = take(args)
        if block >= blocks:
            break
        start, stop = block * BLOCK, min(block * BLOCK + BLOCK, n)
        sums[2 * block] = _kept_sum(bits, start, stop, threshold)
        for word in range(start // 32, (stop + 63) // 64 * 2):
            if 32 * word + 32 <= stop:
                plus[word], minus[word] = _word(bits, 32 * word, 32, threshold, low_negative)
            else:
                count = max(stop - 32 * word, 0)
                plus[word], minus[word] = _word(bits, 32 * word, count, threshold, low_negative)


@cfunc(KERNEL, error_model="numpy", cache=True)
def take_ties(pointer):
    """Add the first few entries whose magnitude is the threshold itself; counts down what is left."""
    args = address(pointer)
    n = get_i64(args, Select.NUMEL)
    bits = array(get_i64(args, Select.VALUES), n, np.uint32)
    words = (n + 63) // 64
    plus = array(get_i64(args, Select.PLUS), words, np.uint64)
    minus = array(get_i64(args, Select.MINUS), words, np.uint64)
    left = array(get_i64(args, Select.COUNTS), 1, np.int64)
    threshold = np.uint32(get_i64(args, Select.THRESHOLD))
    for i in range(n):
        if left[0] == 0:
            break
        if bits[i] & MAGNITUDE == threshold:
            left[0] -= 1
            one = U(1) << U(i % 64)
            if bits[i] >> np.uint32(31):
                minus[i // 64] |= one
            else:
                plus[i // 64] |= one


# ---- two vectors, many vectors --------------------------------------------------------------------------


@_plain
def _add_overlap(plus_a, minus_a, plus_b, minus_b, start, stop, result, at):
    a, b, agree, clash = U(0), U(0), U(0), U(0)
    for i in range(start, stop):
        p, m, q, r = plus_a[i], minus_a[i], plus_b[i], minus_b[i]
        a += count_ones(p | m)
        b += count_ones(q | r)
        agree += count_ones((p & q) | (m & r))
        clash += count_ones((p & r) | (m & q))
    result[at], result[at + 1], result[at + 2], result[at + 3] = a, b, agree, clash


@cfunc(KERNEL, error_model="numpy", cache=True)
def overlap(pointer):
    """By piece: nonzeros of a, of b, of both with the same sign, of both with opposite signs."""
    args = address(pointer)
    words, step = get_i64(args, Compare.WORDS), get_i64(args, Compare.STEP)
    plus_a = array(get_i64(args, Compare.PLUS_A), words, np.uint64)
    minus_a = array(get_i64(args, Compare.MINUS_A), words, np.uint64)
    plus_b = array(get_i64(args, Compare.PLUS_B), words, np.uint64)
    minus_b = array(get_i64(args, Compare.MINUS_B), words, np.uint64)
    pieces = (words + step - 1) // step
    result = array(get_i64(args, Compare.RESULT), 4 * pieces, np.uint64)
    while True:
        piece = take(args)
        if piece >= pieces:
            break
        stop = min(piece * step + step, words)
        _add_overlap(plus_a, minus_a, plus_b, minus_b, piece * step, stop, result, 4 * piece)


@_plain
def _sum_word(masks, weights, word, sums):
    """Positive and negative parts of the sum over vectors, and how many each has, of 32 numbers."""
    sums[:] = 0
    for k in range(len(weights)):
        plus = array(masks[2 * k], word + 1, np.uint32)[word]
        minus = array(masks[2 * k + 1], word + 1, np.uint32)[word]
        weight = weights[k]
        if weight < 0:
            plus, minus, weight = minus, plus, -weight
        for bit in range(32):
            p = np.float32((plus >> np.uint32(bit)) & np.uint32(1))
            m = np.float32((minus >> np.uint32(bit)) & np.uint32(1))
            sums[0, bit] += weight * (p - m)
            sums[1, bit] += weight * p
            sums[2, bit] += weight * m
            sums[3, bit] += p
            sums[4, bit] += m


@cfunc(KERNEL, error_model="numpy", cache=True)
def vote(pointer):
    """The weighted sum of many vectors; or, elected, the mean of the weights on the winning side."""
    args = address(pointer)
    n, step, elect = get_i64(args, Vote.NUMEL), get_i64(args, Vote.STEP), get_i64(args, Vote.ELECT)
    many = get_i64(args, Vote.MANY)
    masks = array(get_i64(args, Vote.MASKS), 2 * many, np.int64)
    weights = array(get_i64(args, Vote.WEIGHTS), many, np.float32)
    to = array(get_i64(args, Vote.TO), n, np.float32)
    sums = np.zeros((5, 32), np.float32)
    words = (n + 31) // 32
    while True:
        start = take(args) * step
        if start >= words:
            break
        for word in range(start, min(start + step, words)):
            _sum_word(masks, weights, word, sums)
            for bit in range(min(32, n - 32 * word)):
                value = sums[0, bit]
                if elect:
                    up = value >= 0
                    side, voters = (sums[1, bit], sums[3, bit]) if up else (-sums[2, bit], sums[4, bit])
                    value = side / max(voters, np.float32(1))
                to[32 * word + bit] = value
