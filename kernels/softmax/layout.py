"""Exponentials as pairs (m, n) that mean ``m 2**n``, in numbers: what all kernels of a dtype agree on.

``n = rint(x log2 e)`` is a whole number that is kept as a float, and ``m = e**t`` for what is left,
``t = x - n ln 2`` (in two constants, by fused products), from 2**-1/2 to 2**1/2. No ``2**n`` is ever
multiplied out, which is what overflows; a sum of pairs is one, at the largest exponent.

Source: "The Two-Pass Softmax Algorithm", arXiv 2001.04438; the constants of float32 are those of XNNPACK's
kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Numbers(NamedTuple):
    """Those of one dtype of arithmetic.

    Attributes:
        log2e: 1 / ln 2.
        ln2: ln 2 less its second part.
        ln2_rest: that part.
        powers: of e**t the coefficients, lowest first.
        mantissa: bits of a number's mantissa that are stored.
        bias: of its exponent.
        most: sums with exponents up to here, either way, are right as they are. Beyond, ``n`` loses its last
            bits, and a row takes a third read, which subtracts its largest entry.
    """

    log2e: float
    ln2: float
    ln2_rest: float
    powers: tuple[float, ...]
    mantissa: int
    bias: int
    most: float

    @property
    def floor(self) -> float:
        """No entry counts as less: beside a sum with an exponent in range it is 0, and -inf is finite so."""
        return -2.0 * self.most * math.log(2)


_POWERS = ("0x1p0", "0x1.FFFFF6p-1", "0x1.FFFDC6p-2", "0x1.555A80p-3", "0x1.573A1Ap-5", "0x1.0F9F9Cp-7")
FLOAT32 = Numbers(
    float.fromhex("0x1.715476p+0"),
    float.fromhex("0x1.62E43p-1"),
    float.fromhex("-0x1.05C61p-29"),
    tuple(map(float.fromhex, _POWERS)),
    23,
    127,
    2.0**16,
)
# Through the points of Chebyshev, to 1.4e-17.
FLOAT64 = Numbers(
    math.log2(math.e),
    0.6931471805599453,
    2.3190468138462996e-17,
    (
        1.0,
        1.0,
        0.5000000000000006,
        0.1666666666666667,
        0.04166666666657011,
        0.008333333333325907,
        0.0013888888933546119,
        0.00019841269875613723,
        2.4801503010708097e-05,
        2.755725439814625e-06,
        2.7626911294650646e-07,
        2.510563243699736e-08,
    ),
    52,
    1023,
    2.0**36,
)

FIELDS = 3
"""A row's sum is three numbers (m, n, shift): ``m 2**n e**shift``; the shift is 0 but in rows beyond the
range."""
