"""What a compiled CPU kernel needs beyond Numba: typed loads and stores that vectorise, and threads.

Loads and stores go through raw addresses. Each role (weight, gradient, first moment, ...) has an alias
scope of its own, so LLVM vectorises a loop over nine arrays without run-time overlap checks, of which it
would make at most eight comparisons before giving up.

Threads come from torch's own OpenMP runtime, reached through its C entry point: the pool that torch's
backward pass just used is warm, follows `torch.set_num_threads`, and is safe when two Python threads step
at once, none of which Numba's default layer is. Work is handed out chunk by chunk from an atomic counter;
every result has a place of its own, so the split over threads never shows in the numbers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba.core.types as nt
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from optx.kernels.generated import source

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LLVM = {
    **{"float32": ir.FloatType(), "float64": ir.DoubleType(), "float16": ir.HalfType(), "bfloat16": I16},
    **{"bool": I8, "uint8": I8, "int8": I8, "int16": I16, "int32": I32, "int64": I64},
}
ITEMSIZE = {
    **{"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2},
    **{"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8},
}
INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
WIDE = ("float64", "int32", "int64")  # read in float64
_ROLES = 32  # alias scopes made per module; roles that share one are taken to overlap


# ---- addresses, counters ----------------------------------------------------------------------------


def _at(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def _typed(result: Any, *args: Any) -> Callable[[Callable[..., Any]], Any]:
    """An intrinsic of a fixed signature from a function ``(builder, *llvm values) -> llvm value``."""

    def make(generate: Callable[..., Any]) -> Any:
        def typer() -> Any:
            def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
                value = generate(builder, *values)
                return context.get_dummy_value() if result is nt.void else value

            return result(*args), codegen

        return intrinsic(_ARITIES[len(args)](typer))

    return make


# Numba reads an intrinsic's arity off its signature.
_ARITIES: dict[int, Callable[[Callable[[], Any]], Callable[..., Any]]] = {
    1: lambda typer: lambda _context, a: typer(),
    2: lambda typer: lambda _context, a, b: typer(),
    3: lambda typer: lambda _context, a, b, c: typer(),
    4: lambda typer: lambda _context, a, b, c, d: typer(),
}


@_typed(nt.int64, nt.voidptr)
def address(builder: Any, pointer: Any) -> Any:
    """A ``void*`` as an integer."""
    return builder.ptrtoint(pointer, I64)


@_typed(nt.int64, nt.int64, nt.int64)
def get_i64(builder: Any, base: Any, index: Any) -> Any:
    """``((int64*)base)[index]``."""
    return builder.load(_at(builder, base, index, I64))


@_typed(nt.float64, nt.int64, nt.int64)
def get_f64(builder: Any, base: Any, index: Any) -> Any:
    """``((double*)base)[index]``."""
    return builder.load(_at(builder, base, index, _LLVM["float64"]))


@_typed(nt.void, nt.int64, nt.int64, nt.float64)
def put_f64(builder: Any, base: Any, index: Any, value: Any) -> None:
    """``((double*)base)[index] = value``."""
    builder.store(value, _at(builder, base, index, _LLVM["float64"]))


@_typed(nt.float64, nt.int64)
def get_f32(builder: Any, base: Any) -> Any:
    """``*(float*)base``, widened."""
    pointer = builder.inttoptr(base, _LLVM["float32"].as_pointer())
    return builder.fpext(builder.load(pointer), _LLVM["float64"])


@_typed(nt.void, nt.int64, nt.float64)
def put_f32(builder: Any, base: Any, value: Any) -> None:
    """``*(float*)base = value``."""
    builder.store(
        builder.fptrunc(value, _LLVM["float32"]), builder.inttoptr(base, _LLVM["float32"].as_pointer())
    )


@_typed(nt.int64, nt.int64)
def take(builder: Any, base: Any) -> Any:
    """Atomically take the next number from the counter at ``base``."""
    pointer = builder.inttoptr(base, I64.as_pointer())
    return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")


@_typed(nt.float64, nt.float64, nt.float64)
def add_any_order(builder: Any, total: Any, value: Any) -> Any:
    """``total + value`` that LLVM may regroup into lanes; which grouping is fixed at compile time."""
    return builder.fadd(total, value, flags=("reassoc", "nsz", "contract"))


@_typed(nt.float32, nt.float32, nt.float32)
def add_lanes(builder: Any, total: Any, value: Any) -> Any:
    """`add_any_order` in float32, for short runs."""
    return builder.fadd(total, value, flags=("reassoc", "nsz", "contract"))


# ---- elements ---------------------------------------------------------------------------------------


def _scopes(module: Any) -> list[tuple[Any, Any]]:
    """Per role, the metadata "is of this scope" and "overlaps none of the other scopes"."""
    if not hasattr(module, "optx_scopes"):
        domain = module.add_metadata(["optx"])
        scopes = [module.add_metadata([f"role{i}", domain]) for i in range(_ROLES)]
        module.optx_scopes = [
            (module.add_metadata([s]), module.add_metadata([o for o in scopes if o is not s])) for s in scopes
        ]
    return module.optx_scopes


def _tag(builder: Any, instruction: Any, role: int) -> Any:
    scope, others = _scopes(builder.module)[role % _ROLES]
    instruction.set_metadata("alias.scope", scope)
    instruction.set_metadata("noalias", others)
    return instruction


@functools.cache
def load(dtype: str, role: int) -> Any:
    """An intrinsic ``(address, index) -> float32`` (or float64) that loads one element of a role."""
    kind = _LLVM[dtype]
    out = nt.float64 if dtype in WIDE else nt.float32

    @_typed(out, nt.int64, nt.int64)
    def load_element(builder: Any, base: Any, index: Any) -> Any:
        value = _tag(builder, builder.load(_at(builder, base, index, kind)), role)
        value.align = ITEMSIZE[dtype]
        return _to_float(builder, value, dtype)

    return load_element


@functools.cache
def store(dtype: str, role: int, stochastic: bool = False) -> Any:
    """An intrinsic ``(address, index, value, random)`` that rounds and stores one element of a role.

    ``random`` is an int32 whose lower 16 bits decide a stochastic rounding to bfloat16; else unused.
    """
    kind = _LLVM[dtype]
    wide = nt.float64 if dtype in WIDE else nt.float32

    @_typed(nt.void, nt.int64, nt.int64, wide, nt.int32)
    def store_element(builder: Any, base: Any, index: Any, value: Any, random: Any) -> None:
        value = _from_float(builder, value, dtype, random if stochastic else None)
        instruction = _tag(builder, builder.store(value, _at(builder, base, index, kind)), role)
        instruction.align = ITEMSIZE[dtype]

    return store_element


@functools.cache
def get_number(dtype: str) -> Any:
    """An intrinsic ``(address) -> float64`` that reads one number."""
    kind = _LLVM[dtype]

    @_typed(nt.float64, nt.int64)
    def get(builder: Any, base: Any) -> Any:
        value = _to_float(builder, builder.load(_at(builder, base, I64(0), kind)), dtype)
        return value if dtype in WIDE else builder.fpext(value, _LLVM["float64"])

    return get


@functools.cache
def put_number(dtype: str) -> Any:
    """An intrinsic ``(address, value)`` that stores one float64, rounded to nearest or truncated."""
    kind = _LLVM[dtype]

    @_typed(nt.void, nt.int64, nt.float64)
    def put(builder: Any, base: Any, value: Any) -> None:
        value = value if dtype in WIDE else builder.fptrunc(value, _LLVM["float32"])
        builder.store(_from_float(builder, value, dtype, None), _at(builder, base, I64(0), kind))

    return put


def whole_number(dtype: str, wide: bool) -> Any:
    """An intrinsic ``(value) -> value``: what an integer slot makes of a float32 (or float64)."""
    return _whole_number(dtype, wide or dtype in WIDE)


@functools.cache
def _whole_number(dtype: str, wide: bool) -> Any:
    kind = nt.float64 if wide else nt.float32

    @_typed(kind, kind)
    def whole(builder: Any, value: Any) -> Any:
        kept = _to_float(builder, _from_float(builder, value, dtype, None), dtype)
        return builder.fpext(kept, _LLVM["float64"]) if wide and dtype not in WIDE else kept

    return whole


def _to_float(b: Any, value: Any, dtype: str) -> Any:
    """A stored number as a float32, or as a float64 where that takes one."""
    match dtype:
        case "bfloat16":  # a float32 whose lower half is missing
            return b.bitcast(b.shl(b.zext(value, I32), I32(16)), _LLVM["float32"])
        case "float16":
            return b.fpext(value, _LLVM["float32"])
        case "bool":
            return b.uitofp(b.icmp_unsigned("!=", value, I8(0)), _LLVM["float32"])
        case "uint8":
            return b.uitofp(value, _LLVM["float32"])
        case "int8" | "int16":
            return b.sitofp(value, _LLVM["float32"])
        case "int32" | "int64":
            return b.sitofp(value, _LLVM["float64"])
        case _:
            return value


def _from_float(b: Any, value: Any, dtype: str, random: Any) -> Any:
    """A float32 or float64 as it is stored: what torch's ``copy_`` makes of it, where no bits are drawn."""
    match dtype:
        case "bfloat16":
            return _round_bfloat16(b, value, random)
        case "float16":
            return b.fptrunc(value, _LLVM["float16"])
        case "bool":
            return b.zext(b.fcmp_unordered("!=", value, ir.Constant(value.type, 0.0)), I8)
        case "uint8" | "int8" | "int16":
            return b.trunc(b.fptosi(value, I32), _LLVM[dtype])
        case "int32" | "int64":
            return b.fptosi(value, _LLVM[dtype])
        case _:
            return value


# ---- bits -------------------------------------------------------------------------------------------

RUN = 128  # elements that a loop over packed bits takes at a time


@_typed(nt.int64, nt.int64)
def scratch(builder: Any, _size: Any) -> Any:
    """`RUN` bytes of the function's own, for `expand`; the argument is not looked at."""
    room = cgutils.alloca_once(builder, ir.ArrayType(I8, RUN))
    room.align = 64
    return builder.ptrtoint(room, I64)


def _expand(count: int) -> Any:
    """An intrinsic ``(bits, bytes)``: so many bytes of bits as 8 times as many bytes, 0 or not.

    Written as vectors, which every target has instructions for: each byte eight times, one bit of each.
    """
    few, many = ir.VectorType(I8, count), ir.VectorType(I8, 8 * count)
    lanes = ir.Constant(ir.VectorType(I32, 8 * count), [i // 8 for i in range(8 * count)])
    bit = ir.Constant(many, [1 << i % 8 for i in range(8 * count)])

    @_typed(nt.void, nt.int64, nt.int64)
    def expand(builder: Any, bits: Any, room: Any) -> None:
        held = builder.load(builder.inttoptr(bits, few.as_pointer()))
        held.align = 1
        spread = builder.shuffle_vector(held, ir.Constant(few, ir.Undefined), lanes)
        found = builder.icmp_unsigned("!=", builder.and_(spread, bit), ir.Constant(many, [0] * 8 * count))
        stored = builder.store(builder.sext(found, many), builder.inttoptr(room, many.as_pointer()))
        stored.align = 8

    return expand


expand_1 = _expand(1)
expand_4 = _expand(4)


@functools.cache
def prefetch(lines: int, write: bool) -> Any:
    """An intrinsic ``(address)`` that hints at so many cache lines from there that will be read, or written.

    An address beyond an array does no harm.
    """

    @_typed(nt.void, nt.int64)
    def hint(builder: Any, base: Any) -> None:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        first = builder.inttoptr(base, byte)
        for line in range(lines):  # keep them in all caches; data, not instructions
            builder.call(function, [builder.gep(first, [I64(64 * line)]), I32(int(write)), I32(3), I32(1)])

    return hint


def _round_bfloat16(b: Any, value: Any, random: Any) -> Any:
    """The upper half of a float32 after adding 16 random bits, or half a unit (ties to even).

    What is added carries an inf no further: its lower half is empty. A nan becomes none of the other
    numbers, and one whose payload sits in the lower half only stays a nan.
    """
    bits = b.bitcast(value, I32)
    if random is None:
        increment = b.add(I32(0x7FFF), b.and_(b.lshr(bits, I32(16)), I32(1)))
    else:
        increment = b.and_(random, I32(0xFFFF))
    is_nan = b.fcmp_unordered("uno", value, value)
    kept = b.select(is_nan, b.or_(bits, I32(0x00400000)), b.add(bits, increment))
    return b.trunc(b.lshr(kept, I32(16)), I16)


@_typed(nt.int32, nt.int64, nt.int64, nt.int64)
def random_bits(b: Any, index: Any, start: Any, key: Any) -> Any:
    """32 bits of the element ``start + index``, from a key: two rounds of a multiply-xorshift hash.

    Counter-based, so neither the chunk size nor the number of threads shows in the result. All that differs
    from lane to lane is 32 bits wide; what comes above 32 bits of ``start`` is the key's part. Elements are
    a multiple apart when the first round begins: of numbers that are next to each other two rounds leave a
    trace in differences. The key's halves go in before the first round and in the second, so that no key's
    numbers are another's a few elements on.
    """
    return drawn(b, b.add(b.trunc(index, I32), b.trunc(start, I32)), key, I32)


def drawn(b: Any, number: Any, key: Any, constant: Callable[[int], Any]) -> Any:
    """That of element numbers of 32 bits: of one, or of a vector whose constants ``constant`` makes."""
    first, second = b.trunc(key, I32), b.trunc(b.lshr(key, I64(32)), I32)
    if isinstance(number.type, ir.VectorType):
        first, second = (spread(b, half, number.type.count) for half in (first, second))
    x = b.add(b.mul(number, constant(_SPREAD)), first)
    x = b.mul(b.xor(x, b.lshr(x, constant(15))), constant(0xED5AD4BB - (1 << 32)))
    x = b.add(b.xor(x, b.lshr(x, constant(14))), second)
    x = b.mul(x, constant(0xAC4C1B51 - (1 << 32)))
    return b.xor(x, b.lshr(x, constant(15)))


def spread(b: Any, value: Any, count: int) -> Any:
    """A number in every lane of a vector."""
    none, lanes = ir.Constant(ir.VectorType(value.type, count), ir.Undefined), ir.VectorType(I32, count)
    return b.shuffle_vector(b.insert_element(none, value, I32(0)), none, ir.Constant(lanes, [0] * count))


_SPREAD = 0x9E3779B1 - (1 << 32)  # of 2**32 the golden section


@_typed(nt.int32, nt.int32)
def upper_half(b: Any, bits: Any) -> Any:
    """The other 16 random bits of a draw."""
    return b.lshr(bits, I32(16))


@_typed(nt.int64, nt.int64, nt.int64)
def mix(b: Any, key: Any, value: Any) -> Any:
    """A 64-bit key from two numbers (the finaliser of splitmix64)."""
    x = b.add(key, b.mul(value, I64(0x9E3779B97F4A7C15 - (1 << 64))))
    x = b.mul(b.xor(x, b.lshr(x, I64(30))), I64(0xBF58476D1CE4E5B9 - (1 << 64)))
    x = b.mul(b.xor(x, b.lshr(x, I64(27))), I64(0x94D049BB133111EB - (1 << 64)))
    return b.xor(x, b.lshr(x, I64(31)))


@functools.cache
def digest() -> str:
    """Changes when this file does: what is compiled of it is part of every kernel."""
    return hashlib.sha256(source("optx.kernels", "cpu.py").encode()).hexdigest()[:12]


# ---- threads ----------------------------------------------------------------------------------------

_forked = False


def _after_fork() -> None:
    # An OpenMP pool does not survive fork(): a child (a DataLoader worker) runs on its own thread only.
    global _forked
    _forked = True
    _python_pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _openmp() -> Any:
    """The fork entry point of the OpenMP runtime torch has loaded, or None (macOS, Windows)."""
    torch.get_num_threads()
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def _python_pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="optx")


def pool_name() -> str:
    """Which threads run the CPU kernels, in words."""
    if _forked:
        return "the calling thread (forked process)"
    return "torch's OpenMP pool" if _openmp() else "Python threads"


def run(kernel: int, args: int, parallel: bool) -> None:
    """Call a compiled kernel ``void(void*)`` at an address, on all of torch's threads or on this one.

    The kernel takes its work from an atomic counter in ``args`` until none is left, so it may be run by
    any number of threads. The GIL is released meanwhile.
    """
    threads = 1 if _forked or not parallel else torch.get_num_threads()
    if threads == 1:
        _prototype(kernel)(args)
    elif (openmp := _openmp()) is not None:
        openmp(kernel, args, threads, 0)
    else:
        call = _prototype(kernel)
        others = [_python_pool(threads - 1).submit(call, args) for _ in range(threads - 1)]
        call(args)
        for other in others:
            other.result()


@functools.cache
def _prototype(kernel: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)
