"""StableMax cross-entropy in Triton: one program per row, each logit read once in either direction.

Forward moves 4 bytes per float32 logit (read), backward 8 (read, and the gradient's write); `cross_entropy`
moves 8 and 20, as its `nll_loss` hands a dense gradient on. The mathematics, and the two functions exported
here, are those of `optx.kernels.loss.stablemax_rows`.

A target is either ``labels`` or ``probs``; the other one, and an absent ``weight``, is None, which Triton
takes as a constant and compiles away.
"""
# Triton's language has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from optx.kernels.loss.stablemax_rows import Options, RowSums, math_dtype, terms
from optx.kernels.triton_launch import AuditSpec

__all__ = ["audit_specs", "backward", "forward"]

# The interpreter only takes functions that see `tl`; it calls a plain one as it is.
_terms = terms if knobs.runtime.interpret else triton.jit(terms)
_MAX_BLOCK = 4096


@triton.jit
def _log1p(x):
    # log(1 + x) loses a small x; the quotient gives back what rounding took (Goldberg 1991, theorem 4).
    u = 1.0 + x
    excess = u - 1.0
    small = tl.where(excess == 0.0, x, tl.log(u) * (x / tl.maximum(excess, 1e-30)))
    return tl.where(x < 1.0, small, tl.log(u))


@triton.jit
def _own_term(logits, label, weight, SMOOTHING: tl.constexpr, MATH: tl.constexpr):
    """s of the label's own logit, and the weight of its part of the loss."""
    s, _ = _terms(tl.load(logits + label).to(MATH), 1.0, tl.where)
    share = tl.zeros_like(s) + (1.0 - SMOOTHING)
    if weight is not None:
        share *= tl.load(weight + label).to(MATH)
    return s, share


@triton.jit
def _soft_weights(probs, weight, k, mask, classes, SMOOTHING: tl.constexpr, MATH: tl.constexpr):
    """q at the classes k; 0 where the mask is off."""
    q = tl.full(k.shape, SMOOTHING, MATH) / classes.to(MATH)
    if probs is not None:
        q += (1.0 - SMOOTHING) * tl.load(probs + k, mask).to(MATH)
    if weight is not None:
        q *= tl.load(weight + k, mask).to(MATH)
    if mask is not None:
        q = tl.where(mask, q, 0.0)
    return q


@triton.jit
def _add_block(sums, logits, label, probs, weight, k, mask, classes, SMOOTHING: tl.constexpr):
    """Add the classes k to the lanes of the running sums of s, q and q log s."""
    rest, mass, score = sums
    s, _ = _terms(tl.load(logits + k, mask).to(rest.dtype), 1.0, tl.where)
    counted = k != label
    if mask is not None:
        counted = counted & mask
    rest += tl.where(counted, s, 0.0)
    if (probs is not None) or SMOOTHING > 0.0:
        q = _soft_weights(probs, weight, k, mask, classes, SMOOTHING, rest.dtype)
        mass += q
        score += tl.where(q == 0.0, 0.0, q * tl.log(s))  # a class of weight 0 may have a logit of -inf
    return rest, mass, score


@triton.jit
def forward_kernel(
    logits, labels, probs, weight, loss, rest, mass,
    classes, logits_stride, probs_stride, ignore_index,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and sums of one row."""
    row = tl.program_id(0).to(tl.int64)
    MATH: tl.constexpr = loss.dtype.element_ty
    SOFT: tl.constexpr = (probs is not None) or SMOOTHING > 0.0
    logits += row * logits_stride
    label = tl.full((), -1, tl.int64)
    if probs is not None:
        probs += row * probs_stride
    else:
        label = tl.load(labels + row)
        if label == ignore_index:
            tl.store(loss + row, 0.0)
            tl.store(rest + row, 0.0)
            if SOFT:
                tl.store(mass + row, 0.0)
            return
        tl.device_assert((label >= 0) & (label < classes), "stablemax_cross_entropy: target out of range")
    lane = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), MATH)
    sums = (zeros, zeros, zeros)
    full = classes // BLOCK * BLOCK
    for start in range(0, full, BLOCK):  # without a mask, which would narrow the loads
        sums = _add_block(sums, logits, label, probs, weight, start + lane, None, classes, SMOOTHING)
    if full < classes:
        k = full + lane
        sums = _add_block(sums, logits, label, probs, weight, k, k < classes, classes, SMOOTHING)
    total = tl.sum(sums[0])
    tl.store(rest + row, total)
    value = tl.zeros_like(total)
    if labels is not None:
        own, share = _own_term(logits, label, weight, SMOOTHING, MATH)
        value += share * _log1p(total / own)
        total += own
    if SOFT:
        soft = tl.sum(sums[1])
        tl.store(mass + row, soft)
        value += soft * tl.log(total) - tl.sum(sums[2])
    tl.store(loss + row, value)


@triton.jit
def _write_block(
    result, logits, label, probs, weight, k, mask, classes, factors, SMOOTHING: tl.constexpr
):  # fmt: skip
    """The gradient at the classes k: h' scale (gain s + even s - q), the label's gain s being lone."""
    scale, gain, lone, even = factors
    s, slope = _terms(tl.load(logits + k, mask).to(scale.dtype), 1.0, tl.where)
    value = tl.where(k == label, lone, gain * s)
    if (probs is not None) or SMOOTHING > 0.0:
        value += even * s - _soft_weights(probs, weight, k, mask, classes, SMOOTHING, scale.dtype)
    tl.store(result + k, (value * (slope * scale)).to(result.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    result, grad, logits, labels, probs, weight, rest, mass,
    classes, logits_stride, probs_stride, ignore_index,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row."""
    row = tl.program_id(0).to(tl.int64)
    MATH: tl.constexpr = rest.dtype.element_ty
    logits += row * logits_stride
    result += row * classes
    lane = tl.arange(0, BLOCK)
    total = tl.load(rest + row)
    scale = tl.load(grad + row).to(MATH)
    label = tl.full((), -1, tl.int64)
    gain = tl.zeros_like(total)
    lone = tl.zeros_like(total)
    even = tl.zeros_like(total)
    if probs is not None:
        probs += row * probs_stride
    else:
        label = tl.load(labels + row)
        if label == ignore_index:  # its logits are not looked at: they may be anything
            for start in range(0, classes, BLOCK):
                tl.store(
                    result + start + lane, tl.zeros((BLOCK,), result.dtype.element_ty), start + lane < classes
                )
            return
        own, share = _own_term(logits, label, weight, SMOOTHING, MATH)
        gain = share / (total + own)
        lone = -total * gain
        total += own
    if (probs is not None) or SMOOTHING > 0.0:
        even = tl.load(mass + row) / total
    factors = (scale, gain, lone, even)
    full = classes // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        _write_block(result, logits, label, probs, weight, start + lane, None, classes, factors, SMOOTHING)
    if full < classes:
        k = full + lane
        _write_block(result, logits, label, probs, weight, k, k < classes, classes, factors, SMOOTHING)


def forward(logits: Tensor, target: Tensor, options: Options) -> RowSums:
    """Loss and sums of each row; see `optx.kernels.loss.stablemax_rows.forward`.

    Args:
        logits: shape (R, C), last stride 1.
        target: labels, int64 (R,), contiguous, or probabilities (R, C), last stride 1.
        options: class weights, ignored label, smoothing (a constant of the compiled kernel).
    """
    rows = logits.shape[0]
    soft = target.is_floating_point()
    loss, rest = (torch.empty(rows, dtype=math_dtype(logits.dtype), device=logits.device) for _ in range(2))
    mass = torch.empty_like(loss) if soft or options.smoothing > 0.0 else None
    _launch(forward_kernel, logits, (), (loss, rest, mass), target, options)
    return RowSums(loss, rest, mass)


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, rest: Tensor, mass: Tensor | None, options: Options
) -> Tensor:
    """Gradient of the logits; see `optx.kernels.loss.stablemax_rows.backward`."""
    result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if mass is not None:
        mass = mass.contiguous()
    _launch(backward_kernel, logits, (result, grad.contiguous()), (rest, mass), target, options)
    return result


_OPTIONS = {
    "enable_fp_fusion": True,  # said, as Triton 3.10 changes the default
    "debug": True,  # keeps the assertion on the target, as torch does for cross_entropy
    "sanitize_overflow": False,
}


def _launch(
    kernel: Any,
    logits: Tensor,
    first: tuple[Tensor, ...],
    sums: tuple[Tensor | None, ...],
    target: Tensor,
    options: Options,
) -> None:
    rows, classes = logits.shape
    if rows == 0:
        return
    soft = target.is_floating_point()
    block, warps = _blocking(classes)
    with torch.cuda.device_of(logits):  # does nothing for the interpreter's CPU tensors
        kernel[(rows,)](
            *first,
            logits,
            None if soft else target,
            target if soft else None,
            options.weight,
            *sums,
            classes,
            logits.stride(0),
            target.stride(0) if soft else 0,
            options.ignore_index,
            SMOOTHING=options.smoothing,
            BLOCK=block,
            num_warps=warps,
            **_OPTIONS,
        )


def _blocking(classes: int) -> tuple[int, int]:
    """Block size and warps: 16 elements a thread in the widest case, four 128-bit loads of float32."""
    block = min(_MAX_BLOCK, triton.next_power_of_2(classes))
    return block, min(8, max(1, block // 512))


def audit_specs() -> list[AuditSpec]:
    """The kernels as launched for a large vocabulary with labels, in the dtypes that matter."""
    return [
        _audit_spec(kernel, dtype, smoothing)
        for kernel in (forward_kernel, backward_kernel)
        for dtype in ("fp32", "bf16")
        for smoothing in (0.0, 0.1)
    ]


def _audit_spec(kernel: Any, dtype: str, smoothing: float) -> AuditSpec:
    block, warps = _blocking(_MAX_BLOCK)
    constants = {"probs": None, "weight": None, "SMOOTHING": smoothing, "BLOCK": block}
    if smoothing == 0.0:
        constants["mass"] = None
    types = {"logits": f"*{dtype}", "result": f"*{dtype}", "labels": "*i64"}
    types |= dict.fromkeys(("loss", "rest", "mass", "grad"), "*fp32")
    types |= dict.fromkeys(("classes", "logits_stride", "probs_stride", "ignore_index"), "i32")
    size = 4 if dtype == "fp32" else 2
    direction = kernel.__name__.removesuffix("_kernel")
    return AuditSpec(
        name=f"stablemax {direction} {dtype}{' smoothed' if smoothing else ''}",
        function=kernel,
        types=types,
        constexprs=constants,
        bytes_per_element=size if direction == "forward" else 2 * size,
        num_warps=warps,
        multiples=("classes", "logits_stride"),  # as of aligned rows
        options=_OPTIONS,
    )
