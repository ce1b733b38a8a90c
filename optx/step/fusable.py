"""Whether a kernel can serve a param group, and if not, why, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optx._names import is_dtensor
from optx._rules import RuleSourceError
from optx.kernels.available import why_unavailable
from optx.kernels.step.program import Program
from optx.step.base_step import step_replaced
from optx.step.bases import rules_or_why
from optx.step.memory import DTYPES, Extents, extent, why_not_dense, why_not_plain
from optx.step.sharded import here, why_no_window, why_not_spread
from optx.step.state import is_ours
from optx.step.transform import Group

SHARED = "two tensors that the step writes share their memory, and kernels write all at once"
ALIASED = "a gradient lies in memory that the step writes"


class Unfusable(Exception):
    """Found while pointing kernels at tensors: one has no memory to point at. The message says why."""


def why_not(base: torch.optim.Optimizer, group: Group, program: Program) -> str | None:
    """Why a group can't take a fused path whatever its tensors are, in words; None if it can."""
    rules = rules_or_why(base, group)
    if isinstance(rules, str):
        return rules
    if step_replaced(base):
        return "its step() was replaced by another"
    if group.get("differentiable", False):
        return "differentiable=True needs autograd through the step"
    for call in program.calls():
        try:
            _ = call.rule.source
        except RuleSourceError as error:
            return str(error)
    devices = {p.device.type for p in group["params"]}
    if program.tiled:
        reason = next((why for p in group["params"] if (why := why_no_window(p))), None)
        if reason:
            return reason
    if program.scratch and any(map(is_dtensor, group["params"])):
        return "its update takes whole matrices, which kernels do not gather from shards"
    return why_unavailable("triton" if devices == {"cuda"} else "numba")


def why_not_tensors(group: Group, state: Any, shaped: bool = False) -> str | None:
    """Why the tensors of a group can't be served by a kernel as they are now, in words; None if they can.

    Args:
        group: the group.
        state: the base's.
        shaped: whether the step takes weights as matrices.
    """
    devices = {p.device.type for p in group["params"]}
    if not devices <= {"cpu"} and not devices <= {"cuda"}:
        return f"no fused kernels for tensors on {', '.join(sorted(devices))}"
    written: list[Tensor] = []
    read: list[Tensor] = []
    for p in group["params"]:
        reason = why_not_weight(p) or (why_not_gradient(p.grad) if p.grad is not None else None)
        if reason or (shaped and (reason := why_not_matrix(p))):
            return reason
        if is_dtensor(p):
            continue  # the memory of shards is looked at in each step: other processes don't see it
        written.append(p)
        if p.grad is not None and why_not_plain(p.grad) is None:
            read.append(p.grad)
        for key, value in state.get(p, {}).items():
            if isinstance(value, Tensor) and not is_ours(key):
                reason = why_not_plain(value)
                if key != "step" and reason:
                    return f"{key} of a parameter {reason}"
                if reason is None and value.device == p.device:
                    written.append(value)
    memory = Extents.of(written)
    if memory.overlap:
        return SHARED
    aliased = memory.meet([g.data_ptr() for g in read], [extent(g) for g in read])
    return ALIASED if aliased else None


def why_not_matrix(p: Tensor) -> str | None:
    """Why a kernel can't tell a parameter's rows and columns: by where an element lies in memory."""
    if here(p).is_contiguous():
        return None
    return "a parameter that is taken as a matrix is not contiguous (transposed, or channels_last)"


def why_not_weight(p: Tensor) -> str | None:
    """Why a parameter can't be served by a kernel."""
    spread = is_dtensor(p)
    reason = why_not_spread(p) if spread else why_not_plain(p)
    if reason is None and p.dtype not in DTYPES:
        reason = f"is {p.dtype}"
    reason = reason or (None if spread else why_not_dense(p))
    return reason and f"a parameter {reason}"


def why_not_gradient(g: Tensor) -> str | None:
    """Why a gradient can't be served, nor be laid out anew for a kernel."""
    if is_dtensor(g):
        return None  # it is spread as its weight is, or will be
    if g.layout != torch.strided:
        return "a gradient is sparse"
    reason = why_not_plain(g)
    if reason is None or (type(g) is Tensor and (g.is_neg() or g.is_conj() or g._is_zerotensor())):  # pyright: ignore
        return None  # a lazy one is computed into memory of its own
    return f"a gradient {reason}"
