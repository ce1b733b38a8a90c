"""One head as a bilinear form: its scores are x W z for tokens x and queries z, or it is refused.

Source: arXiv 2308.16898: with q = W_Q z and k = W_K x a score is xᵀ W_Kᵀ W_Q z, so W is W_Kᵀ W_Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optx._errors import TargetError
from optx.analysis.attention._algebra import singular_values, triangle
from optx.analysis.attention._capture import Captured, Projection

F64 = torch.float64
_HIDDEN = -1e4
"""What models add to a score that is not to count, or less."""


@dataclass(frozen=True, eq=False)
class Factor:
    """Rows of a projection: x becomes x Wᵀ + b, (head_dim,)."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    biased: bool


@dataclass(frozen=True, eq=False)
class Head:
    """A head's scores as softmax is given them: (x W z + x c), plus what is the same for all tokens of a row.

    Attributes:
        tokens: (B, S, d) float64.
        queries: (B, T, e).
        seen: (B, T, S) bool, which tokens each query's softmax is over.
        W: (d, e), the scale included.
        column: (d,): the scale times W_Kᵀ b_Q, the part of the query's bias; zeros without one.
        biased: whether queries have a bias.
        key_factor: (head_dim, d), and
        query_factor: (head_dim, e), whose product W is but for the scale.
    """

    tokens: Tensor
    queries: Tensor
    seen: Tensor
    W: Tensor
    column: Tensor
    biased: bool
    key_factor: Tensor
    query_factor: Tensor

    def scores(self) -> Tensor:
        """(B, T, S): but for what is the same for all tokens of a row."""
        return (self.queries @ self.W.T + self.column) @ self.tokens.mT


def head_of(found: Captured, head: int) -> Head:
    """A head of what was captured.

    Raises:
        TargetError: there is no such head, or its scores are no bilinear form of tokens and queries.
    """
    given = found.call
    assert given is not None
    query, key = (x if x.ndim == 4 else x[None] for x in (given.query, given.key))
    heads, own = query.shape[1], key.shape[1]
    if type(head) is not int or not 0 <= head < heads:
        raise TargetError(
            f"attention_margins: head is {head!r}; {found.path!r} has {heads} heads, so it must be a whole "
            f"number between 0 and {heads - 1}."
        )
    scale = given.factor()
    q, q_scale = _factor(found, query[:, head], "queries")
    k, k_scale = _factor(found, key[:, head * own // heads], "keys")  # grouped: several heads share keys
    scale *= q_scale * k_scale
    K, Q = k.weight.to(F64), q.weight.to(F64)
    return Head(
        tokens=k.input.to(F64),
        queries=q.input.to(F64),
        seen=_seen(found, head),
        W=scale * K.T @ Q,
        column=scale * K.T @ q.bias.to(F64),
        biased=q.biased,
        key_factor=K,
        query_factor=Q,
    )


def _factor(found: Captured, wanted: Tensor, what: str) -> tuple[Factor, float]:
    """The rows of a projection whose output a head's queries or keys are, number by number.

    So no layout need be known (of packed matrices, of groups), and what was done to them since is noticed.
    """
    width = wanted.shape[-1]
    for projection in found.projections:
        if projection.output.shape[:2] != wanted.shape[:2]:
            continue
        for scale in (1.0, width**-0.5, width**-0.25):
            rows = _rows(projection.output if scale == 1.0 else projection.output * scale, wanted)
            if rows is not None:
                return _checked(found, projection, rows, what), scale
    raise TargetError(
        f"attention_margins: the {what} of {found.path!r} are not what its linear modules put out: something "
        "stands between, as rotary positions (RoPE) or a norm. Then a score depends on more than x W z: with "
        "RoPE W is another one at each distance of token and query, and no single W has these margins. "
        "Choose a model without (GPT-2, BERT, ViT, OPT)."
    )


def _rows(output: Tensor, wanted: Tensor) -> Tensor | None:
    """Which columns of (B, T, out) are those of (B, T, head_dim), to the bit."""
    flat, own = output.flatten(0, 1), wanted.flatten(0, 1)
    first = flat[0][:, None] == own[0][None]  # of one token; the few that fit are compared whole
    found = list[int]()
    for j in range(own.shape[1]):
        fits = [int(i) for i in first[:, j].nonzero()[:, 0] if torch.equal(flat[:, int(i)], own[:, j])]
        if not fits:
            return None
        found.append(next((i for i in fits if i not in found), fits[0]))
    return torch.tensor(found, device=output.device)


def _checked(found: Captured, one: Projection, rows: Tensor, what: str) -> Factor:
    """The factor, if the module's weight says what it computed: an adapter on it would not be in there."""
    weight = one.weight.detach()[rows]
    bias = torch.zeros_like(weight[:, 0]) if one.bias is None else one.bias.detach()[rows]
    wanted, got = one.output[..., rows].to(F64), one.input.to(F64) @ weight.to(F64).T + bias.to(F64)
    off, size = (wanted - got).abs().amax(), wanted.abs().amax()
    # sums in float32 at least, and one rounding of what comes out
    sums, rounding = torch.finfo(torch.promote_types(one.output.dtype, torch.float32)).eps, _eps(one.output)
    allowed = 100.0 * sums * one.input.shape[-1] ** 0.5 + 4.0 * rounding
    if float(off) > allowed * float(size):
        raise TargetError(
            f"attention_margins: the {what} of {found.path!r} are not what the weight of their linear module "
            f"makes of its input (off by {float(off / size):.1g} of the largest): an adapter or a hook adds "
            "to it. Merge it first (handle.merge())."
        )
    return Factor(one.input, weight, bias, one.bias is not None)


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _seen(found: Captured, head: int) -> Tensor:
    """(B, T, S): what the mask shows of one head."""
    given = found.call
    assert given is not None
    query, key = (x if x.ndim == 4 else x[None] for x in (given.query, given.key))
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    seen = torch.ones(full, dtype=torch.bool, device=query.device)
    if given.is_causal:
        seen = seen.tril()
    mask = given.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        shown = mask == 0
        if not bool((shown | (mask <= _HIDDEN)).all()):
            raise TargetError(
                f"attention_margins: {found.path!r} adds numbers to its scores (a bias by position, as "
                "ALiBi's or T5's), which are no part of x W z. Choose a model without (GPT-2, BERT, OPT)."
            )
        mask = shown
    if mask is not None:
        seen = seen & mask.expand(full)
    return seen[:, head]


def spectrum(head: Head) -> Tensor:
    """W's singular values but for the scale, from its factors: at most head_dim are not 0."""
    left, right = (triangle(x.T) for x in (head.key_factor, head.query_factor))
    return singular_values(left @ right.T)
