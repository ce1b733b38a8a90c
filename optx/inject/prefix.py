"""Prefix tuning: trained keys and values in front of every attention layer's own.

Source: arXiv 2101.00190; as one of the unified view's methods, arXiv 2110.04366, section 3.1, equation 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optx._errors import check_range
from optx.inject.hidden_delta import Choice, HiddenDelta


@dataclass(frozen=True)
class PrefixTuning(Choice):
    """Trained keys and values that every query of every attention layer sees beside its own.

    Attention over [P_k; K], [P_v; V] is (1 - λ) h + λ softmax(q P_k') P_v with λ the prefix's share of the
    softmax: unlike the other methods it changes outputs from the start, and it would with zeros too.

    Args:
        length: l, the number of trained positions.
        mlp: width of an MLP that makes keys and values while training: an embedding (l, heads * head width),
            a linear layer to ``mlp``, tanh, a linear layer to keys and values. Each layer of the model has
            its own; the paper shares one embedding and first layer, at width 800. `optx.fold_prefix` drops it
            after the training. None: keys and values are trained themselves.
        std: deviation of the normal distribution that keys and values are drawn from, without MLP.
        kv_heads: heads of keys and values, if an attention module does not say.
        head_dim: their width, likewise.

    Serves attention modules that call torch's scaled_dot_product_attention (transformers' ``"sdpa"``, timm,
    nn.MultiheadAttention), by default all of the model's. ``key`` and ``value`` have the shape (heads of keys
    and values, l, head width). Nothing goes into a cache: position ids and masks are what they were, and the
    prefix is visible from every position. Prefix keys are not rotated by position embeddings.
    nn.MultiheadAttention's attention weights, if asked for, are those among the real tokens.

    Paper values:
        ``length=10, mlp=512``: GPT-2 Medium, from tables to text, lr 5e-5, batches of 10, 5 epochs (authors'
            code).
        ``length=200, mlp=800``: BART-large on XSum, as a baseline of arXiv 2110.04366, lr 5e-5 (authors'
            script).
        ``mlp=None, std=0.02``: arXiv 2110.04366's variant without an MLP (the defaults).

    Limits: It changes outputs from the start and shrinks the pretrained attention's share. It can't be
    merged.

    Keywords: P-tuning v2, prompt tuning, soft prompts, PEFT, parameter-efficient fine-tuning.

    Evidence: ``test_prefix.py``, ``test_peft_prefix.py``; within `optx.MAM`, ``optx run adapt``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a module that is no attention or computes it otherwise; at a call, one that
            did not reach scaled_dot_product_attention.
        ShapeError: at a call, keys or values of other heads.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
        >>> handle = optx.attach(model, optx.PrefixTuning(length=3), targets="attn")
        >>> model["attn"].optx.prefix.key.shape
        torch.Size([2, 3, 4])

    Source: arXiv 2101.00190; arXiv 2110.04366, section 3.1.
    """

    name: ClassVar[str] = "prefix"
    serves: ClassVar[str] = "attention modules that call scaled_dot_product_attention"

    length: int = 16
    mlp: int | None = None
    std: float = 0.02
    kv_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        check_range("PrefixTuning", "length", self.length, 1)
        super().__post_init__()

    def delta(self) -> HiddenDelta:
        """A softmax over the prefix, gated by its share."""
        return self.choose(form="softmax", modifies="heads", compose="gated", rank=self.length, init="bert")
