"""Weights as whole levels: counted, and moved by their ranks; compiled by Numba.

Not to be imported: `optx.delta.deepshape` runs its text.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

import math

import numpy as np

from optx.kernels.jit import njit


@njit(cache=True, nogil=True, error_model="numpy")
def count(values, step, counts, sums):
    """Add to the numbers of each level, and to the sums by distance from 0; whether all were finite.

    Args:
        values: float64.
        step: between two levels.
        counts: int64, of levels from -m to m; what is further out is not counted.
        sums: float64 (m + 1, 2, 4): by magnitude of the level, of the weights up to it and of those beyond
            (half a step at most): how many, their sum, that of their magnitudes, that of their squares.
    """
    most = len(sums) - 1
    for w in values:
        if not math.isfinite(w):
            return False
        at = np.rint(w / step)
        if abs(at) > most:
            continue
        level = int(at)
        counts[level + most] += 1
        own = sums[abs(level), 1 if abs(w) > abs(at) * step else 0]
        own[0] += 1.0
        own[1] += w
        own[2] += abs(w)
        own[3] += w * w
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def move(values, step, first, ranks, targets, ends, made):
    """Every weight's new level, times the step; equal levels take their places in the order of the weights.

    Args:
        values: float64.
        step: between two levels.
        first: the lowest level that is moved.
        ranks: int64, by level from there on: the place of its next weight among all that are moved; advanced.
        targets: int64, by level: the new level that this place falls into; advanced.
        ends: int64: where each new level's places end, the first being ``first``'s.
        made: float64, of as many.
    """
    for i in range(len(values)):
        at = np.rint(values[i] / step)
        own = at - first
        if own >= 0 and own < len(ranks):
            level = int(own)
            rank, target = ranks[level], targets[level]
            ranks[level] = rank + 1
            while target < len(ends) and rank >= ends[target]:
                target += 1
            targets[level] = target
            if target < len(ends):  # else it is one of the few that the rounding down of numbers left over
                at = float(first + target)
        made[i] = at * step
