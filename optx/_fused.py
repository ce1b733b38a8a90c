"""The fused paths: whether a param group can take one, and the tables that point a kernel at its tensors."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optx._bases import BaseRules, base_numbers, base_rules, init_base_state
from optx._errors import OptxError
from optx._names import is_dtensor
from optx._rules import RuleSourceError
from optx._transform import Group
from optx.kernels.program import Program

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
KAHAN = "optx.kahan"


def why_not(base: torch.optim.Optimizer, group: Group, program: Program) -> str | None:
    """Why a group can't take a fused path, in words; None if it can."""
    if base_rules(base, group) is None:
        return f"{type(base).__name__} has no fused form (SGD, Adam and AdamW have)"
    if group.get("differentiable", False):
        return "differentiable=True needs autograd through the step"
    for call in program.calls():
        try:
            _ = call.rule.source
        except RuleSourceError as error:
            return str(error)
    devices = {p.device.type for p in group["params"]}
    if not devices <= {"cpu"} and not devices <= {"cuda"}:
        return f"no fused kernels for tensors on {', '.join(sorted(devices))}"
    missing = _missing("triton" if devices == {"cuda"} else "numba")
    if missing:
        return missing
    return next(filter(None, map(_why_not_tensor, group["params"])), None)


def _why_not_tensor(p: Tensor) -> str | None:
    if is_dtensor(p):
        return "a parameter is a DTensor"
    if p.dtype not in _DTYPES:
        return f"a parameter is {p.dtype}"
    if p.layout != torch.strided or not _is_dense(p):
        return f"a parameter of shape {tuple(p.shape)} has gaps in memory (strides {p.stride()})"
    return None


@functools.cache
def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order."""
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


@dataclass
class _Bucket:
    """Tensors of a group that one kernel serves: all of the same dtypes."""

    members: list[int]  # positions in the group's params
    runner: Any  # CpuStep or TritonStep
    roles: list[Callable[[Tensor], Tensor]]  # after w and g: how to get each slot and cell of a parameter


class FusedGroup:
    """Runs one param group's program through compiled kernels.

    Tables are rebuilt when the set of parameters with a gradient (or a dtype) changes; otherwise a step
    only compares and rewrites addresses.

    Args:
        group: the param group.
        program: what to compute.
        rules: the base's update.
        base: its state is read and, for new parameters, made as torch makes it.
        slot: ``(p, key) -> tensor`` for the transforms' state.
        rounding: for bfloat16 weights.
        triton: run Triton kernels, else Numba.
    """

    def __init__(
        self,
        group: Group,
        program: Program,
        rules: BaseRules,
        base: torch.optim.Optimizer,
        slot: Callable[[Tensor, str], Tensor],
        rounding: str,
        triton: bool,
    ) -> None:
        self.group, self.program, self.rules, self.base = group, program, rules, base
        self._slot, self._rounding, self.triton = slot, rounding, triton
        self._signature: Any = None
        self._buckets: list[_Bucket] = []
        self._fresh: set[int] = set()  # ids of parameters whose base state this step has made
        self.active: list[Tensor] = []
        self.totals: dict[str, Any] = {}

    # ---- tables ------------------------------------------------------------------------------------

    def prepare(self, key: int) -> None:
        """Point the kernels at this step's tensors and numbers."""
        params: list[Tensor] = self.group["params"]
        self.active = active = [p for p in params if p.grad is not None]
        for p in active:
            if init_base_state(self.base.state[p], p, self.rules, self.group):
                self._fresh.add(id(p))
        signature = [(id(p), p.dtype, p.grad.dtype, p.numel()) for p in active]  # type: ignore[union-attr]
        if signature != self._signature:
            self._rebuild(params)
            self._signature = signature
        numbers: dict[str, Any] | None = None
        for bucket in self._buckets:
            self._point(bucket, [params[i] for i in bucket.members])
            numbers = numbers or self._numbers()
            runner = bucket.runner
            runner.hypers[: len(runner.columns.hypers)] = [numbers[n] for n in runner.columns.hypers]
            runner.set_key(key)
        self._fresh.clear()

    def _rebuild(self, params: Sequence[Tensor]) -> None:
        buckets: dict[tuple[str, ...], list[int]] = {}
        for i, p in enumerate(params):
            if p.grad is not None:
                reason = _why_not_tensor(p)
                if reason:
                    raise OptxError(f"optx: after wrap(), {reason}; wrap the optimizer again.")
                slots = [self._tensor(name)(p) for name in self.program.slots]
                dtypes = (p, p.grad, *slots)
                buckets.setdefault(tuple(_DTYPES[t.dtype] for t in dtypes), []).append(i)
        self._buckets = [self._bucket(dtypes, members, params) for dtypes, members in buckets.items()]

    def _bucket(self, dtypes: tuple[str, ...], members: list[int], params: Sequence[Tensor]) -> _Bucket:
        from optx.kernels.emit_cpu import Layout

        low = dtypes[0] == "bfloat16"
        layout = Layout(dtypes, self._rounding if low else "nearest", self.rules.counted)
        numels = [params[i].numel() for i in members]
        if self.triton:
            from optx.kernels.step_triton import TritonStep

            runner: Any = TritonStep(self.program, layout, numels, members, params[members[0]].device)
        else:
            from optx.kernels.step_cpu import CpuStep

            runner = CpuStep(self.program, layout, numels, members)
        roles = [self._tensor(name) for name in (*runner.columns.roles[2:], *runner.columns.cells)]
        return _Bucket(members, runner, roles)

    def _tensor(self, name: str) -> Callable[[Tensor], Tensor]:
        """How to get the state tensor of a role or cell."""
        if name in self.rules.slots or name == "step":
            state = self.base.state
            return lambda p: state[p][name]
        key = KAHAN if name == "kahan" else f"optx.{name}"
        return lambda p: self._slot(p, key)

    def _point(self, bucket: _Bucket, members: list[Tensor]) -> None:
        table = bucket.runner.tensors
        fresh = [id(p) in self._fresh for p in members]
        grads: list[Tensor] = [p.grad for p in members]  # type: ignore[misc]
        self._laid_out = [_like(g, p) for g, p in zip(grads, members, strict=True)]  # keeps copies alive
        table[:, 0] = [p.data_ptr() for p in members]
        table[:, 1] = [g.data_ptr() for g in self._laid_out]
        names = (*bucket.runner.columns.roles[2:], *bucket.runner.columns.cells)
        for column, (name, get) in enumerate(zip(names, bucket.roles, strict=True), start=2):
            tensors = [get(p) for p in members]
            if name in bucket.runner.columns.roles:
                self._check_layout(name, tensors, members)
                tensors = [get(p) for p in members]
            table[:, column] = [t.data_ptr() for t in tensors]
        if any(fresh) or bucket.runner.cols[:, _FRESH].any():
            bucket.runner.cols[:, _FRESH] = fresh

    def _check_layout(self, name: str, tensors: list[Tensor], members: list[Tensor]) -> None:
        """A state tensor in another memory order (from a checkpoint, say) is laid out like its weight."""
        for t, p in zip(tensors, members, strict=True):
            if not (t.is_contiguous() and p.is_contiguous()) and t.stride() != p.stride():
                t.data = torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)

    def _numbers(self) -> dict[str, float]:
        group = self.group
        numbers = {k: float(v) for k, v in base_numbers(group).items()}
        for name in self.program.named("hyper"):
            if "." in name:
                numbers[name] = float(group[name.replace(".", "_")])
        return numbers

    # ---- a step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """A whole step, where nothing waits for totals."""
        for bucket in self._buckets:
            bucket.runner.step()

    def measure(self, level: int) -> dict[str, Any]:
        """A level's sums and scalars; this group's share of its totals by name."""
        if level >= len(self.program.levels):
            return {}
        shares: dict[str, Any] = {}
        for bucket in self._buckets:
            runner = bucket.runner
            runner.totals[:] = 0.0
            runner.measure(level)
            for ref in self.program.levels[level].totals:
                share = runner.totals[runner.columns.totals.index(ref.name)]
                shares[ref.name] = shares.get(ref.name, 0.0) + share
        return shares

    def finish(self, level: int, totals: dict[str, Any]) -> None:
        """The scalars that waited for totals."""
        if level >= len(self.program.levels):
            return
        for bucket in self._buckets:
            names = bucket.runner.columns.totals
            for i, name in enumerate(names, start=len(bucket.runner.columns.hypers)):
                if name in totals:
                    bucket.runner.hypers[i] = totals[name]
            bucket.runner.finish(level)

    def update(self) -> None:
        """Rewrite weights and state, and count the step."""
        for bucket in self._buckets:
            bucket.runner.update()
            bucket.runner.commit()


_FRESH = 2  # position of the col "fresh", see optx.kernels.emit_cpu.Columns


def _like(g: Tensor, p: Tensor) -> Tensor:
    """A gradient in its weight's memory order; itself where it is already."""
    if g.layout != torch.strided:
        raise OptxError(
            f"optx: a sparse gradient (shape {tuple(g.shape)}); use sparse=False in the embedding, or leave "
            "its group out of every transform and wrap with fused=False."
        )
    if (g.is_contiguous() and p.is_contiguous()) or g.stride() == p.stride():
        return g
    return torch.empty_like(p, dtype=g.dtype, requires_grad=False).copy_(g)
