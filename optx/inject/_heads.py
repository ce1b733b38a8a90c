"""The functional forms that act on attention's heads: a softmax over a prefix, and one adapter per head.

Source: arXiv 2110.04366, section 3.1 and table 1.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx.inject._attention import Attention, AttentionPart, Heads, spread, with_prefix
from optx.inject._hidden_delta_options import FORMS, HiddenDeltaOptions, draw
from optx.inject._part import new_tensor


class Prefix(AttentionPart):
    """Keys and values (heads, l, head width) that every query sees beside its own.

    With a bottleneck `mlp`, they are what an MLP makes of an embedding (l, heads * head width).
    """

    what: ClassVar[str] = "the prefix"

    def __init__(self, options: HiddenDeltaOptions, module: nn.Module, path: str, heads: Heads) -> None:
        super().__init__(path, heads)
        self.length, self.mlp = options.rank, options.mlp
        if self.mlp is None:
            key, value = (new_tensor(module, heads.count, self.length, heads.width) for _ in range(2))
            draw(key, value, options)
            self.key, self.value = nn.Parameter(key), nn.Parameter(value)
            return
        width = heads.count * heads.width
        self.embedding = nn.Parameter(new_tensor(module, self.length, width).normal_())
        self.W_down = nn.Parameter(_uniform(new_tensor(module, self.mlp, width)))
        self.b_down = nn.Parameter(new_tensor(module, self.mlp))
        self.W_up = nn.Parameter(_uniform(new_tensor(module, 2 * width, self.mlp)))
        self.b_up = nn.Parameter(new_tensor(module, 2 * width))

    def pair(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v."""
        if self.mlp is None:
            return self.key, self.value
        hidden = torch.tanh(F.linear(self.embedding, self.W_down, self.b_down))
        both = F.linear(hidden, self.W_up, self.b_up).view(self.length, 2, *self.heads)
        key, value = both.permute(1, 2, 0, 3)
        return key, value

    def attend(self, call: Attention) -> Tensor:
        """Attention over both; see `with_prefix`."""
        return with_prefix(call, *self.pair())

    def drop_mlp(self) -> None:
        """Keep what the MLP makes, as parameters of their own."""
        with torch.no_grad():
            trains = self.embedding.requires_grad
            key, value = (
                nn.Parameter(made.clone(memory_format=torch.contiguous_format), trains)
                for made in self.pair()
            )
        for name in ("embedding", "W_down", "b_down", "W_up", "b_up"):
            delattr(self, name)
        self.key, self.value, self.mlp = key, value, None

    def note(self) -> str:
        """Its size."""
        made = "" if self.mlp is None else f", from an MLP of width {self.mlp}"
        return f"{self.length} keys and values on {self.heads.count} heads{made}"


class HeadAdapter(AttentionPart):
    """Each head's output plus s f(q P_k' / sqrt(d)) P_v; P_k and P_v are (heads, r, head width)."""

    what: ClassVar[str] = "the adapter of the heads"

    def __init__(self, options: HiddenDeltaOptions, module: nn.Module, path: str, heads: Heads) -> None:
        super().__init__(path, heads)
        self.form, self.dropout = options.form, options.dropout
        key, value = (new_tensor(module, heads.count, options.rank, heads.width) for _ in range(2))
        draw(key, value, options)
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)
        learned = options.scale == "learned"
        self.scale = nn.Parameter(new_tensor(module) + 1) if learned else float(options.scale)

    def attend(self, call: Attention) -> Tensor:
        """Heads that share keys and values share an adapter; the query is scaled as for the softmax."""
        key = spread(self.key * call.factor(), call.query, "queries")
        value = spread(self.value * self.scale, call.query, "queries")
        hidden = FORMS[self.form](call.query @ key.transpose(-1, -2))
        out = call.run()
        change = F.dropout(hidden, self.dropout, self.training) @ value
        return (out + change).to(out.dtype)

    def note(self) -> str:
        """Its size."""
        return f"bottleneck {self.key.shape[1]} on each of {self.heads.count} heads, {self.form}"


def _uniform(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
