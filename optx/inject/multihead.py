"""One small adapter per attention head.

Source: arXiv 2110.04366, section 4.4 and table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from optx.inject._hidden_delta_options import Form
from optx.inject.hidden_delta import Choice, HiddenDelta


@dataclass(frozen=True)
class MultiHeadParallelAdapter(Choice):
    """A bottleneck per attention head, read from its query: head + f(q P_k' / sqrt(d)) P_v.

    Prefix tuning with f for the softmax and a sum for the gate. Queries are scaled as for the softmax, and
    not normalised; there are no biases.

    Args:
        rank: r, the width of each bottleneck.
        form: f: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``, ``"linear"`` or ``"softmax"``.
        dropout: of the bottlenecks, while training.
        init: ``"lora"``: P_v = 0, no output changes at the start; ``"bert"``: normal with deviation 0.02.
        kv_heads: heads of keys and values, if an attention module does not say.
        head_dim: their width, likewise.

    Serves attention modules that call torch's scaled_dot_product_attention, by default all of the model's.
    ``key`` and ``value`` have the shape (heads of keys and values, r, head width): query heads that share
    keys and values share an adapter.

    Paper values:
        The paper compares it with prefix tuning at the same number of weights (section 4.4) and recommends no
        width.

    Limits: As of `optx.PrefixTuning`: attention must call torch's scaled_dot_product_attention. It can't be
    merged.

    Keywords: PEFT, adapters, attention heads, parameter-efficient fine-tuning.

    Evidence: ``test_prefix.py``; no recipe.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a module that is no attention or computes it otherwise; at a call, one that
            did not reach scaled_dot_product_attention.
        ShapeError: at a call, queries of other heads.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
        >>> handle = optx.attach(model, optx.MultiHeadParallelAdapter(rank=3), targets="attn")
        >>> handle.report().rows[0].note
        'bottleneck 3 on each of 2 heads, relu'

    Source: arXiv 2110.04366, section 4.4.
    """

    name: ClassVar[str] = "multihead"
    serves: ClassVar[str] = "attention modules that call scaled_dot_product_attention"

    rank: int = 16
    form: Form = "relu"
    dropout: float = 0.0
    init: Literal["lora", "bert"] = "lora"
    kv_heads: int | None = None
    head_dim: int | None = None

    def delta(self) -> HiddenDelta:
        """Beside each head, added."""
        return self.choose(modifies="heads", insertion="parallel", compose="add")
