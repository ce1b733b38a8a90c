"""How a causal language model is called step by step, by the names that its forward has for things."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError

_CACHES = ("cache", "past_key_values", "cache_params")  # transformers 5, 4, and 4's state spaces


class Caller:
    """Calls a model with what has come since the last call, or without a cache with all of it.

    Attributes:
        cache: what the model keeps between calls; None before the first, and without one.
        mask: (B, places) int64, 1 where there is something.
    """

    def __init__(self, model: nn.Module, mask: Tensor, use_cache: bool | None) -> None:
        names = named(model)
        self.model = model
        self.mask = mask.long()
        self.cache: Any = None
        self._cache_name = next((name for name in _CACHES if name in names), None)
        self._takes = {name for name in ("attention_mask", "position_ids", "logits_to_keep") if name in names}
        if use_cache and self._cache_name is None:
            raise OptxError(
                f"generate: use_cache is True, and the forward of {type(model).__name__} has no "
                f"{' or '.join(map(repr, _CACHES[:2]))}. Leave it out: all of a row is computed at each step."
            )
        self.caches = self._cache_name is not None if use_cache is None else bool(use_cache)
        self._padded = bool((self.mask == 0).any())
        if self._padded and "attention_mask" not in self._takes:
            raise OptxError(
                f"generate: prompts are padded, and the forward of {type(model).__name__} has no "
                "attention_mask. Give prompts of one length."
            )

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits of the last place, (B, V).

        Args:
            ids: (B, places): those that have not been given yet, or without a cache all of them.
        """
        kwargs: dict[str, Any] = {}
        if self._padded:
            kwargs["attention_mask"] = self.mask
            if "position_ids" in self._takes:
                kwargs["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            kwargs["logits_to_keep"] = 1
        if self._cache_name is not None:
            kwargs["use_cache"] = self.caches
            if self.cache is not None:
                kwargs[self._cache_name] = self.cache
        output = self.model(ids, **kwargs)
        if self.caches:
            self.cache = _cache_of(output)
            if self.cache is None:
                raise OptxError(
                    f"generate: {type(self.model).__name__} gave no cache. In training with gradient "
                    "checkpointing it has none: call model.eval(), or pass use_cache=False. An encoder "
                    "(BERT) has none either, and can't generate."
                )
        return logits_of(output, self.model)

    def branch(self) -> Caller:
        """Another with a copy of its cache."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def grow(self) -> None:
        """One place more, of every row: what a row is given after its end nobody reads."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)


def named(model: nn.Module) -> set[str]:
    """The arguments of the forward that a call comes to; PEFT's passes them on unnamed."""
    give: Any = getattr(model, "get_base_model", None)
    inner: Any = give() if callable(give) else model
    forwards: list[Any] = [model.forward, inner.forward]
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


def _cache_of(output: Any) -> Any:
    for name in _CACHES:
        found = getattr(output, name, None)
        if found is not None:
            return found
    return None


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """The logits of the last place, (B, V).

    Raises:
        OptxError: the model gives none of that form.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        what = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise OptxError(
            f"generate: {type(model).__name__} gives {what}; a causal language model gives (B, T, V), as a "
            "tensor or as .logits."
        )
    return logits[:, -1]
