"""Products of RF8's bytes and a few vectors in Triton: bytes become numbers in registers.

A program has some rows of the weights and goes along them; each thread sums its own columns, and what they
have is added at the end. The bytes are what is moved: a vector stays in the caches.
"""
# Triton's language has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from optx.kernels.rf8.codes_triton import decode
from optx.kernels.triton_launch import AuditSpec
from optx.kernels.triton_lib import LAUNCH

ROWS, COLUMNS, WARPS = 8, 512, 4
MOST = 4
"""Vectors that a launch takes at most."""


@triton.jit
def _terms(codes, x, row, column, rows, columns, at, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """A tile's products with one vector; bytes outside of the matrix are zeros."""
    place = row[:, None] * columns + (at + column)[None, :]
    if MASKED:
        inside = (row[:, None] < rows) & ((at + column)[None, :] < columns)
        w = decode(tl.load(codes + place, inside, 0))
        return w * tl.load(x + at + column, at + column < columns, 0.0)[None, :]
    return decode(tl.load(codes + place)) * tl.load(x + at + column)[None, :]


@triton.jit(do_not_specialize=["rows", "factor"])
def product_kernel(
    codes, x, y, rows, columns, factor, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One vector's product with some rows: ``y = w @ x``."""
    vector = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    x += vector * columns
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    full = columns // COLUMNS * COLUMNS
    for at in range(0, full, COLUMNS):
        sums += _terms(codes, x, row, column, rows, columns, tl.multiple_of(at, COLUMNS), not EVEN, ROWS)
    if full < columns:
        sums += _terms(codes, x, row, column, rows, columns, full, True, ROWS)
    tl.store(y + vector * rows + row, tl.sum(sums, 1) * factor, row < rows)


def multiply(codes: Tensor, x: Tensor, y: Tensor, e_max: int) -> None:
    """``y = x @ w.T`` for the w of bytes, in float32.

    Args:
        codes: uint8 (rows, columns), contiguous.
        x: float32 (batch, columns), contiguous.
        y: float32 (batch, rows), contiguous.
        e_max: of the codes.
    """
    rows, columns = codes.shape
    if not rows or not len(x):
        return
    with torch.cuda.device_of(codes):  # does nothing for the interpreter's CPU tensors
        product_kernel[(triton.cdiv(rows, ROWS), len(x))](
            *(codes, x, y, rows, columns, 2.0 ** (e_max - 19)),
            EVEN=rows % ROWS == 0,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
            **LAUNCH,
        )


def audit_specs() -> Iterator[AuditSpec]:
    """What `multiply` launches, on a matrix of whole tiles."""
    constants = {"EVEN": True, "ROWS": ROWS, "COLUMNS": COLUMNS}
    types = {"codes": "*u8", "x": "*fp32", "y": "*fp32", "rows": "i32", "columns": "i32", "factor": "fp32"}
    yield AuditSpec(
        "multiply",
        product_kernel,
        types,
        constants,
        1.0 + 4 / ROWS,  # a vector's numbers are read once for the rows of a program, out of a cache
        WARPS,
        multiples=("columns",),
    )
