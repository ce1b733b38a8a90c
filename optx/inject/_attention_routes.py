"""Attention of one's own in transformers' models, through their registry of attention functions.

An attention module looks its function up by its config's ``_attn_implementation``. A function of optx's is
put into the registry under a name of its own, as long as anything needs it, and a served module gets a config
that is the model's in everything, live, but for that name. So modules that are not served, masks and the
model's config know nothing of it, and taking it off is giving the module its config back.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import weakref
from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from optx._errors import OptxError, TargetError
from optx.inject._part import Part

NAME = "optx"
"""In the registry."""

_UNKNOWN = {
    "softcap": "caps its scores",
    "s_aux": "adds sinks to its sums",
    "position_bias": "adds a bias by position to its scores",
    "head_mask": "masks whole heads",
    "layer_head_mask": "masks whole heads",
}


class Routed(Part):
    """A part that computes attention in the place of what the module's config names."""

    path: str

    @abstractmethod
    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
    ) -> Tensor:
        """What attention gives, (B, H, T, e), of heads (B, H, T, d), (B, H', S, d) and (B, H', S, e)."""

    @abstractmethod
    def with_weights(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """The same, and its weights (B, H, T, S)."""


def home_of(module: nn.Module) -> str:
    """The Python module in whose registry a module looks its attention function up; empty if in none."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return ""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return forward.__module__ if code is not None and _REGISTRY in code.co_names else ""


class Route:
    """A module's config while a part is on it; ``remove`` gives it its own back."""

    def __init__(self, module: nn.Module, part: Routed) -> None:
        self.module, self.own = module, module.config
        module.config = _config_with(self.own, part, home_of(module))  # pyright: ignore[reportArgumentType]

    def remove(self) -> None:
        """Undo it, unless someone has given the module another since."""
        if hasattr(self.module.config, "optx_part"):
            self.module.config = self.own  # pyright: ignore[reportArgumentType]


def _config_with(own: Any, part: Routed, home: str) -> Any:
    """A config that shares all of another's attributes, and says where its module is to look."""
    found = object.__new__(_kind(own.__class__))
    held: dict[str, Any] = {"__dict__": vars(own), "optx_part": part, "optx_own": own, "optx_home": home}
    for name, value in held.items():
        object.__setattr__(found, name, value)
    _users.append((home, weakref.ref(found, _leave)))
    _registry(home)[NAME] = _attend
    return found


_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_users: list[tuple[str, weakref.ref[Any]]] = []
"""Configs that name what optx put into a registry, and the registry's Python module."""


def _registry(home: str) -> Any:
    return getattr(sys.modules[home], _REGISTRY)  # the module's class is from there


def _leave(gone: Any) -> None:
    """A config is no more: take what it needed out of the registry, unless others need it."""
    for one in [one for one in _users if one[1] is gone]:
        _users.remove(one)
        others = [_registry(home) for home, _ in _users]
        if not any(other is _registry(one[0]) for other in others):
            _registry(one[0]).pop(NAME, None)


@functools.cache
def _kind(own: Any) -> Any:
    """A config's class with a place for a part, by which it says what attention is."""

    def implementation(config: Any) -> Any:
        name = config._attn_implementation_internal
        return NAME if name is not None and config.optx_part.active else name

    def again(config: Any, protocol: Any = None) -> Any:
        return _config_with, (config.optx_own, config.optx_part, config.optx_home)

    def copied(config: Any, memo: Any) -> Any:  # it shares what the copied config has
        return _config_with(*copy.deepcopy((config.optx_own, config.optx_part, config.optx_home), memo))

    names: dict[str, Any] = {
        "__slots__": ("optx_home", "optx_own", "optx_part"),
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__reduce_ex__": again,
        "__deepcopy__": copied,
        "_attn_implementation": property(implementation, own._attn_implementation.fset),
    }
    return type(own.__name__, (own,), names)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a module of transformers calls: its part's attention, by the rules of the function it stands for.

    As eager attention it gives weights, and has all that is hidden from the mask; as the others it gives
    none, and is causal by itself where there is no mask.
    """
    config: Any = module.config
    part: Routed = config.optx_part
    eager = config._attn_implementation_internal == "eager"
    _check(part, module, attention_mask, others, eager)
    given = (query, key, value, attention_mask, dropout)
    if eager:
        out, weights = part.with_weights(*given, False)
        return out.transpose(1, 2).contiguous(), weights
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    return part.attended(*given, causal).transpose(1, 2).contiguous(), None


def _check(part: Routed, module: nn.Module, mask: Any, others: dict[str, Any], eager: bool) -> None:
    """Raise for what the attention that is replaced would have done and this would not."""
    does = next((why for name, why in _UNKNOWN.items() if others.get(name) is not None), "")
    if does:
        raise TargetError(
            f"{part.path!r}, a {type(module).__name__}, {does}, which the attention attached to it does not. "
            "Leave it out of targets."
        )
    if others.get("output_attentions") and not eager:
        raise OptxError(
            "output_attentions=True: weights are had where the model was loaded with "
            "attn_implementation='eager', which makes them of all keys at once."
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        what = f"{mask.ndim} axes" if isinstance(mask, Tensor) else f"the type {type(mask).__name__}"
        raise TargetError(
            f"{part.path!r} got a mask of {what}; it must be one of 4, a tensor. Load the model with "
            "attn_implementation='sdpa'."
        )
