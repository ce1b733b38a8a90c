"""RF8: for each weight a sign, a power of two, and one of eight multipliers, in a byte; see `optx.rf8`."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optx._errors import OptxError, as_whole, shown
from optx.kernels.available import why_unavailable
from optx.kernels.rf8.layout import HIGHEST, LOWEST

SERVED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that are packed, and unpacked to: each holds RF8's numbers exactly, within its own range."""
_NOT_FINITE = 0x7F800000
_TURNS = 2 - 2**-1.5  # mantissas from here on are 7/8, 15/16 or 1 of the next power of two


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in RF8: a byte for each number, and one exponent for all.

    A byte is a sign, four bits of exponent E (0: the number is 0) and three of R, and means
    ``2**(e_max - 15 + E)`` times 3/4, 7/8, 15/16, 1, 17/16, 9/8, 5/4 or 3/2.

    Args:
        codes: uint8, of the tensor's shape, on its device.
        e_max: of the largest magnitude, -128 to 127.
        dtype: that `unpack` gives: float32, bfloat16 or float16.

    Raises:
        OptxError: one of these is something else.

    Example:
        >>> import torch, optx
        >>> packed = optx.rf8.pack(torch.tensor([1.0, -0.3, 0.0]))
        >>> packed.codes, packed.e_max
        (tensor([123, 238,   0], dtype=torch.uint8), 0)
        >>> packed.unpack()
        tensor([ 1.0000, -0.3125,  0.0000])
    """

    codes: Tensor
    e_max: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.codes, Tensor) or self.codes.dtype != torch.uint8:  # pyright: ignore[reportUnnecessaryIsInstance]
            what = self.codes.dtype if isinstance(self.codes, Tensor) else shown(self.codes)  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"Packed: codes is {what}; it must be a tensor of uint8.")
        e_max = as_whole(self.e_max)
        if e_max is None or not LOWEST <= e_max <= HIGHEST:
            raise OptxError(
                f"Packed: e_max is {shown(self.e_max)}; it must be a whole number from -128 to 127."
            )
        check_dtype("Packed", self.dtype)

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """What it takes: a byte for each number, and one for the exponent."""
        return self.codes.numel() + 1

    def numel(self) -> int:
        """How many numbers it has."""
        return self.codes.numel()

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, on the codes' device; what float16 has no room for becomes its largest.

        Args:
            dtype: float32, bfloat16 or float16; None: its own.
        """
        made = torch.empty(
            self.shape, dtype=check_dtype("unpack", dtype or self.dtype), device=self.codes.device
        )
        unpack_into(made, self.codes, self.e_max)
        return made

    def to(self, device: torch.device | str | int) -> Packed:
        """The same on another device."""
        return Packed(self.codes.to(device), self.e_max, self.dtype)

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"Packed(shape={tuple(self.shape)}, e_max={self.e_max}, dtype={kind}, {self.nbytes:,} bytes)"


def check_dtype(who: str, dtype: torch.dtype) -> torch.dtype:
    """Raise unless a dtype is one that RF8 is unpacked to."""
    if dtype not in SERVED:
        raise OptxError(f"{who}: dtype is {shown(dtype)}; it must be torch.float32, bfloat16 or float16.")
    return dtype


def check_numbers(who: str, name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is one that can be packed, as far as its kind tells.

    Args:
        who: the function, for messages.
        name: of the tensor, or what it is.
        tensor: to be packed.

    Raises:
        OptxError: another dtype, a wrapper's, sparse, or without numbers; names it.
    """
    if tensor.dtype not in SERVED:
        raise OptxError(
            f"{who}: {name} is {tensor.dtype}; RF8 packs float32, bfloat16 and float16. Convert it, or leave "
            "it out."
        )
    wrapped = is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided
    if wrapped or tensor.is_meta:
        what = (
            "on the meta device, without numbers"
            if tensor.is_meta
            else f"a {type(tensor).__name__} of another"
        )
        raise OptxError(f"{who}: {name} is {what}{'' if tensor.is_meta else ' layout'}; give a plain tensor.")


def pack_tensor(tensor: Tensor, who: str = "pack", name: str = "the tensor") -> Packed:
    """A tensor's numbers as codes of its shape.

    Args:
        tensor: float32, bfloat16 or float16, any shape, finite.
        who: the function, for messages.
        name: of the tensor.

    Raises:
        OptxError: inf or nan, or see `check_numbers`; names it.
    """
    check_numbers(who, name, tensor)
    flat = tensor.detach().contiguous()
    e_max = exponent_of(largest(flat), who, name)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    pack_into(codes, flat, e_max)
    return Packed(codes, e_max, tensor.dtype)


def exponent_of(bits: int, who: str, name: str) -> int:
    """The e_max for a largest magnitude, given as a float32's bits.

    It is that of the largest code: 3/2 of a power of two is a multiple of this one, not of the next.

    Raises:
        OptxError: it is inf or nan.
    """
    if bits >= _NOT_FINITE:
        found = "nan" if bits > _NOT_FINITE else "inf"
        raise OptxError(f"{who}: {name} has {found} among its numbers; RF8 has finite ones only.")
    half, exponent = math.frexp(struct.unpack("f", struct.pack("i", bits))[0])
    if bits == 0:
        return 0
    return min(max(exponent - (2 * half < _TURNS), LOWEST), HIGHEST)


def round_tensor(tensor: Tensor, who: str = "quantise", name: str = "the tensor") -> Tensor:
    """The nearest numbers of RF8, with as many powers of two as the dtype has.

    Raises:
        OptxError: as `pack_tensor`.
    """
    check_numbers(who, name, tensor)
    flat = tensor.detach().contiguous()
    exponent_of(largest(flat), who, name)
    made = torch.empty_like(flat)
    _on(flat, lambda kernels, held: kernels.quantise(held[0], held[1]), [flat, made], made)
    return made


# ---- where the kernels are ------------------------------------------------------------------------------


def largest(flat: Tensor) -> int:
    """The bits of the largest magnitude, as a float32; 0 of no numbers.

    Args:
        flat: contiguous, of one of `SERVED`.
    """
    return _on(flat, lambda kernels, held: kernels.largest(held[0]), [flat]) if flat.numel() else 0


def pack_into(codes: Tensor, flat: Tensor, e_max: int) -> None:
    """Write the codes of finite numbers; both contiguous, on one device."""
    _on(flat, lambda kernels, held: kernels.pack(held[0], held[1], e_max), [flat, codes], codes)


def unpack_into(flat: Tensor, codes: Tensor, e_max: int) -> None:
    """Write the numbers of codes; ``flat`` contiguous, of one of `SERVED`, on the codes' device."""
    held = [codes.contiguous(), flat]
    _on(flat, lambda kernels, held: kernels.unpack(held[0], held[1], e_max), held, flat)


def _on(
    like: Tensor,
    run: Callable[[ModuleType, list[Tensor]], int],
    tensors: list[Tensor],
    to: Tensor | None = None,
) -> int:
    """Run kernels on tensors of one device; where it has none, on copies, and copy back what was written."""
    if not like.numel():
        return 0
    device = like.device.type
    if device == "cuda" and why_unavailable("triton") is None:
        from optx.kernels.rf8 import codes_triton

        return run(codes_triton, tensors)
    from optx.kernels.rf8 import cpu

    if device == "cpu":
        return run(cpu, tensors)
    copies = [t.cpu() for t in tensors]
    result = run(cpu, copies)
    if to is not None:
        to.copy_(copies[-1])
    return result
