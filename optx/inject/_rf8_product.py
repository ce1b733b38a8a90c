"""``x @ w.T`` for weights in RF8, with no more of them in floats than a tile.

Few vectors are multiplied with the bytes as they are decoded, in registers; for many, a tile of rows is
unpacked into a buffer that torch's product takes. Under torch.compile, and where there are no kernels, the
bytes are decoded by torch's operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from optx._rf8 import SERVED, unpack_into
from optx.kernels.available import why_unavailable
from optx.kernels.rf8.layout import STEPS

TILE = 1 << 19
"""Numbers that are unpacked at once."""
FEW = {"cpu": 16, "cuda": 4}
"""Vectors up to which bytes are decoded on the way to the sums."""


def product(x: Tensor, codes: Tensor, e_max: Tensor, known: int | None) -> Tensor:
    """(..., out) in x's dtype; gradients flow to x.

    Args:
        x: (..., in).
        codes: uint8 (out, in), contiguous, on x's device.
        e_max: of the codes, a whole number.
        known: that number, if it is at hand; None: it is not (while a graph is made).
    """
    if known is None or not _has_kernels(x):
        return torch.nn.functional.linear(x, decoded(codes, e_max, x.dtype))
    return cast(Any, _Product).apply(x, codes, known)


def decoded(codes: Tensor, e_max: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of codes by torch's operations, which torch.compile can read."""
    code = codes.to(torch.int32)
    exponent = (code >> 3) & 15
    steps = (STEPS >> 4 * (code & 7)) & 15
    size = torch.where(exponent == 0, 0, (steps + 12) << exponent)
    signed = torch.where(code > 127, -size, size)
    return (signed * torch.exp2(e_max.to(torch.float32) - 19)).to(dtype)


def _has_kernels(x: Tensor) -> bool:
    package = {"cpu": "numba", "cuda": "triton"}.get(x.device.type)
    return package is not None and x.dtype.is_floating_point and why_unavailable(package) is None


class _Product(torch.autograd.Function):
    """The product, and the gradient of its vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, e_max: int) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.e_max = e_max
        flat = x.reshape(-1, codes.shape[1])
        if len(flat) <= FEW[x.device.type]:
            return _of_few(flat, codes, e_max).to(x.dtype).view(*x.shape[:-1], len(codes))
        made = x.new_empty(len(flat), len(codes))
        for begin, end, tile in tiles(codes, e_max, x.dtype):
            made[:, begin:end] = flat @ tile.t()
        return made.view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (codes,), grad = ctx.saved_tensors, grads[0]
        flat = grad.reshape(-1, len(codes))
        made = grad.new_zeros(len(flat), codes.shape[1])
        for begin, end, tile in tiles(codes, ctx.e_max, grad.dtype):
            made.addmm_(flat[:, begin:end], tile)
        return made.view(*grad.shape[:-1], codes.shape[1]), None, None


def _of_few(flat: Tensor, codes: Tensor, e_max: int) -> Tensor:
    made = torch.empty(len(flat), len(codes), device=flat.device)
    vectors = flat.to(torch.float32).contiguous()
    if flat.is_cuda:
        from optx.kernels.rf8 import product_triton

        product_triton.multiply(codes, vectors, made, e_max)
    else:
        from optx.kernels.rf8 import cpu

        cpu.multiply(codes, vectors, made, e_max)
    return made


def tiles(codes: Tensor, e_max: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Rows begin to end, unpacked into memory that the next ones are unpacked into too."""
    rows, columns = codes.shape
    step = max(1, TILE // max(1, columns))
    kind = dtype if dtype in SERVED else torch.float32
    room = torch.empty(min(step, rows), columns, dtype=kind, device=codes.device)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        tile = room[: end - begin]
        unpack_into(tile, codes[begin:end], e_max)
        yield begin, end, tile if kind == dtype else tile.to(dtype)
