"""Cross-entropy over a vocabulary of which many tokens share a score, without a column for each token.

Token i has the score s_M(i) + b_i, so that with a_k = log(sum of exp(b_i) over the tokens of code k)
nll(t) = logsumexp_k(s_k + a_k) - s_M(t) - b_t; without b, a_k is the log of the number of tokens.

Source: VQ-Logits, arXiv 2505.10202 (without b).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS = ("mean", "sum", "none")


def log_sizes(mapping: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
    """a_k without b: the log of how many tokens a code has; -inf if none."""
    return torch.bincount(mapping, minlength=codes).to(dtype).log()


def log_masses(bias: Tensor, mapping: Tensor, codes: int) -> Tensor:
    """a_k, (codes,); -inf where a code has no token. Autograd follows it to b, (V,)."""
    with torch.no_grad():
        top = bias.new_full((codes,), -torch.inf).scatter_reduce_(0, mapping.long(), bias, "amax")
        top.masked_fill_(top == -torch.inf, 0)
    total = bias.new_zeros(codes).index_add(0, mapping, (bias - top[mapping]).exp())
    empty = total == 0
    return torch.where(empty, -torch.inf, total.masked_fill(empty, 1).log() + top)


def nll(
    scores: Tensor,
    mass: Tensor,
    codes: Tensor,
    own: Tensor,
    *,
    valid: Tensor,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    even: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The loss by codes.

    Args:
        scores: (N, K), in float32 or wider.
        mass: a_k, (K,).
        codes: of the labels, (N,) int64; -100 for one that is ignored.
        own: a_M(t) - b_t of the labels, (N,); 0 for one that is ignored.
        valid: which are not ignored, (N,) bool.
        reduction: ``"mean"`` over what is not ignored, ``"sum"`` or ``"none"``.
        label_smoothing: as torch's cross_entropy has it, over all tokens.
        z_loss: weight of the squared log of the sum of exponentials.
        even: for smoothing, each code's share of the tokens (K,), and the mean b.
    """
    shifted = scores + mass
    plain = label_smoothing == 0 and z_loss == 0
    if plain and reduction != "none":
        loss = F.cross_entropy(shifted, codes, ignore_index=-100, reduction=reduction)
        extra = own.sum()
        return loss + (extra / valid.sum() if reduction == "mean" else extra)
    each = F.cross_entropy(shifted, codes, ignore_index=-100, reduction="none") + own
    if not plain:
        log_z = shifted.logsumexp(1)
        if even is not None:
            uniform = log_z - scores @ even[0] - even[1]
            each = (1 - label_smoothing) * each + label_smoothing * uniform
        each = (each + z_loss * log_z.square()).masked_fill(~valid, 0)
    if reduction == "none":
        return each
    return each.sum() / valid.sum() if reduction == "mean" else each.sum()
