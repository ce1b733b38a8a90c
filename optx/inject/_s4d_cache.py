"""The recurrent state of a mixer in transformers' cache, beside or in the place of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from optx._errors import OptxError

_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")


def layer_in(cache: Any, index: int | None, path: str, mixer: str, *, own: bool) -> Any:
    """The layer of a cache that keeps the state of one mixer; made at its first call.

    Args:
        cache: transformers' DynamicCache, or what has one for self-attention.
        index: the module's number in it.
        path: of the module.
        mixer: names the mixer among all that are attached to the model.
        own: the mixer is in the place of attention, so that the layer of that number is its own; else it is
            one behind all others.

    Raises:
        OptxError: a cache of another kind, or one that was filled without the mixer.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if index is None:
        raise OptxError(
            f"S4D on {path!r}: the module was called with a cache and does not say which of its layers is "
            "its own (layer_idx). Call the model with use_cache=False."
        )
    if not isinstance(layers, list):
        raise OptxError(
            f"S4D on {path!r}: the module was called with a cache of type {type(cache).__name__}, where its "
            "state can't be kept. Use transformers' DynamicCache, or use_cache=False."
        )
    if own:
        return _in_place(cache, layers, index, path, mixer)
    seen = cache.get_seq_length(index)
    found = next((one for one in layers if getattr(one, "mixer", None) == mixer), None)
    if found is None:
        _check_growing(layers[index] if index < len(layers) else None, path)
        found = _state_layer()(path, mixer)
        while len(layers) <= index:  # attention's own, which it would make itself
            layers.append(cache.layer_class_to_replicate())
        layers.append(found)
    _check_filled(found, seen, path)
    return found


def _in_place(cache: Any, layers: list[Any], index: int, path: str, mixer: str) -> Any:
    while len(layers) <= index:
        layers.append(cache.layer_class_to_replicate())
    found = layers[index]
    if getattr(found, "mixer", None) == mixer:
        return found
    _check_growing(found, path)
    _check_filled(None, found.get_seq_length(), path)
    layers[index] = _state_layer()(path, mixer)
    return layers[index]


def _check_growing(layer: Any, path: str) -> None:
    if layer is not None and type(layer).__name__ not in _GROWING:
        raise OptxError(
            f"S4D on {path!r}: the cache has a {type(layer).__name__} for this module, which keeps keys and "
            "values in a form of its own and no state. Generate with the default cache "
            "(cache_implementation=None), or use_cache=False."
        )


def _check_filled(layer: Any, seen: int, path: str) -> None:
    own = 0 if layer is None else layer.seen
    if own != seen:
        raise OptxError(
            f"S4D on {path!r}: the cache has {seen} tokens, of which the mixer has seen {own}: it was filled "
            "while S4D was not attached, or switched off. Begin with an empty cache."
        )


@functools.cache
def _state_layer() -> Any:
    """The class; its base comes from transformers, which is not loaded before a cache is there."""
    from transformers.cache_utils import DynamicLayer

    class StateLayer(DynamicLayer):
        """A state that does not grow, and how many tokens went into it."""

        is_croppable = False

        def __init__(self, path: str, mixer: str) -> None:
            super().__init__()
            self.path, self.mixer, self.seen = path, mixer, 0
            self._state: Tensor | None = None
            self._make: Callable[[], Tensor] | None = None

        def put(self, make: Callable[[], Tensor], tokens: int) -> None:
            """Keep a state, which is computed once it is asked for: in training it never is."""
            self._make, self.seen = make, self.seen + tokens

        @property
        def state(self) -> Tensor | None:
            """What all tokens so far left; None before the first."""
            if self._make is not None:
                self._state, self._make = self._make(), None
            return self._state

        def _change(self, change: Callable[[Tensor], Tensor]) -> None:
            if self.state is not None:
                self._state = change(self.state)

        def update(self, *_: Any, **__: Any) -> Any:
            """Nothing has keys and values here."""
            raise OptxError(
                f"S4D on {self.path!r}: attention wrote to the cache where the mixer keeps its state. Begin "
                "with an empty cache once S4D was switched off."
            )

        def get_seq_length(self) -> int:
            """How many tokens it has seen."""
            return self.seen

        def reset(self) -> None:
            """As before the first token."""
            self._state, self._make, self.seen = None, None, 0

        def crop(self, tokens_to_remove: int) -> None:
            """A recurrence can't go back."""
            if tokens_to_remove:
                raise OptxError(
                    f"S4D on {self.path!r}: the cache was to forget {abs(tokens_to_remove)} tokens, as "
                    "assisted generation does, and a state can't go back. Generate without an assistant."
                )

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Beams that go on."""
            self._change(lambda state: state.index_select(0, beam_idx.to(state.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            """Every sequence several times."""
            self._change(lambda state: state.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            """Some sequences."""
            self._change(lambda state: state[indices])

        def offload(self) -> None:
            """It is small, and stays."""

        def prefetch(self) -> None:
            """It is there."""

    return StateLayer
