"""The frequency loss: routing weights that learn how often each primitive is the best.

Source: PMOE, arXiv 2104.09122.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, check_choice, shown
from optx._expression import expression
from optx.policy._checks import check_scores, check_tensor, free, where

Reduction = Literal["mean", "sum_k"]
REDUCTIONS = ("mean", "sum_k")


class FrequencyLoss(nn.Module):
    """The squared distance of routing weights from the one-hot of each state's best primitive.

    v is 1 for the primitive with the highest score (the lowest number of several) and 0 for the others, a
    constant; the loss is the mean of (v - w)^2. Where scores vary, w becomes how often each primitive is
    the best: the frequency. No draw is differentiated.

    Args:
        reduction: ``"mean"`` over states and primitives, as the authors' code has it, so that of twice as
            many primitives w moves half as fast; ``"sum_k"``: the mean over states of the sum over
            primitives.

    Paper values:
        ``reduction="mean"``: the authors' code (the default), with a weight of 1 beside SAC's policy loss.

    Limits: A primitive that is never the best is routed to ever less, and its policy has no gradient; it is
        scored with the others still, so that it can come back. Gradients go where w came from: with
        `optx.PMOEHead` to the mixing head alone.

    Keywords: mixture of experts, router, gating, mixture policy, categorical gradient, argmax, SAC, PPO.

    Evidence: ``optx run modes``; ``test_frequency_loss.py``.

    Raises:
        OptxError: an option out of range, a score of nan, or weights that are no softmax's.
        ShapeError: scores and weights of two shapes, or of no state.

    Example:
        >>> import torch, optx
        >>> w = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
        >>> scores = torch.tensor([[1.0, 5.0, 2.0, 3.0], [0.0, -1.0, -2.0, -3.0]])
        >>> optx.FrequencyLoss()(w, scores)
        tensor(0.1275)

    Source: arXiv 2104.09122.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice("FrequencyLoss", "reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction

    def arguments(self) -> dict[str, object]:
        """What its constructor takes."""
        return {"reduction": self.reduction}

    def __repr__(self) -> str:
        return expression(type(self), self.arguments())

    def forward(self, w: Tensor, scores: Tensor) -> Tensor:
        """The loss.

        Args:
            w: routing weights, (..., K), each row a softmax's.
            scores: of what each primitive proposes, (..., K); the higher, the better.
        """
        check_tensor("FrequencyLoss", "w", w)
        check_tensor("FrequencyLoss", "scores", scores)
        if w.shape != scores.shape or w.ndim == 0:
            raise ShapeError(
                f"FrequencyLoss: w has shape {tuple(w.shape)} and scores {tuple(scores.shape)}; both must be "
                "(..., K), a number for each primitive of each state."
            )
        if not w.numel():
            raise ShapeError(f"FrequencyLoss: w has shape {tuple(w.shape)}: of no state there is no mean.")
        _check_weights(w)
        return frequency_loss(w, best(scores, "FrequencyLoss"), self.reduction)


def _check_weights(w: Tensor) -> None:
    """Raise unless rows are a softmax's: of logits or of their logarithms the loss would be a number, too."""
    if not free(w):
        return
    rows = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    slack = 1e-3 if w.dtype.itemsize >= 4 else 0.02
    wrong = ~((rows.sum(-1) - 1).abs() <= slack) | (rows < -slack).any(-1)
    if bool(wrong.any()):
        row = [round(float(one), 4) for one in rows[wrong][0]]
        raise OptxError(
            f"FrequencyLoss: w[{where(wrong)}] is {shown(row)}, which are no weights: a row must be at least "
            "0 and sum to 1. Of logits, give their softmax."
        )


def best(scores: Tensor, who: str) -> Tensor:
    """The primitive of the highest score, the lowest number of several; (...) int64, a constant.

    Raises:
        OptxError: a score is nan.
    """
    check_scores(who, scores)
    scores = scores.detach()
    return (scores.byte() if scores.dtype == torch.bool else scores).argmax(-1)


def frequency_loss(w: Tensor, chosen: Tensor, reduction: Reduction, counts: Tensor | None = None) -> Tensor:
    """The loss of given primitives.

    Args:
        w: (..., K).
        chosen: the best primitive of each state, (...) int64.
        reduction: see `FrequencyLoss`.
        counts: how much each state counts, (...), constants; None: all the same. Means are weighted by it.
    """
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    v = torch.nn.functional.one_hot(chosen, w.shape[-1]).to(wide.dtype)
    rows = (v - wide).square()
    rows = rows.mean(-1) if reduction == "mean" else rows.sum(-1)
    if counts is None:
        return rows.mean()
    total = counts.sum().to(rows.dtype)
    return (rows * counts).sum() / torch.where(total > 0, total, 1.0)
