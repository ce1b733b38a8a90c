"""Attention by softplus and a second sharpening sum in the place of softmax: LSSA and LSSAR.

Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models", arXiv
2501.13428.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, ShapeError, check_above_0, check_range
from optx.kernels.attention import softplus_rows as rows
from optx.kernels.attention.softplus_rows import Options
from optx.kernels.available import why_unavailable

__all__ = ["attend", "attend_with_weights", "lssa_attention", "lssar_attention"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lssa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Attention with softplus in the place of the exponential, on cosines times ln d ln N: LSSA.

    Row i weighs key j by softplus(ln d ln N cos(q_i, k_j)), divided by the row's sum; N is how many keys the
    row sees, and d the width of a head. Arguments and shapes are those of
    `torch.nn.functional.scaled_dot_product_attention`, with these differences: there is no scale (lengths of
    queries and keys do not count), a mask hides or shows and adds nothing, and heads that share keys need no
    flag. A row that sees no key gives zeros.

    No matrix of T x S numbers is made, but for second derivatives (which dropout has not): memory grows with
    T + S. Sums are in float32 (float64 for float64).

    Args:
        query: shape (..., H, T, d).
        key: (..., H', S, d), where H' divides H.
        value: (..., H', S, e).
        attn_mask: bool, True where a key is seen; or floating, of 0 where it is seen and -inf (or -10,000 and
            less) where not. Broadcastable to (..., H, T, S).
        dropout_p: share of the weights that are dropped, whether something trains or not.
        is_causal: row i sees keys up to the i-th; with a mask, those of them that it shows.

    Returns:
        (..., H, T, e), in the value's dtype.

    Raises:
        ShapeError: shapes do not fit.
        OptxError: an option out of range, a mask that adds numbers to scores, or dtypes that differ.

    Example:
        >>> import torch, optx
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> optx.functional.lssa_attention(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 5, 8])
    """
    return attend(query, key, value, attn_mask, 0.0, is_causal, dropout_p)


def lssar_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    p: float = 15.0,
) -> Tensor:
    """LSSA whose weights are sharpened: those above the row's mean, to the power p, divided by their sum.

    With a the weights of `lssa_attention` they are relu(N a - 1)^p, over their sum; where a row sees up to 3
    keys, (N a)^p. A row whose weights are all equal keeps them. Larger p attends to fewer keys, whatever N.

    Args:
        query: shape (..., H, T, d).
        key: (..., H', S, d), where H' divides H.
        value: (..., H', S, e).
        attn_mask: see `lssa_attention`.
        dropout_p: share of the weights that are dropped, whether something trains or not.
        is_causal: row i sees keys up to the i-th; with a mask, those of them that it shows.
        p: the power, above 0; the paper has 15 for lengths beyond those of training, 3 at these.

    Returns:
        (..., H, T, e), in the value's dtype.

    Raises:
        ShapeError: shapes do not fit.
        OptxError: an option out of range, a mask that adds numbers to scores, or dtypes that differ.

    Example:
        >>> import torch, optx
        >>> q, k = torch.tensor([[[3.0, -4.0]]]), torch.tensor([[[2.0, 0], [0, 5], [-1, 1], [1, -1]]])
        >>> optx.functional.lssar_attention(q, k, torch.eye(4)[None], p=3.0)
        tensor([[[0.1197, 0.0000, 0.0000, 0.8803]]])
    """
    return attend(
        query, key, value, attn_mask, check_above_0("lssar_attention", "p", p), is_causal, dropout_p
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    power: float,
    is_causal: bool,
    dropout_p: float,
) -> Tensor:
    """The two above; ``power`` 0 is LSSA."""
    q, k, v, mask, lead = _fitted(query, key, value, attn_mask, dropout_p)
    options = Options(power, is_causal, dropout_p)
    if not (q.numel() and k.numel()):  # an empty batch; or no keys, so that all rows give zeros
        out = (0 * q[..., :1] + k.sum() + v.sum()).to(v.dtype).expand(*q.shape[:-1], v.shape[-1])
    elif _has_kernel(q):
        from optx.kernels.attention.softplus_ops import attention

        seed = torch.randint(1 << 62, (), device=q.device) if dropout_p else None
        out = attention(q, k, v, mask, seed, options)
    else:
        out = _by_rows(q, k, v, mask, options)[0]
    return out.reshape(*lead, *out.shape[1:])


def attend_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    power: float,
    is_causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The same, and the weights (..., H, T, S), which takes memory for them."""
    q, k, v, mask, lead = _fitted(query, key, value, attn_mask, dropout_p)
    out, weights = _by_rows(q, k, v, mask, Options(power, is_causal, dropout_p))
    return out.view(*lead, *out.shape[1:]), weights.view(*lead, *weights.shape[1:])


def _by_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    weights = rows.weights(q, k, mask, options)
    used = F.dropout(weights, options.dropout) if options.dropout else weights
    return rows.attended(used, v), weights.to(v.dtype)


def _has_kernel(q: Tensor) -> bool:
    if type(q) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
        return False  # a tensor of another kind has its own ways with torch's operations
    on_gpu = q.is_cuda and q.dtype != torch.float64 and why_unavailable("triton") is None
    return q.device.type == "cpu" or on_gpu


def _fitted(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Four axes each, and what is in front of the heads; a mask that shows or hides."""
    if dropout:
        check_range("softplus attention", "dropout_p", dropout, 0.0, 1.0)
    lead = _check(query, key, value)
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    batch = math.prod(lead)
    q, k, v = (x.expand(*lead, *x.shape[-3:]).reshape(batch, *x.shape[-3:]) for x in (query, key, value))
    return q, k, v, _mask(mask, query, key, lead), lead


def _together(*shapes: torch.Size) -> tuple[int, ...] | None:
    """The shape that all broadcast to, if there is one; torch's own function loads sympy."""
    longest = max(map(len, shapes))
    padded = [(1,) * (longest - len(shape)) + tuple(shape) for shape in shapes]
    found: list[int] = []
    for sizes in zip(*padded, strict=True):
        size = next((one for one in sizes if one != 1), 1)
        if any(one not in (1, size) for one in sizes):
            return None
        found.append(size)
    return tuple(found)


def _check(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """What is in front of the heads."""
    given = (query, key, value)
    shapes = ", ".join(str(tuple(x.shape)) for x in given)
    lead = _together(*(x.shape[:-3] for x in given)) if min(x.ndim for x in given) > 2 else None
    if lead is None:
        raise ShapeError(
            f"softplus attention: query, key and value have shapes {shapes}; they must be (..., heads, "
            "length, width)."
        )
    fits = query.shape[-1] == key.shape[-1] and key.shape[-3:-1] == value.shape[-3:-1]
    if not (fits and key.shape[-3] and query.shape[-3] % key.shape[-3] == 0):
        raise ShapeError(
            f"softplus attention: query, key and value have shapes {shapes}; queries and keys must be "
            "equally wide, keys and values equally long and many, and their heads a divisor of the query's."
        )
    if query.shape[-1] < 2:
        raise ShapeError(
            "softplus attention: heads are 1 wide, and scores are multiplied with the logarithm of that, 0; "
            "they must be 2 wide at least."
        )
    kinds = {x.dtype for x in given}
    if (len(kinds) > 1 and not torch.is_autocast_enabled(query.device.type)) or not kinds <= {*_FLOATS}:
        raise OptxError(
            f"softplus attention: query, key and value have dtypes {query.dtype}, {key.dtype}, "
            f"{value.dtype}; they must be one floating dtype, of float16, bfloat16, float32 and float64."
        )
    return lead


def _mask(mask: Tensor | None, query: Tensor, key: Tensor, lead: tuple[int, ...]) -> Tensor | None:
    """As bool with four axes, those of the batch being of its size or 1."""
    if mask is None:
        return None
    full = (*lead, *query.shape[-3:-1], key.shape[-2])
    if _together(mask.shape, torch.Size(full)) != full:
        raise ShapeError(
            f"softplus attention: attn_mask has shape {tuple(mask.shape)}; it must broadcast to {full}."
        )
    seen = _seen(mask)
    seen = seen.view(*[1] * (len(full) - seen.ndim), *seen.shape)
    if len(lead) == 1 or all(size == 1 for size in seen.shape[:-3]):
        return seen.reshape(math.prod(seen.shape[:-3]), *seen.shape[-3:])
    return seen.expand(*lead, *seen.shape[-3:]).reshape(math.prod(lead), *seen.shape[-3:])


_HIDDEN = -1e4
"""What models add to a score that is not to count, or less."""


def _seen(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise OptxError(
            f"softplus attention: attn_mask has dtype {mask.dtype}; it must be bool, True where a key is "
            "seen, or floating, 0 where it is seen."
        )
    seen = mask == 0
    understood = (seen | (mask <= _HIDDEN)).all()
    said = (
        "softplus attention: attn_mask adds numbers to scores (a bias by position, as ALiBi's or T5's); here "
        "it can but show a key, by 0, or hide it, by -inf."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(understood, said)  # pyright: ignore
    elif not mask.is_meta and not bool(understood):
        raise OptxError(said)
    return seen
