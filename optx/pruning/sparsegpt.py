"""SparseGPT: prune column by column, and let what is kept make up for what is gone.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv
2301.00774, algorithm 1; dead columns and damping as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optx._errors import OptxError, check_choice, check_range, check_whole
from optx.delta.prune import kept_largest
from optx.pruning._calibration_sums import InputSums, Products
from optx.pruning._method import PruneMethod, keep_in_rows


def inverse_factor(product: Tensor, damping: float, name: str) -> Tensor:
    """U, upper triangular with U^T U = (H + damping * mean(diag H) * I)^-1.

    The inverse itself is not formed: if J reverses the order of columns and J H J = L L^T, U is the inverse
    of J L J. One factorisation instead of two.

    Args:
        product: H, (in, in), without zeros on its diagonal.
        damping: relative to the mean of the diagonal.
        name: for errors.

    Raises:
        OptxError: H is singular.
    """
    H = product.flip(0, 1)
    H.diagonal().add_(damping * H.diagonal().mean())
    L, failed = torch.linalg.cholesky_ex(H)
    if bool(failed):
        raise OptxError(
            f"SparseGPT: the Hessian of {name!r} is singular at damping={damping}; raise damping, or give "
            f"more calibration tokens than its {len(H)} inputs."
        )
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)


@dataclass(frozen=True)
class SparseGPT(PruneMethod):
    """Prune what costs least given all inputs together, and correct what is kept for it.

    Columns of a weight (inputs) are gone through from the left. Of each, the weights of the lowest w^2 /
    U_jj^2 go, and the columns that follow take over what they did: kept weights change too. U is the
    Cholesky factor of the inverse of H, the products of every two inputs over the calibration data.

    An input that was 0 throughout has its weights set to 0, as in the authors' code: they go first, and those
    that are kept all the same (where others go by count) are 0.

    Args:
        sparsity: the share that goes, in [0, 1): int(numbers * sparsity) of each layer, exactly; each
            block of columns gives its part. None: the pattern's, without one 0.5.
        pattern: ``"n:m"``: of every m inputs in a row n go, chosen when the first of them is reached, as
            ``"2:4"``; None: any may.
        granularity: ``"layer"`` alone.
        damping: what is added to H's diagonal, as a share of its mean over inputs that are not always 0.
        block: how many columns are scored together and updated before the rest is; rounded down to a
            multiple of m.

    Paper values:
        ``sparsity=0.5``: language models of 125M to 175B, with ``damping=0.01, block=128``.
        ``pattern="2:4"``, ``pattern="4:8"``: the patterns that hardware speeds up.

    Limits: H takes (inputs)^2 float32 numbers for each layer of one block; layers with one input share it.
    Convolutions over three dimensions are not served.

    Keywords: OBS, optimal brain surgeon, one-shot pruning, Hessian, 2:4, n:m, semi-structured, sparsity.

    Evidence: ``optx run prune``; ``test_sparsegpt.py``, ``test_prune_peer.py`` (llmcompressor).

    Raises:
        OptxError: an option is out of range; in `optx.prune`, n:m that doesn't divide a layer's inputs, no
            data, inputs that are inf or nan, a singular H.

    Example:
        >>> import torch, optx
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> masks = optx.prune(model, optx.SparseGPT(pattern="2:4"), [torch.randn(64, 8)])
        >>> float((model[0].weight == 0).float().mean())
        0.5

    Source: arXiv 2301.00774, algorithm 1.
    """

    needs_inputs: ClassVar[bool] = True
    sums: ClassVar[type[InputSums]] = Products
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("SparseGPT", "granularity", self.granularity, ("layer",))
        check_range("SparseGPT", "damping", self.damping, 0.0)
        check_whole("SparseGPT", "block", self.block, 1)

    def prune_matrix(self, weight: Tensor, stats: Any = None) -> tuple[Tensor, Tensor]:
        """One matrix.

        Args:
            weight: (out, in), float32 or wider; not changed.
            stats: `Products` of its inputs.

        Returns:
            The mask (bool, True: kept), and the new matrix, with zeros where it is False.

        Raises:
            OptxError: the sums are inf or nan, or H is singular.
        """
        new, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
        groups = stats.groups
        for group, H in enumerate(stats.mean().to(weight)):
            rows = slice(group * len(weight) // groups, (group + 1) * len(weight) // groups)
            kept[rows], new[rows] = self._prune_rows(
                weight[rows], H, stats.name, weight[: rows.start].numel()
            )
        return kept, new

    def _prune_rows(self, weight: Tensor, H: Tensor, name: str, before: int) -> tuple[Tensor, Tensor]:
        """Rows that have the same inputs; ``before`` are the numbers of the rows above them."""
        diagonal = H.diagonal()
        dead = diagonal == 0
        # The code has 1 for these; then damping would depend on how large inputs are, and on how many are 0.
        level = float(diagonal.sum()) / max(1, len(H) - int(dead.sum()))
        alive = H.diagonal_scatter(diagonal.masked_fill(dead, level or 1.0))
        U = inverse_factor(alive, self.damping, name)
        columns = weight.t().masked_fill(dead[:, None], 0.0)  # a column of the weight is a row of memory
        kept = torch.ones_like(columns, dtype=torch.bool)
        for start, stop in self._blocks(len(columns)):
            own, after = slice(start, stop), slice(stop, None)
            if self.pattern is None:
                score = (columns[own] / U.diagonal()[own, None]).square().t()
                # Counts up to here less those before: over all blocks they are int(numbers * sparsity).
                done, now = before + columns[:start].numel(), before + columns[:stop].numel()
                count = int(now * self.share) - int(done * self.share)
                kept[own] = kept_largest(score.contiguous(), count).t()
            errors = self._prune_block(columns[own], kept[own], U[own, own])
            columns[after].addmm_(U[own, after].t(), errors, alpha=-1)
        return kept.t(), columns.t()

    def _blocks(self, width: int) -> Iterator[tuple[int, int]]:
        """Where blocks of columns start and stop; no group of n:m is cut."""
        m = 1 if self.pattern is None else self.groups[1]
        size = max(m, self.block // m * m)
        yield from ((start, min(start + size, width)) for start in range(0, width, size))

    def _prune_block(self, columns: Tensor, kept: Tensor, U: Tensor) -> Tensor:
        """Prune a block of columns in place, and update those that follow within it.

        Args:
            columns: (columns, out).
            kept: the same shape, bool; chosen here if there is a pattern.
            U: the block on the factor's diagonal.

        Returns:
            (columns, out): what went of each column, over U_jj; later blocks are to make up for it.
        """
        n, m = self.groups if self.pattern is not None else (0, len(columns) + 1)
        diagonal = U.diagonal()
        errors = torch.empty_like(columns)
        for j, (w, keep) in enumerate(zip(columns, kept, strict=True)):
            if n and j % m == 0:
                score = (columns[j : j + m] / diagonal[j : j + m, None]).square()
                kept[j : j + m] = keep_in_rows(score.t(), n).t()
            torch.div(w.masked_fill(keep, 0.0), diagonal[j], out=errors[j])
            w.masked_fill_(~keep, 0.0)
            columns[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
        return errors
