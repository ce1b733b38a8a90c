"""Shared weights in Triton: gathered, and gradients added up, in an order that nothing changes.

Hashes are computed where they are needed. A gather writes each weight once, and reads the array through the
caches. Sums of a fold are taken slot by slot over the segments in their order. Those of other mappings, whose
slots are anywhere, are taken by atomic additions of integers, 2^-40 of the largest term each, so that
their order does not show.
"""
# Triton's language has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optx.kernels.shared.mapping import Place
from optx.kernels.triton_launch import AuditSpec, shown
from optx.kernels.triton_lib import LAUNCH, nearest, read

BLOCK, TURNS, WARPS = 1024, 8, 4
_CODES = {"fold": 0, "hashed": 1, "roast": 2}
_BITS = 40


@triton.jit
def _mix(key, value):
    """splitmix64's finaliser of key + value * G."""
    x = (key + value * 0x9E3779B97F4A7C15).to(tl.uint64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _chosen(key, value, of):
    """One of ``of`` values, by the top 31 bits of a hash."""
    return ((_mix(key, value) >> 33).to(tl.int64) * of) >> 31


@triton.jit
def _slot(i, j, m, key, cols, MAPPING: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    """The slot of weight i of the long vector, weight j of its module."""
    if MAPPING == 0:
        q = i // m
        s = _chosen(key, q.to(tl.uint64), m) + i - q * m
        return tl.where(s >= m, s - m, s)
    if MAPPING == 1:
        return _chosen(key, i.to(tl.uint64), m)
    row = j // cols
    col = j - row * cols
    block = (row // TALL) * ((cols + WIDE - 1) // WIDE) + col // WIDE
    return _chosen(key, block.to(tl.uint64), m - TALL * WIDE + 1) + (row % TALL) * WIDE + col % WIDE


@triton.jit
def _signed(x, i, key, SIGNED: tl.constexpr):
    """x, or -x where the sign of weight i says so."""
    if not SIGNED:
        return x
    word = _mix(key, (i >> 6).to(tl.uint64))
    return tl.where(((word >> (i & 63).to(tl.uint64)) & 1) != 0, -x, x)


@triton.jit
def _keys(words):
    """The keys of slots and of signs: as tensors, since a launch would take a small one for another type."""
    return tl.load(words).to(tl.uint64), tl.load(words + 1).to(tl.uint64)


@triton.jit
def _gather_block(
    psi, weights, at, n, offset, m, keys, scale, cols, MASKED: tl.constexpr, SHAPE: tl.constexpr
):
    """Weights from ``at`` on, a multiple of the block; ``SHAPE`` is (mapping, tall, wide, block)."""
    slots_key, signs_key = keys
    j = at + tl.arange(0, SHAPE[3])
    mask = j < n if MASKED else None
    s = _slot(j + offset, j, m, slots_key, cols, SHAPE[0], SHAPE[1], SHAPE[2])
    value = _signed(tl.load(psi + s, mask) * scale, j + offset, signs_key, True)
    if weights.dtype.element_ty == tl.uint16:  # bfloat16
        tl.store(weights + j, nearest(value), mask)
    else:
        tl.store(weights + j, value.to(weights.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n", "offset", "m", "cols"])
def gather_kernel(
    psi,
    weights,
    words,
    n,
    offset,
    m,
    scale,
    cols,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Weights block by block; a uint16 is a bfloat16."""
    keys, factor = _keys(words), tl.load(scale).to(psi.dtype.element_ty)
    n, offset, m, cols = n.to(tl.int64), offset.to(tl.int64), m.to(tl.int64), cols.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    last = tl.minimum(first + BLOCK * TURNS, n)
    full = first + (last - first) // BLOCK * BLOCK
    for at in range(first, full, BLOCK):  # without a mask, which would narrow the accesses
        _gather_block(psi, weights, tl.multiple_of(at, BLOCK), n, offset, m, keys, factor, cols, False, SHAPE)
    if full < last:
        _gather_block(
            psi, weights, tl.multiple_of(full, BLOCK), n, offset, m, keys, factor, cols, True, SHAPE
        )


@triton.jit(do_not_specialize=["n", "offset", "m"])
def fold_sums_kernel(sums, grads, words, n, offset, m, scale, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Slots block by block, each over the segments in their order."""
    MATH: tl.constexpr = sums.dtype.element_ty
    slots_key, signs_key = _keys(words)
    factor = tl.load(scale).to(MATH)
    m, offset = m.to(tl.int64), offset.to(tl.int64)
    end = offset + n
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), MATH)
    first = offset // m
    for turn in range(0, (end + m - 1) // m - first):
        q = first + turn
        start = _chosen(slots_key, q.to(tl.uint64), m)
        i = q * m + tl.where(s >= start, s - start, s - start + m)
        there = (s < m) & (i >= offset) & (i < end)
        term = read(grads + (i - offset), there, MATH) * factor
        total += tl.where(there, _signed(term, i, signs_key, SIGNED), 0.0)
    tl.store(sums + s, total, s < m)


@triton.jit
def _sums_block(sums, grads, at, n, offset, m, keys, scale, cols, SIGNED: tl.constexpr, SHAPE: tl.constexpr):
    """Terms of the weights from ``at`` on."""
    slots_key, signs_key = keys
    j = at + tl.arange(0, SHAPE[3])
    s = _slot(j + offset, j, m, slots_key, cols, SHAPE[0], SHAPE[1], SHAPE[2])
    term = _signed(read(grads + j, j < n, tl.float64) * scale, j + offset, signs_key, SIGNED)
    tl.atomic_add(sums + s, tl.floor(term + 0.5).to(tl.int64), j < n)


@triton.jit(do_not_specialize=["n", "offset", "m", "cols"])
def any_sums_kernel(
    sums,
    grads,
    words,
    n,
    offset,
    m,
    scale,
    cols,
    SIGNED: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Terms as whole multiples of a unit, by which ``scale`` is divided; ``sums`` is int64."""
    keys, factor = _keys(words), tl.load(scale)
    n, offset, m, cols = n.to(tl.int64), offset.to(tl.int64), m.to(tl.int64), cols.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    for at in range(first, tl.minimum(first + BLOCK * TURNS, n), BLOCK):
        _sums_block(sums, grads, tl.multiple_of(at, BLOCK), n, offset, m, keys, factor, cols, SIGNED, SHAPE)


# ---- launches -------------------------------------------------------------------------------------------


def gather(psi: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """scale * sign * psi[slot], (numel,), rounded once.

    Args:
        psi: (m,), contiguous, float32 or float64.
        place: the module's.
        dtype: any float.
    """
    made = torch.empty(place.numel, dtype=dtype, device=psi.device)
    if place.numel:
        with torch.cuda.device_of(psi):  # does nothing for the interpreter's CPU tensors
            gather_kernel[(triton.cdiv(place.numel, BLOCK * TURNS),)](
                *(psi, shown(made), *_numbers(place, psi.device), place.cols, _shape(place)),
                BLOCK=BLOCK,
                TURNS=TURNS,
                num_warps=WARPS,
                **LAUNCH,
            )
    return made


def scatter(values: Tensor, place: Place, dtype: torch.dtype, signed: bool = True) -> Tensor:
    """Per slot the sum of scale * sign * value, (m,).

    Args:
        values: (numel,), contiguous, any float dtype.
        place: the module's.
        dtype: of the sums; float32 or float64.
        signed: False leaves signs out.
    """
    numbers, held = _numbers(place, values.device), shown(values)
    with torch.cuda.device_of(values):
        if place.mapping == "fold":
            made = torch.empty(place.slots, dtype=dtype, device=values.device)
            fold_sums_kernel[(triton.cdiv(place.slots, BLOCK),)](
                made, held, *numbers, signed, BLOCK, num_warps=WARPS, **LAUNCH
            )
            return made
        # 2^-40 of the largest term: below the rounding of any term, and room for 2^22 terms on a slot.
        largest = (values.abs().max().double() * abs(place.scale)).clamp_min(torch.finfo(torch.float64).tiny)
        unit = torch.exp2(_BITS - torch.ceil(torch.log2(largest)))
        whole = torch.zeros(place.slots, dtype=torch.int64, device=values.device)
        any_sums_kernel[(triton.cdiv(place.numel, BLOCK * TURNS),)](
            *(whole, held, *numbers[:-1], numbers[-1] * unit, place.cols, signed, _shape(place)),
            BLOCK=BLOCK,
            TURNS=TURNS,
            num_warps=WARPS,
            **LAUNCH,
        )
    return torch.where(largest.isfinite(), whole.double() / unit, largest * math.nan).to(dtype)


@functools.lru_cache(4096)
def _numbers(place: Place, device: torch.device) -> tuple[Any, ...]:
    """What a kernel is told of a module; made once, so that no call waits for a copy to the device."""
    keys = torch.tensor([place.slots_key, place.signs_key], device=device)
    scale = torch.tensor([place.scale], dtype=torch.float64, device=device)
    return keys, place.numel, place.offset, place.slots, scale


def _shape(place: Place) -> tuple[int, int, int, int]:
    return _CODES[place.mapping], place.tall, place.wide, BLOCK


def audit_specs() -> Iterator[AuditSpec]:
    """What `gather` and `scatter` launch. Rotations are by any number: of one side a load is of 32 bits."""
    plain = {"words": "*i64", **dict.fromkeys(("n", "offset", "m", "cols"), "i64"), "scale": "*fp64"}
    blocks = {"BLOCK": BLOCK, "TURNS": TURNS}
    for mapping, code in _CODES.items():
        for kind, size in (("fp32", 4), ("u16", 2)):
            constants = {"SHAPE": (code, 16, 16, BLOCK), **blocks}
            types = {"psi": "*fp32", "weights": f"*{kind}", **plain}
            yield AuditSpec(f"gather {mapping} {kind}", gather_kernel, types, constants, 4 + size, WARPS)
    types = {"sums": "*fp32", "grads": "*fp32", **plain}
    constants = {"SIGNED": True, "BLOCK": BLOCK}
    yield AuditSpec("sums fold", fold_sums_kernel, types, constants, 4, WARPS)
    types = {**types, "sums": "*i64"}
    constants = {"SIGNED": True, "SHAPE": (_CODES["hashed"], 16, 16, BLOCK), **blocks}
    yield AuditSpec("sums hashed", any_sums_kernel, types, constants, 4, WARPS)
