"""The sum by which contents are told apart, compiled by Numba.

Not to be imported: `optx.delta._mixed_sum` runs its text, where there is Numba.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingTypeArgument=false

from __future__ import annotations

import numpy as np

from optx.kernels.jit import njit

STEP = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
U27, U30, U31 = np.uint64(27), np.uint64(30), np.uint64(31)


@njit(nogil=True, cache=True)
def mixed_sum(bits, begin):
    """Of each number's bits and place, mixed as SplitMix64 mixes its state."""
    start, made = begin * STEP, np.uint64(0)
    for i in range(bits.shape[0]):
        z = (start + np.uint64(i) * STEP) ^ np.uint64(bits[i])
        z = (z ^ (z >> U30)) * FIRST
        z = (z ^ (z >> U27)) * SECOND
        made += z ^ (z >> U31)
    return made
