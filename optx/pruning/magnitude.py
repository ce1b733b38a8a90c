"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optx.pruning._method import PruneMethod


@dataclass(frozen=True)
class Magnitude(PruneMethod):
    """Prune the weights of least absolute value, layer by layer.

    It needs no data, so that `optx.prune` also takes checkpoints larger than memory: files and folders.

    Args:
        sparsity: the share that goes, in [0, 1): int(numbers * sparsity) of each layer, exactly; of equal
            weights those that come first. None: the pattern's, without one 0.5.
        pattern: ``"n:m"``: of every m inputs in a row n go, as ``"2:4"``; None: any may.
        granularity: what is ranked together where there is no pattern: ``"layer"``, or ``"row"``, one output.

    Paper values:
        ``sparsity=0.5``: OPT, LLaMA and Mistral, all linear layers of the blocks alike.
        ``sparsity=0.5, pattern="2:4"``: the same models, semi-structured.

    Limits: Of large language models it loses far more than Wanda at the same share, if they are not
    trained after it.

    Keywords: pruning, sparsity, one-shot, unstructured, semi-structured, 2:4, sparse.

    Evidence: ``optx run prune``, ``optx run share``; ``test_prune_folders.py``, ``test_magnitude.py``.

    Raises:
        OptxError: an argument out of range, or a sparsity that is not the pattern's.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> masks = optx.prune(model, optx.Magnitude(0.5), targets="0")
        >>> masks.sparsity, int((model[0].weight == 0).sum())
        (0.5, 32)

    Source: arXiv 1506.02626, section 3; as a baseline in PERP, arXiv 2312.15230.
    """

    def score(self, weight: Tensor, stats: Any = None) -> Tensor:
        """The absolute value."""
        return weight.abs()
