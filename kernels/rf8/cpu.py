"""RF8 on CPU: packed, unpacked, rounded to, and multiplied with vectors as it is.

A number becomes a byte by integer arithmetic on a float32's bits, and a float again by one product
(`optx.kernels.rf8.layout`); both are written as instructions, so that LLVM has 32-bit lanes throughout. Work
is split over torch's threads (`optx.kernels.cpu`); the split never shows in the result.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false
# ruff: noqa: E402

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from enum import IntEnum
from types import ModuleType
from typing import Any

from optx.kernels.available import demand

demand("numba", "RF8 weights")  # before Numba's own imports fail in their ways

import numba.core.types as nt
import torch
from llvmlite import ir
from torch import Tensor

from optx.kernels import cpu
from optx.kernels.cpu import I8, I32, _at, _tag, _typed
from optx.kernels.generated import load_loops, source
from optx.kernels.rf8.layout import BIAS, GROWTH, LEVELS, TO_NEXT
from optx.kernels.rf8.vectors import whole_number

CHUNK = 1 << 15  # numbers that a thread takes
_PACKAGE = "optx.kernels.rf8"
F32 = ir.FloatType()


class Codes(IntEnum):
    """Positions in the argument block of `pack`, `unpack`, `quantise` and `largest`, in units of 8 bytes."""

    NEXT = 0  # atomic counter: the next chunk
    NUMEL = 1
    VALUES = 2  # address
    CODES = 3  # address of bytes; of `quantise`, of the rounded numbers
    E_MAX = 4
    LARGEST = 5  # address: int64, of each chunk


class Product(IntEnum):
    """Those of `multiply`."""

    NEXT = 0  # atomic counter: the next rows
    ROWS = 1
    STEP = 2  # rows of a turn
    COLUMNS = 3
    BATCH = 4
    CODES = 5  # address: (rows, columns)
    X = 6  # float32 (batch, columns)
    Y = 7  # float32 (batch, rows)
    E_MAX = 8


def largest(values: Tensor) -> int:
    """The bits of the largest magnitude, as a float32: inf and nan are above all others.

    Args:
        values: contiguous, on the CPU, float16, bfloat16 or float32.
    """
    found = torch.zeros(max(1, -(-values.numel() // CHUNK)), dtype=torch.int64)
    _run("largest", values, {Codes.LARGEST: found})
    return int(found.max())


def pack(values: Tensor, codes: Tensor, e_max: int) -> None:
    """The bytes of numbers, which must be finite.

    Args:
        values: see `largest`.
        codes: uint8, contiguous, of as many.
        e_max: the exponent of E = 15.
    """
    _run("pack", values, {Codes.CODES: codes, Codes.E_MAX: e_max})


def unpack(codes: Tensor, values: Tensor, e_max: int) -> None:
    """The numbers of bytes; see `pack`."""
    _run("unpack", values, {Codes.CODES: codes, Codes.E_MAX: e_max})


def quantise(values: Tensor, rounded: Tensor) -> None:
    """Finite numbers rounded to RF8's with any exponent; both of one dtype, see `largest`."""
    _run("quantise", values, {Codes.CODES: rounded})


def _run(name: str, values: Tensor, more: Mapping[Codes, int | Tensor]) -> None:
    module = _compiled("codes", DTYPE=str(values.dtype).removeprefix("torch."))
    places: dict[Any, int | Tensor] = {Codes.NUMEL: values.numel(), Codes.VALUES: values, **more}
    _call(module, name, Codes, places, values.numel() > 4 * CHUNK)


def multiply(codes: Tensor, x: Tensor, y: Tensor, e_max: int) -> None:
    """``y = x @ w.T`` for the w of bytes, decoded on the way to the sums.

    Args:
        codes: uint8 (rows, columns), contiguous, on the CPU.
        x: float32 (batch, columns), contiguous.
        y: float32 (batch, rows), contiguous.
        e_max: of the codes.
    """
    rows, columns = codes.shape
    places: dict[Any, int | Tensor] = {
        **{Product.ROWS: rows, Product.STEP: max(1, CHUNK // max(1, columns)), Product.COLUMNS: columns},
        **{Product.BATCH: len(x), Product.CODES: codes, Product.X: x, Product.Y: y, Product.E_MAX: e_max},
    }
    _call(_compiled("product"), "multiply", Product, places, codes.numel() * len(x) > 4 * CHUNK)


def _call(
    module: ModuleType, name: str, layout: type[IntEnum], values: Mapping[Any, int | Tensor], parallel: bool
) -> None:
    """Run a kernel with its argument block; tensors are given as their addresses."""
    plain = {at: value.data_ptr() if isinstance(value, Tensor) else value for at, value in values.items()}
    block = (ctypes.c_int64 * len(layout))(*(plain.get(at, 0) for at in range(len(layout))))
    cpu.run(vars(module)[name].address, ctypes.addressof(block), parallel)


@functools.cache
def _compiled(name: str, **dtypes: str) -> ModuleType:
    """The loops of one file, compiled, from the disk cache where they were before."""
    files = ("cpu.py", "layout.py", "vectors.py")
    imported = cpu.digest() + "".join(source(_PACKAGE, file) for file in files)
    return load_loops(f"rf8_{name}", _PACKAGE, f"{name}_loops.py", imported, **dtypes)


# ---- what the loops need --------------------------------------------------------------------------------


def _normal(b: Any, magnitude: Any) -> Any:
    """A float32's magnitude as exponent and 23 bits of mantissa, below the least normal one too.

    There the bits are the number of units of 2**-149, whose own float has the mantissa; the exponent may be
    negative then, and is of zero the least.
    """
    units = b.bitcast(b.sitofp(magnitude, F32), I32)
    return b.select(
        b.icmp_signed("<", magnitude, I32(1 << 23)), b.sub(units, I32(149 << 23)), magnitude, name="normal"
    )


@_typed(nt.int32, nt.float32)
def magnitude_bits(b: Any, value: Any) -> Any:
    """The bits of an absolute value, which order as the numbers do, with inf and nan above all."""
    return b.and_(b.bitcast(value, I32), I32(0x7FFFFFFF))


@_typed(nt.int32, nt.int32, nt.int32)
def larger(b: Any, one: Any, other: Any) -> Any:
    """The larger of two, in 32 bits."""
    return b.select(b.icmp_signed(">", one, other), one, other)


@_typed(nt.int32, nt.int64)
def lifted(b: Any, e_max: Any) -> Any:
    """An exponent far enough from both ends for what `encode` does, to which ``lift`` brings another."""
    e_max = b.trunc(e_max, I32)
    low, high = b.icmp_signed("<", e_max, I32(-60)), b.icmp_signed(">", e_max, I32(60))
    return b.select(low, b.add(e_max, I32(64)), b.select(high, b.sub(e_max, I32(64)), e_max))


@_typed(nt.float32, nt.int64, nt.int32)
def lift(b: Any, e_max: Any, to: Any) -> Any:
    """The power of two by which numbers are multiplied that have one exponent and shall have another."""
    return b.bitcast(b.shl(b.add(b.sub(to, b.trunc(e_max, I32)), I32(BIAS)), I32(23)), F32)


@_typed(nt.int32, nt.int32)
def first_number(b: Any, e_max: Any) -> Any:
    """8 times the exponent, as a float32 has it, that E = 0 stands for, less the number of multiplier 1."""
    return b.sub(b.mul(b.add(e_max, I32(BIAS - LEVELS)), I32(8)), I32(3))


@_typed(nt.int32, nt.int32)
def half_of_least(b: Any, e_max: Any) -> Any:
    """The bits of half of the smallest magnitude, 3/4 * 2**(e_max - 14)."""
    return b.add(b.shl(b.add(e_max, I32(BIAS - LEVELS - 1)), I32(23)), I32(1 << 22))


@_typed(nt.int32, nt.float32, nt.int32, nt.int32)
def encode(b: Any, value: Any, first: Any, half: Any) -> Any:
    """The byte of a number, from `first_number` and `half_of_least`, where all is far from float32's ends."""
    bits = b.bitcast(value, I32)
    magnitude = b.and_(bits, I32(0x7FFFFFFF))
    # With this added the exponent is that of the nearest power of two in log2.
    power = b.add(magnitude, I32(TO_NEXT))
    rest = b.fsub(b.bitcast(magnitude, F32), b.bitcast(b.and_(power, I32(-1 << 23)), F32))
    rest = b.bitcast(rest, I32)
    second = b.lshr(b.add(b.and_(rest, I32(0x7FFFFFFF)), I32(TO_NEXT)), I32(23))
    power = b.lshr(power, I32(23))
    steps = b.add(b.sub(second, power), I32(5))
    steps = b.select(b.icmp_signed(">", steps, I32(0)), steps, I32(0))
    # 3/4 of a power of two is 3/2 of the one below, whose code is one less.
    below = b.select(b.icmp_signed("==", steps, I32(3)), I32(-4), b.sub(I32(0), steps))
    steps = b.select(b.icmp_signed("<", rest, I32(0)), below, steps)
    number = b.add(b.sub(b.shl(power, I32(3)), first), steps)
    number = b.select(b.icmp_signed(">", number, I32(127)), I32(127), number)
    under = b.select(b.icmp_signed(">=", magnitude, half), I32(8), I32(0))
    number = b.select(b.icmp_signed("<", number, I32(8)), under, number)
    signed = b.or_(number, b.and_(b.lshr(bits, I32(24)), I32(0x80)))
    return b.select(b.icmp_signed("==", number, I32(0)), I32(0), signed)


@_typed(nt.void, nt.int64, nt.int64, nt.int32)
def put_code(b: Any, base: Any, index: Any, code: Any) -> None:
    """``((uint8*)base)[index] = code``."""
    _tag(b, b.store(b.trunc(code, I8), _at(b, base, index, I8)), 2)


@_typed(nt.float32, nt.int64, nt.int64)
def decode(b: Any, base: Any, index: Any) -> Any:
    """The number of a byte, in units of ``2**(e_max - 19)``: a whole one."""
    code = b.zext(_tag(b, b.load(_at(b, base, index, I8)), 2), I32)
    return b.sitofp(whole_number(b, code, I32), F32)


@_typed(nt.float32, nt.int64)
def unit(b: Any, e_max: Any) -> Any:
    """``2**(e_max - 19)``, which may be less than a normal float32."""
    exponent = b.add(b.trunc(e_max, I32), I32(BIAS - 19))
    normal = b.icmp_signed(">", exponent, I32(0))
    small = b.shl(I32(1), b.select(normal, I32(0), b.add(exponent, I32(22))))
    return b.bitcast(b.select(normal, b.shl(exponent, I32(23)), small), F32)


@_typed(nt.float32, nt.float32, nt.int32)
def rounded(b: Any, value: Any, most: Any) -> Any:
    """The number of RF8, with any exponent, for a finite one; ``most``: bits of the largest."""
    bits = b.bitcast(value, I32)
    magnitude = b.and_(bits, I32(0x7FFFFFFF))
    normal = _normal(b, magnitude)
    mantissa = b.and_(normal, I32(0x7FFFFF))
    grown = I32(0)
    for at, adds in GROWTH:
        grown = b.add(grown, b.select(b.icmp_signed(">=", mantissa, I32(at)), I32(adds), I32(0)))
    made = b.add(b.sub(magnitude, mantissa), grown)
    # Units of 2**-149 there; of zero the shift would be too large.
    lost = b.sub(I32(1), b.ashr(normal, I32(23)))
    lost = b.select(b.icmp_signed(">", lost, I32(24)), I32(24), lost)
    small = b.lshr(b.add(grown, I32(1 << 23)), b.and_(lost, I32(31)))
    made = b.select(b.icmp_signed("<", magnitude, I32(1 << 23)), small, made)
    made = b.select(b.icmp_signed(">", made, most), most, made)
    return b.bitcast(b.or_(made, b.and_(bits, I32(-(1 << 31)))), F32)


@_typed(nt.float32, nt.float32, nt.float32)
def within(b: Any, value: Any, most: Any) -> Any:
    """A number kept from ``-most`` to ``most``."""
    value = b.select(b.fcmp_ordered(">", value, most), most, value)
    least = b.fneg(most)
    return b.select(b.fcmp_ordered("<", value, least), least, value)


@_typed(nt.float32, nt.float32, nt.float32, nt.float32)
def add_product(b: Any, total: Any, x: Any, w: Any) -> Any:
    """``total + x * w`` that LLVM may regroup into lanes and fuse."""
    flags = ("reassoc", "nsz", "contract")
    return b.fadd(total, b.fmul(x, w, flags=flags), flags=flags)
