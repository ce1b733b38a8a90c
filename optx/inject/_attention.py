"""Acting inside attention: calls of ``scaled_dot_product_attention`` while a served module runs.

The modules of transformers, timm and torch compute queries, keys and values in their own ways, but all hand
them to one function. A part changes that call for the time of its module's call, so caches, position ids and
the modules' own code know nothing of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optx._errors import ShapeError, TargetError
from optx.inject._part import Part


class Attention(NamedTuple):
    """The arguments of one call of ``scaled_dot_product_attention``, by its names.

    Heads are the third axis from behind: query (..., H, T, d), key and value (..., H', S, d).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Tensor:
        """What attention gives."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def factor(self) -> float:
        """What products of queries and keys are multiplied with."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale


def with_prefix(call: Attention, key: Tensor, value: Tensor) -> Tensor:
    """Attention that also sees a prefix (H'', l, d) of keys and values, from every query.

    It is (1 - λ) Attention(q, K, V) + λ Attention(q, key, value), where λ is the prefix's share of the
    softmax's sum (equation 7 of the paper).
    """
    length = key.shape[-2]
    query, mask = call.query, call.attn_mask
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], call.key.shape[-2])
        mask = F.pad(mask, (length, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
    if call.is_causal:
        # As many rows in front as there are columns keep the triangle where it was. The other way, a mask of
        # T * (l + S), is read by slower kernels only.
        query = F.pad(query, (0, 0, length, 0))
    keys = torch.cat([spread(key, call.key, "keys"), call.key], dim=-2)
    values = torch.cat([spread(value, call.value, "values"), call.value], dim=-2)
    out = call._replace(query=query, key=keys, value=values, attn_mask=mask).run()
    return out[..., length:, :] if call.is_causal else out


def spread(own: Tensor, like: Tensor, what: str) -> Tensor:
    """(H'', l, d) over the batch and the heads of another tensor, each of ours for a group of its heads."""
    heads, _, width = own.shape
    if like.ndim < 3 or like.shape[-3] % heads or like.shape[-1] != width:
        raise ShapeError(
            f"what is attached has {heads} heads of width {width}, and attention was called with {what} of "
            f"shape {tuple(like.shape)}. Pass the right kv_heads= and head_dim=."
        )
    own = own.to(like.dtype)
    if like.shape[-3] != heads:
        own = own.repeat_interleave(like.shape[-3] // heads, dim=0)
    return own.expand(*like.shape[:-3], *own.shape)


class Intercepted(TorchFunctionMode):
    """While it is entered, ``attend`` answers calls of ``scaled_dot_product_attention``."""

    def __init__(self, attend: Callable[[Attention], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.calls = 0

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """One call of a function of torch."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self.attend(Attention(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            with self:  # torch's own would run without this mode
                return multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)


class AttentionPart(Part):
    """A part that acts where its module calls ``scaled_dot_product_attention``."""

    what: ClassVar[str]

    def __init__(self, path: str, heads: Heads) -> None:
        super().__init__()
        self.path = path
        self.heads = heads

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing; but that there is a hook keeps nn.TransformerEncoderLayer from going past the module."""

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call, with `attend` in the place of attention."""
        mode = Intercepted(self.attend)
        with mode:
            output = call(*args, **kwargs)
        if not mode.calls:
            raise self.unreached(module)
        return output

    def unreached(self, module: nn.Module) -> TargetError:
        """The error of a call that did not come to attention."""
        return TargetError(
            f"{self.what} on {self.path!r} ({type(module).__name__}) did nothing: its call did not reach "
            "torch's scaled_dot_product_attention. Load the model with attn_implementation='sdpa', or "
            "target the modules that call it."
        )

    def attend(self, call: Attention) -> Tensor:
        """What attention gives with this part."""
        raise NotImplementedError


class Heads(NamedTuple):
    """How many heads keys and values have, and how wide they are."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    width: int


def heads_of(module: nn.Module, kv_heads: int | None, head_dim: int | None) -> Heads | str:
    """What an attention module says of its heads, or what was given; else what is missing, in words."""
    config = getattr(module, "config", None)
    heads = _number(module, "num_heads", "num_attention_heads", "n_heads", "n_head")
    groups = _number(module, "num_key_value_groups")
    spread_first = getattr(module, "new_decoder_architecture", False)  # Falcon's keys, before attention
    own = kv_heads or (spread_first and heads) or _number(module, "num_key_value_heads", "num_kv_heads")
    width = head_dim or _number(module, "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    if not (heads or groups or own or width):  # a module that only shares the model's config is no attention
        return "does not say how many heads it has"
    heads = heads or _number(config, "num_attention_heads")
    count = own or (heads and groups and heads // groups) or _number(config, "num_key_value_heads") or heads
    if not count:
        return "does not say how many heads it has (kv_heads=)"
    total = _number(module, "embed_dim", "dim", "hidden_size") or _number(config, "hidden_size")
    width = width or _number(config, "head_dim") or (heads and total and total // heads)
    return Heads(count, width) if width else "does not say how wide its heads are (head_dim=)"


def adds_position_bias(module: nn.Module) -> bool:
    """Whether an attention module adds numbers by position to its scores, as T5's and MPT's do."""
    return "position_bias" in inspect.signature(type(module).forward).parameters


def _number(owner: Any, *names: str) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def kernel_of(module: nn.Module) -> str:
    """What a module says it computes attention with, if that is not ``scaled_dot_product_attention``."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if isinstance(chosen, str) and "sdpa" not in chosen:
        return f"attn_implementation={chosen!r}"
    if getattr(module, "fused_attn", True) is False:
        return "fused_attn=False"
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "add_bias_kv or add_zero_attn"
    return ""


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What nn.MultiheadAttention computes, always by ``scaled_dot_product_attention``.

    Weights, if asked for, are those among the real tokens.
    """
    batched = query.ndim == 3
    inputs = [x if batched else x.unsqueeze(1) for x in (query, key, value)]
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    width = embed_dim_to_check // num_heads
    q, k, v = (
        # By view: unflatten can't be compiled while a mode looks at torch's functions.
        F.linear(x, w, b).view(*x.shape[:2], num_heads, width).permute(1, 2, 0, 3)  # pyright: ignore[reportArgumentType]
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    mask = _added_mask(q, attn_mask, key_padding_mask)
    # is_causal is a hint that attn_mask is the causal one, which is there too.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p if training else 0.0)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    shares = _shares(q, k, mask) if need_weights else None
    if shares is not None and average_attn_weights:
        shares = shares.mean(dim=1)
    return (out, shares) if batched else (out.squeeze(1), None if shares is None else shares.squeeze(0))


def _added_mask(q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """Both masks as one (N, H, L, S) that is added; True hides in torch's module."""
    added: Tensor | None = None
    for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        if is_padding:
            mask = mask.view(-1, 1, 1, mask.shape[-1])
        elif mask.ndim == 3:
            mask = mask.view(*q.shape[:2], *mask.shape[1:])
        mask = mask.to(q.dtype)
        added = mask if added is None else added + mask
    return added


def _shares(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(logits if mask is None else logits + mask, dim=-1)
