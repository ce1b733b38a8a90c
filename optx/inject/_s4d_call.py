"""What a call of an attention module tells a mixer in its place: its input, its real tokens, its cache."""

from __future__ import annotations

import inspect
import re
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, TargetError
from optx.inject._part import hidden_of

_MASKS = ("attention_mask", "attn_mask", "mask")
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_OTHERS = ("key_value_states", "encoder_hidden_states")
_PACKED = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q")
_SHOWN = ("output_attentions", "need_weights")
_HIDDEN = -9e3
"""Masks that are added have less where a key is hidden: minus infinity, a dtype's least, or -10000."""
_CROSS = re.compile(r"(.*\.)?(crossattention|encoder_attn|cross_attn|multihead_attn|EncDecAttention)(\..*)?")


class Call(NamedTuple):
    """One call.

    Attributes:
        hidden: (batch, L, width).
        real: bool, (batch, L): which are tokens; None: all.
        cache: transformers' cache, if it goes by one.
        turned: the module has L before batch.
    """

    hidden: Tensor
    real: Tensor | None
    cache: Any
    turned: bool


def is_cross(path: str, module: nn.Module) -> bool:
    """Whether an attention module attends to another sequence than its own, by its name or what it says."""
    said = getattr(module, "is_cross_attention", False) is True
    return said or _CROSS.fullmatch(path) is not None or "Cross" in type(module).__name__


def is_causal(module: nn.Module) -> bool | None:
    """Whether an attention module says that it sees nothing of what is to come; None: it does not say."""
    names = "is_causal", "is_decoder"  # the second is BERT's, before transformers 5
    said = (getattr(module, name, None) for name in names)
    return next((one for one in said if isinstance(one, bool)), None)


class Reader:
    """Reads the calls of all modules of one handle; of a mask that all are called with, once."""

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}

    def read(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], both_ways: bool
    ) -> Call:
        """What a call says.

        Args:
            path: of the module.
            module: it.
            args: the call's.
            kwargs: likewise.
            both_ways: the mixer sees what is still to come.

        Raises:
            OptxError: it asks for what a state space has not: another sequence, attention weights, a mask
                that hides more than padding and the future.
        """
        given = _by_name(module, args, kwargs)
        hidden = given.get("query", hidden_of(args, kwargs))
        for name in (*_OTHERS, "key", "value"):
            if given.get(name) is not None and given[name] is not hidden:
                raise TargetError(
                    f"S4D on {path!r}: the module was called with {name}= of another sequence, as "
                    "cross-attention is, which a state space of its own sequence can't take the place of. "
                    "Leave it out by targets= or exclude=."
                )
        self._refuse(path, module, given, both_ways)
        turned = isinstance(module, nn.MultiheadAttention) and not module.batch_first and hidden.ndim == 3
        if turned:
            hidden = hidden.transpose(0, 1)
        real = self._real(path, module, given, hidden, both_ways)
        return Call(
            hidden, real, next((given[name] for name in _CACHES if given.get(name) is not None), None), turned
        )

    def _refuse(self, path: str, module: nn.Module, given: dict[str, Any], both_ways: bool) -> None:
        for name in _SHOWN:
            if given.get(name) and not (name == "need_weights" and "need_weights" not in given["given"]):
                raise OptxError(
                    f"S4D on {path!r}: {name}={given[name]!r} asks for attention weights, and a state space "
                    f"has none. Call with {name}=False."
                )
        for name in _PACKED:
            if given.get(name) is not None:
                raise OptxError(
                    f"S4D on {path!r}: the module was called with {name}, sequences packed into one, and a "
                    "state would go on from one into the next. Pass a padded batch."
                )
        if both_ways and given.get("is_causal") is True:
            raise OptxError(
                f"S4D on {path!r}: the module was called with is_causal=True, and the mixer in its place "
                "sees what is still to come. Attach optx.S4D(bidirectional=False)."
            )

    def _real(
        self, path: str, module: nn.Module, given: dict[str, Any], hidden: Tensor, both_ways: bool
    ) -> Tensor | None:
        padding = given.get("key_padding_mask")
        mask = next((given[name] for name in _MASKS if given.get(name) is not None), None)
        if isinstance(module, nn.MultiheadAttention):
            allowed = None if mask is None else ~mask if mask.dtype == torch.bool else mask > _HIDDEN
            mask = allowed
            if padding is not None:
                hides = padding if padding.dtype == torch.bool else padding <= _HIDDEN
                padding = ~hides if hides.ndim == 2 else ~hides.unsqueeze(0)
        real = padding
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise OptxError(
                    f"S4D on {path!r}: the module was called with a mask of type {type(mask).__name__}, "
                    "which does not say which tokens are padding. Load the model with "
                    "attn_implementation='sdpa'."
                )
            own = self._of_mask(path, module, mask, hidden, both_ways)
            real = own if real is None or own is None else real & own
        return real

    def _of_mask(
        self, path: str, module: nn.Module, mask: Tensor, hidden: Tensor, both_ways: bool
    ) -> Tensor | None:
        """(batch, L) from a mask of pairs, or of tokens."""
        windowed = _has_window(module)
        key = (hidden.shape[:-1], both_ways, windowed, mask._version)
        if self._seen is not None and self._seen[0]() is mask and self._seen[1] == key:
            return self._seen[2]
        per_token = mask.ndim == 2 and not isinstance(module, nn.MultiheadAttention)
        real = (
            _of_tokens(path, mask, hidden)
            if per_token
            else _of_pairs(path, mask, hidden, both_ways, windowed)
        )
        if not torch.compiler.is_compiling():
            self._seen = (weakref.ref(mask), key, real)
        return real


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the class's forward; ``given`` are those that were passed."""
    signature = inspect.signature(type(module).forward)
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError:
        return {**kwargs, "given": set(kwargs)}
    found = dict(bound.arguments)
    more = next((n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    found.update(found.pop(more, {}) if more is not None else {})
    return {**found, "given": set(found)}


def _has_window(module: nn.Module) -> bool:
    """Whether attention sees a window alone, so that its mask hides more than a state space has to."""
    for owner in (module, getattr(module, "config", None)):
        if any(
            getattr(owner, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")
        ):
            return True
    return False


def _of_tokens(path: str, mask: Tensor, hidden: Tensor) -> Tensor:
    batch, length = hidden.shape[:2]
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ShapeError(
            f"S4D on {path!r}: the mask has shape {tuple(mask.shape)}, and the module was called with "
            f"{batch} sequences of {length} tokens."
        )
    own = mask[:, mask.shape[1] - length :]
    return own if own.dtype == torch.bool else own > 0 if bool((own >= 0).all()) else own > _HIDDEN


def _of_pairs(path: str, mask: Tensor, hidden: Tensor, both_ways: bool, windowed: bool) -> Tensor:
    batch, length = hidden.shape[:2] if hidden.ndim == 3 else (1, len(hidden))
    allowed = mask if mask.dtype == torch.bool else mask > _HIDDEN
    while allowed.ndim < 3:
        allowed = allowed.unsqueeze(0)
    allowed = allowed[:, 0] if allowed.ndim == 4 else allowed
    allowed = (
        allowed if len(allowed) in (1, batch) else allowed[:: len(allowed) // batch]
    )  # of heads, the first
    keys = allowed.shape[-1]
    allowed = allowed.expand(batch, length, keys)
    past = keys - length
    if past < 0:
        raise ShapeError(
            f"S4D on {path!r}: the mask has shape {tuple(mask.shape)}, and the module was called with "
            f"{length} tokens."
        )
    ahead = torch.ones(length, keys, dtype=torch.bool, device=allowed.device).triu(past + 1)
    real = allowed.diagonal(past, -2, -1)
    if not both_ways:
        real = real & ~(allowed & ahead).any(-1)  # a row of padding may be allowed all, against nan
    if not windowed and not torch.compiler.is_compiling():
        _check_pairs(path, allowed[..., past:], real, ahead[:, past:], both_ways)
    return real


def _check_pairs(path: str, allowed: Tensor, real: Tensor, ahead: Tensor, both_ways: bool) -> None:
    """Raise if a mask hides more than padding and, of a mixer that does not see it, what is still to come."""
    expected = real.unsqueeze(-2) if both_ways else real.unsqueeze(-2) & ~ahead
    if bool(((allowed != expected) & real.unsqueeze(-1)).any()):
        way = "both ways" if both_ways else "what was before"
        raise OptxError(
            f"S4D on {path!r}: the module was called with a mask that is not padding alone, for a mixer that "
            f"sees {way}: its state would carry what the mask hides. Pass bidirectional="
            f"{not both_ways} if that is what the mask says; packed sequences and prefixes can't be had."
        )
