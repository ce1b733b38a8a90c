"""The fused paths: whether a param group can take one, and the tables that point a kernel at its tensors."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optx._bases import BaseRules, base_rules, init_base_state, rule_numbers
from optx._errors import OptxError
from optx._names import is_dtensor
from optx._rounding import step_key
from optx._rules import RuleSourceError
from optx._transform import Group
from optx.kernels.layout import FRESH, Layout
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

    members: list[Tensor]
    runner: Any  # CpuStep or TritonStep
    keys: list[str]  # where state[p] has each role after w and g, then each cell
    roles: int  # how many of the keys are roles
    plain: bool = False  # whether all members are contiguous
    addresses: dict[int, list[int]] = field(default_factory=dict[int, list[int]])  # by column, as last seen


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
        self._base_keys = (*rules.slots, *(("step",) if rules.counted else ()))
        # Parameters whose base state was made since the last update, by id, and the names made.
        self._fresh: dict[int, tuple[str, ...]] = {}
        self._copies: list[Tensor] = []  # gradients laid out like their weights, alive until the update
        self.active: list[Tensor] = []
        self._hypers = program.named("hyper")

    # ---- tables ------------------------------------------------------------------------------------

    def prepare(self, key: int) -> None:
        """Point the kernels at this step's tensors and numbers."""
        params: list[Tensor] = self.group["params"]
        self.active = active = [p for p in params if p.grad is not None]
        self._copies.clear()
        signature = [(id(p), p.dtype, p.grad.dtype, p.numel()) for p in active]  # type: ignore[union-attr]
        if signature != self._signature:
            self._rebuild(params)
            self._signature = signature
        numbers: dict[str, Any] = rule_numbers(self.group, self._hypers)
        for bucket in self._buckets:
            self._point(bucket)
            runner = bucket.runner
            if self.triton:
                runner.live = {
                    i: numbers[n] for i, n in enumerate(runner.columns.hypers) if _on_gpu(numbers[n])
                }
            else:
                runner.set_key(key)
            plain = [0.0 if _on_gpu(v) else float(v) for v in map(numbers.__getitem__, runner.columns.hypers)]
            runner.hypers[: len(plain)] = plain

    def _rebuild(self, params: Sequence[Tensor]) -> None:
        buckets: dict[tuple[str, ...], list[int]] = {}
        for i, p in enumerate(params):
            if p.grad is not None:
                reason = _why_not_tensor(p)
                if reason:
                    raise OptxError(f"optx: after wrap(), {reason}; wrap the optimizer again.")
                self._init(p)
                slots = [self._find(p, self._key(name)) for name in self.program.slots]
                dtypes = tuple(_DTYPES[t.dtype] for t in (p, p.grad, *slots))
                buckets.setdefault(dtypes, []).append(i)
        self._buckets = [self._bucket(dtypes, members, params) for dtypes, members in buckets.items()]

    def _init(self, p: Tensor) -> None:
        """Make what is missing of the base's state."""
        if not self._base_keys:
            return
        state = self.base.state[p]
        made = tuple(name for name in self._base_keys if state.get(name) is None)
        if made:
            init_base_state(state, p, self.rules, self.group)
            self._fresh[id(p)] = made
        if self.rules.counted:
            # The kernels count in float32, on the device; torch counts in float64 where that is the default.
            device = p.device if self.triton else "cpu"
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)

    def _bucket(self, dtypes: tuple[str, ...], numbers: list[int], params: Sequence[Tensor]) -> _Bucket:
        low = dtypes[0] == "bfloat16"
        layout = Layout(dtypes, self._rounding if low else "nearest", self.rules.counted)
        members = [params[i] for i in numbers]
        numels = [p.numel() for p in members]
        if self.triton:
            from optx.kernels.step_triton import TritonStep

            runner: Any = TritonStep(self.program, layout, numels, numbers, members[0].device)
            # One key for the whole run: on the device, draws go on with the step count, also in CUDA graphs.
            runner.set_key(step_key(self.group.get("optx.seed", 0), 0), self.group.get("optx.step", 0))
        else:
            from optx.kernels.step_cpu import CpuStep

            runner = CpuStep(self.program, layout, numels, numbers)
        keys = [self._key(name) for name in (*runner.columns.roles[2:], *runner.columns.cells)]
        return _Bucket(members, runner, keys, len(runner.columns.roles) - 2)

    def _key(self, name: str) -> str:
        """Where ``state[p]`` has a role or cell."""
        if name in self._base_keys:
            return name
        return KAHAN if name == "kahan" else f"optx.{name}"

    def _find(self, p: Tensor, key: str) -> Tensor:
        """A state tensor, made if it is not there."""
        if key in self._base_keys:
            self._init(p)
            return self.base.state[p][key]
        return self._slot(p, key)

    def _point(self, bucket: _Bucket) -> None:
        """Write addresses into the table. What runs per tensor here is most of a small model's step."""
        members = bucket.members
        state = self.base.state
        states = [state.get(p, _NOTHING) for p in members]
        weights = [p.data_ptr() for p in members]
        if weights != bucket.addresses.get(0):
            self._moved(bucket)
        self._set(bucket, 0, weights)
        self._set(bucket, 1, [g.data_ptr() for g in self._gradients(bucket)])
        for column, key in enumerate(bucket.keys, start=2):
            try:
                tensors = [s[key] for s in states]
                addresses = [t.data_ptr() for t in tensors]
            except (KeyError, AttributeError):  # not there yet, or None
                tensors = [self._find(p, key) for p in members]
                states = [state.get(p, _NOTHING) for p in members]
                addresses = [t.data_ptr() for t in tensors]
            if addresses != bucket.addresses.get(column):
                if column < 2 + bucket.roles:
                    for t, p in zip(tensors, members, strict=True):
                        _lay_out_like(t, p)
                self._set(bucket, column, [t.data_ptr() for t in tensors])
        fresh = bucket.runner.cols[:, FRESH]
        if self._fresh or fresh.any():
            fresh[:] = [id(p) in self._fresh for p in members]

    def _moved(self, bucket: _Bucket) -> None:
        """Weights lie elsewhere, maybe in another order: ``model.to(memory_format=...)`` sets ``.data``."""
        for p in bucket.members:
            if (reason := _why_not_tensor(p)) is not None:
                raise OptxError(f"optx: after wrap(), {reason}; wrap the optimizer again.")
        bucket.plain = all(p.is_contiguous() for p in bucket.members)
        bucket.addresses.clear()  # so that the state is laid out like them, see _point

    def _set(self, bucket: _Bucket, column: int, addresses: list[int]) -> None:
        if addresses != bucket.addresses.get(column):
            bucket.runner.tensors[:, column] = addresses
            bucket.addresses[column] = addresses

    def _gradients(self, bucket: _Bucket) -> list[Tensor]:
        """The gradients in their weights' memory order; copies only where they are not."""
        grads: list[Tensor] = [p.grad for p in bucket.members]  # type: ignore[misc]
        try:
            if bucket.plain and all(g.is_contiguous() for g in grads):
                return grads
        except RuntimeError:
            pass  # a sparse gradient has no memory order; the next line says so
        laid_out = [_like(g, p) for g, p in zip(grads, bucket.members, strict=True)]
        # Only the copies: a gradient kept here would outlive zero_grad().
        self._copies += [new for new, g in zip(laid_out, grads, strict=True) if new is not g]
        return laid_out

    # ---- a step ------------------------------------------------------------------------------------

    def step(self) -> None:
        """A whole step, where nothing waits for totals."""
        for bucket in self._buckets:
            bucket.runner.step()
        self._done()

    def measure(self, level: int) -> dict[str, Any]:
        """A level's sums and scalars; this group's share of its totals by name."""
        if level >= len(self.program.levels):
            return {}
        shares: dict[str, Any] = {}
        for bucket in self._buckets:
            runner = bucket.runner
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
            bucket.runner.receive(totals)
            bucket.runner.finish(level)

    def update(self) -> None:
        """Rewrite weights and state, and count the step."""
        for bucket in self._buckets:
            bucket.runner.update()
            bucket.runner.commit()
        self._done()

    def _done(self) -> None:
        self._fresh.clear()
        self._copies.clear()

    def undo(self) -> None:
        """The step is skipped: take back the state that `prepare` made."""
        for p in self.active:
            for name in self._fresh.get(id(p), ()):
                del self.base.state[p][name]
            if p in self.base.state and not self.base.state[p]:
                del self.base.state[p]
        self._done()


_NOTHING: dict[str, Tensor] = {}


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _lay_out_like(t: Tensor, p: Tensor) -> None:
    """A state tensor in another memory order (from a checkpoint, say) is laid out like its weight."""
    if not (t.is_contiguous() and p.is_contiguous()) and t.stride() != p.stride():
        t.data = torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)


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
