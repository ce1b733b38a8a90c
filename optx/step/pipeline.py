"""Composes transforms and a base into one `Program`: binds names, and finds how few passes do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from optx._errors import TransformError
from optx._rules import Rule, rule
from optx.kernels.step.program import BASE_G, NUMBER_KINDS, Call, G, Level, Program, Ref
from optx.kernels.step.text import variable
from optx.step.bases import BaseRules
from optx.step.binding import GRAD_SQ, NUMEL, REGISTERS, Binder, common_names
from optx.step.measured import INCOMING_SQ
from optx.step.transform import Moments, Transform

INCOMING = Ref("col", INCOMING_SQ)


@rule(writes="grad_sq")
def square(g: Any) -> Any:
    """Summed, the gradient's squared norm."""
    return g * g


@dataclass
class _Builder:
    """Collects the calls of one group, level by level."""

    common: Mapping[str, Ref]  # what every rule may read
    levels: list[Level] = field(default_factory=list[Level])
    gradient: list[Call] = field(default_factory=list[Call])
    weight: list[Call] = field(default_factory=list[Call])
    after: list[Call] = field(default_factory=list[Call])
    observe: list[Call] = field(default_factory=list[Call])
    meter: list[Call] = field(default_factory=list[Call])
    kept: list[str] = field(default_factory=list[str])
    # Of transforms that enclose the others: after each gradient rule that is not theirs, and after all.
    closing: list[Call] = field(default_factory=list[Call])
    last: list[Call] = field(default_factory=list[Call])
    # The level whose scalars the gradient rules so far depend on, plus one; and how many of the gradient
    # rules each level's pass must re-apply to see the gradient it sums.
    depth: int = 0
    grad_sq_level: int = -1  # where the col grad_sq, as it stands now in the chain, was computed

    def level(self, index: int) -> Level:
        while len(self.levels) <= index:
            self.levels.append(Level())
        return self.levels[index]

    def extend(
        self,
        index: int,
        prefix: Iterable[Call] = (),
        sums: Iterable[Call] = (),
        scalars: Iterable[Call] = (),
        totals: Iterable[Ref] = (),
        finish: Iterable[Call] = (),
    ) -> None:
        old = self.level(index)
        self.levels[index] = Level(
            (*old.prefix, *prefix),
            (*old.sums, *sums),
            (*old.scalars, *scalars),
            (*old.totals, *totals),
            (*old.finish, *finish),
        )

    def need_grad_sq(self) -> int:
        """Make sure that the squared norm of the gradient as it stands is summed; give its level."""
        if self.grad_sq_level < 0:
            self.grad_sq_level = self.sum(Call(square, (G,), (GRAD_SQ,)))
        return self.grad_sq_level

    def sum(self, call: Call) -> int:
        """Take a sum over what the gradient rules so far make of the gradient; give its level."""
        level = self.level(self.depth)
        if level.sums and len(level.prefix) < len(self.gradient):
            self.depth += 1  # that pass sees an earlier gradient
            level = self.level(self.depth)
        if not level.sums:
            self.extend(self.depth, prefix=self.gradient)
        self.extend(self.depth, sums=[call])
        return self.depth


def build(
    transforms: Sequence[Transform],
    moments: Mapping[str, Moments],
    base: BaseRules | None,
    base_names: Iterable[str],
    base_hypers: Iterable[str],
    *,
    check_finite: bool = False,
    meter: bool = False,
) -> Program:
    """The program of one param group.

    Args:
        transforms: those enabled for the group, in order.
        moments: each one's rules, by transform name.
        base: the base's update as rules; None to leave the base as it is.
        base_names: state of the base that rules may read, ``step`` if it counts (with ``base``, that is
            known).
        base_hypers: numbers of the base's param group that rules may read.
        check_finite: total the squared norm of the incoming gradient under the name ``grad_sq``.
        meter: take the sums of `Moments.meter` too, and the incoming gradient's squared norm.

    Raises:
        TransformError: a rule reads what nothing provides, writes what its moment may not, or is none.
    """
    names = set(base_names)
    counted = base.counted if base else "step" in names
    common = common_names(names - {"step"}, base_hypers, counted)
    b = _Builder(common)
    if check_finite:
        b.need_grad_sq()
        # A col of its own: later transforms may replace grad_sq.
        b.extend(0, scalars=[Call(_keep, (GRAD_SQ,), (Ref("col", "incoming_sq"),))])
        b.extend(0, totals=[Ref("col", "incoming_sq")])
    for transform in sorted(transforms, key=lambda t: not t.encloses):
        _add(b, transform, moments[transform.name])
    b.after += b.last
    if base:
        for r in base.scalars:
            call = _bind_base(common, r, G)
            b.extend(max(len(b.levels) - 1, 0), scalars=[call])
    if meter:
        _meter_gradient(b)
    program = Program(
        tuple(_with_what_sums_need(level) for level in b.levels),
        tuple(b.gradient),
        tuple(b.weight),
        _base_update(b, base) if base else (),
        tuple(b.after),
        tuple(b.observe),
        tuple(b.meter) if meter else (),
        tuple(b.kept),
        tuple(_cell_dtypes(transforms)),
        tuple(f"{t.name}.{name}" for t in transforms for name, slot in t.slots.items() if slot.packed),
    )
    _check_spelling(program)
    return program


def _meter_gradient(b: _Builder) -> None:
    """The squared norm of the gradient that the step is given: kept, where it is summed anyway."""
    first = b.levels[0] if b.levels else Level()
    if not first.prefix and Call(square, (G,), (GRAD_SQ,)) in first.sums:
        own = Call(_keep, (GRAD_SQ,), (INCOMING,))
        b.levels[0] = replace(first, scalars=(own, *first.scalars))
    else:
        b.meter.append(Call(square, (G,), (INCOMING,)))


def _with_what_sums_need(level: Level) -> Level:
    """Without gradient rules whose results its sums do not read: they would load tensors for nothing."""
    wanted = {ref for call in level.sums for ref in call.args}
    needed: list[Call] = []
    for call in reversed(level.prefix):
        if wanted & set(call.writes):
            needed.insert(0, call)
            wanted |= set(call.args)
    return replace(level, prefix=tuple(needed))


def _cell_dtypes(transforms: Sequence[Transform]) -> Iterable[tuple[str, str | None]]:
    for transform in transforms:
        for name, slot in transform.slots.items():
            if slot.scalar and slot.dtype != torch.float64:
                dtype = None if slot.dtype is None else str(slot.dtype).removeprefix("torch.")
                yield f"{transform.name}.{name}", dtype


def _base_update(b: _Builder, base: BaseRules) -> tuple[Call, ...]:
    """The base's rules; on a gradient of their own, where rules after them read the one they were given."""
    read_later = any(G in call.args for call in (*b.after, *b.observe))
    g, calls = G, list[Call]()
    for r in base.update:
        written = BASE_G if read_later and "g" in r.writes else g
        call = _bind_base(b.common, r, g)
        writes = tuple(written if ref == g else ref for ref in call.writes)
        calls.append(Call(r, call.args, writes))
        g = written
    return tuple(calls)


def _check_spelling(program: Program) -> None:
    """Refuse names that would be one variable in a kernel."""
    for kind in ("slot", "cell", *NUMBER_KINDS):
        seen: dict[str, str] = {}
        names = program.cells if kind == "cell" else program.named(kind)
        for name in names:
            other = seen.setdefault(variable(Ref(kind, name)), name)
            if other != name:
                raise TransformError(
                    f"wrap: {other!r} and {name!r} (transform.name) can't be told apart in a kernel, where "
                    "both are written with an underscore; rename a transform or what it has."
                )


@rule(writes="kept")
def _keep(grad_sq: Any) -> Any:
    return grad_sq * 1.0


def _add(b: _Builder, transform: Transform, m: Moments) -> None:
    binder = Binder(transform, m, b.common)
    level = 0
    if sums := binder.call("sums"):
        level = b.sum(sums)
    if any(binder.reads(moment, "grad_sq") for moment in _AFTER_SUMS):
        level = max(level, b.need_grad_sq())
    if any(binder.reads(moment, "grad_sq") for moment in _AFTER_SUMS[1:]):
        own = Ref("col", f"{transform.name}.grad_sq")
        b.extend(level, scalars=[Call(_keep, (GRAD_SQ,), (own,))])
    scalars = binder.call("scalars")
    b.extend(level, scalars=[scalars] if scalars else [])
    totals = binder.totals()
    b.extend(level, totals=[t for t in totals if t not in b.level(level).totals])
    finish = binder.call("finish")
    if totals:
        b.extend(level, finish=[finish] if finish else [])
    else:  # it waits for nothing, and a step without totals runs no finish
        b.extend(level, scalars=[finish] if finish else [])
    if gradient := binder.call("gradient"):
        b.gradient.append(gradient)
        if transform.encloses:
            b.closing.append(gradient)
        else:
            b.gradient += b.closing
        b.grad_sq_level = level if scalars and GRAD_SQ in scalars.writes else -1
        if any(ref.kind in ("col", "total") and ref != NUMEL for ref in gradient.args):
            b.depth = max(b.depth, level + 1)
    after = b.last if transform.encloses else b.after
    last = (("weight", b.weight), ("after", after), ("observe", b.observe), ("meter", b.meter))
    for moment, calls in last:
        if call := binder.call(moment):
            calls.append(call)
    b.kept += [name for name in binder.kept if name not in b.kept]


_AFTER_SUMS = ("scalars", "finish", "gradient", "weight", "after", "observe", "meter")


def _bind_base(common: Mapping[str, Ref], r: Rule, g: Ref) -> Call:
    """One of the base's rules, whose gradient is in ``g``."""

    def resolve(name: str) -> Ref:
        if name == "g":
            return g
        if name == "fresh":
            return Ref("col", name)
        return REGISTERS.get(name) or common.get(name) or Ref("col", f"base.{name}")

    return Call(r, tuple(resolve(n) for n in r.reads), tuple(resolve(n) for n in r.writes))
