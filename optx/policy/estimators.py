"""Other ways to a gradient of routing weights: Gumbel-softmax, the score ratio, and the exact sum.

Source: as compared in PMOE, arXiv 2104.09122; Gumbel-softmax, arXiv 1611.01144 and 1611.00712; REINFORCE.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_above_0, check_choice
from optx._gumbel import gumbel
from optx.policy._checks import check_alpha, check_primitive, check_scores, check_tensor, free

Baseline = Literal["value", "none"]
BASELINES = ("value", "none")


def gumbel_weights(
    log_w: Tensor,
    temperature: float = 1.0,
    *,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A smoothed draw from routing weights: softmax((ln w + g) / temperature), through which gradients go.

    Args:
        log_w: ln w, (..., K).
        temperature: near 0 a one-hot, whose gradient varies without bound; the larger, the more biased.
        hard: give the one-hot of the largest, with the gradient of the smoothed draw (straight-through).
        generator: of g.

    Returns:
        (..., K), each row summing to 1.

    Raises:
        OptxError: a temperature that is not above 0, or logarithms above 0.
    """
    temperature = check_above_0("gumbel_weights", "temperature", temperature)
    _check_log(log_w, "gumbel_weights")
    wide = log_w.to(torch.promote_types(log_w.dtype, torch.float32))
    noise = gumbel(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
    soft = ((wide + noise) / temperature).softmax(-1)
    if not hard:
        return soft
    one = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return one + (soft - soft.detach())  # so that the value is the one-hot exactly


def score_ratio_loss(
    log_w: Tensor, scores: Tensor, primitive: Tensor, baseline: Baseline = "value"
) -> Tensor:
    """-mean(ln w_i (J_i - b)) of primitives drawn by w: its mean gradient is that of -sum_i w_i J_i.

    Args:
        log_w: ln w, (..., K).
        scores: J, (..., K), constants.
        primitive: i ~ w, (...) int64.
        baseline: ``"value"``: b = sum_i w_i J_i, which all scores are known for and which doesn't depend on
            the draw; ``"none"``: 0. Neither has a bias; the first varies less.

    Raises:
        OptxError: a score of nan, or a primitive that there isn't.
        ShapeError: shapes that don't go together.
    """
    check_choice("score_ratio_loss", "baseline", baseline, BASELINES)
    _check(log_w, scores, "score_ratio_loss")
    primitive = check_primitive("score_ratio_loss", primitive, log_w.shape[:-1], log_w.shape[-1])
    check_scores("score_ratio_loss", scores)
    scores = scores.detach()
    value = (log_w.detach().exp() * scores).sum(-1) if baseline == "value" else 0.0
    index = primitive.unsqueeze(-1)
    gain = scores.gather(-1, index).squeeze(-1) - value
    return -(log_w.gather(-1, index).squeeze(-1) * gain).mean()


def enumerated_loss(log_w: Tensor, costs: Tensor, alpha: float | Tensor = 0.0) -> Tensor:
    """mean(sum_i w_i (alpha ln w_i + cost_i)), exactly: every primitive is evaluated anyway.

    Args:
        log_w: ln w, (..., K).
        costs: (..., K), as alpha ln pi_i - Q_i; gradients go to them, too.
        alpha: of the weights' own entropy.

    Raises:
        OptxError: alpha is no number of at least 0.
        ShapeError: shapes that don't go together.
    """
    _check(log_w, costs, "enumerated_loss")
    alpha = check_alpha("enumerated_loss", alpha, constant=False)
    return (log_w.exp() * (alpha * log_w + costs)).sum(-1).mean()


def _check(log_w: Tensor, values: Tensor, who: str) -> None:
    _check_log(log_w, who)
    check_tensor(who, "what log_w weighs", values)
    if log_w.shape != values.shape or log_w.ndim == 0 or not log_w.numel():
        raise ShapeError(
            f"{who}: log_w has shape {tuple(log_w.shape)} and what it weighs {tuple(values.shape)}; both "
            "must be (..., K), a number for each primitive of each state, and of one state at least."
        )


def _check_log(log_w: Tensor, who: str) -> None:
    check_tensor(who, "log_w", log_w)
    if free(log_w) and bool((log_w > 1e-4).any()):
        raise OptxError(
            f"{who}: log_w has {float(log_w.detach().max()):g}; logarithms of weights are at most 0."
        )
