"""Golomb codes of ternary masks on CPU, compiled by Numba; the format is that of `optx.delta._golomb`.

Not to be imported: `optx.kernels.ternary.cpu` runs its text. A block of
`SPAN` numbers has a bit stream of its own, in words of 32 bits, lowest bit first: one sign bit for each
number that is kept, then the codes of the gaps between positions, or of four positions at a time. A block is
one piece of work.
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
    DROPPED,
    FOURS,
    SPAN,
    THIRDS,
    Codec,
    array,
    peek,
    poke,
)
from optx.kernels.words import count_ones, first_one, last_one

U = np.uint64
ONE, ALL = U(1), U(0xFFFFFFFFFFFFFFFF)
KERNEL = types.void(types.voidptr)
SHORT = 1024  # gaps below are counted, longer ones summed one by one
WORDS = SPAN // 64
# Bits of four positions' code, Huffman's for a density of 0.35; it is canonical, so that the lengths tell it.
LENGTHS = np.array([3, 3, 3, 4, 4, 4, 4, 5, 4, 4, 4, 5, 4, 5, 6, 6])
LONGEST = 6


def _canonical(lengths):
    """By four positions: their code, first bit lowest; and by the next six bits: positions + 16 * length."""
    codes, meanings = np.zeros(16, np.uint64), np.zeros(1 << LONGEST, np.uint64)
    code, length = 0, 0
    for fours in np.argsort(lengths, kind="stable"):
        code <<= int(lengths[fours]) - length
        length = int(lengths[fours])
        codes[fours] = int(f"{code:0{length}b}"[::-1], 2)
        meanings[int(codes[fours]) :: 1 << length] = int(fours) + 16 * length
        code += 1
    return codes, meanings


CODES, MEANINGS = _canonical(LENGTHS)
_plain = part(error_model="numpy")


@_plain
def _arrays(args):
    """Numbers, blocks, both masks, and three numbers for each block."""
    n, blocks = get_i64(args, Codec.NUMEL), get_i64(args, Codec.BLOCKS)
    plus = array(get_i64(args, Codec.PLUS), (n + 63) // 64, np.uint64)
    minus = array(get_i64(args, Codec.MINUS), (n + 63) // 64, np.uint64)
    table = array(get_i64(args, Codec.TABLE), 3 * blocks, np.int64)
    return n, blocks, plus, minus, table


@_plain
def _valid(word, n):
    """The bits of a word that stand for numbers: all but those past the last."""
    count = n - 64 * word
    return ALL if count >= 64 else (ONE << U(count)) - ONE


@_plain
def _coded(kept, word, n, dropped):
    """The ones of a word whose positions are coded: what is kept, or what is not."""
    return ~kept & _valid(word, n) if dropped else kept


@_plain
def _divisor(code):
    """The m of a code, and the number of its plain low bits."""
    low = code & 31
    return ((3 if code & THIRDS else 1) << low), low


@_plain
def _cost(gap, code):
    """Bits of a gap's code."""
    m, low = _divisor(code)
    bits = gap // m + 1 + low
    if code & THIRDS:
        bits += 1 if (gap % m) >> low == 0 else 2
    return bits


@_plain
def _total(counts, longest, far, many, code):
    """Bits of all gaps: the counted short ones, and the far ones."""
    bits = np.int64(0)
    for gap in range(longest + 1):
        if counts[gap]:
            bits += counts[gap] * _cost(gap, code)
    for i in range(many):
        bits += _cost(far[i], code)
    return bits


@_plain
def _count_gaps(plus, minus, n, block, dropped, counts, far):
    """Counts of the short gaps, the longest of these, and the far gaps."""
    counts[:] = 0
    longest, many, last = np.int64(0), 0, np.int64(block * SPAN) - 1
    for word in range(block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)):
        rest = _coded(plus[word] | minus[word], word, n, dropped)
        while rest:
            at = np.int64(64 * word) + np.int64(first_one(rest))
            gap = at - last - 1
            last = at
            rest &= rest - ONE
            if gap < SHORT:
                counts[gap] += 1
                longest = max(longest, gap)
            else:
                far[many] = gap
                many += 1
    return longest, many


@_plain
def _total_fours(plus, minus, n, block, dropped):
    """Bits of all positions, four at a time."""
    bits = np.int64(0)
    for word in range(block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)):
        rest = _coded(plus[word] | minus[word], word, n, dropped)
        for _ in range((min(n - 64 * word, 64) + 3) // 4):
            bits += LENGTHS[rest & U(15)]
            rest >>= U(4)
    return bits


@_plain
def _measure(plus, minus, n, block, counts, far):
    """How many are kept, the shortest code, and how many bits it takes."""
    size = min(SPAN, n - block * SPAN)
    kept = np.int64(0)
    for word in range(block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)):
        kept += np.int64(count_ones(plus[word] | minus[word]))
    dropped = 2 * kept > size
    coded = size - kept if dropped else kept
    best, least = 0, np.int64(0)
    if coded > 0:
        longest, many = _count_gaps(plus, minus, n, block, dropped, counts, far)
        near = 0
        while (size >> (near + 1)) > coded:  # a random mask would want about this many low bits
            near += 1
        least = np.int64(-1)
        for low in range(max(near - 3, 0), near + 2):
            for code in (low, low | THIRDS):
                bits = _total(counts, longest, far, many, code)
                if least < 0 or bits < least:
                    best, least = code, bits
        if near == 1:
            bits = _total_fours(plus, minus, n, block, dropped)
            if bits < least:
                best, least = FOURS, bits
    return kept, best | (DROPPED if dropped else 0), least


@cfunc(KERNEL, error_model="numpy", cache=True)
def measure(pointer):
    """By block: how many are kept, the shortest code, and how many bits the gaps take."""
    args = address(pointer)
    n, blocks, plus, minus, table = _arrays(args)
    counts, far = np.zeros(SHORT, np.int64), np.zeros(SPAN // SHORT, np.int64)
    while True:
        block = take(args)
        if block >= blocks:
            break
        kept, code, bits = _measure(plus, minus, n, block, counts, far)
        table[3 * block], table[3 * block + 1], table[3 * block + 2] = kept, code, bits


# ---- writing --------------------------------------------------------------------------------------------


@_plain
def _put(stream, state, value, count):
    """Append up to 32 bits; the state is bits that wait, how many, and where they go."""
    waiting, have, at = state
    waiting |= value << U(have)
    have += count
    if have >= 32:
        poke(stream, at, np.uint32(waiting & U(0xFFFFFFFF)))
        waiting >>= U(32)
        have -= 32
        at += 1
    return waiting, have, at


@_plain
def _put_gap(stream, state, gap, code):
    m, low = _divisor(code)
    quotient = gap // m
    while quotient >= 31:
        state = _put(stream, state, U(0x7FFFFFFF), 31)
        quotient -= 31
    state = _put(stream, state, (ONE << U(quotient)) - ONE, quotient + 1)
    rest = gap % m
    if code & THIRDS:
        third = rest >> low
        if third > 0:  # 0, 10, 11, first bit first
            state = _put(stream, state, ONE, 1)
            third_bit = U(third - 1)
        else:
            third_bit = U(0)
        state = _put(stream, state, third_bit, 1)
        rest -= third << low
    return _put(stream, state, U(rest), low)


@_plain
def _encode(plus, minus, n, block, code, stream, at):
    """Write one block's stream from a word on."""
    state = (U(0), 0, at)
    start, stop = block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)
    for word in range(start, stop):
        rest = plus[word] | minus[word]
        while rest:
            state = _put(stream, state, (minus[word] >> first_one(rest)) & ONE, 1)
            rest &= rest - ONE
    last = np.int64(block * SPAN) - 1
    for word in range(start, stop):
        rest = _coded(plus[word] | minus[word], word, n, (code & DROPPED) != 0)
        if code & FOURS:
            for _ in range((min(n - 64 * word, 64) + 3) // 4):
                state = _put(stream, state, CODES[rest & U(15)], LENGTHS[rest & U(15)])
                rest >>= U(4)
        while rest:
            position = np.int64(64 * word) + np.int64(first_one(rest))
            state = _put_gap(stream, state, position - last - 1, code)
            last = position
            rest &= rest - ONE
    if state[1] > 0:
        poke(stream, state[2], np.uint32(state[0]))


@cfunc(KERNEL, error_model="numpy", cache=True)
def encode(pointer):
    """The streams of all blocks."""
    args = address(pointer)
    n, blocks, plus, minus, table = _arrays(args)
    starts = array(get_i64(args, Codec.STARTS), blocks + 1, np.int64)
    stream = get_i64(args, Codec.STREAM)
    while True:
        block = take(args)
        if block >= blocks:
            break
        _encode(plus, minus, n, block, table[3 * block + 1], stream, starts[block])


# ---- reading --------------------------------------------------------------------------------------------


@_plain
def _copy_positions(plus, n, block, count, stream, bit, stop):
    """Where every gap is coded in ones alone, a 0 is a position: the code is the mask, inverted."""
    left = count
    for word in range(block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)):
        at, skip = bit // 32, U(bit % 32)
        low = U(peek(stream, at)) if at < stop else U(0)
        middle = U(peek(stream, at + 1)) if at + 1 < stop else U(0)
        high = U(peek(stream, at + 2)) if at + 2 < stop else U(0)
        value = ~((low | (middle << U(32))) >> skip | ((high << U(32)) << (U(32) - skip))) & _valid(word, n)
        extra = np.int64(count_ones(value)) - left
        while extra > 0:  # what follows the last position is no longer code
            value ^= ONE << last_one(value)
            extra -= 1
        left -= np.int64(count_ones(value))
        plus[word] = value
        bit += 64
    return left == 0


@_plain
def _decode_fours(plus, n, block, count, stream, bit, stop):
    """Set the coded positions in a mask, four at a time; whether they are so many, all in the block."""
    at = bit // 32
    waiting, have = U(0), U(0)
    if at < stop:
        waiting, have = U(peek(stream, at)) >> U(bit % 32), U(32 - bit % 32)
    at += 1
    left = count
    for word in range(block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)):
        value = U(0)
        for i in range((min(n - 64 * word, 64) + 3) // 4):
            if have < U(LONGEST):
                waiting |= (U(peek(stream, at)) if at < stop else U(0)) << have
                have += U(32)
                at += 1
            meaning = MEANINGS[waiting & U((1 << LONGEST) - 1)]
            value |= (meaning & U(15)) << U(4 * i)
            waiting >>= meaning >> U(4)
            have -= meaning >> U(4)
        if value & ~_valid(word, n):
            return False
        plus[word] = value
        left -= np.int64(count_ones(value))
    return left == 0 and 32 * at - np.int64(have) <= 32 * stop


@_plain
def _decode_positions(plus, n, block, code, count, stream, bit, stop):
    """Set the coded positions in a mask; whether all lie in the block."""
    low = U(code & 31)
    factor = U(3 if code & THIRDS else 1)
    thirds = U(1 if code & THIRDS else 0)
    plain = (ONE << low) - ONE
    position, end = np.int64(block * SPAN) - 1, min(np.int64(block * SPAN) + SPAN, n)
    at = bit // 32
    waiting, have = U(0), U(0)  # bits read and not used yet; at least 32 before each use
    if at < stop:
        waiting = U(peek(stream, at)) >> U(bit % 32)
    have = U(32 - bit % 32)
    at += 1
    for _ in range(count):
        quotient = U(0)
        while True:
            if have < U(32):
                waiting |= (U(peek(stream, at)) if at < stop else U(0)) << have
                have += U(32)
                at += 1
            ones = first_one(~waiting)
            quotient += min(ones, have)
            if ones < have:
                break
            if at > stop:
                return False
            waiting, have = U(0), U(0)
        waiting >>= ones + ONE
        have -= ones + ONE
        if have < U(32):
            waiting |= (U(peek(stream, at)) if at < stop else U(0)) << have
            have += U(32)
            at += 1
        some = waiting & thirds
        third = some + (some & (waiting >> ONE))
        waiting >>= thirds + some
        gap = ((factor * quotient + third) << low) + (waiting & plain)
        waiting >>= low
        have -= thirds + some + low
        position += np.int64(gap) + 1
        if position >= end:
            return False
        plus[position >> 6] |= ONE << U(position & 63)
    return True


@_plain
def _decode_signs(plus, minus, n, block, kept, stream, bit):
    """Turn coded positions into what is kept, and share it out by sign; whether the count is right."""
    used = np.int64(0)
    waiting, have, at = U(0), 0, bit // 32
    for word in range(block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)):
        rest = plus[word]
        if used + np.int64(count_ones(rest)) > kept:
            return False
        negative = U(0)
        while rest:
            if have == 0:
                waiting, have = U(peek(stream, at)), 32
                at += 1
            one = rest & (~rest + ONE)
            negative |= one * (waiting & ONE)
            waiting >>= ONE
            have -= 1
            used += 1
            rest ^= one
        minus[word] = negative
        plus[word] ^= negative
    return used == kept


@_plain
def _decode(plus, minus, n, block, kept, code, stream, start, stop):
    size = min(SPAN, n - block * SPAN)
    dropped = (code & DROPPED) != 0
    first, last = block * WORDS, min(block * WORDS + WORDS, (n + 63) // 64)
    plus[first:last] = 0
    count = size - kept if dropped else kept
    # Signs need words of their own, so their number is checked before they are read.
    if kept > size or 32 * (stop - start) < kept:
        return False
    bit = 32 * start + kept
    if code & FOURS:
        fine = _decode_fours(plus, n, block, count, stream, bit, stop)
    elif code & ~DROPPED == 0:
        fine = _copy_positions(plus, n, block, count, stream, bit, stop)
    else:
        fine = _decode_positions(plus, n, block, code, count, stream, bit, stop)
    if not fine:
        return False
    if dropped:
        for word in range(first, last):
            plus[word] = ~plus[word] & _valid(word, n)
    return _decode_signs(plus, minus, n, block, kept, stream, 32 * start)


@cfunc(KERNEL, error_model="numpy", cache=True)
def decode(pointer):
    """The masks of all blocks; the table's third number becomes 1 where a stream makes sense, else 0."""
    args = address(pointer)
    n, blocks, plus, minus, table = _arrays(args)
    starts = array(get_i64(args, Codec.STARTS), blocks + 1, np.int64)
    stream = get_i64(args, Codec.STREAM)
    while True:
        block = take(args)
        if block >= blocks:
            break
        kept, code = table[3 * block], table[3 * block + 1]
        fine = _decode(plus, minus, n, block, kept, code, stream, starts[block], starts[block + 1])
        table[3 * block + 2] = 1 if fine else 0
