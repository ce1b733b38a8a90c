"""What generated Triton kernels are made of: streams, roundings, random bits, sums, the functions of rules.

bfloat16 is handled as the upper half of a float32, by integer instructions, on every target: one definition
of each rounding, which the interpreter (whose own bfloat16 casts truncate) runs too.
"""
# Triton's language has no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeStubs=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# Without fusion a * b + c rounds twice, as on the CPU, wherever ptxas might fuse in one copy of an expression
# and not in another: an element's bits don't depend on whether it falls into a full block or a tail.
LAUNCH = {"num_stages": 1, "enable_fp_fusion": False}

# ---- streams ----------------------------------------------------------------------------------------


@triton.jit
def stream(address, DTYPE: tl.constexpr, start, ALIGNED: tl.constexpr):
    """A pointer to element ``start`` of the array whose address is stored at ``address``.

    128-bit accesses need this hint (bytes) and the caller's, on ``start`` (elements).
    """
    base = tl.load(address).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + start


@triton.jit
def read(p, mask, MATH: tl.constexpr):
    """Elements in the dtype of the arithmetic; a uint16 is a bfloat16."""
    x = tl.load(p, mask)
    if x.dtype == tl.uint16:
        x = widen(x)
    return x.to(MATH)


@triton.jit
def read_bits(p, lane, mask, MATH: tl.constexpr):
    """Packed bits of the elements ``lane``, as 0 or 1; ``p`` is where the first lies, in the lowest bit."""
    if mask is None:
        # A byte is loaded once, for eight elements.
        COUNT: tl.constexpr = lane.shape[0] // 8
        held = tl.load(p + tl.arange(0, COUNT)).to(tl.int32)
        bits = tl.reshape((held[:, None] >> tl.arange(0, 8)[None, :]) & 1, (COUNT * 8,))
    else:
        bits = (tl.load(p + (lane >> 3), mask).to(tl.int32) >> (lane & 7)) & 1
    return bits.to(MATH)


@triton.jit
def widen(half):
    """The float32 with the upper half ``half``."""
    return (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def write(p, x, mask):
    """Store elements, rounded to nearest."""
    tl.store(p, x.to(p.dtype.element_ty), mask)


@triton.jit
def whole_number(x, FIRST: tl.constexpr, KEPT: tl.constexpr, MATH: tl.constexpr):
    """What an integer slot makes of a number: truncated towards zero, by way of a wider integer."""
    return x.to(FIRST).to(KEPT).to(MATH)


@triton.jit
def get_number(p):
    """One number as float64."""
    return read(p, None, tl.float64)


@triton.jit
def put_number(p, x, IS_BOOL: tl.constexpr, keep):
    """Store one float64 in another dtype, if ``keep``; a uint16 is a bfloat16."""
    if IS_BOOL:
        tl.store(p, (x != 0.0).to(tl.int8), keep)
    elif p.dtype.element_ty == tl.uint16:
        tl.store(p, nearest(x.to(tl.float32)), keep)
    else:
        tl.store(p, x.to(p.dtype.element_ty), keep)


# ---- bfloat16 ---------------------------------------------------------------------------------------


@triton.jit
def upper_half(x, increment):
    """The upper half of a float32 after adding ``increment`` to its bits."""
    bits = x.to(tl.uint32, bitcast=True)
    # An exponent of all ones is inf or nan: a carry would turn one into the other. A nan whose payload sits
    # in the lower half only must stay a nan.
    magnitude = bits & 0x7FFFFFFF
    kept = tl.where(magnitude > 0x7F800000, bits | 0x00400000, bits)
    rounded = tl.where(magnitude >= 0x7F800000, kept, bits + increment)
    return (rounded >> 16).to(tl.uint16)


@triton.jit
def nearest(x):
    """float32 to bfloat16, ties to even."""
    return upper_half(x, ((x.to(tl.uint32, bitcast=True) >> 16) & 1) + 0x7FFF)


@triton.jit
def dithered(x, random):
    """float32 to bfloat16: up with a probability equal to the distance from below; ``random`` has 16 bits."""
    return upper_half(x, random)


@triton.jit
def random_bits(key, start, lane, step, tensor, ROLE: tl.constexpr):
    """16 random bits for elements ``start + lane``: Philox4x32-7, one call for eight consecutive elements.

    The counter is (element // 8, role, step, tensor): neither the chunking, nor the block size, nor which
    other tensors have a gradient shows in the result. Lanes of one octet compute the same call; the compiler
    sees that where they sit in one thread, and keeps one. ``start`` is a multiple of the number of lanes.

    Seven rounds pass all of BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    2011). Ten would cost half as much again, which on gfx942, slow at integer products, is step time.
    """
    octet = start // 8
    c0 = octet.to(tl.uint32) + (lane // 8).to(tl.uint32)  # never carries: see start
    zero = c0 * 0
    c1 = zero + (octet >> 32).to(tl.uint32) + (ROLE << 24)
    a, b, c, d = tl.philox(key, c0, c1, zero + step.to(tl.uint32), zero + tensor.to(tl.uint32), 7)
    low = tl.where(lane & 2 != 0, b, a)
    high = tl.where(lane & 2 != 0, d, c)
    word = tl.where(lane & 4 != 0, high, low)
    return tl.where(lane & 1 != 0, word >> 16, word & 0xFFFF)


# ---- moments of 8 bits, weights in two parts (optx.step.formats has both in words) -----------------------

# A small number plus this has its nearest integer in its lowest bits.
_ROUND: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def reciprocal(u):
    """1 / u for u from 1 to 2, to 3e-6, in the same products and sums as on the CPU."""
    p = ((-0.22183709 * u + 1.33102253) * u - 2.93934142) * u + 2.82842288
    return p * (2.0 - u * p)


@triton.jit
def per_lane(of_group, LANES: tl.constexpr):
    """A group's number for each of its 32 lanes."""
    return tl.reshape(tl.broadcast_to(of_group[:, None], (LANES // 32, 32)), (LANES,))


@triton.jit
def decoded(codes, scale, NONNEGATIVE: tl.constexpr):
    """The float32 numbers that codes and their groups' scales stand for."""
    LANES: tl.constexpr = codes.shape[0]
    q = codes.to(tl.float32)
    if NONNEGATIVE:
        root = q * per_lane(scale * 0.003921568859368563, LANES)
        return root * root
    else:
        over = reciprocal(2.0 - tl.abs(q) * 0.007874015718698502)
        return q * over * per_lane(scale * 0.007874015718698502, LANES)


@triton.jit
def read_codes(p, scales, lane, mask, NONNEGATIVE: tl.constexpr, MATH: tl.constexpr):
    """The elements ``lane`` of a moment of 8 bits; ``p`` and ``scales`` are where the first group begins."""
    GROUPS: tl.constexpr = lane.shape[0] // 32
    group = tl.arange(0, GROUPS)
    if mask is None:
        return decoded(tl.load(p + lane), widen(tl.load(scales + group)), NONNEGATIVE).to(MATH)
    else:
        there = tl.max(tl.reshape(mask.to(tl.int32), (GROUPS, 32)), 1) > 0
        scale = widen(tl.load(scales + group, there, other=0))
        return decoded(tl.load(p + lane, mask, other=0), scale, NONNEGATIVE).to(MATH)


@triton.jit
def write_codes(p, scales, x, lane, mask, bits, NONNEGATIVE: tl.constexpr):
    """Store elements of a moment (of second moments the roots), rounded stochastically by 16 random bits.

    Returns what was stored.
    """
    LANES: tl.constexpr = lane.shape[0]
    GROUPS: tl.constexpr = LANES // 32
    group = tl.arange(0, GROUPS)
    x = x.to(tl.float32)
    if mask is not None:
        x = tl.where(mask, x, 0.0)
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.reshape(size, (GROUPS, 32)), 1)
    above = (largest + 0xFFFF) & -65536
    kept = tl.where(largest < 0x00800000, 0, tl.where(largest >= 0x7E800000, 0x7FC00000, above))
    plain = (largest >= 0x00800000) & (largest < 0x7E800000)
    scale = kept.to(tl.float32, bitcast=True)
    safe = tl.where(plain, scale, 1.0)
    dither = (bits.to(tl.float32) + 0.5) * 1.52587890625e-05 - 0.5
    if NONNEGATIVE:
        level = tl.minimum(x * per_lane(255.0 / safe, LANES) + dither, 255.0)
        level = tl.maximum(level, tl.where(x > 0.0, 1.0, 0.0))
    else:
        y = x * per_lane(1.0 / safe, LANES)
        level = y * reciprocal(1.0 + tl.abs(y)) * 254.0 + dither
        level = tl.maximum(tl.minimum(level, 127.0), -127.0)
    code = (level + _ROUND).to(tl.int32, bitcast=True) & per_lane(tl.where(plain, 0xFF, 0), LANES)
    codes = code.to(p.dtype.element_ty)
    tl.store(p + lane, codes, mask)
    half = (kept >> 16).to(tl.uint16)
    if mask is None:
        tl.store(scales + group, half)
    else:
        tl.store(scales + group, half, tl.max(tl.reshape(mask.to(tl.int32), (GROUPS, 32)), 1) > 0)
    return decoded(codes, scale, NONNEGATIVE)


@triton.jit
def read_split(p, rests, mask, BITS: tl.constexpr):
    """The float32 that bfloat16 weights and their rests of 8 or 16 bits are."""
    bits = tl.load(p, mask).to(tl.int32) << 16
    low = tl.load(rests, mask).to(tl.int32) << (16 - BITS)
    size = tl.maximum((bits & 0x7FFFFFFF) + low, 0)
    return ((bits & -2147483648) | size).to(tl.float32, bitcast=True)


@triton.jit
def write_split(p, rests, x, mask, BITS: tl.constexpr):
    """Store the nearest bfloat16 and what is left."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
    if BITS == 8:
        bits = (bits + 128) & -256
    half = ((bits + 0x8000) >> 16) & 0xFFFF
    rest = (bits - (half << 16)) >> (16 - BITS)
    tl.store(p, half.to(tl.uint16), mask)
    tl.store(rests, rest.to(rests.dtype.element_ty), mask)


# ---- sums -------------------------------------------------------------------------------------------


@triton.jit
def fold(column, STRIDE: tl.constexpr, low, high, LANES: tl.constexpr):
    """The sum of ``column[low * STRIDE : high * STRIDE : STRIDE]`` in float64, always in the same order."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    for first in range(low, high, LANES):
        at = first + lanes
        total += tl.load(column + at.to(tl.int64) * STRIDE, at < high, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def fold_lines(p, stride, count, inside, LANES: tl.constexpr):
    """For each pointer in ``p`` the sum of ``count`` float64, ``stride`` apart, always in the same order."""
    lane = tl.arange(0, LANES)[None, :]
    total = tl.zeros((p.shape[0], LANES), tl.float64)
    for first in range(0, count, LANES):
        at = first + lane
        total += tl.load(p[:, None] + at * stride, inside[:, None] & (at < count), other=0.0)
    return tl.sum(total, 1)


@triton.jit
def fold_chunks(partials, first, sums, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Each tensor's sums over its chunks, one program a tensor."""
    t = tl.program_id(0).to(tl.int64)
    low, high = tl.load(first + t), tl.load(first + t + 1)
    for i in tl.static_range(WIDTH):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(sums + t * WIDTH + i, fold(partials + i, WIDTH, low, high, LANES))


# ---- the functions of optx.ops, and ** ----------------------------------------------------------------


@triton.jit
def sqrt(x):
    """Square root."""
    return tl.sqrt(x)


@triton.jit
def exp(x):
    """Natural exponential."""
    return tl.exp(x)


@triton.jit
def log(x):
    """Natural logarithm."""
    return tl.log(x)


@triton.jit
def abs(x):
    """Absolute value."""
    return tl.abs(x)


@triton.jit
def sign(x):
    """-1, 0 or 1; sign(0) is 0."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def where(condition, a, b):
    """``a`` where ``condition`` holds, else ``b``."""
    return tl.where(condition, a, b)


@triton.jit
def maximum(a, b):
    """The larger of two; ``b`` where they don't compare."""
    return tl.where(a > b, a, b)


@triton.jit
def minimum(a, b):
    """The smaller of two; ``b`` where they don't compare."""
    return tl.where(a < b, a, b)


@triton.jit
def fast_power(x, y):
    """``x ** y`` in x's precision, x above 0: a few instructions where `power` has hundreds."""
    return tl.exp2(y * tl.log2(x))


@triton.jit
def power(x, y):
    """``x ** y`` as C's pow has it, for finite numbers.

    In float64, from exp2 and log2: libdevice's pow is not there in the interpreter. The error grows with the
    exponent of the result, so that float32 alone would lose digits.
    """
    a, b = x.to(tl.float64), y.to(tl.float64)
    size = tl.exp2(b * tl.log2(tl.abs(a)))
    whole = tl.floor(b) == b
    odd = tl.floor(b * 0.5) * 2.0 != b
    negative = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    result = tl.where(a < 0.0, negative, size)
    return tl.where(b == 0.0, 1.0, result).to(x.dtype)
