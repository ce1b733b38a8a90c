"""Softplus attention in Triton: tiles of rows and keys, of which none of L x L numbers is ever made.

A program of the forward pass has some rows and goes over their keys twice: for the sum D of softplus, and for
b and what it weighs, where the largest u so far is carried along and what was summed is rescaled by
(old / new)^p when it grows. LSSA needs the first of these alone. Backward, one kernel goes over a row's keys
twice (for the sum that the first division hands back, and for the query's gradient), another over a key's
rows. Formulas are those of `softplus_rows` and `softplus_blocks`; queries and keys stay as they are, and come
with the factors that give them length 1 (for queries times ln d ln N), so that products are of the tensors'
own dtype and summed in float32.
"""
# Triton's language has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optx.kernels.attention import softplus_rows as reference
from optx.kernels.attention.softplus_rows import Options, through_length
from optx.kernels.triton_launch import AuditSpec
from optx.kernels.triton_lib import LAUNCH

__all__ = ["audit_specs", "backward", "forward"]

# Rows and keys of a tile, by what walks and the bytes of an element: as large as registers hold.
TILES = {("keys", 2): (64, 32), ("rows", 2): (32, 16), ("keys", 4): (16, 32), ("rows", 4): (32, 16)}
WARPS = 4


@triton.jit
def _power(x, POWER: tl.constexpr):
    """x^POWER for x >= 0; 0^0 is 1."""
    if POWER == 0.0:
        return tl.full(x.shape, 1.0, tl.float32)
    elif POWER == 1.0:
        return x
    else:
        return tl.where(x > 0.0, tl.exp2(POWER * tl.log2(tl.maximum(x, 1e-38))), 0.0)


@triton.jit
def _scores(q, k, row_scale, key_scale, PRECISION: tl.constexpr):
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) * row_scale[:, None] * key_scale[None, :]


@triton.jit
def _softplus(s):
    e = tl.exp(-tl.abs(s))  # log(1 + e) loses a small e, whose series has it
    return tl.maximum(s, 0.0) + tl.where(e < 1e-3, e * (1.0 - 0.5 * e), tl.log(1.0 + e))


@triton.jit
def _seen(mask, row, key, rows, keys, row_step, key_step, CAUSAL: tl.constexpr):
    inside = (row[:, None] < rows) & (key[None, :] < keys)
    if CAUSAL:
        inside = inside & (key[None, :] <= row[:, None])
    if mask is not None:
        place = row[:, None].to(tl.int64) * row_step + key[None, :] * key_step
        inside = inside & (tl.load(mask + place, inside, 0) != 0)
    return inside


@triton.jit
def _kept(seed, at, row, key, keys, DROPOUT: tl.constexpr):
    """What dropout multiplies weights with."""
    place = (at + row.to(tl.int64))[:, None] * keys + key[None, :]
    return tl.where(tl.rand(tl.load(seed), place) >= DROPOUT, 1.0 / (1.0 - DROPOUT), 0.0)


@triton.jit
def _tile(x, at, number, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``at`` to ``at + ROWS`` of (number, width); 0 outside."""
    row, column = at + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row[:, None] < number) & (column[None, :] < width)
    return tl.load(x + row[:, None].to(tl.int64) * width + column[None, :], inside, 0.0)


@triton.jit
def _put(x, tile, at, number, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column = at + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row[:, None] < number) & (column[None, :] < width)
    place = x + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(place, tile.to(x.dtype.element_ty), inside)


@triton.jit
def _shares(a, factor, offset):
    """u / max u, from softplus, N / (D max) and O / max."""
    return tl.maximum(a * factor[:, None] - offset[:, None], 0.0)


@triton.jit
def forward_kernel(
    q, k, v, row_scale, key_scale, counts, limit, mask, seed, out, stats,
    heads, groups, rows, keys, width, depth, total_rows, batch_step, head_step, row_step, key_step,
    POWER: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Some rows of one head; ``stats`` gets D, the largest u (0: the row is LSSA's) and the sum of b."""
    head = tl.program_id(1).to(tl.int64)
    own = head // heads * (heads // groups) + head % heads // groups
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    here = row < rows
    q += head * rows * width
    k += own * keys * width
    v += own * keys * depth
    key_scale += own * keys
    at = head * rows
    if mask is not None:
        mask += head // heads * batch_step + head % heads * head_step
    scale = tl.load(row_scale + at + row, here, 0.0)
    n = tl.load(counts + at + row, here, 1.0)
    query = _tile(q, first, rows, width, ROWS, WIDTH)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    plain = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        s = _scores(
            query,
            _tile(k, start, keys, width, KEYS, WIDTH),
            scale,
            tl.load(key_scale + key, key < keys, 0.0),
            PRECISION,
        )
        a = tl.where(_seen(mask, row, key, rows, keys, row_step, key_step, CAUSAL), _softplus(s), 0.0)
        total += tl.sum(a, 1)
        if seed is not None:
            a *= _kept(seed, at, row, key, keys, DROPOUT)
        value = _tile(v, start, keys, depth, KEYS, DEPTH)
        plain += tl.dot(a.to(value.dtype), value, input_precision=PRECISION)
    total = tl.maximum(total, 1e-37)
    found = plain / total[:, None]
    tl.store(stats + at + row, total, here)
    if POWER > 0.0:
        factor, offset = n / total, tl.where(n > FEW, 1.0, 0.0)
        most = tl.zeros((ROWS,), tl.float32)
        norm = tl.zeros((ROWS,), tl.float32)
        sharp = tl.zeros((ROWS, DEPTH), tl.float32)
        for start in range(0, end, KEYS):
            key = start + tl.arange(0, KEYS)
            s = _scores(
                query,
                _tile(k, start, keys, width, KEYS, WIDTH),
                scale,
                tl.load(key_scale + key, key < keys, 0.0),
                PRECISION,
            )
            a = tl.where(_seen(mask, row, key, rows, keys, row_step, key_step, CAUSAL), _softplus(s), 0.0)
            u = _shares(a, factor, offset)
            larger = tl.maximum(most, tl.max(u, 1))
            safe = tl.where(larger > 0.0, larger, 1.0)
            again = _power(most / safe, POWER)
            b = _power(u / safe[:, None], POWER)
            norm = norm * again + tl.sum(b, 1)
            if seed is not None:
                b *= _kept(seed, at, row, key, keys, DROPOUT)
            value = _tile(v, start, keys, depth, KEYS, DEPTH)
            sharp = sharp * again[:, None] + tl.dot(b.to(value.dtype), value, input_precision=PRECISION)
            most = larger
        flat = most <= tl.load(limit + at + row, here, 1.0)
        found = tl.where(flat[:, None], found, sharp / tl.maximum(norm, 1e-37)[:, None])
        tl.store(stats + total_rows + at + row, tl.where(flat, 0.0, most), here)
        tl.store(stats + 2 * total_rows + at + row, tl.where(flat, 1.0, norm), here)
    _put(out + at * depth, found, first, rows, depth, ROWS, DEPTH)


@triton.jit
def _slope(a, change, delta, total, most, norm, n, POWER: tl.constexpr, FEW: tl.constexpr):
    """w, the gradient of u, and of a / D in LSSA's rows, from softplus and the gradient of w."""
    less = change - delta[:, None]
    w, even = a / total[:, None], less / total[:, None]
    sharp = tl.zeros_like(w)
    if POWER > 0.0:
        flat = most == 0.0
        top = tl.where(flat, 1.0, most)
        u = _shares(a, n / (total * top), tl.where(n > FEW, 1.0, 0.0) / top)
        lower = tl.where(u > 0.0, _power(tl.where(u > 0.0, u, 1.0), POWER - 1.0), 0.0)
        w = tl.where(flat[:, None], w, lower * u / norm[:, None])
        sharp = tl.where(flat[:, None], 0.0, less * lower * (POWER / (top * norm))[:, None])
    return w, sharp, even


@triton.jit
def _rise(s, sharp, even, both, total, most, n, POWER: tl.constexpr, FEW: tl.constexpr):
    """The gradient of scores; ``both`` is the sum of u's gradients."""
    change = even
    if POWER > 0.0:
        back = tl.where(n > FEW, both / n, 0.0)
        change = tl.where((most == 0.0)[:, None], even, (sharp - back[:, None]) * (n / total)[:, None])
    e = tl.exp(-tl.abs(s))
    return change * tl.where(s >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def rows_kernel(
    q, k, v, row_scale, key_scale, counts, mask, seed, stats, grad, delta, both, result,
    heads, groups, rows, keys, width, depth, total_rows, batch_step, head_step, row_step, key_step,
    POWER: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The gradient of some rows of one head's unit queries; ``both`` gets the sums of u's gradients."""
    head = tl.program_id(1).to(tl.int64)
    own = head // heads * (heads // groups) + head % heads // groups
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    here = row < rows
    k += own * keys * width
    v += own * keys * depth
    key_scale += own * keys
    at = head * rows
    if mask is not None:
        mask += head // heads * batch_step + head % heads * head_step
    scale = tl.load(row_scale + at + row, here, 0.0)
    n = tl.load(counts + at + row, here, 1.0)
    total = tl.load(stats + at + row, here, 1.0)
    most = tl.load(stats + total_rows + at + row, here, 0.0)
    norm = tl.load(stats + 2 * total_rows + at + row, here, 1.0)
    less = tl.load(delta + at + row, here, 0.0)
    query = _tile(q + at * width, first, rows, width, ROWS, WIDTH)
    above = _tile(grad + at * depth, first, rows, depth, ROWS, DEPTH)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + ROWS)
    summed = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    for turn in tl.static_range(2):  # pyright: ignore
        if turn == 1 or POWER > 0.0:
            for start in range(0, end, KEYS):
                key = start + tl.arange(0, KEYS)
                unit = tl.load(key_scale + key, key < keys, 0.0)
                keyed = _tile(k, start, keys, width, KEYS, WIDTH)
                s = _scores(query, keyed, scale, unit, PRECISION)
                inside = _seen(mask, row, key, rows, keys, row_step, key_step, CAUSAL)
                a = tl.where(inside, _softplus(s), 0.0)
                value = _tile(v, start, keys, depth, KEYS, DEPTH)
                change = tl.dot(above, tl.trans(value), input_precision=PRECISION)
                if seed is not None:
                    change *= _kept(seed, at, row, key, keys, DROPOUT)
                _, sharp, even = _slope(a, change, less, total, most, norm, n, POWER, FEW)
                if turn == 0:
                    summed += tl.sum(sharp, 1)
                else:
                    rise = _rise(s, sharp, even, summed, total, most, n, POWER, FEW)
                    rise = tl.where(inside, rise, 0.0) * unit[None, :]
                    found += tl.dot(rise.to(keyed.dtype), keyed, input_precision=PRECISION)
    tl.store(both + at + row, summed, here)
    _put(result + at * width, found, first, rows, width, ROWS, WIDTH)


@triton.jit
def keys_kernel(
    q, k, v, row_scale, key_scale, counts, mask, seed, stats, grad, delta, both, key_result, value_result,
    heads, groups, rows, keys, width, depth, total_rows, batch_step, head_step, row_step, key_step,
    POWER: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The gradients of some unit keys of one head of keys, and of their values."""
    own = tl.program_id(1).to(tl.int64)
    shared = heads // groups
    begin = tl.program_id(0) * KEYS
    key = begin + tl.arange(0, KEYS)
    unit = tl.load(key_scale + own * keys + key, key < keys, 0.0)
    keyed = _tile(k + own * keys * width, begin, keys, width, KEYS, WIDTH)
    value = _tile(v + own * keys * depth, begin, keys, depth, KEYS, DEPTH)
    key_found = tl.zeros((KEYS, WIDTH), tl.float32)
    value_found = tl.zeros((KEYS, DEPTH), tl.float32)
    start = 0
    if CAUSAL:
        start = begin // ROWS * ROWS
    for group in range(0, groups):
        head = own // shared * heads + own % shared * groups + group
        at = head * rows
        for first in range(start, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            here = row < rows
            scale = tl.load(row_scale + at + row, here, 0.0)
            n = tl.load(counts + at + row, here, 1.0)
            total = tl.load(stats + at + row, here, 1.0)
            most = tl.load(stats + total_rows + at + row, here, 0.0)
            norm = tl.load(stats + 2 * total_rows + at + row, here, 1.0)
            less = tl.load(delta + at + row, here, 0.0)
            summed = tl.load(both + at + row, here, 0.0)
            query = _tile(q + at * width, first, rows, width, ROWS, WIDTH)
            above = _tile(grad + at * depth, first, rows, depth, ROWS, DEPTH)
            s = _scores(query, keyed, scale, unit, PRECISION)
            place = mask
            if mask is not None:
                place = mask + head // heads * batch_step + head % heads * head_step
            inside = _seen(place, row, key, rows, keys, row_step, key_step, CAUSAL)
            a = tl.where(inside, _softplus(s), 0.0)
            change = tl.dot(above, tl.trans(value), input_precision=PRECISION)
            w, sharp, even = _slope(a, change, less, total, most, norm, n, POWER, FEW)
            if seed is not None:
                kept = _kept(seed, at, row, key, keys, DROPOUT)
                w, sharp, even = _slope(a, change * kept, less, total, most, norm, n, POWER, FEW)
                w *= kept
            value_found += tl.dot(tl.trans(w.to(above.dtype)), above, input_precision=PRECISION)
            rise = _rise(s, sharp, even, summed, total, most, n, POWER, FEW)
            rise = tl.where(inside, rise, 0.0) * scale[:, None]
            key_found += tl.dot(tl.trans(rise.to(query.dtype)), query, input_precision=PRECISION)
    _put(key_result + own * keys * width, key_found, begin, keys, width, KEYS, WIDTH)
    _put(value_result + own * keys * depth, value_found, begin, keys, depth, KEYS, DEPTH)


def _precision(wide: bool, cuda: bool) -> str:
    """How products are made: float32's by three of TF32 on NVIDIA's tensor cores, near its own digits."""
    return ("tf32x3" if cuda else "ieee") if wide else "tf32"


class _Call:
    """The arguments that all kernels have."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, seed: Tensor | None
    ) -> None:
        self.q, self.k, self.v = (x.contiguous() for x in (q, k, v))
        self.shape, self.keys = q.shape[:3], k.shape[2]
        counts = reference.counts_of(mask, options.causal, q, self.keys)
        scale = reference.log_scale(counts, q.shape[-1], torch.float32)
        self.scale = scale.expand(self.shape).contiguous()
        self.query_unit, self.key_unit = reference.normalised(q)[1], reference.normalised(k)[1]
        self.counts = counts.clamp_min(1).float().expand(self.shape).contiguous()
        self.limit = reference.tolerance(counts, torch.float32).float().expand(self.shape).contiguous()
        self.seed, self.options = seed, options
        self.mask = None if mask is None else mask.view(torch.uint8)
        full = (*self.shape, self.keys)
        self.steps = (0, 0, 0, 0) if self.mask is None else self.mask.expand(full).stride()

    def tensors(self) -> tuple[Any, ...]:
        """q, k, v, what makes them of length 1, N."""
        rows = (self.scale[..., None] * self.query_unit).contiguous()
        return self.q, self.k, self.v, rows, self.key_unit.contiguous(), self.counts

    def launch(self, kernel: Any, along: str, *tensors: Any) -> None:
        """Launch one of the kernels, whose programs have some rows and walk along keys, or the other way."""
        tile_rows, tile_keys = TILES[along, self.q.element_size()]
        grid = (triton.cdiv(self.shape[2], tile_rows), self.shape[0] * self.shape[1])
        if along == "rows":
            grid = (triton.cdiv(self.keys, tile_keys), self.k.shape[0] * self.k.shape[1])
        heads, rows = self.shape[1:]
        sizes = (heads, heads // self.k.shape[1], rows, self.keys, self.q.shape[-1], self.v.shape[-1])
        wide = [max(16, triton.next_power_of_2(size)) for size in sizes[-2:]]
        with torch.cuda.device_of(self.q):  # does nothing for the interpreter's CPU tensors
            kernel[grid](
                *tensors,
                *sizes,
                self.shape.numel(),
                *self.steps,
                POWER=self.options.power,
                CAUSAL=self.options.causal,
                DROPOUT=self.options.dropout,
                PRECISION=_precision(self.q.dtype == torch.float32, cuda=torch.version.hip is None),
                ROWS=tile_rows,
                KEYS=tile_keys,
                WIDTH=wide[0],
                DEPTH=wide[1],
                FEW=reference.FEW,
                num_warps=WARPS,
                **LAUNCH,
            )


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What attention gives, and three numbers a row; see `softplus_blocks.forward`. Not of float64."""
    call = _Call(q, k, v, mask, options, seed)
    out = q.new_empty((*q.shape[:3], v.shape[-1]), dtype=v.dtype)
    stats = torch.ones((3, *q.shape[:3]), dtype=torch.float32, device=q.device)
    if out.numel():
        call.launch(forward_kernel, "keys", *call.tensors(), call.limit, call.mask, seed, out, stats)
    return out, stats


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    out: Tensor,
    options: Options,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; see `softplus_blocks.backward`."""
    call = _Call(q, k, v, mask, options, seed)
    results = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    if not out.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad = grad.to(q.dtype).contiguous()
    delta = (grad.float() * out.float()).sum(-1)
    both = torch.empty_like(delta)
    given = (*call.tensors(), call.mask, seed, stats.contiguous(), grad, delta, both)
    call.launch(rows_kernel, "keys", *given, results[0])
    call.launch(keys_kernel, "rows", *given, *results[1:])
    query = results[0] * call.scale[..., None]  # of rows of length 1, as the key's
    return through_length(query, q), through_length(results[1], k), results[2].to(v.dtype)


def audit_specs(cuda: bool, wave: int) -> Iterator[AuditSpec]:
    """The kernels as launched for aligned heads of 64: causal LSSAR, and LSSA with a mask of all rows."""
    pointers = ("row_scale", "key_scale", "counts", "limit", "stats", "delta", "both")
    types = dict.fromkeys((*pointers, "result", "key_result", "value_result"), "*fp32") | {"mask": "*u8"}
    strides = ("batch_step", "head_step", "row_step")
    sizes = ("rows", "keys", "width", "depth", "total_rows")
    types |= dict.fromkeys(("heads", "groups", *sizes, *strides), "i32")
    for dtype, size, masked in (("fp32", 4, False), ("bf16", 2, False), ("bf16", 2, True)):
        own = types | dict.fromkeys(("q", "k", "v", "out", "grad"), f"*{dtype}")
        for kernel, along, beside in (
            (forward_kernel, "keys", 1),
            (rows_kernel, "keys", 1),
            (keys_kernel, "rows", 7),
        ):
            rows, keys = TILES[along, size]
            walked = keys if along == "keys" else rows
            none = {"seed": None} if masked else {"mask": None, "seed": None, **dict.fromkeys(strides, 0)}
            constants = {"POWER": 0.0 if masked else 15.0, "CAUSAL": not masked, "DROPOUT": 0.0}
            constants |= {"PRECISION": _precision(size == 4, cuda), "ROWS": rows, "KEYS": keys}
            constants |= {"WIDTH": 64, "DEPTH": 64, "FEW": reference.FEW, "key_step": int(masked), **none}
            name = kernel.__name__.removesuffix("_kernel")
            yield AuditSpec(
                f"softplus {name} {'masked ' if masked else ''}{dtype}",
                kernel,
                own,
                constants,
                size + (4 * beside + masked * rows * keys / walked) / 128,
                WARPS,
                multiples=(*sizes, *(strides if masked else ())),
                again=walked // 2 if beside == 1 else beside * walked // 4,
                elements=walked * 128,
                narrowest=min(128, 8 * rows * keys // (WARPS * wave)) if masked else 128,
            )
