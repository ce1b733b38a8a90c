"""Powers in loops over vectors: those of the C library are calls, one element at a time.

In float32 x^p = 2^(p log2 x) by polynomials, of instructions that every target has for vectors: 30 of them.
The logarithm is good to 3e-7, so that the power's relative error is 3e-7 (1 + |p log2 x|) at most.
"""
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numba.core.types as nt
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from optx.kernels.cpu import I32
from optx.kernels.generated import source

F32, F64 = ir.FloatType(), ir.DoubleType()

# log2(1 + t) / t for 1 + t from sqrt(1/2) to sqrt(2), and 2^t for t from -1/2 to 1/2, through Chebyshev's
# points; lowest powers first.
LOG2 = (
    1.4426950216293335,
    -0.7213529348373413,
    0.48091670870780945,
    -0.3602251708507538,
    0.2872888743877411,
    -0.24927182495594025,
    0.23265257477760315,
    -0.14275974035263062,
)
EXP2 = (
    1.0,
    0.6931471824645996,
    0.2402210682630539,
    0.055503569543361664,
    0.009676031768321991,
    0.0013390863314270973,
)

_ROOT = 0x3F3504F3  # the bits of sqrt(1/2)


@intrinsic
def fast_power(_context: Any, x: Any, exponent: Any) -> Any:
    """``x`` to the ``exponent``, for x above 0 and powers from 2^-125 to 2^127, outside of which it stays."""
    if x == nt.float32 and exponent == nt.float32:
        return x(x, exponent), _narrow
    return nt.float64(nt.float64, nt.float64), _wide


def _wide(_context: Any, b: Any, _signature: Any, values: Sequence[Any]) -> Any:
    kind = ir.FunctionType(F64, [F64, F64])
    power: Any = cgutils.get_or_insert_function(b.module, kind, "llvm.pow.f64")  # pyright: ignore
    return b.call(power, values)


def _narrow(_context: Any, b: Any, _signature: Any, values: Sequence[Any]) -> Any:
    x, exponent = values
    power = _exp2(b, b.fmul(exponent, _log2(b, x)))
    return b.select(b.fcmp_ordered(">=", x, F32(0.0)), power, F32(float("nan")))


def _log2(b: Any, x: Any) -> Any:
    """Of a normal number above 0: its exponent, and the logarithm of what is left, near 1."""
    bits = b.bitcast(x, I32)
    whole = b.ashr(b.sub(bits, I32(_ROOT)), I32(23))
    left = b.bitcast(b.sub(bits, b.shl(whole, I32(23))), F32)
    t = b.fsub(left, F32(1.0))
    return _fused(b, t, _polynomial(b, t, LOG2), b.sitofp(whole, F32))


def _exp2(b: Any, y: Any) -> Any:
    """The nearest whole number is added to the exponent's bits of what the rest makes."""
    y = b.select(b.fcmp_ordered("<", y, F32(127.0)), y, F32(127.0))
    y = b.select(b.fcmp_ordered(">", y, F32(-125.0)), y, F32(-125.0))
    moved = b.fadd(y, F32(_TO_WHOLE))
    rest = _polynomial(b, b.fsub(y, b.fsub(moved, F32(_TO_WHOLE))), EXP2)
    # All of its bits but the whole number's are shifted out.
    return b.bitcast(b.add(b.bitcast(rest, I32), b.shl(b.bitcast(moved, I32), I32(23))), F32)


_TO_WHOLE = 1.5 * 2.0**23  # beside it float32 has whole numbers only


def _polynomial(b: Any, t: Any, coefficients: Sequence[float]) -> Any:
    """Estrin's scheme: pairs, pairs of pairs, ..., so that few instructions wait for others."""
    values = [F32(one) for one in coefficients]
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [_fused(b, t, high, low) for low, high in pairs]
        t = b.fmul(t, t)
        if len(values) % 2 and len(values) > 1:
            values.append(F32(0.0))
    return values[0]


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


@functools.cache
def digest() -> str:
    """Changes when this file does."""
    return hashlib.sha256(source("optx.kernels", "cpu_powers.py").encode()).hexdigest()[:12]
