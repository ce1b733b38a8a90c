"""What AdamR tells of a step: how far weights are from their anchors, and how strong the pull was."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._names import is_dtensor, whole
from optx.step.measured import Measured
from optx.step.transform import Group

Pair = tuple[Tensor, "Tensor | None"]
_PIECE = 1 << 20  # numbers that are compared at a time


class Distances:
    """Distances from anchors: of weights that a step moved as it summed them, of the others taken here.

    What a step leaves alone (HFT's other half) stays as far away as it is, so that is taken once.
    """

    def __init__(self) -> None:
        self._still: dict[int, tuple[weakref.ref[Tensor], int, float]] = {}

    def total(self, measured: Measured, beside: Sequence[Pair]) -> float | None:
        """The distance of all, as one vector; None while shards are not known, which only a step completes.

        Args:
            measured: with the squared distances that the step took.
            beside: the weights that it left alone, with their anchors; None is zero.
        """
        new = [pair for pair in beside if not self._knows(pair[0])]
        if any(is_dtensor(p) for p, _ in new):
            return None
        self._take(new)
        moved = measured.sum("adamr.distance_sq") or 0.0
        return math.sqrt(max(moved, 0.0) + sum(self._still[id(p)][2] for p, _ in beside))

    def complete(self, beside: Iterable[Pair]) -> None:
        """In a step, which all ranks take: the shards that it left alone."""
        self._take([pair for pair in beside if is_dtensor(pair[0]) and not self._knows(pair[0])])

    def _knows(self, p: Tensor) -> bool:
        of, version, _ = self._still.get(id(p), (None, -1, 0.0))
        return of is not None and of() is p and version == p._version

    def _take(self, pairs: Sequence[Pair]) -> None:
        for p, anchor in pairs:
            square = float(squared_distance(p.detach(), anchor))
            self._still[id(p)] = weakref.ref(p), p._version, square


def squared_distance(w: Tensor, anchor: Tensor | None) -> Tensor:
    """A sum in float64 of what is compared piece by piece; complete over the mesh."""
    wide = torch.float32 if w.device.type == "mps" else torch.float64
    given = [w] if anchor is None else [w, anchor]
    if not is_dtensor(w) and all(t.is_contiguous() for t in given):
        pieces: Any = zip(*(t.view(-1).split(_PIECE) for t in given), strict=True)
    else:
        pieces = [given]
    total = torch.zeros((), dtype=wide, device=w.device)
    for piece in pieces:
        now, *then = (t.to(wide) for t in piece)
        total = total + whole((now - then[0] if then else now).square().sum())
    return total


def pull(measured: Measured, groups: Iterable[Group]) -> dict[str, float]:
    """The rate of the last step's pull, the mean over param groups; and r, where it divides by that."""
    found: dict[str, float] = {}
    first = [measured.first("adamr.rate", group["params"]) for group in groups]
    known = [rate for rate in first if rate is not None]
    if known:
        found["pull"] = sum(known) / len(known)
    second, size = measured.sum("adamr.second"), measured.sum("numel", where="adamr.second")
    if second is not None and size:
        found["scale"] = math.sqrt(max(second / size, 0.0)) or 1.0
    return found
