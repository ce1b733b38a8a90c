"""The functional forms that act on attention's heads: a softmax over a prefix, and one adapter per head.

Source: arXiv 2110.04366, section 3.1 and table 1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError
from optx.inject._attention import Attention, AttentionPart, Heads, spread, with_prefix
from optx.inject._bottleneck import FORMS, draw
from optx.inject._part import new_tensor

if TYPE_CHECKING:
    from optx.inject._handle import Handle
    from optx.inject.unified import HiddenDelta


class Prefix(AttentionPart):
    """Keys and values (heads, l, head width) that every query sees beside its own.

    With a bottleneck `mlp`, they are what an MLP makes of an embedding (l, heads * head width).
    """

    what: ClassVar[str] = "the prefix"

    def __init__(self, delta: HiddenDelta, module: nn.Module, path: str, heads: Heads) -> None:
        super().__init__(path, heads)
        self.length, self.mlp = delta.rank, delta.mlp
        if self.mlp is None:
            key, value = (new_tensor(module, heads.count, self.length, heads.width) for _ in range(2))
            draw(key, value, delta)
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

    def __init__(self, delta: HiddenDelta, module: nn.Module, path: str, heads: Heads) -> None:
        super().__init__(path, heads)
        self.form, self.dropout = delta.form, delta.dropout
        key, value = (new_tensor(module, heads.count, delta.rank, heads.width) for _ in range(2))
        draw(key, value, delta)
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)
        learned = delta.scale == "learned"
        self.scale = nn.Parameter(new_tensor(module) + 1) if learned else float(delta.scale)

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


def fold_prefix(handle: Handle) -> None:
    """Replace the MLPs that make prefixes by what they make; outputs stay the same.

    For after the training: an optimizer that was made before moves tensors which are no longer used. The
    handle then saves and loads like one of ``PrefixTuning(mlp=None)``.

    Args:
        handle: of `optx.PrefixTuning`, `optx.MAM`, or any injection with a prefix that has an MLP.

    Raises:
        OptxError: the handle has no such prefix, or has been removed.

    Example:
        >>> import torch, optx
        >>> attention = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
        >>> handle = optx.attach(attention, optx.PrefixTuning(length=3, mlp=16), targets="attn")
        >>> optx.fold_prefix(handle)
        >>> sorted(handle.state_dict())
        ['attn.prefix.key', 'attn.prefix.value']
    """
    if handle.removed:
        raise OptxError("fold_prefix: this handle has been removed from its model.")
    todo = [one for one in handle.served if isinstance(one.part, Prefix) and one.part.mlp is not None]
    if not todo:
        raise OptxError(f"fold_prefix: {handle!r} has no prefix that is made by an MLP, so nothing to fold.")
    known: dict[int, Any] = {}
    for one in todo:
        assert isinstance(one.part, Prefix)
        one.part.drop_mlp()
        one.injection = known.setdefault(id(one.injection), replace(one.injection, mlp=None))  # pyright: ignore[reportCallIssue]
    whole: Any = handle.injection
    if id(whole) in known:
        handle.injection = known[id(whole)]
    elif hasattr(whole, "mlp"):  # a composite makes its members from an option of its own
        handle.injection = replace(whole, mlp=None)


def _uniform(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
