"""Tensors and state dicts packed in RF8, rounded to it, and unpacked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from optx._errors import OptxError, warn
from optx._rf8 import Packed, pack_tensor, round_tensor
from optx._safetensors import Entry
from optx.delta._name_filter import floating
from optx.inject._followed import replaced

Made = TypeVar("Made")


@overload
def pack(what: Tensor, *, include: str | None = None, exclude: str | None = None) -> Packed: ...
@overload
def pack(
    what: Mapping[str, Tensor] | nn.Module, *, include: str | None = None, exclude: str | None = None
) -> dict[str, Packed | Tensor]: ...
def pack(
    what: Tensor | Mapping[str, Tensor] | nn.Module,
    *,
    include: str | None = None,
    exclude: str | None = None,
) -> Packed | dict[str, Packed | Tensor]:
    """Pack a tensor, or the weights of a state dict, in RF8.

    What is below half of a tensor's smallest magnitude, 3/4 * 2**(e_max - 14), becomes 0. What was unpacked
    packs to the same codes.

    Args:
        what: float32, bfloat16 or float16, any shape; or tensors by name, or a module, for its state dict.
        include: regex of the names that are packed (full match); None: floating tensors of two dimensions or
            more. The authors' code rounds every parameter: ``include=".*"``.
        exclude: regex of the names that are left.

    Returns:
        A `Packed`; or by name one, or the tensor itself where it is not packed.

    Paper values:
        None: the authors' code has one option, the powers of two between both parts, and it is 4.

    Limits: Each number is off by 4 % of itself (root mean square), by 10.83 % at most, and so is what a
        linear module makes of them: int8 with a scale for each row is off by 0.9 % where weights are normal.
        RF8 needs no scales, and keeps small weights apart over 15 octaves. Nothing is trained in it.

    Keywords: compression, quantisation, quantization, 8 bits, fp8, weight-only, memory.

    Evidence: ``optx run compress``; ``test_rf8_codes.py``, ``test_rf8_files.py``.

    Raises:
        OptxError: inf or nan, or another dtype among what is packed; names it.

    Example:
        >>> import torch, optx
        >>> w = torch.tensor([[0.011, 0.7], [-1.96, 0.0]])
        >>> optx.rf8.pack(w).unpack()
        tensor([[ 0.0117,  0.7500],
                [-2.0000,  0.0000]])

    Source: arXiv 2506.00486v3, section 4.
    """
    return _each(what, "pack", pack_tensor, include, exclude)


@overload
def quantise(what: Tensor, *, include: str | None = None, exclude: str | None = None) -> Tensor: ...
@overload
def quantise(
    what: Mapping[str, Tensor] | nn.Module, *, include: str | None = None, exclude: str | None = None
) -> dict[str, Tensor]: ...
def quantise(
    what: Tensor | Mapping[str, Tensor] | nn.Module,
    *,
    include: str | None = None,
    exclude: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Round to RF8's numbers without packing them, with as many powers of two as the dtype has.

    What the authors' code does to each parameter. A largest number whose rounding the dtype has no room for
    becomes the largest of RF8's that it has.

    Args:
        what: as for `pack`; it stays as it is.
        include: see `pack`.
        exclude: see `pack`.

    Returns:
        New tensors of the same dtypes; what is not rounded is the tensor itself.

    Raises:
        OptxError: as `pack`.

    Example:
        >>> import torch, optx
        >>> optx.rf8.quantise(torch.tensor([1.8, 1e-30, 0.7]))
        tensor([1.7500e+00, 9.8608e-31, 7.5000e-01])
    """
    return _each(what, "quantise", round_tensor, include, exclude)


@overload
def unpack(what: Packed, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def unpack(what: Mapping[str, Packed | Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]: ...
def unpack(
    what: Packed | Mapping[str, Packed | Tensor], dtype: torch.dtype | None = None
) -> Tensor | dict[str, Tensor]:
    """The numbers of what `pack` made.

    Args:
        what: one, or by name; tensors among them stay as they are.
        dtype: float32, bfloat16 or float16; None: what was packed. All of RF8's numbers are exact in float32
            and bfloat16; float16 ends at 65,504, which larger ones become, and has fewer digits below 2**-20.

    Raises:
        OptxError: another dtype.

    Example:
        >>> import torch, optx
        >>> optx.rf8.unpack(optx.rf8.pack(torch.tensor([1.05])), torch.bfloat16)
        tensor([1.0625], dtype=torch.bfloat16)
    """
    if isinstance(what, Packed):
        return what.unpack(dtype)
    if not isinstance(what, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"unpack: this is a {type(what).__name__}; it must be what optx.rf8.pack gave.")
    return {name: one.unpack(dtype) if isinstance(one, Packed) else one for name, one in what.items()}


def _each(
    what: Tensor | Mapping[str, Tensor] | nn.Module,
    who: str,
    make: Callable[[Tensor, str, str], Made],
    include: str | None,
    exclude: str | None,
) -> Made | dict[str, Made | Tensor]:
    """Make something of a tensor, or of those of several that are chosen."""
    if isinstance(what, Tensor):
        if include is not None or exclude is not None:
            raise OptxError(f"{who}: include and exclude choose by name, and this is one tensor.")
        return make(what, who, "the tensor")
    tensors = what.state_dict() if isinstance(what, nn.Module) else what
    if not isinstance(tensors, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(
            f"{who}: this is a {type(what).__name__}; it must be a tensor, a state dict or a module."
        )
    for name, t in tensors.items():
        if not isinstance(t, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"{who}: {name!r} is a {type(t).__name__}; it must be a tensor. Leave it out.")
    entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    keep = set(floating(who, entries, include, exclude))
    tell_of_replaced(who, what, keep)
    return {name: make(t, who, repr(name)) if name in keep else t for name, t in tensors.items()}


def tell_of_replaced(who: str, what: object, keep: Collection[str]) -> None:
    """Warn of weights of a module among the names that are packed, in whose place others compute."""
    if not isinstance(what, nn.Module):
        return
    gone = replaced(what)
    found = {name: gone[p] for name, p in what.named_parameters() if p in gone and name in keep}
    if found:
        first, part = next(iter(found.items()))
        warn(
            f"{who}: {len(found)} of the weights ({first!r} is the first) take no part, since others were "
            f"added in their place ({part!r}), and are packed all the same. Pack handle.state_dict(), or the "
            "model after merge_and_unload()."
        )
