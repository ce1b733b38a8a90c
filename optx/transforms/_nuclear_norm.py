"""The nuclear norm of the selected part of a matrix: its gradient, and which matrix a step pulls.

Source: SaRA, arXiv 2409.06633; the code's choice of one random matrix a step, github.com/sjtuplayer/SaRA.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from optx._errors import OptxError, TransformError
from optx._names import parameter_names, placed_like, whole
from optx.step.rehearsal import is_rehearsal
from optx.step.transform import Group, Host

LEAST_SIDE = 65  # rows and columns of a matrix that is pulled: "min(shape) > 64"
LEAST_SELECTED = 101  # entries: "more than 100"
_CUT = 1e-7  # of the largest singular value, below which another has no direction

T = TypeVar("T")


def nuclear_gradient(matrix: Tensor) -> Tensor:
    """The gradient of the sum of singular values: U V^T, of those singular values that are not 0.

    Directly, since autograd's of an SVD divides by differences of singular values. What is 0 but for rounding
    has directions that mean nothing, and is left out.

    Args:
        matrix: two dimensions, any float dtype.

    Returns:
        Of the same shape, in float32 (float64 for such).
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.to(torch.float32)
    u, sizes, vh = torch.linalg.svd(wide, full_matrices=False)
    cut = max(_CUT, torch.finfo(wide.dtype).eps * max(matrix.shape))
    return (u * (sizes > cut * sizes.amax()).to(wide.dtype)) @ vh


def choice(seed: int, step: int, candidates: Sequence[T]) -> T:
    """One of them at random, the same wherever these are the same: on all ranks, in a resumed run."""
    # Seeded by text (sha512), and used through random() only: both are promised to stay as they are.
    return candidates[int(random.Random(f"sara/{seed}/{step}").random() * len(candidates))]


class Pull:
    """Adds the nuclear norm's gradient to one weight's ``p.grad``, and gives that back after the step.

    Args:
        mask_of: a weight's selection, as bool.
    """

    def __init__(self, mask_of: Callable[[Tensor], Tensor]) -> None:
        self._mask_of = mask_of
        # A weight, its gradient, what stands there meanwhile, and how often that had been changed in place.
        self._lent: tuple[Tensor, Tensor, Tensor, int] | None = None

    def check(self, sara: Any, optimizer: Host) -> None:
        """Raise where a weight is asked for, and there is nothing to pull."""
        weighted = [g for g in optimizer.param_groups if sara.serves(g) and _strength(sara, g) > 0]
        if weighted and not any(_served(p) for g in weighted for p in g["params"]):
            raise TransformError(
                f"SaRA: rank_weight pulls matrices of {LEAST_SIDE} rows and columns or more, and no "
                "trainable weight is one. Leave it at 0."
            )

    def add(self, sara: Any, optimizer: Host) -> None:
        """Choose a matrix and pull it, where it is time."""
        if sara.steps % sara.rank_every:
            return
        candidates = [
            (p, _strength(sara, group) * (-1.0 if group.get("maximize", False) else 1.0))
            for group in optimizer.param_groups
            if sara.serves(group) and _strength(sara, group) > 0
            for p in group["params"]
            if _served(p) and p.grad is not None
        ]
        if not candidates or is_rehearsal(optimizer):
            return
        p, strength = choice(sara.seed, sara.steps, candidates)
        mask = self._mask_of(p)
        if int(whole(mask.sum())) < LEAST_SELECTED:
            return
        matrix = whole(torch.where(mask, p.detach(), 0.0))
        if not bool(matrix.isfinite().all()):
            name = parameter_names(optimizer.base)[id(p)]
            raise OptxError(f"SaRA: the weight {name!r} has inf or nan, and so no nuclear norm.")
        pull = nuclear_gradient(matrix) * (strength * sara.rank_every)
        g: Any = p.grad
        new = g.to(pull.dtype, copy=True).add_(placed_like(pull, p)).to(g.dtype)
        p.grad = new
        self._lent = p, g, new, new._version

    def give_back(self) -> None:
        """Put the gradient back, unless somebody has written another since (a closure)."""
        if self._lent is not None:
            p, g, lent, version = self._lent
            self._lent = None
            if p.grad is lent and lent._version == version:
                p.grad = g


def _strength(sara: Any, group: Group) -> float:
    return float(group.get("sara_rank_weight", sara.options["rank_weight"]))


def _served(p: Tensor) -> bool:
    return p.requires_grad and p.ndim == 2 and min(p.shape) >= LEAST_SIDE
