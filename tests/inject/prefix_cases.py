"""What the tests of prefixes share: the gated sum by its definition, and models whose prefixes moved."""

from __future__ import annotations

import functools
import math

import adapter_models
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack  # type: ignore[attr-defined]

from optx.inject._attention import Attention

moved = functools.partial(adapter_models.moved, by=0.5)


def modes() -> int:
    return len(_get_current_function_mode_stack())


def gated(call: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - λ) Attention(q, K, V) + λ Attention(q, P_k, P_v), and λ, from the definitions."""
    heads = call.query.shape[-3]
    K, V, P, W = (
        t.repeat_interleave(heads // t.shape[-3], dim=-3) for t in (call.key, call.value, key, value)
    )
    factor = 1 / math.sqrt(call.query.shape[-1]) if call.scale is None else call.scale
    logits = call.query @ K.transpose(-1, -2) * factor
    if call.is_causal:
        rows, columns = logits.shape[-2:]
        hidden = torch.arange(columns)[None] > torch.arange(rows)[:, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    if call.attn_mask is not None:
        mask = call.attn_mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    own = call.query @ P.transpose(-1, -2) * factor
    sums = own.exp().sum(-1), logits.exp().sum(-1)
    share = (sums[0] / (sums[0] + sums[1]))[..., None]
    return (1 - share) * (logits.softmax(-1) @ V) + share * (own.softmax(-1) @ W), share
