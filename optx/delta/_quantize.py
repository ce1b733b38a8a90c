"""A tensor as integer codes of a few levels, packed into bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optx._errors import OptxError, check_choice

Form = Literal["linear", "log", "tanh"]
_LARGEST_TANH = 15.0  # beyond it, float64's tanh is too near to 1 to be inverted


@dataclass(frozen=True)
class Coded:
    """One tensor in codes 0 .. levels - 1.

    Attributes:
        codes: packed, the first in a byte's lowest bits; uint8, flat.
        shape: of the tensor.
        levels: how many values there are.
        form: ``linear``: evenly spaced from ``low`` to ``high``. ``log``: the same for log2 of the magnitude,
            half of the codes for either sign. ``tanh``: the same for the tanh.
        low: the first level's value, in the form's own scale.
        high: the last one's.
    """

    codes: Tensor
    shape: tuple[int, ...]
    levels: int
    form: Form
    low: float
    high: float

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the two bounds, as float32."""
        return self.codes.numel() + 8

    def decode(self) -> Tensor:
        """The tensor, float32."""
        count = 1
        for size in self.shape:
            count *= size
        codes = _unpack(self.codes, _bits(self.levels), count).to(torch.float64)
        if self.form != "log":
            values = _values(codes, self.levels, self.low, self.high)
            return (values.atanh() if self.form == "tanh" else values).to(torch.float32).view(self.shape)
        half = self.levels // 2
        negative = codes >= half
        sizes = _values(codes - half * negative, half, self.low, self.high).exp2()
        return torch.where(negative, -sizes, sizes).to(torch.float32).view(self.shape)


def encode(tensor: Tensor, levels: int, form: Form) -> Coded:
    """The nearest level of each number; halves go to the even one.

    Raises:
        OptxError: levels out of range, or numbers that the form cannot hold.
    """
    check_quantize(levels, form)
    x, shape = tensor.detach().to("cpu", torch.float64).flatten(), tuple(tensor.shape)
    if not x.numel():
        return Coded(torch.empty(0, dtype=torch.uint8), shape, levels, form, 0.0, 0.0)
    if form == "log":
        return _encode_log(x, shape, levels)
    if form == "tanh" and x.abs().max() > _LARGEST_TANH:
        raise OptxError(
            f"quantize: form='tanh' holds numbers up to {_LARGEST_TANH}, and one is "
            f"{float(x.abs().max()):.3g}. Use form='linear'."
        )
    y = x.tanh() if form == "tanh" else x
    low, high = float(y.min()), float(y.max())
    return Coded(_pack(_codes(y, levels, low, high), _bits(levels)), shape, levels, form, low, high)


def check_quantize(levels: int, form: str) -> None:
    """Raise unless these can be stored."""
    check_choice("quantize", "form", form, ("linear", "log", "tanh"))
    least = 4 if form == "log" else 2  # log needs two magnitudes, with either sign
    if not least <= levels <= 256 or levels != int(levels):
        raise OptxError(f"quantize: levels is {levels!r}; for form={form!r} it must be {least} to 256.")
    if form == "log" and levels % 2:
        raise OptxError(f"quantize: levels is {levels}; form='log' needs an even number, half for each sign.")


def _encode_log(x: Tensor, shape: tuple[int, ...], levels: int) -> Coded:
    nonzero = x[x != 0]
    if not nonzero.numel():  # nothing but zeros: linear holds it exactly
        return encode(x.view(shape), levels, "linear")
    sizes = nonzero.abs().log2()
    low, high, half = float(sizes.min()), float(sizes.max()), levels // 2
    # A zero has no logarithm: it becomes the smallest magnitude.
    logs = x.abs().log2().clamp(low, high)
    codes = _codes(logs, half, low, high) + half * (x < 0).to(torch.uint8)
    return Coded(_pack(codes, _bits(levels)), shape, levels, "log", low, high)


def _codes(y: Tensor, levels: int, low: float, high: float) -> Tensor:
    if not high > low:
        return torch.zeros(y.numel(), dtype=torch.uint8)
    return ((y - low) / (high - low) * (levels - 1)).round_().to(torch.uint8)


def _values(codes: Tensor, levels: int, low: float, high: float) -> Tensor:
    return codes / (levels - 1) * (high - low) + low


def packed_bytes(count: int, levels: int) -> int:
    """Bytes that so many codes take."""
    return -(-count // (8 // _bits(levels)))


def _bits(levels: int) -> int:
    """Of a code: 1, 2, 4 or 8, so that none lies across two bytes."""
    return next(bits for bits in (1, 2, 4, 8) if levels <= 1 << bits)


def _pack(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    padded = torch.zeros(-(-codes.numel() // per_byte) * per_byte, dtype=torch.uint8)
    padded[: codes.numel()] = codes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (padded.view(-1, per_byte) << shifts).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).flatten()[:count]
