"""Mix-and-match: a short prefix at the heads, a scaled parallel adapter at the FFN.

Source: arXiv 2110.04366, section 4.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from optx._errors import check_range
from optx.inject._injection import Composite, Injection
from optx.inject.adapters import ScaledParallelAdapter
from optx.inject.prefix import PrefixTuning


@dataclass(frozen=True)
class MAM(Composite):
    """Mix-and-match: `optx.PrefixTuning` on attention and `optx.ScaledParallelAdapter` on the FFN.

    Args:
        prefix: l, the prefix's length.
        rank: r, the width of the FFN's bottlenecks.
        scale: s, of the FFN's adapters, or ``"learned"``.
        mlp: see `optx.PrefixTuning`.
        dropout: of the bottlenecks, while training.

    Members are ``"prefix"`` and ``"ffn"``, for ``targets={"prefix": ..., "ffn": ...}``. The prefix
    changes outputs from the start.

    Paper values:
        ``prefix=16, rank=16, scale=2.0, mlp=800``: RoBERTa-base on GLUE, lr 1e-4, weight decay 0.1, 10 epochs
            (authors' script). All but ``mlp`` are what optx takes.
        ``prefix=30, rank=512, scale=4.0, mlp=800``: BART-large on XSum, lr 5e-5, weight decay 0.01, 100,000
            steps; mBART from English to Romanian likewise, 50,000 (authors' scripts).

    Limits: The prefix needs attention that calls torch's scaled_dot_product_attention. Nothing of it can be
    merged.

    Keywords: mix-and-match, PEFT, adapters, prefix tuning, parameter-efficient fine-tuning.

    Evidence: ``optx run adapt``; ``test_adapters.py``, ``test_prefix.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, as its members.

    Example:
        >>> import torch, optx
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attn, self.ffn = torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8)
        >>> targets = {"prefix": "attn", "ffn": "ffn"}
        >>> handle = optx.attach(Block(), optx.MAM(prefix=2, rank=3), targets=targets)
        >>> [row.trainable for row in handle.report().rows]
        [32, 59]

    Source: arXiv 2110.04366, section 4.6.
    """

    name: ClassVar[str] = "mam"

    prefix: int = 16
    rank: int = 16
    scale: float | Literal["learned"] = 2.0
    mlp: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range("MAM", "prefix", self.prefix, 1)
        self.members()  # which check the rest

    def members(self) -> dict[str, Injection]:
        """Prefix and adapter."""
        return {
            "prefix": PrefixTuning(length=self.prefix, mlp=self.mlp),
            "ffn": ScaledParallelAdapter(rank=self.rank, scale=self.scale, dropout=self.dropout),
        }
