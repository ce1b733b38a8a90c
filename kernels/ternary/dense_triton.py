"""Dense tensors from ternary masks in Triton: each element is written once, each mask read once.

A program walks over a stretch of blocks. It loads a block's mask words, one per thread and mask, 128 bytes
per warp, and spreads each over the 32 elements it stands for: adding to bfloat16 weights moves 4.25 bytes
per element, of which the masks are 0.25.
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

from optx.kernels.triton_launch import AuditSpec, shown
from optx.kernels.triton_lib import LAUNCH, nearest, read

BLOCK, TURNS, WARPS = 4096, 16, 4


@triton.jit
def _block(to, plus, minus, start, n, scale, MASKED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Elements from ``start`` on, a multiple of the block."""
    MATH: tl.constexpr = tl.float64 if to.dtype.element_ty == tl.float64 else tl.float32
    word = tl.arange(0, BLOCK // 32)
    bit = tl.arange(0, 32)
    at = word[:, None] * 32 + bit[None, :]
    mask = None
    word_mask = None
    if MASKED:
        mask = start + at < n
        word_mask = start + word * 32 < n
    p = tl.load(plus + start // 32 + word, word_mask)
    m = tl.load(minus + start // 32 + word, word_mask)
    up = (p[:, None] >> bit[None, :]) & 1
    down = (m[:, None] >> bit[None, :]) & 1
    value = (up - down).to(MATH) * scale
    if ADD:
        value += read(to + start + at, mask, MATH)
    if to.dtype.element_ty == tl.uint16:  # bfloat16
        tl.store(to + start + at, nearest(value), mask)
    else:
        tl.store(to + start + at, value.to(to.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def dense_kernel(to, plus, minus, n, scale, ADD: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """``to = scale * t`` or ``to += scale * t``; a uint16 is a bfloat16."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS)
    last = tl.minimum(first + BLOCK * TURNS, n)
    full = first + (last - first) // BLOCK * BLOCK
    for at in range(first, full, BLOCK):  # without a mask, which would narrow the accesses
        _block(to, plus, minus, tl.multiple_of(at, BLOCK), n, scale, False, ADD, BLOCK)
    if full < last:
        _block(to, plus, minus, tl.multiple_of(full, BLOCK), n, scale, True, ADD, BLOCK)


def add(to: Tensor, masks: Tensor, scale: float) -> None:
    """``to += scale * t`` for the ternary t: summed in float32 (float64 for such), rounded once.

    Args:
        to: contiguous, float16, bfloat16, float32 or float64.
        masks: int64 (2, words), on the same device: +1s, -1s.
        scale: a float32.
    """
    _launch(to, masks, scale, True)


def fill(to: Tensor, masks: Tensor, scale: float) -> None:
    """``to = scale * t``; see `add`."""
    _launch(to, masks, scale, False)


def _launch(to: Tensor, masks: Tensor, scale: float, add: bool) -> None:
    n = to.numel()
    if n == 0:
        return
    words = masks.view(torch.int32)
    with torch.cuda.device_of(to):  # does nothing for the interpreter's CPU tensors
        dense_kernel[(triton.cdiv(n, BLOCK * TURNS),)](
            shown(to),
            words[0],
            words[1],
            n,
            scale,
            ADD=add,
            BLOCK=BLOCK,
            TURNS=TURNS,
            num_warps=WARPS,
            **LAUNCH,
        )


def audit_specs(shared: bool) -> Iterator[AuditSpec]:
    """What `add` and `fill` launch.

    Args:
        shared: whether the compiler hands mask words on through shared memory (NVIDIA). Else (AMD) each
            thread loads the word of its 16 bytes itself: the same requests to memory, more to the cache.
    """
    for kind, size in (("fp32", 4), ("fp16", 2), ("u16", 2)):
        for adds in (True, False):
            constants = {"ADD": adds, "BLOCK": BLOCK, "TURNS": TURNS}
            types = {"to": f"*{kind}", "plus": "*i32", "minus": "*i32", "n": "i32", "scale": "fp32"}
            yield AuditSpec(
                f"{'add' if adds else 'fill'} {'bf16' if kind == 'u16' else kind}",
                dense_kernel,
                types,
                constants,
                (2 if adds else 1) * size + (0.25 if shared else size / 2),
                WARPS,
            )
