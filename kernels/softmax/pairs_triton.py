"""Softmax in two passes in Triton: rows that fit a program are read once, longer ones twice.

A long row is summed by one program or, where there are few rows, by several, whose pairs are merged after;
what is carried over a loop is a pair in each lane, so that lanes meet once, at its end. The functions
exported here are those of `optx.kernels.softmax.cpu`.
"""
# Triton's language has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from optx.kernels.softmax.layout import FIELDS, FLOAT32, FLOAT64
from optx.kernels.softmax.rows import math_dtype
from optx.kernels.triton_launch import AuditSpec, shown
from optx.kernels.triton_lib import LAUNCH, nearest, read

__all__ = ["audit_specs", "backward", "fold", "softmax", "spread"]

FITS = 1 << 14
"""Elements of a row that a program holds in its registers."""
BLOCK, WARPS = 2048, 4
TURNS = 8  # blocks of a program that writes
FEW = 256  # rows; of fewer long ones each is several programs'

_NARROW, _WIDE = tl.constexpr(tuple(FLOAT32)), tl.constexpr(tuple(FLOAT64))
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _numbers(MATH: tl.constexpr):
    """The constants of a dtype of arithmetic."""
    return _NARROW if MATH.is_fp32() else _WIDE


@triton.jit
def pair(x, MATH: tl.constexpr):
    """``e**x`` as (m, n); see `optx.kernels.softmax.layout`."""
    C: tl.constexpr = _numbers(MATH)
    # A number of this size has no fraction: what is added to it is rounded to a whole one.
    MOVED: tl.constexpr = 1.5 * 2.0 ** C[4]
    FLOOR: tl.constexpr = -1.3862943611198906 * C[6]
    x = tl.where(x < FLOOR, FLOOR, x)
    n = (x * C[0] + MOVED) - MOVED
    t = tl.fma(n, tl.full(x.shape, -C[1], MATH), x)
    t = tl.fma(n, tl.full(x.shape, -C[2], MATH), t)
    LAST: tl.constexpr = len(C[3]) - 1
    m = tl.full(x.shape, C[3][LAST], MATH)
    for i in tl.static_range(LAST):
        m = tl.fma(m, t, tl.full(x.shape, C[3][LAST - 1 - i], MATH))
    return m, n


@triton.jit
def power(n):
    """``2**n`` for whole numbers up to 0; 0 where that is below the least normal number."""
    C: tl.constexpr = _numbers(n.dtype)
    n = tl.maximum(n, -C[5] * 1.0) + C[5]
    if n.dtype == tl.float64:
        return (n.to(tl.int64) << 52).to(tl.float64, bitcast=True)
    else:
        return (n.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _add(m, n, x):
    """Pairs, and those of ``e**x`` added."""
    own, exponent = pair(x, m.dtype)
    top = tl.where(exponent > n, exponent, n)
    return m * power(n - top) + own * power(exponent - top), top


@triton.jit
def _read(x, k, mask, MATH: tl.constexpr):
    value = read(x + k, mask, MATH)
    if mask is not None:
        value = tl.where(mask, value, float("-inf"))
    return value


@triton.jit
def _write(p, value, mask):
    if p.dtype.element_ty == tl.uint16:  # bfloat16
        tl.store(p, nearest(value), mask)
    else:
        tl.store(p, value.to(p.dtype.element_ty), mask)


@triton.jit
def _fold(x, begin, end, shift, BLOCK: tl.constexpr, MATH: tl.constexpr):
    """The sum of ``e**(x - shift)`` as (m, n)."""
    C: tl.constexpr = _numbers(MATH)
    lane = tl.arange(0, BLOCK)
    m, n = tl.zeros((BLOCK,), MATH), tl.full((BLOCK,), -2.0 * C[6], MATH)
    full = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):  # without a mask, which would narrow the loads
        m, n = _add(m, n, _read(x, tl.multiple_of(start, BLOCK) + lane, None, MATH) - shift)
    if full < end:
        k = full + lane
        m, n = _add(m, n, _read(x, k, k < end, MATH) - shift)
    top = tl.max(n)
    return tl.sum(m * power(n - top)), top


@triton.jit
def small_kernel(x, y, sums, count, stride, BLOCK: tl.constexpr):
    """A row that fits: its largest entry is known before, so no power is above 1."""
    row = tl.program_id(0).to(tl.int64)
    MATH: tl.constexpr = sums.dtype.element_ty
    k = tl.arange(0, BLOCK)
    mask = k < count
    value = _read(x + row * stride, k, mask, MATH)
    shift = tl.max(value)
    m, n = pair(tl.where(mask, value - shift, float("-inf")), MATH)
    e = m * power(n)
    total = tl.sum(e)
    tl.store(sums + row * _FIELDS, total)
    tl.store(sums + row * _FIELDS + 1, 0.0)
    wrong = tl.sum((value != value).to(tl.int32)) > 0
    tl.store(sums + row * _FIELDS + 2, tl.where(wrong, float("nan"), shift))
    if y is not None:
        _write(y + row * count + k, e / total, mask)


@triton.jit
def fold_kernel(x, parts, count, stride, piece, BLOCK: tl.constexpr):
    """The pair of a piece; ``piece`` is a multiple of the block."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    MATH: tl.constexpr = parts.dtype.element_ty
    begin = number * piece
    zero = tl.zeros((), MATH)
    m, n = _fold(x + row * stride, begin, tl.minimum(begin + piece, count), zero, BLOCK, MATH)
    at = parts + 2 * (row * tl.num_programs(1) + number)
    tl.store(at, m)
    tl.store(at + 1, n)


@triton.jit
def merge_kernel(x, parts, sums, count, stride, pieces, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a row's pairs; beyond the range it is read again, less its largest entry."""
    row = tl.program_id(0).to(tl.int64)
    MATH: tl.constexpr = sums.dtype.element_ty
    C: tl.constexpr = _numbers(MATH)
    lane = tl.arange(0, LANES)
    at = parts + 2 * (row * pieces + lane)
    own = tl.load(at, lane < pieces, other=0.0)
    exponent = tl.load(at + 1, lane < pieces, other=-2.0 * C[6])
    n = tl.max(exponent)
    m = tl.sum(own * power(exponent - n))
    shift = tl.zeros((), MATH)
    if not ((n <= C[6]) & (n >= -C[6])):
        x += row * stride
        k = tl.arange(0, BLOCK)
        top = tl.full((BLOCK,), float("-inf"), MATH)
        for start in range(0, count, BLOCK):
            value = _read(x, start + k, start + k < count, MATH)
            top = tl.where((value > top) | (value != value), value, top)
        wrong = tl.sum((top != top).to(tl.int32)) > 0
        shift = tl.where(wrong, float("nan"), tl.max(top))
        m, n = _fold(x, 0, count, shift, BLOCK, MATH)
    tl.store(sums + row * _FIELDS, m)
    tl.store(sums + row * _FIELDS + 1, n)
    tl.store(sums + row * _FIELDS + 2, shift)


@triton.jit
def _write_block(y, x, k, mask, shift, scale, n, label, lone, MATH: tl.constexpr):
    m, own = pair(_read(x, k, mask, MATH) - shift, MATH)
    value = m * scale * power(own - n)
    if lone is not None:
        value = tl.where(k == label, value - lone, value)
    _write(y + k, tl.where(scale == 0.0, 0.0, value), mask)


@triton.jit
def write_kernel(
    x, y, sums, scales, labels, lone, count, stride, BLOCK: tl.constexpr, TURNS: tl.constexpr
):  # fmt: skip
    """Some blocks of a row: scale p, less a number at the label."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    MATH: tl.constexpr = sums.dtype.element_ty
    m, n = tl.load(sums + row * _FIELDS), tl.load(sums + row * _FIELDS + 1)
    shift = tl.load(sums + row * _FIELDS + 2)
    scale = 1.0 / m
    if scales is not None:
        given = tl.load(scales + row)
        scale = tl.where(given == 0.0, 0.0, given * scale)
    label = tl.full((), -1, tl.int64)
    off = None
    if labels is not None:
        label = tl.load(labels + row)
        off = tl.load(lone + row)
    x += row * stride
    y += row * count
    lane = tl.arange(0, BLOCK)
    begin = number * (BLOCK * TURNS)
    end = tl.minimum(begin + BLOCK * TURNS, count)
    full = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        k = tl.multiple_of(start, BLOCK) + lane
        _write_block(y, x, k, None, shift, scale, n, label, off, MATH)
    if full < end:
        k = full + lane
        _write_block(y, x, k, k < end, shift, scale, n, label, off, MATH)


@triton.jit
def small_backward_kernel(grad, y, x, count, stride, grad_stride, BLOCK: tl.constexpr, MATH: tl.constexpr):
    """The gradient of a row that fits."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < count
    own = tl.where(mask, read(y + row * stride + k, mask, MATH), 0.0)
    given = tl.where(mask, read(grad + row * grad_stride + k, mask, MATH), 0.0)
    _write(x + row * count + k, own * (given - tl.sum(own * given)), mask)


@triton.jit
def dot_kernel(grad, y, parts, count, stride, grad_stride, piece, BLOCK: tl.constexpr):
    """The sum of a piece's products; ``piece`` is a multiple of the block."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    MATH: tl.constexpr = parts.dtype.element_ty
    y += row * stride
    grad += row * grad_stride
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), MATH)
    begin = number * piece
    end = tl.minimum(begin + piece, count)
    full = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        k = tl.multiple_of(start, BLOCK) + lane
        total += read(y + k, None, MATH) * read(grad + k, None, MATH)
    if full < end:
        k = full + lane
        total += tl.where(k < end, read(y + k, k < end, MATH) * read(grad + k, k < end, MATH), 0.0)
    tl.store(parts + row * tl.num_programs(1) + number, tl.sum(total))


@triton.jit
def backward_kernel(
    grad, y, x, parts, count, stride, grad_stride, pieces, length,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient at some blocks of a row, ``length`` long together."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    MATH: tl.constexpr = parts.dtype.element_ty
    at = tl.arange(0, LANES)
    total = tl.sum(tl.load(parts + row * pieces + at, at < pieces, other=0.0))
    y += row * stride
    grad += row * grad_stride
    x += row * count
    lane = tl.arange(0, BLOCK)
    begin = number * length
    end = tl.minimum(begin + length, count)
    full = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        k = tl.multiple_of(start, BLOCK) + lane
        _write(x + k, read(y + k, None, MATH) * (read(grad + k, None, MATH) - total), None)
    if full < end:
        k = full + lane
        _write(x + k, read(y + k, k < end, MATH) * (read(grad + k, k < end, MATH) - total), k < end)


def softmax(x: Tensor) -> Tensor:
    """Softmax of each row; see `optx.kernels.softmax.cpu.softmax`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = _summed(x, y)
    if x.shape[1] > FITS:
        _launch_write(x, y, sums, None, None, None)
    return y


def fold(x: Tensor) -> Tensor:
    """Each row's sum of exponentials as (m, n, shift); see `optx.kernels.softmax.cpu.fold`."""
    return _summed(x, None)


def spread(x: Tensor, sums: Tensor, scale: Tensor, labels: Tensor | None, lone: Tensor | None) -> Tensor:
    """``scale softmax(x)``, less ``lone`` at labels; see `optx.kernels.softmax.cpu.spread`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_write(x, y, sums.contiguous(), scale, labels, lone)
    return y


def backward(grad: Tensor, y: Tensor) -> Tensor:
    """Softmax's gradient, from that of its result; see `optx.kernels.softmax.cpu.backward`."""
    x = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    rows, count = y.shape
    if rows == 0:
        return x
    numbers = (count, y.stride(0), grad.stride(0))
    given = (shown(grad), shown(y))
    with torch.cuda.device_of(y):  # does nothing for the interpreter's CPU tensors
        if count <= FITS:
            block, warps = _fitting(count)
            math = tl.float64 if y.dtype == torch.float64 else tl.float32
            small_backward_kernel[(rows,)](
                *given, shown(x), *numbers, BLOCK=block, MATH=math, num_warps=warps, **LAUNCH
            )
            return x
        piece, pieces = _pieces(rows, count)
        parts = torch.empty(rows, pieces, dtype=math_dtype(y.dtype), device=y.device)
        dot_kernel[(rows, pieces)](*given, parts, *numbers, piece, BLOCK=BLOCK, num_warps=WARPS, **LAUNCH)
        backward_kernel[(rows, triton.cdiv(count, BLOCK * TURNS))](
            *given,
            shown(x),
            parts,
            *numbers,
            pieces,
            BLOCK * TURNS,
            LANES=triton.next_power_of_2(pieces),
            BLOCK=BLOCK,
            num_warps=WARPS,
            **LAUNCH,
        )
    return x


def _summed(x: Tensor, y: Tensor | None) -> Tensor:
    """The rows' sums; rows that fit are written to ``y`` too."""
    rows, count = x.shape
    sums = torch.empty(rows, FIELDS, dtype=math_dtype(x.dtype), device=x.device)
    if rows == 0:
        return sums
    numbers = (count, x.stride(0))
    with torch.cuda.device_of(x):
        if count <= FITS:
            block, warps = _fitting(count)
            to = None if y is None else shown(y)
            small_kernel[(rows,)](shown(x), to, sums, *numbers, BLOCK=block, num_warps=warps, **LAUNCH)
            return sums
        piece, pieces = _pieces(rows, count)
        parts = torch.empty(rows, pieces, 2, dtype=sums.dtype, device=x.device)
        fold_kernel[(rows, pieces)](shown(x), parts, *numbers, piece, BLOCK=BLOCK, num_warps=WARPS, **LAUNCH)
        lanes = triton.next_power_of_2(pieces)
        merge_kernel[(rows,)](
            shown(x), parts, sums, *numbers, pieces, LANES=lanes, BLOCK=BLOCK, num_warps=WARPS, **LAUNCH
        )
    return sums


def _launch_write(
    x: Tensor, y: Tensor, sums: Tensor, scale: Tensor | None, labels: Tensor | None, lone: Tensor | None
) -> None:
    rows, count = x.shape
    if rows == 0:
        return
    with torch.cuda.device_of(x):
        write_kernel[(rows, triton.cdiv(count, BLOCK * TURNS))](
            *(shown(x), shown(y), sums, scale, labels, None if labels is None else lone),
            *(count, x.stride(0)),
            BLOCK=BLOCK,
            TURNS=TURNS,
            num_warps=WARPS,
            **LAUNCH,
        )


def _fitting(count: int) -> tuple[int, int]:
    """Block and warps of a row that fits: 32 elements a thread in the widest case."""
    block = triton.next_power_of_2(count)
    return block, min(16, max(1, block // 1024))


def _pieces(rows: int, count: int) -> tuple[int, int]:
    """How long a piece of a row is, and how many there are: as many programs as keep a device busy."""
    wanted = 1 if rows >= FEW else -(-2 * FEW // rows)
    piece = -(-triton.cdiv(count, wanted) // BLOCK) * BLOCK
    return piece, triton.cdiv(count, piece)


def audit_specs() -> Iterator[AuditSpec]:
    """The kernels as launched for aligned rows, in the dtypes that matter."""
    for dtype, size in (("fp32", 4), ("u16", 2)):
        name = "bf16" if dtype == "u16" else dtype
        pointers = dict.fromkeys(("x", "y", "grad"), f"*{dtype}")
        pointers |= dict.fromkeys(("sums", "parts", "scales", "lone"), "*fp32")
        numbers = dict.fromkeys(("count", "stride", "grad_stride", "piece", "pieces", "length"), "i32")
        types = {**pointers, **numbers, "labels": "*i64"}
        none = {"scales": None, "labels": None, "lone": None}
        block, warps = _fitting(8192)
        for kernel, constants, moved, own in (
            (small_kernel, {"BLOCK": block}, 2 * size, warps),
            (fold_kernel, {"BLOCK": BLOCK}, size, WARPS),
            (write_kernel, {**none, "BLOCK": BLOCK, "TURNS": TURNS}, 2 * size, WARPS),
            (write_kernel, {"BLOCK": BLOCK, "TURNS": TURNS}, 2 * size, WARPS),
            (small_backward_kernel, {"BLOCK": block, "MATH": tl.float32}, 3 * size, warps),
            (dot_kernel, {"BLOCK": BLOCK}, 2 * size, WARPS),
            (backward_kernel, {"LANES": 512, "BLOCK": BLOCK}, 3 * size, WARPS),
            (merge_kernel, {"LANES": 512, "BLOCK": BLOCK}, size, WARPS),
        ):
            said = kernel.__name__.removesuffix("_kernel").replace("_", " ")
            spread = " with labels" if kernel is write_kernel and "labels" not in constants else ""
            yield AuditSpec(
                f"softmax2 {said}{spread} {name}",
                kernel,
                types,
                constants,
                moved,
                own,
                multiples=("count", "stride", "grad_stride", "piece", "length"),
            )
