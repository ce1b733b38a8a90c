"""Calibration data: how a model is called with it, and which of its tokens are padding."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, shown
from optx._no_trace import evaluating, randomness_kept

_WAYS = "a list of tensors, of dicts of keyword arguments or of tuples of positional ones"


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        args: positional arguments, on the model's device.
        kwargs: keyword arguments.
        padding: if any token is padding, the masks of all sequences among them, True where a token counts:
            each (batch, tokens).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    padding: tuple[Tensor, ...]

    def counted(self, x: Tensor, name: str) -> Tensor | None:
        """Which rows of a layer's input count, flattened as its rows are; None: all of them.

        Raises:
            OptxError: the batch has padding, and this input isn't laid out by its tokens.
        """
        if not self.padding or (x.ndim == 2 and len(x) in {len(mask) for mask in self.padding}):
            return None  # nothing is padding, or these are sequences and no tokens
        fits = [mask for mask in self.padding if _is_laid_out(x, mask)]
        if not fits:
            shapes = " or ".join(str(tuple(mask.shape)) for mask in self.padding)
            raise OptxError(
                f"prune: a batch has padding (a mask of shape {shapes}), and {name!r} is given "
                f"{tuple(x.shape)}, of which optx can't tell what is padding; calibrate with batches "
                "without."
            )
        if any(not torch.equal(mask, fits[0]) for mask in fits[1:]):
            raise OptxError(
                f"prune: a batch has two masks of shape {tuple(fits[0].shape)} that differ, and optx can't "
                f"tell which is for {name!r}; pad the two sides to different lengths, or give batches of "
                "one sequence."
            )
        return fits[0].flatten()


def _is_laid_out(x: Tensor, mask: Tensor) -> bool:
    return x.shape[:-1] in (mask.shape, torch.Size((mask.numel(),)))


def batches_of(model: nn.Module, data: Any, method: str) -> list[Batch]:
    """Calibration data as calls of a model.

    Raises:
        OptxError: there is none, or it is no row of batches.
    """
    if data is None:
        raise OptxError(f"prune: {method} needs calibration data; give data=, {_WAYS}.")
    if isinstance(data, Tensor | Mapping | str) or not hasattr(data, "__iter__"):
        raise OptxError(f"prune: data is {_what(data)}; it must be {_WAYS}: data=[batch] if it is one batch.")
    with randomness_kept():  # a DataLoader draws a seed
        rows: list[Any] = list(data)
    if not rows:
        raise OptxError(f"prune: data is empty, and {method} needs calibration data, {_WAYS}.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [_batch(model, row, device) for row in rows]


def _what(data: object) -> str:
    return f"a tensor of shape {tuple(data.shape)}" if isinstance(data, Tensor) else shown(data)


def _batch(model: nn.Module, row: Any, device: torch.device) -> Batch:
    if isinstance(row, Mapping):
        args, kwargs = (), {str(key): _placed(value, device) for key, value in row.items()}  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    elif isinstance(row, tuple | list):
        args, kwargs = tuple(_placed(value, device) for value in row), {}  # pyright: ignore[reportUnknownVariableType]
    elif isinstance(row, Tensor):
        args, kwargs = (_placed(row, device),), {}
    else:
        raise OptxError(f"prune: a batch is {shown(row)}; data must be {_WAYS}.")
    takes = inspect.signature(model.forward).parameters
    named = dict(zip(takes, args, strict=False)) | kwargs
    if any(named.get(name) is not None for name in ("past_key_values", "cache")):
        raise OptxError(
            "prune: a batch has past_key_values, which blocks would add to at each call; give whole "
            "sequences."
        )
    if "use_cache" in takes and "use_cache" not in list(takes)[: len(args)]:
        kwargs["use_cache"] = False
    masks = _masks(
        named, encodes=getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    )
    return Batch(args, kwargs, masks if any(not bool(mask.all()) for mask in masks) else ())


def _masks(named: Mapping[str, Any], *, encodes: bool) -> tuple[Tensor, ...]:
    """The masks of a batch's sequences; of one that comes without, ones, as no other's mask is for it."""
    masks = {name: one for name, one in named.items() if name.endswith("attention_mask")}
    found = [one.bool() for one in masks.values() if isinstance(one, Tensor) and one.ndim == 2]
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels") if encodes else ():
        one = named.get(name)
        if isinstance(one, Tensor) and one.ndim >= 2 and masks.get("decoder_attention_mask") is None:
            return (*found, torch.ones(one.shape[:2], dtype=torch.bool, device=one.device))
    return tuple(found)


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def as_in_use(model: nn.Module) -> Generator[None]:
    """The model in eval mode, without gradients or autocast; each module is put back into its mode."""
    kinds = {p.device.type for p in model.parameters()} or {"cpu"}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no layers, and hands on nested tensors
        with (
            evaluating(model),
            torch.no_grad(),
            torch.autocast(kinds.pop(), enabled=False),
            randomness_kept(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def digest(*values: Any) -> str:
    """A hash of tensors and plain values, whatever they are nested in."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        found.update(repr((plain.dtype, tuple(plain.shape))).encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key, one in value.items():  # pyright: ignore[reportUnknownVariableType]
            found.update(repr(key).encode())  # pyright: ignore[reportUnknownArgumentType]
            _feed(found, one)
    elif isinstance(value, tuple | list):
        for one in value:  # pyright: ignore[reportUnknownVariableType]
            _feed(found, one)
    else:
        found.update(repr(value).encode())
