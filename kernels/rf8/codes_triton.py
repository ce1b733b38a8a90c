"""RF8's bytes in Triton: packed, unpacked, rounded to.

The arithmetic is that of `optx.kernels.rf8.cpu`, on the bits of a float32, and so the bytes are. A program
walks over a stretch of blocks.
"""
# Triton's language has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optx.kernels.rf8 import layout
from optx.kernels.triton_launch import AuditSpec, shown
from optx.kernels.triton_lib import LAUNCH, nearest, read

BLOCK, TURNS, WARPS = 4096, 8, 4
SMALL = 2048  # the block of what needs more registers
TO_NEXT = tl.constexpr(layout.TO_NEXT)
STEPS = tl.constexpr(layout.STEPS - (1 << 32))  # of 32 bits with a sign


@triton.jit
def encode(value, first, half, factor):
    """The bytes of float32 numbers; see `optx.kernels.rf8.cpu.encode`."""
    bits = (value * factor).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    power = magnitude + TO_NEXT
    nearest_power = (power & -0x800000).to(tl.float32, bitcast=True)
    rest = (magnitude.to(tl.float32, bitcast=True) - nearest_power).to(tl.int32, bitcast=True)
    second = ((rest & 0x7FFFFFFF) + TO_NEXT) >> 23
    power = power >> 23
    steps = tl.maximum(second - power + 5, 0)
    steps = tl.where(rest < 0, tl.where(steps == 3, -4, -steps), steps)
    number = tl.minimum(power * 8 - first + steps, 127)
    number = tl.where(number < 8, tl.where(magnitude >= half, 8, 0), number)
    code = tl.where(number == 0, 0, number | ((bits >> 24) & 0x80))
    return code.to(tl.uint8)


@triton.jit
def decode(code):
    """The numbers of bytes in units of ``2**(e_max - 19)``, float32."""
    code = code.to(tl.int32)
    exponent = (code >> 3) & 15
    steps = ((code & 0) + STEPS >> (code & 7) * 4) & 15
    size = tl.where(exponent == 0, 0, (steps + 12) << exponent)
    return tl.where(code >= 128, -size, size).to(tl.float32)


@triton.jit
def rounded(value, MOST: tl.constexpr, PLACES: tl.constexpr):
    """The numbers of RF8, with any exponent, for finite ones."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    small = magnitude < 0x800000
    units = magnitude.to(tl.float32).to(tl.int32, bitcast=True) - (149 << 23)
    normal = tl.where(small, units, magnitude)
    mantissa = normal & 0x7FFFFF
    grown = mantissa * 0
    for i in tl.static_range(7):
        grown += tl.where(mantissa >= PLACES[2 * i], PLACES[2 * i + 1], 0)
    lost = tl.minimum(1 - (normal >> 23), 24)
    made = tl.where(small, (grown + 0x800000) >> (lost & 31), magnitude - mantissa + grown)
    made = tl.minimum(made, MOST) | (bits & -0x80000000)
    return made.to(tl.float32, bitcast=True)


@triton.jit
def _put(p, value, mask):
    if p.dtype.element_ty == tl.uint16:  # bfloat16
        tl.store(p, nearest(value), mask)
    else:
        if p.dtype.element_ty == tl.float16:
            value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
        tl.store(p, value.to(p.dtype.element_ty), mask)


@triton.jit
def _block(
    source, to, at, mask, first, half, factor, KIND: tl.constexpr, MOST: tl.constexpr, PLACES: tl.constexpr
):
    if KIND == 0:
        tl.store(to + at, encode(read(source + at, mask, tl.float32), first, half, factor), mask)
    elif KIND == 1:
        _put(to + at, decode(tl.load(source + at, mask)) * factor, mask)
    else:
        _put(to + at, rounded(read(source + at, mask, tl.float32), MOST, PLACES), mask)


@triton.jit(do_not_specialize=["n", "first", "half"])
def codes_kernel(
    source,
    to,
    n,
    first,
    half,
    factor,
    KIND: tl.constexpr,
    MOST: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """KIND 0: numbers to bytes. 1: bytes to numbers. 2: numbers to rounded ones. A uint16 is a bfloat16."""
    begin = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    last = tl.minimum(begin + BLOCK * TURNS, n)
    full = begin + (last - begin) // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for start in range(begin, full, BLOCK):  # without a mask, which would narrow the accesses
        at = tl.multiple_of(start, BLOCK) + lane
        _block(source, to, at, None, first, half, factor, KIND, MOST, PLACES)
    if full < last:
        at = tl.multiple_of(full, BLOCK) + lane
        _block(source, to, at, at < n, first, half, factor, KIND, MOST, PLACES)


PLACES = tuple(number for pair in layout.GROWTH for number in pair)


def largest(values: Tensor) -> int:
    """The bits of the largest magnitude, as a float32; see `optx.kernels.rf8.cpu.largest`."""
    least, most = torch.aminmax(values)
    return int(torch.maximum(-least, most).float().view(torch.int32)) & 0x7FFFFFFF


def pack(values: Tensor, codes: Tensor, e_max: int) -> None:
    """The bytes of finite numbers; see `optx.kernels.rf8.cpu.pack`."""
    within = e_max + 64 if e_max < -60 else e_max - 64 if e_max > 60 else e_max
    first = 8 * (within + layout.BIAS - layout.LEVELS) - 3
    half = (within + layout.BIAS - layout.LEVELS - 1 << 23) + (1 << 22)
    _launch(values, codes, 0, first, half, 2.0 ** (within - e_max))


def unpack(codes: Tensor, values: Tensor, e_max: int) -> None:
    """The numbers of bytes; see `optx.kernels.rf8.cpu.unpack`."""
    _launch(codes, values, 1, 0, 0, 2.0 ** (e_max - 19))


def quantise(values: Tensor, rounded: Tensor) -> None:
    """Finite numbers rounded; see `optx.kernels.rf8.cpu.quantise`."""
    _launch(values, rounded, 2, 0, 0, 1.0)


def _launch(source: Tensor, to: Tensor, kind: int, first: int, half: int, factor: float) -> None:
    n = source.numel()
    if n == 0:
        return
    constants = _constants(kind, torch.float16 in (source.dtype, to.dtype))
    with torch.cuda.device_of(source):  # does nothing for the interpreter's CPU tensors
        codes_kernel[(triton.cdiv(n, constants["BLOCK"] * TURNS),)](
            *(shown(source), shown(to), n, first, half, factor),
            **constants,
            num_warps=WARPS,
            **LAUNCH,
        )


def _constants(kind: int, half: bool) -> dict[str, Any]:
    most = 0x47700000 if half else 0x7F700000
    return {
        "KIND": kind,
        "MOST": most,
        "PLACES": PLACES,
        "BLOCK": SMALL if kind == 2 else BLOCK,
        "TURNS": TURNS,
    }


def audit_specs() -> Iterator[AuditSpec]:
    """What `pack`, `unpack` and `quantise` launch."""
    for dtype, size in (("fp32", 4), ("fp16", 2), ("u16", 2)):
        for kind, name in enumerate(("pack", "unpack", "quantise")):
            source, to = ("*u8", f"*{dtype}") if kind == 1 else (f"*{dtype}", ("*u8", "", f"*{dtype}")[kind])
            constants = _constants(kind, dtype == "fp16")
            types = {"source": source, "to": to, "n": "i32", "first": "i32", "half": "i32", "factor": "fp32"}
            yield AuditSpec(
                f"{name} {'bf16' if dtype == 'u16' else dtype}",
                codes_kernel,
                types,
                constants,
                2 * size if kind == 2 else size + 1,
                WARPS,
            )
