"""Composes transforms and a base into one `Program`: binds names, and finds how few passes do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from optx._errors import TransformError
from optx._rules import rule
from optx.kernels.step.program import AXES, NUMBER_KINDS, Axis, Call, G, Level, Program, Ref, needed
from optx.kernels.step.text import variable
from optx.step.base_calls import add_base
from optx.step.base_update import BaseRules
from optx.step.binding import GRAD_SQ, SIZES, Binder, common_names
from optx.step.builder import Builder, square
from optx.step.declared import Slot
from optx.step.measured import INCOMING_SQ
from optx.step.step_moments import Moments
from optx.step.transform import Transform

INCOMING = Ref("col", INCOMING_SQ)


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
    counted = bool(base.counted) if base else "step" in names
    common = common_names(names - {"step"}, base_hypers, counted)
    b = Builder(common)
    if check_finite:
        b.need_grad_sq()
        # A col of its own: later transforms may replace grad_sq.
        b.extend(0, scalars=[Call(_keep, (GRAD_SQ,), (Ref("col", "incoming_sq"),))])
        b.extend(0, totals=[Ref("col", "incoming_sq")])
    enclosing_first = sorted(transforms, key=lambda t: not t.encloses)
    binders = {t.name: Binder(t, moments[t.name], common) for t in enclosing_first}
    for transform in enclosing_first:
        _add(b, transform, binders[transform.name])
    if base:
        add_base(b, base, any(binder.reads(m, "g") for binder in binders.values() for m in SEE_BASE))
    b.before = len(b.levels)
    # Where the base is run as it is, all that comes before has been stored by then.
    before = (*b.gradient, *b.weight, *b.base) if base else ()
    for transform in sorted(transforms, key=lambda t: t.encloses):
        _add_after(b, binders[transform.name], before)
    for transform in enclosing_first:
        _add_watches(b, binders[transform.name])
    if meter:
        _meter_gradient(b)
    slots = {f"{t.name}.{name}": slot for t in transforms for name, slot in t.slots.items()}
    packed = tuple(name for name, slot in slots.items() if slot.packed)
    slots |= base.slots if base else {}
    program = Program(
        tuple(
            replace(level, prefix=needed(level.prefix, level.sums), after=index >= b.before)
            for index, level in enumerate(b.levels)
        ),
        tuple(b.gradient),
        tuple(b.weight),
        tuple(b.base),
        tuple(b.after),
        tuple(b.observe),
        tuple(b.meter) if meter else (),
        tuple(b.kept),
        tuple(_cell_dtypes(slots)),
        packed,
        tuple(_vectors(slots, b.levels)),
    )
    _check_spelling(program)
    return program


def _meter_gradient(b: Builder) -> None:
    """The squared norm of the gradient that the step is given: kept, where it is summed anyway."""
    first = b.levels[0] if b.levels else Level()
    if not first.prefix and Call(square, (G,), (GRAD_SQ,)) in first.sums:
        own = Call(_keep, (GRAD_SQ,), (INCOMING,))
        b.levels[0] = replace(first, scalars=(own, *first.scalars))
    else:
        b.meter.append(Call(square, (G,), (INCOMING,)))


def _cell_dtypes(slots: Mapping[str, Slot]) -> Iterable[tuple[str, str | None]]:
    """Of what has fewer numbers than a weight, and isn't float64."""
    for name, slot in slots.items():
        if slot.kind != "slot" and slot.dtype != torch.float64:
            yield name, None if slot.dtype is None else str(slot.dtype).removeprefix("torch.")


def _vectors(slots: Mapping[str, Slot], levels: Iterable[Level]) -> Iterable[tuple[str, Axis]]:
    """State per row and column that the step reads or writes."""
    used = {ref for level in levels for call in level.scalars for ref in (*call.args, *call.writes)}
    for name, slot in slots.items():
        if slot.axis and {Ref(slot.axis, name), Ref(slot.kind, name)} & used:
            yield name, slot.axis


def _check_spelling(program: Program) -> None:
    """Refuse names that would be one variable in a kernel."""
    for kind in ("slot", "cell", *NUMBER_KINDS, *AXES):
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


def _add(b: Builder, transform: Transform, binder: Binder) -> None:
    """What a transform does before the base's update."""
    level = 0
    for moment in ("sums", "row_sums", "column_sums"):
        if sums := binder.call(moment):
            level = b.sum(sums)
    if counters := binder.counts():
        b.extend(0, scalars=counters)
    if any(binder.reads(moment, "grad_sq") for moment in _AFTER_SUMS):
        level = max(level, b.need_grad_sq())
    if any(binder.reads(moment, "grad_sq") for moment in _AFTER_SUMS[1:]):
        own = Ref("col", f"{transform.name}.grad_sq")
        b.extend(level, scalars=[Call(_keep, (GRAD_SQ,), (own,))])
    scalars = binder.call("scalars")
    calls = (scalars, binder.call("rows"), binder.call("columns"))
    b.extend(level, scalars=[call for call in calls if call])
    totals = binder.totals()
    b.extend(level, totals=totals)
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
        if any(ref.kind in _COMPUTED and ref not in SIZES for ref in gradient.args):
            b.depth = max(b.depth, level + 1)
    if weight := binder.call("weight"):
        b.weight.append(weight)


def _add_after(b: Builder, binder: Binder, before: Sequence[Call]) -> None:
    """What it does once the base has made the new weight, in levels that follow all others.

    Args:
        b: what it is added to.
        binder: of the transform.
        before: what its sums have to apply in registers to see the new weight.
    """
    level = b.before
    if sums := binder.call("after_sums"):
        level = b.sum_left(sums, (*before, *b.after), level)
    if scalars := binder.call("after_scalars"):
        level = b.scalar(scalars, level)
    totals = binder.totals("after_")
    finish = binder.call("after_finish")
    if totals:
        read = (*totals, *(ref for ref in finish.args if ref.kind == "col")) if finish else totals
        level = max([level, *map(b.computed, read)])
        b.extend(level, totals=totals, finish=[finish] if finish else [])
    elif finish:
        b.scalar(finish, level)
    if after := binder.call("after"):
        b.after.append(after)


def _add_watches(b: Builder, binder: Binder) -> None:
    """What it looks at in the end."""
    for moment, calls in (("observe", b.observe), ("meter", b.meter)):
        if call := binder.call(moment):
            calls.append(call)
    b.kept += [name for name in binder.kept if name not in b.kept]


# The moments that run once sums have been taken; and those that see what the base makes of the weight, and
# the gradient that it was given.
_AFTER_SUMS = (
    *("scalars", "rows", "columns", "finish", "gradient", "weight"),
    *("after_sums", "after_scalars", "after_finish", "after", "observe", "meter"),
)
_COMPUTED = ("col", "total", "row", "column")  # in this step, per tensor, row or column
SEE_BASE = ("after_sums", "after", "observe")
