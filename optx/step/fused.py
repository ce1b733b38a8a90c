"""The fused paths: whether a param group can take one, and the tables that point a kernel at its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError
from optx._names import parameter_names
from optx._rules import RuleSourceError
from optx.kernels.available import why_unavailable
from optx.kernels.step.layout import FRESH, Layout
from optx.kernels.step.program import Program
from optx.step.base_step import step_replaced
from optx.step.bases import BaseRules, base_rules, init_base_state, rule_numbers
from optx.step.checks import check_count, shapes_differ
from optx.step.memory import DTYPES, Extents, Likeness, extent, why_not_dense, why_not_plain
from optx.step.rounding import step_key
from optx.step.slots import KAHAN, Slots
from optx.step.state import is_ours
from optx.step.transform import SLOT_DTYPES, Group

SLOT_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in SLOT_DTYPES}


class Unfusable(Exception):
    """Found while pointing kernels at tensors: one has no memory to point at. The message says why."""


def why_not(base: torch.optim.Optimizer, group: Group, program: Program) -> str | None:
    """Why a group can't take a fused path whatever its tensors are, in words; None if it can."""
    if base_rules(base, group) is None:
        return f"{type(base).__name__} has no fused form (SGD, Adam and AdamW have)"
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
    return why_unavailable("triton" if devices == {"cuda"} else "numba")


def why_not_tensors(group: Group, state: Any) -> str | None:
    """Why the tensors of a group can't be served by a kernel as they are now, in words; None if they can."""
    devices = {p.device.type for p in group["params"]}
    if not devices <= {"cpu"} and not devices <= {"cuda"}:
        return f"no fused kernels for tensors on {', '.join(sorted(devices))}"
    written: list[Tensor] = []
    read: list[Tensor] = []
    for p in group["params"]:
        reason = why_not_weight(p) or (why_not_gradient(p.grad) if p.grad is not None else None)
        if reason:
            return reason
        written.append(p)
        if p.grad is not None and why_not_plain(p.grad) is None:
            read.append(p.grad)
        for key, value in state.get(p, _NOTHING).items():
            if isinstance(value, Tensor) and not is_ours(key):
                reason = why_not_plain(value)
                if key != "step" and reason:
                    return f"{key} of a parameter {reason}"
                if reason is None and value.device == p.device:
                    written.append(value)
    memory = Extents.of(written)
    if memory.overlap:
        return _SHARED
    aliased = memory.meet([g.data_ptr() for g in read], [extent(g) for g in read])
    return _ALIASED if aliased else None


def why_not_weight(p: Tensor) -> str | None:
    """Why a parameter can't be served by a kernel."""
    reason = why_not_plain(p)
    if reason is None and p.dtype not in DTYPES:
        reason = f"is {p.dtype}"
    reason = reason or why_not_dense(p)
    return reason and f"a parameter {reason}"


def why_not_gradient(g: Tensor) -> str | None:
    """Why a gradient can't be served, nor be laid out anew for a kernel."""
    if g.layout != torch.strided:
        return "a gradient is sparse"
    reason = why_not_plain(g)
    if reason is None or (type(g) is Tensor and (g.is_neg() or g.is_conj() or g._is_zerotensor())):  # pyright: ignore
        return None  # a lazy one is computed into memory of its own
    return f"a gradient {reason}"


@dataclass
class _Column:
    """What the tensors of one column of a table were when their addresses were taken."""

    like: Likeness | None  # None for single numbers: at the same address they are what they were
    addresses: list[int]
    sizes: list[int]  # in bytes

    @classmethod
    def of(cls, tensors: Sequence[Tensor], single: bool) -> _Column:
        like = None if single else Likeness(tensors)
        return cls(like, list(map(_ADDRESS, tensors)), list(map(extent, tensors)))


@dataclass
class _Bucket:
    """Tensors of a group that one kernel serves: all of the same dtypes."""

    members: list[Tensor]
    runner: Any  # CpuStep or TritonStep
    keys: list[str]  # where state[p] has each role after w and g, then each cell
    columns: list[_Column] = field(default_factory=list[_Column])
    found: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])  # in a step, by key
    # The parameters that had state, in the order of `base.state`, and where the members are among them.
    known: list[Tensor] = field(default_factory=list[Tensor])
    places: list[int] = field(default_factory=list[int])
    # By key of a derived number: its sources and itself, and their versions, as last seen.
    looked: dict[str, tuple[list[Any], list[int] | None]] = field(default_factory=dict[str, Any])


class FusedGroup:
    """Runs one param group's program through compiled kernels.

    A step compares every tensor with what it was when its address was taken; where anything differs, all are
    looked at again and the tables are made anew, before anything is changed.

    Args:
        group: the param group.
        program: what to compute.
        rules: the base's update.
        base: its state is read and, for new parameters, made as torch makes it.
        slots: the transforms' state.
        derived: keys of the cells that are taken from a state tensor of the base, with its name.
        rounding: for bfloat16 weights.
        triton: run Triton kernels, else Numba.
    """

    def __init__(
        self,
        group: Group,
        program: Program,
        rules: BaseRules,
        base: torch.optim.Optimizer,
        slots: Slots,
        derived: Sequence[tuple[str, str]],
        rounding: str,
        triton: bool,
    ) -> None:
        self.group, self.program, self.rules, self.base = group, program, rules, base
        self._slots, self._rounding, self.triton = slots, rounding, triton
        self._derived = derived
        self._seen: list[Tensor] | None = None  # the parameters that the buckets were made for
        self._buckets: list[_Bucket] = []
        self._written = Extents([], [])  # all that the kernels write
        self._base_keys = (*rules.slots, *(("step",) if rules.counted else ()))
        # Parameters whose base state was made since the last update, by id: the names made, and whether None
        # was there (a person's doing).
        self._fresh: dict[int, dict[str, bool]] = {}
        self._was_fresh = False
        self._copies: list[Tensor] = []  # gradients laid out like their weights, alive until the update
        self.active: list[Tensor] = []
        self.draws = False  # whether anything is rounded stochastically
        self._hypers = program.named("hyper")

    # ---- tables ------------------------------------------------------------------------------------

    def prepare(self, key: Callable[[], int]) -> None:
        """Point the kernels at this step's tensors and numbers.

        Args:
            key: gives the key of this step's random draws.

        Raises:
            Unfusable: a tensor has no memory to point at; the group can be served by torch's operations.
            OptxError: a tensor that goes with a parameter has another shape or device, or an unknown dtype.
        """
        params: list[Tensor] = self.group["params"]
        grads: list[Any] = [p.grad for p in params]
        active = list(params)
        if True in map(is_, grads, repeat(None)):
            active = [p for p, g in zip(params, grads, strict=True) if g is not None]
            grads = [g for g in grads if g is not None]
        self.active = active
        self._copies.clear()
        seen = self._seen
        same = seen is not None and len(active) == len(seen) and all(map(is_, active, seen))
        if len(self._buckets) != 1:
            grads = []  # each bucket asks for its own
        if not (same and all(map(self._point, self._buckets, repeat(grads)))):
            self._seen = None
            self._rebuild(params)
            self._seen = list(active)
        if self._derived:  # in place, once every tensor has been looked at
            for bucket in self._buckets:
                self._refresh_derived(bucket)
        numbers: dict[str, Any] = rule_numbers(self.group, self._hypers)
        drawn = key() if self.draws else 0
        for bucket in self._buckets:
            runner = bucket.runner
            if self.triton:
                runner.live = {
                    i: numbers[n] for i, n in enumerate(runner.columns.hypers) if _on_gpu(numbers[n])
                }
            elif self.draws:
                runner.set_key(drawn)
            plain = [0.0 if _on_gpu(v) else float(v) for v in map(numbers.__getitem__, runner.columns.hypers)]
            runner.hypers[: len(plain)] = plain

    def _rebuild(self, params: Sequence[Tensor]) -> None:
        """Look at every tensor, sort the parameters by dtypes, and make the tables."""
        buckets: dict[tuple[str, ...], list[int]] = {}
        for i, p in enumerate(params):
            if p.grad is not None:
                self._check_weight(p)
                self._init(p)
                slots = [self._role(p, self._key(name)) for name in self.program.slots]
                for name in self.program.cells:
                    self._cell(p, name)
                dtypes = tuple(SLOT_DTYPE_NAMES[t.dtype] for t in (p, p.grad, *slots))
                buckets.setdefault(dtypes, []).append(i)
        self.draws = any("bfloat16" in (d[0], *d[2:]) for d in buckets)
        self._buckets = [self._bucket(dtypes, members, params) for dtypes, members in buckets.items()]
        for bucket in self._buckets:
            self._take(bucket)
        written = [c for b in self._buckets for c in (b.columns[0], *b.columns[2:])]
        self._written = Extents(
            [a for c in written for a in c.addresses], [n for c in written for n in c.sizes]
        )
        if self._written.overlap:
            raise Unfusable(_SHARED)
        if any(self._written.meet(b.columns[1].addresses, b.columns[1].sizes) for b in self._buckets):
            raise Unfusable(_ALIASED)

    def _check_weight(self, p: Tensor) -> None:
        assert p.grad is not None
        reason = why_not_weight(p) or why_not_gradient(p.grad)
        if reason:
            raise Unfusable(reason)
        if p.grad.dtype not in DTYPES:
            raise OptxError(
                f"optx: the gradient of {self._name(p)} is {p.grad.dtype}, which no kernel reads."
            )
        self._check_fits(p, "its gradient", p.grad)

    def _check_fits(self, p: Tensor, what: str, t: Tensor) -> None:
        """What goes with a weight element by element has its shape and is where it is."""
        if t.shape != p.shape:
            raise ShapeError(shapes_differ(parameter_names(self.base)[id(p)], p, what, t))
        if t.device != p.device:
            raise OptxError(
                f"optx: {self._name(p)} is on {p.device}, {what} is on {t.device}; move it there."
            )

    def _role(self, p: Tensor, key: str) -> Tensor:
        """A state tensor with one element per weight element, laid out like the weight."""
        t = self._find(p, key)
        self._check_tensor(p, key, t)
        self._check_fits(p, _words(key), t)
        if t.dtype not in (DTYPES if key in self._base_keys else SLOT_DTYPE_NAMES):
            raise OptxError(f"optx: {_words(key)} of {self._name(p)} is {t.dtype}, which no kernel reads.")
        _lay_out_like(t, p)
        return t

    def _cell(self, p: Tensor, name: str) -> Tensor:
        """A state tensor with one element per weight, in the dtype that kernels are made for."""
        key = self._key(name)
        t = self._find(p, key)
        self._check_tensor(p, key, t)
        if t.numel() != 1:
            raise ShapeError(
                f"optx: {_words(key)} of {self._name(p)} has shape {tuple(t.shape)}; it must be one number."
            )
        wanted = self.program.cell_dtype(name, SLOT_DTYPE_NAMES[p.dtype])
        if SLOT_DTYPE_NAMES.get(t.dtype) != wanted:
            t.data = t.to(getattr(torch, wanted))  # from a checkpoint of another version, say
        return t

    def _check_tensor(self, p: Tensor, key: str, t: Any) -> None:
        if not isinstance(t, Tensor):
            raise OptxError(
                f"optx: {_words(key)} of {self._name(p)} is a {type(t).__name__}; it must be a tensor."
            )
        if reason := why_not_plain(t):
            raise Unfusable(f"{_words(key)} of a parameter {reason}")

    def _name(self, p: Tensor) -> str:
        return f"parameter {parameter_names(self.base)[id(p)]!r}"

    def _init(self, p: Tensor) -> None:
        """Make what is missing of the base's state."""
        if not self._base_keys:
            return
        state = self.base.state[p]
        made = {name: name in state for name in self._base_keys if state.get(name) is None}
        if made:
            self._fresh[id(p)] = made  # first, so that an interrupt leaves nothing behind
            init_base_state(state, p, self.rules, self.group)
        if self.rules.counted:
            count = check_count(state["step"], self.base, p)
            # The kernels count in float32, on the device; torch counts in float64 where that is the default.
            device = p.device if self.triton else "cpu"
            state["step"] = torch.as_tensor(count, dtype=torch.float32, device=device)

    def _bucket(self, dtypes: tuple[str, ...], numbers: list[int], params: Sequence[Tensor]) -> _Bucket:
        low = dtypes[0] == "bfloat16"
        layout = Layout(dtypes, self._rounding if low else "nearest", self.rules.counted)
        members = [params[i] for i in numbers]
        numels = [p.numel() for p in members]
        if self.triton:
            from optx.kernels.step.triton import TritonStep

            runner: Any = TritonStep(self.program, layout, numels, numbers, members[0].device)
            # One key for the whole run: on the device, draws go on with the step count, also in CUDA graphs.
            runner.set_key(step_key(self.group.get("optx.seed", 0), 0), self.group.get("optx.step", 0))
        else:
            from optx.kernels.step.cpu import CpuStep

            runner = CpuStep(self.program, layout, numels, numbers)
        keys = [self._key(name) for name in (*runner.columns.roles[2:], *runner.columns.cells)]
        if "kahan" in runner.columns.roles:
            for p in members:
                self._role(p, KAHAN)
        return _Bucket(members, runner, keys)

    def _key(self, name: str) -> str:
        """Where ``state[p]`` has a role or cell."""
        if name in self._base_keys:
            return name
        return KAHAN if name == "kahan" else f"optx.{name}"

    def _find(self, p: Tensor, key: str) -> Tensor:
        """A state tensor, made if it is not there."""
        return self.base.state[p][key] if key in self._base_keys else self._slots.get(p, key)

    # ---- addresses ---------------------------------------------------------------------------------

    def _take(self, bucket: _Bucket) -> None:
        """Take the addresses of tensors that were looked at."""
        members = bucket.members
        columns = [members, self._laid_out(members)]
        columns += [[self._find(p, key) for p in members] for key in bucket.keys]
        roles = len(bucket.runner.columns.roles)
        bucket.columns = [_Column.of(tensors, i >= roles) for i, tensors in enumerate(columns)]
        for number, column in enumerate(bucket.columns):
            bucket.runner.tensors[:, number] = column.addresses
        bucket.found = dict(zip(bucket.keys, columns[2:], strict=True))
        self._mark_fresh(bucket)

    def _point(self, bucket: _Bucket, grads: list[Tensor]) -> bool:
        """Write this step's addresses into the table; False where a tensor is not what it was.

        What runs per tensor here is most of a small model's step.
        """
        members = bucket.members
        pending, states = self._slots.store.pending, self._states(bucket)
        try:
            grads = grads or [p.grad for p in members]  # type: ignore[misc]
            like = bucket.columns[1].like
            if like is None or not like(grads):
                grads = self._laid_out(members)
                if like is None or not like(grads):
                    return False
            columns = [members, grads]
            for key in bucket.keys:
                if pending and is_ours(key):
                    pairs = zip(states, members, strict=True)
                    columns.append([s[key] if key in s else pending[p][key] for s, p in pairs])
                else:
                    columns.append([s[key] for s in states])
            for number, (column, tensors) in enumerate(zip(bucket.columns, columns, strict=True)):
                if column.like is not None and number != 1 and not column.like(tensors):
                    return False
                addresses = list(map(_ADDRESS, tensors))
                if addresses != column.addresses:
                    # A gradient lies elsewhere in every step; one without elements lies nowhere.
                    if number != 1 or addresses.count(0) != column.addresses.count(0):
                        return False
                    if self._written.meet(addresses, column.sizes):
                        return False
                    bucket.runner.tensors[:, number] = addresses
                    column.addresses = addresses
        except (KeyError, TypeError, RuntimeError):  # not there, no tensor, or one without memory
            return False
        bucket.found = dict(zip(bucket.keys, columns[2:], strict=True))
        self._mark_fresh(bucket)
        return True

    def _states(self, bucket: _Bucket) -> list[dict[str, Tensor]]:
        """What the base keeps of each member.

        torch hashes tensors in Python, which takes longer than all comparisons of a step. Where the same
        parameters have state in the same order as before, it is found without.
        """
        state, members = self.base.state, bucket.members
        if len(state) > 2 * len(members):
            return [state.get(p, _NOTHING) for p in members]
        if not bucket.places or len(state) != len(bucket.known) or not all(map(is_, state, bucket.known)):
            places = {id(p): i for i, p in enumerate(state)}
            if not all(id(p) in places for p in members):
                return [state.get(p, _NOTHING) for p in members]
            bucket.known, bucket.places = list(state), [places[id(p)] for p in members]
        entries = list(state.values())
        return [entries[i] for i in bucket.places]

    def _mark_fresh(self, bucket: _Bucket) -> None:
        if self._fresh or self._was_fresh:
            bucket.runner.cols[:, FRESH] = [id(p) in self._fresh for p in bucket.members]

    def _laid_out(self, members: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in their weights' memory order."""
        grads: list[Tensor] = [p.grad for p in members]  # type: ignore[misc]
        laid_out = [_like(g, p) for g, p in zip(grads, members, strict=True)]
        # Only the copies: a gradient kept here would outlive zero_grad().
        self._copies += [new for new, g in zip(laid_out, grads, strict=True) if new is not g]
        return laid_out

    # ---- numbers that are taken from the base's state --------------------------------------------------

    def _refresh_derived(self, bucket: _Bucket) -> None:
        """Take anew what no longer goes with the state that it was taken from."""
        for key, source in self._derived:
            kept = bucket.found[key]
            sources: list[Any] = bucket.found.get(source) or [None] * len(kept)
            tensors: list[Any] = [*sources, *kept]
            try:
                versions = list(map(_VERSION, tensors))
            except (AttributeError, RuntimeError):  # not there yet, or it counts none
                versions = None
            last, then = bucket.looked.get(key, ((), None))
            # Others with the same count are possible: `state[p][k] = state[p][k].data.mul_(2)`, twice.
            if versions is None or versions != then or not all(map(is_, last, tensors)):
                self._slots.refresh(bucket.members, key, sources)
                bucket.looked[key] = tensors, versions

    def _took_derived(self) -> None:
        """Kernels count up no version: only what this step made is news."""
        for bucket in self._buckets if self._fresh else ():
            bucket.looked.clear()
            for key, source in self._derived:
                if source in bucket.found:
                    self._slots.took(bucket.members, key, bucket.found[source])

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
        self._took_derived()
        self._was_fresh = bool(self._fresh)
        self._release()

    def _release(self) -> None:
        """Let go of what is only held during a step."""
        self._fresh.clear()
        self._copies.clear()
        for bucket in self._buckets:
            bucket.found = {}

    def undo(self) -> None:
        """The step is skipped: take back the state that `prepare` made."""
        for p in self.active:
            for name, was_none in self._fresh.get(id(p), {}).items():
                if was_none:
                    self.base.state[p][name] = None
                else:
                    self.base.state[p].pop(name, None)
            if p in self.base.state and not self.base.state[p]:
                del self.base.state[p]
        if self._fresh:
            self._seen, self._buckets = None, []
        self._release()


_SHARED = "two tensors that the step writes share their memory, and kernels write all at once"
_ALIASED = "a gradient lies in memory that the step writes"
_NOTHING: dict[str, Tensor] = {}
_ADDRESS = Tensor.data_ptr

_VERSION = attrgetter("_version")


def _words(key: str) -> str:
    return f"its state {key!r}"


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _lay_out_like(t: Tensor, p: Tensor) -> None:
    """A state tensor in another memory order (from a checkpoint, say) is laid out like its weight."""
    if not (t.is_contiguous() and p.is_contiguous()) and t.stride() != p.stride():
        t.data = torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)


def _like(g: Tensor, p: Tensor) -> Tensor:
    """A gradient in its weight's memory order; itself where it is already."""
    if g.shape != p.shape:
        raise RuntimeError(
            "the gradient has another shape"
        )  # copy_ would broadcast it; looked at again, see _rebuild
    lazy = g.is_neg() or g.is_conj() or g._is_zerotensor()  # pyright: ignore
    if not lazy and ((g.is_contiguous() and p.is_contiguous()) or g.stride() == p.stride()):
        return g
    return torch.empty_like(p, dtype=g.dtype, requires_grad=False).copy_(g)
