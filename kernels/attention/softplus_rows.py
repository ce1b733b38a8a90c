"""Softplus attention with re-weighting (LSSA, LSSAR), row by row in torch operations: the reference.

With q and k of length 1, N the number of keys that a row sees and d the width of a head::

    s = ln d ln N <q, k>    a = softplus(s) / sum softplus(s)                        (LSSA)
    u = relu(N a - O)       b = (u / max u)^p,  w = b / sum b,  O = 1, and 0 where N <= 3   (LSSAR)

(arXiv 2501.13428.) Dividing by the row's maximum cancels in w, and keeps the powers in range whatever p is,
so that no epsilon is needed, which would take its part of w. A row whose weights are all equal has u = 0, or
what rounding made of it: there w is a, forward and backward.

The kernels (`softplus_blocks`, `softplus_triton`) compute the same without a matrix of L x L numbers.
"""

# torch has no types for its norms.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FEW",
    "SMALLEST",
    "Options",
    "attended",
    "counts_of",
    "math_dtype",
    "normalised",
    "through_length",
    "tolerance",
    "weights",
]

FEW = 3
"""Rows that see so few keys keep all of them: there O is 0."""
SMALLEST = 1e-12
"""A query or key that is no longer than this counts as zero, and has no gradient."""
_BLOCK = 1 << 22


class Options(NamedTuple):
    """What attention is told besides its tensors.

    Args:
        power: p; 0 for LSSA, which has no second step.
        causal: whether row i sees no key after the i-th, from the first on.
        dropout: share of the weights that are dropped, in [0, 1).
    """

    power: float
    causal: bool
    dropout: float = 0.0


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def counts_of(mask: Tensor | None, causal: bool, like: Tensor, keys: int) -> Tensor:
    """N: how many keys each row sees, int64 (b, h, T), where b and h are 1 or those of the mask.

    Args:
        mask: bool, True where a key is seen, broadcastable to (B, H, T, S); None: everywhere.
        causal: see `Options`.
        like: the queries (B, H, T, d).
        keys: S.
    """
    rows = like.shape[2]
    if mask is None:
        own = torch.arange(1, rows + 1, device=like.device).clamp_max(keys)
        return (own if causal else torch.full_like(own, keys)).view(1, 1, rows)
    mask = mask.expand(*mask.shape[:3], keys)
    if not causal:
        return mask.sum(-1).expand(-1, -1, rows)
    if mask.shape[2] == 1:  # of keys alone: a running sum has them all
        last = torch.arange(rows, device=like.device).clamp_max(keys - 1)
        return mask[:, :, 0].cumsum(-1)[..., last]
    step = max(1, _BLOCK // max(1, mask.shape[0] * mask.shape[1] * keys))
    starts = range(0, rows, step)
    return torch.cat([mask[:, :, i : i + step].tril(i).sum(-1) for i in starts], dim=-1)


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 in the dtype of the mathematics, and what they were multiplied with (0 for zeros)."""
    x = x.to(math_dtype(x.dtype))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    long = length > SMALLEST
    if length.requires_grad:  # a length of 0 has no second derivative
        length = torch.linalg.vector_norm(x.masked_fill(~long, 1.0), dim=-1, keepdim=True)
    factor = torch.where(long, 1 / length.clamp_min(SMALLEST), 0.0)
    return x * factor, factor


def through_length(grad: Tensor, x: Tensor) -> Tensor:
    """From the gradient of rows of length 1 to that of the rows, in their dtype."""
    unit, factor = normalised(x)
    along = (grad * unit).sum(-1, keepdim=True)
    return ((grad - unit * along) * factor).to(x.dtype)


def tolerance(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """What a row's largest u is when it is but rounding: N a sums to N only up to it."""
    return counts * (torch.finfo(dtype).eps / 64) + 1e-6


def log_scale(counts: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """ln d ln N of each row."""
    return counts.clamp_min(1).to(dtype).log() * math.log(width)


def weights(q: Tensor, k: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """The weights (B, H, T, S), before dropout; all of it by torch's own derivatives.

    Args:
        q: (B, H, T, d).
        k: (B, H', S, d), where H' divides H.
        mask: bool, broadcastable to (B, H, T, S), or None.
        options: power and causal.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    counts = counts_of(mask, options.causal, q, k.shape[2])[..., None]
    with torch.autocast(q.device.type, enabled=False):
        (query, _), (key, _) = normalised(q), normalised(k)
        scale = log_scale(counts, q.shape[-1], query.dtype)
        a = torch.nn.functional.softplus((query * scale) @ key.transpose(-1, -2))
    if options.causal:
        rows, keys = a.shape[-2:]
        seen = torch.ones(rows, keys, dtype=torch.bool, device=a.device).tril()
        a = a.masked_fill(~seen, 0.0)
    if mask is not None:
        a = a.masked_fill(~mask, 0.0)
    a = a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    return _sharpened(a, counts, options.power) if options.power else a


def attended(weights: Tensor, v: Tensor) -> Tensor:
    """What weights (B, H, T, S) make of values (B, H', S, e), in their dtype."""
    with torch.autocast(v.device.type, enabled=False):
        found = weights @ v.to(weights.dtype).repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
    return found.to(v.dtype)


def _sharpened(a: Tensor, counts: Tensor, power: float) -> Tensor:
    u = (counts * a - (counts > FEW).to(a.dtype)).relu()
    most = u.detach().amax(-1, keepdim=True)
    flat = most <= tolerance(counts, a.dtype)
    kept = u > 0
    b = torch.where(kept & ~flat, u / most, 1.0).pow(power).where(kept, 0.0)  # no 0^(p - 1) in backward
    return torch.where(flat, a, b / b.sum(-1, keepdim=True).clamp_min(1.0))
