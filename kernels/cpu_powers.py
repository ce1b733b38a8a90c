"""Powers in loops over vectors: those of the C library are calls, one element at a time.

In float32 x^p = 2^(p log2 x) by polynomials, of instructions that every target has for vectors. The
logarithm is good to 1e-7, so that the power's relative error is 1e-7 (1 + |p log2 x|) at most.
"""

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
# points; highest powers first.
LOG2 = (
    -0.10749789327383041,
    0.18476033210754395,
    -0.19138838350772858,
    0.20485764741897583,
    -0.23960812389850616,
    0.28855255246162415,
    -0.36069655418395996,
    0.48089852929115295,
    -0.7213473320007324,
    1.4426950216293335,
)
EXP2 = (
    0.00015461444854736328,
    0.0013400427997112274,
    0.009618056938052177,
    0.05550327152013779,
    0.24022650718688965,
    0.6931471824645996,
    1.0,
)

_ROOT = 0x3F3504F3  # the bits of sqrt(1/2)


@intrinsic
def fast_power(_context: Any, x: Any, exponent: Any) -> Any:
    """``x`` to the ``exponent``: nan below 0; numbers under 1.2e-38 count as 0."""
    if x == nt.float32 and exponent == nt.float32:
        return x(x, exponent), _narrow
    return nt.float64(nt.float64, nt.float64), _wide


def _wide(_context: Any, b: Any, _signature: Any, values: Sequence[Any]) -> Any:
    kind = ir.FunctionType(F64, [F64, F64])
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.pow.f64"), values)


def _narrow(_context: Any, b: Any, _signature: Any, values: Sequence[Any]) -> Any:
    x, exponent = values
    log = _log2(b, x)
    log = b.select(b.fcmp_ordered("<", x, F32(2.0**-126)), F32(-1e30), log)
    log = b.select(b.fcmp_ordered("==", x, F32(float("inf"))), F32(1e30), log)
    return b.select(b.fcmp_ordered(">=", x, F32(0.0)), _exp2(b, b.fmul(exponent, log)), F32(float("nan")))


def _log2(b: Any, x: Any) -> Any:
    """Of a normal number above 0: its exponent, and the logarithm of what is left, near 1."""
    bits = b.bitcast(x, I32)
    whole = b.ashr(b.sub(bits, I32(_ROOT)), I32(23))
    left = b.bitcast(b.sub(bits, b.shl(whole, I32(23))), F32)
    t = b.fsub(left, F32(1.0))
    return b.fadd(b.fmul(t, _polynomial(b, t, LOG2)), b.sitofp(whole, F32))


def _exp2(b: Any, y: Any) -> Any:
    """The nearest whole number goes into the exponent's bits."""
    inside = b.select(b.fcmp_ordered("<", y, F32(127.5)), y, F32(127.5))
    inside = b.select(b.fcmp_ordered(">", inside, F32(-126.0)), inside, F32(-126.0))
    moved = b.fadd(inside, F32(_TO_WHOLE))
    whole = b.sub(b.bitcast(moved, I32), b.bitcast(F32(_TO_WHOLE), I32))
    size = b.bitcast(b.shl(b.add(whole, I32(127)), I32(23)), F32)
    made = b.fmul(size, _polynomial(b, b.fsub(inside, b.fsub(moved, F32(_TO_WHOLE))), EXP2))
    made = b.select(b.fcmp_ordered(">", y, F32(-126.0)), made, F32(0.0))
    return b.select(b.fcmp_ordered(">=", y, F32(127.5)), F32(float("inf")), made)


_TO_WHOLE = 1.5 * 2.0**23  # beside it float32 has whole numbers only


def _polynomial(b: Any, t: Any, coefficients: Sequence[float]) -> Any:
    """Horner's scheme, of which the lowest coefficient comes last."""
    value = F32(coefficients[0])
    for one in coefficients[1:]:
        value = b.fadd(b.fmul(value, t, flags=("contract",)), F32(one), flags=("contract",))
    return value


@functools.cache
def digest() -> str:
    """Changes when this file does."""
    return hashlib.sha256(source("optx.kernels", "cpu_powers.py").encode()).hexdigest()[:12]
