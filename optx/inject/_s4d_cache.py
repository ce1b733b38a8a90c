"""The recurrent state of a mixer in transformers' cache, beside or in the place of keys and values."""

from __future__ import annotations

from typing import Any

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
    found: Any = getattr(cache, "layers", None)
    if index is None:
        raise OptxError(
            f"S4D on {path!r}: the module was called with a cache and does not say which of its layers is "
            "its own (layer_idx). Call the model with use_cache=False."
        )
    if not isinstance(found, list):
        raise OptxError(
            f"S4D on {path!r}: the module was called with a cache of type {type(cache).__name__}, where its "
            "state can't be kept. Use transformers' DynamicCache, or use_cache=False."
        )
    layers: list[Any] = found  # pyright: ignore[reportUnknownVariableType]
    if own:
        return _in_place(cache, layers, index, path, mixer)
    seen = cache.get_seq_length(index)
    found = next((one for one in layers if getattr(one, "mixer", None) == mixer), None)
    if found is None:
        _check_growing(layers[index] if index < len(layers) else None, path)
        found = _new(path, mixer)
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
    layers[index] = _new(path, mixer)
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


def _new(path: str, mixer: str) -> Any:
    from optx.inject._s4d_state import StateLayer  # its base is transformers', which a cache has loaded

    return StateLayer(path, mixer)
