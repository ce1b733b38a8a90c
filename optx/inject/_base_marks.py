"""Checksums of a base model's tensors, by which another base is told from the one that was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # pyright: ignore[reportUnknownVariableType]

from optx._errors import warn
from optx._names import is_dtensor

Mark = tuple[str, list[int], int]  # dtype, shape, checksum; a list, as JSON gives it back
_SIDE = 512  # of the rows of a checksum


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by the names that a state dict has, shared ones by all of their names.

    Not ``state_dict()``: hooks of ours and of others change what that says.
    """
    every = cast("Iterator[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False))
    for path, one in every:
        start = f"{path}." if path else ""
        unsaved: set[str] = one._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        own: dict[str, Any] = {**one._parameters, **one._buffers}  # pyright: ignore[reportPrivateUsage]
        for name, t in own.items():
            if t is not None and name not in unsaved:
                yield start + name, t


@torch.no_grad()
def mark(t: Tensor, dtype: str = "") -> Mark | None:
    """A tensor's dtype, shape and a checksum of its bits; None where they can't be read here.

    Args:
        t: any; offloaded, sharded and quantised ones can't be read.
        dtype: as which to read it: a float that was saved as a narrower one is rounded as that was. Of one
            that is narrower itself nothing is known: a base in bfloat16 is that in float32, or another.
    """
    if t.is_meta or is_dtensor(t) or is_traceable_wrapper_subclass(t):
        return None
    wanted: Any = getattr(torch, dtype.removeprefix("torch.")) if dtype else t.dtype
    if wanted != t.dtype and not (wanted.is_floating_point and t.is_floating_point()):
        return None
    if t.itemsize < wanted.itemsize:
        return None
    return str(wanted), list(t.shape), _checksum(t.detach().to(wanted).contiguous().reshape(-1))


def _checksum(flat: Tensor) -> int:
    """Of the bits and their places: where an order or a mask changes, the bits are the same ones elsewhere.

    Of a large tensor, 64-bit words are added up by rows and by columns, at the memory's speed.
    """
    data = flat.view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    end = len(data) // (8 * _SIDE) * (8 * _SIDE)
    words = data[:end].view(torch.int64).view(-1, _SIDE)
    found = hashlib.blake2b(digest_size=8)
    for part in (words.sum(1), words.sum(0), data[end:]):
        found.update(part.cpu().numpy().data)
    return int.from_bytes(found.digest(), "little")


def as_text(names: Mapping[str, Mark | None]) -> str:
    """What was left out, for a file."""
    return json.dumps(names, separators=(",", ":"))


def from_text(text: str) -> dict[str, Mark | None]:
    """What `as_text` wrote."""
    return json.loads(text)


def check_marks(found: Any) -> None:
    """Raise unless a file's are such as `as_text` wrote.

    Raises:
        ValueError: they are something else.
    """
    good = isinstance(found, dict) and all(map(_is_mark, cast("dict[str, Any]", found).values()))
    if not good:
        raise ValueError("its checksums of the base model are none")


def _is_mark(one: Any) -> bool:
    if one is None:
        return True
    if not isinstance(one, list | tuple) or len(cast("list[Any]", one)) != 3:
        return False
    dtype, shape, checksum = cast("list[Any]", one)
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
    return isinstance(kind, torch.dtype) and isinstance(shape, list | tuple) and isinstance(checksum, int)


def tell_of_another(here: Mapping[str, Tensor], saved: Mapping[str, Mark | None], do: str) -> None:
    """Warn where a checkpoint was trained on other frozen weights than those that are here.

    Args:
        here: the model's tensors.
        saved: what was left out of the checkpoint.
        do: before what the same base model has to be made.
    """
    for name, wanted in saved.items():
        found = None if wanted is None or name not in here else mark(here[name], wanted[0])
        if name not in here or (found is not None and wanted is not None and list(found) != list(wanted)):
            what = "is not the one" if name in here else "is not here. It was one of those"
            warn(
                f"optx: {name!r} of the base model {what} that this checkpoint was trained with, and a "
                f"checkpoint of adapters has the adapters alone. Make the same base model before {do}."
            )
            return
