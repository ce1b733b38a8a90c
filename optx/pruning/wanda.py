"""Wanda: prune by the size of a weight times that of its input.

Source: Sun, Liu, Bair & Kolter, "A Simple and Effective Pruning Approach for Large Language Models", arXiv
2306.11695, equation 1 and section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optx.pruning._calibration_sums import InputSums, Squares
from optx.pruning._method import PruneMethod


@dataclass(frozen=True)
class Wanda(PruneMethod):
    """Prune the weights of the lowest |w_ij| * ||x_j||, compared within each output; none is changed.

    Args:
        sparsity: the share that goes, in [0, 1): int(inputs * sparsity) of each output, exactly; of equals
            those that come first. None: the pattern's, without one 0.5.
        pattern: ``"n:m"``: of every m inputs in a row n go, as ``"2:4"``; None: any may.
        granularity: what is ranked together where there is no pattern: ``"row"``, the weights of one output,
            or ``"layer"``.

    Paper values:
        ``sparsity=0.5``: LLaMA and OPT up to 70B, by rows.
        ``pattern="2:4"``, ``pattern="4:8"``: the patterns that hardware speeds up.
        ``granularity="layer"``: PERP's code.

    Limits: Weights are not corrected for what goes; from 60 % on SparseGPT is ahead (the paper). Convolutions
    over three dimensions are not served.

    Keywords: activations, one-shot pruning, importance, 2:4, n:m, semi-structured, sparsity.

    Evidence: ``optx run prune``; ``test_wanda.py``, ``test_prune_peer.py`` (llmcompressor).

    Raises:
        OptxError: an option is out of range; in `optx.prune`, n:m that doesn't divide a layer's inputs, no
            data, or inputs that are inf or nan.

    Example:
        >>> import torch, optx
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> masks = optx.prune(model, optx.Wanda(0.5), [torch.randn(64, 8)])
        >>> (model[0].weight == 0).sum(1).tolist() == [4] * 16
        True

    Source: arXiv 2306.11695, equation 1.
    """

    needs_inputs: ClassVar[bool] = True
    sums: ClassVar[type[InputSums]] = Squares
    granularity: str = "row"

    def score(self, weight: Tensor, stats: Any = None) -> Tensor:
        """|w_ij| times the root of the mean of x_j^2, of the matrix's shape.

        Raises:
            OptxError: what the layer is given is inf or nan.
        """
        size: Tensor = stats.mean().sqrt()  # (groups, in)
        rows = weight.abs().view(len(size), -1, weight.shape[1])
        return (rows * size[:, None].to(weight)).view(weight.shape)
