"""What the methods of `optx.prune` share: how many weights go, of what, and which."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_choice, check_range, shown
from optx.delta.prune import kept_largest

_PIECE = 1 << 22  # scores of a matrix that are compared together, so that what is in between stays small
_NARROW = 16


@dataclass(frozen=True)
class PruneMethod:
    """How many weights of each matrix go, and in what pattern. Subclasses say which.

    A matrix is (outputs, inputs) in float32; whoever calls `prune_matrix` turns a Conv1D's weight, and
    flattens a convolution's.

    Attributes:
        needs_inputs: whether `prune_matrix` needs statistics of the layer's inputs.
        sparsity: the share that goes, in [0, 1); int(numbers * sparsity) do, exactly. None: the pattern's,
            without one a half.
        pattern: ``"n:m"``: of every m inputs in a row n go; None: any may.
        granularity: what is ranked together where there is no pattern: ``"layer"`` or ``"row"``.
    """

    needs_inputs: ClassVar[bool] = False
    sparsity: float | None = None
    pattern: str | None = None
    granularity: str = "layer"

    def __post_init__(self) -> None:
        who, share = type(self).__name__, 0.5
        if self.pattern is not None:
            n, m = self.groups
            share = n / m
        if self.sparsity is not None:
            check_range(who, "sparsity", self.sparsity, 0.0, 1.0)
            if self.sparsity == 1.0:
                raise OptxError(f"{who}: sparsity is 1, which leaves nothing; it must be below 1.")
            if self.pattern is not None and abs(self.sparsity - share) > 1e-9:
                raise OptxError(
                    f"{who}: sparsity is {self.sparsity}, and pattern {self.pattern!r} prunes {share:g} of "
                    "all; leave sparsity out, or give that."
                )
            share = float(self.sparsity)
        object.__setattr__(self, "sparsity", share)
        check_choice(who, "granularity", self.granularity, ("layer", "row"))

    @property
    def share(self) -> float:
        """The share that goes."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def groups(self) -> tuple[int, int]:
        """n and m of the pattern: of every m inputs n go.

        Raises:
            OptxError: there is none, or it is none.
        """
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.pattern) if isinstance(self.pattern, str) else None
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < n < m:
            raise OptxError(
                f"{type(self).__name__}: pattern is {shown(self.pattern)}; it must be 'n:m' with 0 < n < m, "
                "as '2:4': of every m inputs n go."
            )
        return n, m

    def check_shape(self, name: str, inputs: int) -> None:
        """Raise if the pattern doesn't divide a matrix's inputs; before anything is changed.

        Raises:
            ShapeError: so; names the weight.
        """
        if self.pattern is not None and inputs % self.groups[1]:
            raise ShapeError(
                f"prune: {name!r} has {inputs} inputs, which pattern {self.pattern!r} doesn't divide. Leave "
                "it out with exclude=, or choose another pattern."
            )

    def prune_matrix(self, weight: Tensor, stats: Any = None) -> tuple[Tensor, Tensor]:
        """One matrix pruned.

        Args:
            weight: (outputs, inputs), float32; not changed.
            stats: of the layer's inputs, where the method needs them.

        Returns:
            The mask (bool, True: kept), and the matrix with zeros where it is False.
        """
        kept = self.kept(self.score(weight, stats))
        return kept, weight.masked_fill(~kept, 0)

    def score(self, weight: Tensor, stats: Any = None) -> Tensor:
        """How much each weight is worth, not negative, of the matrix's shape: the least go."""
        raise NotImplementedError

    def kept(self, score: Tensor) -> Tensor:
        """The mask of a matrix of scores: the lowest go, of equal ones those that come first."""
        if self.pattern is not None:
            n, m = self.groups
            return keep_in_rows(score.reshape(-1, m), n).view(score.shape)
        if self.granularity == "row":
            return keep_in_rows(score, int(score.shape[1] * self.share))
        return kept_largest(score, int(score.numel() * self.share))


def keep_in_rows(score: Tensor, count: int) -> Tensor:
    """A mask without the ``count`` lowest scores of each row; of equal ones those that come first go."""
    kept = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    if count and score.numel():
        keep = _by_comparing if score.shape[1] <= _NARROW else _by_threshold
        size = max(1, _PIECE // score.shape[1])
        for scores, rows in zip(score.split(size), kept.split(size), strict=True):
            rows.copy_(keep(scores, count))
    return kept


def _by_comparing(score: Tensor, count: int) -> Tensor:
    """Of a few columns: each with each, which takes a fifth of what sorting does."""
    columns = [column.contiguous() for column in score.unbind(1)]
    lower = [torch.zeros(len(score), dtype=torch.uint8, device=score.device) for _ in columns]
    for i, first in enumerate(columns):
        for j in range(i + 1, len(columns)):
            later = columns[j] < first
            lower[i] += later
            lower[j] += ~later
    return torch.stack([number >= count for number in lower], 1)


def _by_threshold(score: Tensor, count: int) -> Tensor:
    """By each row's ``count``-th lowest score, and of those that equal it the first."""
    threshold = _lowest(score, count)[:, None]
    kept = score > threshold
    equal = score == threshold
    spare = count - (score < threshold).sum(1)
    tied = (equal.sum(1) > spare).nonzero()[:, 0]
    if len(tied):
        kept[tied] |= equal[tied] & (equal[tied].cumsum(1) > spare[tied, None])
    return kept


def _lowest(score: Tensor, count: int) -> Tensor:
    """The ``count``-th lowest of each row."""
    if score.device.type != "cpu":
        return torch.kthvalue(score, count, dim=1).values
    found = np.partition(score.numpy(), count - 1, axis=1)[:, count - 1]  # three times as fast
    return torch.from_numpy(np.ascontiguousarray(found))


def check_finite(name: str, weight: Tensor) -> None:
    """Raise if a weight has numbers that can't be ranked.

    Raises:
        OptxError: it has inf or nan; names it.
    """
    if not bool(torch.isfinite(weight).all()):
        raise OptxError(f"prune: {name!r} has inf or nan; its weights can't be ranked.")
