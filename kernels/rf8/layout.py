"""The byte of RF8, in numbers that every compiler of these kernels shares.

A byte is ``S EEEE RRR``. Its magnitude is ``(12 + step[R]) * 2**E * 2**(e_max - 19)``: R counts the
multipliers 3/4, 7/8, 15/16, 1, 17/16, 9/8, 5/4, 3/2 of a power of two, which E counts up to the tensor's
e_max (E = 15). E = 0 is zero.

Rounding in log2 puts the breakpoints of a magnitude ``m * 2**e``, ``1 <= m < 2``, at ``1 + 2**(-k - 1/2)``
and ``2 - 2**(-k - 1/2)``. They are irrational, so that no float is one of them: there are no ties, and
comparing integers is exact. 3/2 * 2**e and 3/4 * 2**(e + 1) are one number; the former is its code, but for
the smallest magnitude, which the former would give E = 0.
"""

from __future__ import annotations

from math import isqrt

STEPS = 0xC8654320
"""Of R the four bits from ``4 * R`` on: sixteenths of its multiplier, less 12, all of 2**e."""
MULTIPLIERS = (3 / 4, 7 / 8, 15 / 16, 1.0, 17 / 16, 9 / 8, 5 / 4, 3 / 2)
"""Of R."""
BIAS = 127  # of a float32's exponent
LEVELS = 15  # powers of two that a tensor has
LOWEST, HIGHEST = -128, 127
"""Of e_max, which is kept in 8 bits. Beyond the highest is what is over 3/2 * 2**127."""


def _above(low: int, half: int) -> int:
    """The first mantissa (of 23 bits) above ``low + 2**(half - 1/2)``."""
    return low + isqrt(1 << 2 * half - 1) + 1


def _from_two(half: int) -> int:
    """The first above ``2 - 2**(half - 1/2 - 23)``."""
    return (1 << 23) - isqrt(1 << 2 * half - 1)


GROWTH = (
    *((_above(0, half), 1 << at) for half, at in ((19, 19), (20, 19), (21, 20), (22, 21))),
    *((_from_two(half), 1 << at) for half, at in ((22, 21), (21, 20), (20, 20))),
)
"""Breakpoints, as mantissas of 23 bits, and what each adds to the rounded one (17/16, 9/8, ..., 15/8, 2)."""
TO_NEXT = (1 << 23) - (isqrt(1 << 47) + 1 - (1 << 23))
"""What added to a float32's bits makes its exponent log2, rounded: from the root of 2 on there is a carry."""
