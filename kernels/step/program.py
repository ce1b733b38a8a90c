"""What one param group's step computes, as data: rules bound to registers, tensors and numbers.

Three readers share it, so that none can disagree with another about what a step means: the interpreter on
torch tensors (`optx.step.foreach`), and the emitters of Numba and Triton code (`emit_cpu`, `emit_triton`).

A step runs in this order::

    for each level:  one pass each stores what functions of whole matrices are given; they are called
                     one pass over the elements takes the level's sums      (only where a rule needs sums)
                     scalars, per tensor, in float64
                     totals over the whole optimizer, then the finishing scalars
    one pass:        gradient rules, weight rules, base update, after rules, observed and metered sums

A level whose sums see what some of those rules make of the elements (a gradient rewritten, a base's update)
applies them in registers and stores nothing: until the one pass that writes, a step can be given up. The
passes for whole matrices store what they make beside all state. In the end::

    commit:          the step count, cells that scalars wrote and the observed sums become state
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from optx._rules import Rule

Kind = Literal["reg", "local", "slot", "cell", "col", "hyper", "total", "row", "column", "rows", "columns"]
Axis = Literal["row", "column"]
AXES: tuple[Axis, ...] = ("row", "column")
NUMBER_KINDS: tuple[Kind, ...] = ("col", "hyper", "total")


class Ref(NamedTuple):
    """Where a rule's argument lives.

    Kinds:
        reg: ``w``, ``g`` or ``w0`` (the weight when the step began), in registers.
        local: a register that is neither loaded nor stored.
        slot: a state tensor with one element per weight element.
        cell: a state tensor with one element per weight tensor.
        col: a number per tensor, computed in this step.
        hyper: a number per param group.
        total: the sum of a col over every tensor of the optimizer.
        row, column: a number per row or column of the weight as a matrix (shape[0], all the rest), computed
            in this step.
        rows, columns: a state tensor with one element per row or column.
    """

    kind: Kind
    name: str


W, G, W0 = Ref("reg", "w"), Ref("reg", "g"), Ref("reg", "w0")
# What the base makes of its gradient, where later rules read the one that it was given.
BASE_G = Ref("local", "base_g")


@dataclass(frozen=True)
class Call:
    """One rule with every argument and result bound."""

    rule: Rule
    args: tuple[Ref, ...]
    writes: tuple[Ref, ...]

    @property
    def axis(self) -> Axis | None:
        """Of a call that does not run per element: what it runs over; None for once per tensor.

        What such a call writes as a col is summed over the rows or columns.
        """
        kinds = {ref.kind for ref in (*self.args, *self.writes)}
        return next((axis for axis in AXES if kinds & {axis, f"{axis}s"}), None)


@dataclass(frozen=True)
class Fill:
    """A function of whole matrices: what it is given and what it makes, in the dtype ``dtype``.

    A pass stores ``value``, which ``calls`` of the update make in registers; what the function makes of it
    takes its place, and rules read it as ``result``: a slot that is no state.
    """

    calls: tuple[Call, ...]
    value: Ref
    result: Ref
    function: Callable[[Any], Any]
    dtype: str


@dataclass(frozen=True)
class Level:
    """One round of sums and the scalars that follow from them."""

    prefix: tuple[Call, ...] = ()  # of the update, what the sums see: applied in registers before summing
    # Summands per element; their writes are cols, or rows, or columns: what they are summed over.
    sums: tuple[Call, ...] = ()
    scalars: tuple[Call, ...] = ()  # per tensor, and per row or column, in order; see `Call.axis`
    totals: tuple[Ref, ...] = ()  # cols to add over the whole optimizer
    finish: tuple[Call, ...] = ()
    # Its sums see the base's update: where the base is run as it is, they are taken once it has been.
    after: bool = False
    fills: tuple[Fill, ...] = ()  # they come first

    def summed(self, kind: Kind = "col") -> list[Ref]:
        """What its pass sums over tensors, rows or columns."""
        return [ref for call in self.sums for ref in call.writes if ref.kind == kind]

    @property
    def element_calls(self) -> tuple[Call, ...]:
        """What its pass computes of each element."""
        return (*self.prefix, *self.sums)


@dataclass(frozen=True)
class Program:
    """The step of one param group. Equal programs share one compiled kernel."""

    levels: tuple[Level, ...]
    gradient: tuple[Call, ...]
    weight: tuple[Call, ...]
    base: tuple[Call, ...]  # empty: the base optimizer is run as it is
    after: tuple[Call, ...]
    observe: tuple[Call, ...]  # summands of what was written; their writes are cells
    # Summands of what was stored, and of the gradient that the step was given; their writes are cols, which
    # nothing of the step reads.
    meter: tuple[Call, ...] = ()
    # Cells that scalars wrote: until the step is over, the new value is in the col of the same name.
    kept: tuple[str, ...] = ()
    # Dtypes of cells that aren't float64, by name; None for the weight's.
    cell_dtypes: tuple[tuple[str, str | None], ...] = ()
    # Slots of one bit an element, which are only read. A layout has them as "bits" (in memory order), "bool"
    # (bytes) or "ones" (not there: every one is 1).
    packed: tuple[str, ...] = ()
    # State tensors with one element per row or column, and which of the two. What a level writes under their
    # names is in them once the step is over.
    vectors: tuple[tuple[str, Axis], ...] = ()

    @property
    def update(self) -> tuple[Call, ...]:
        """All calls of the update pass, in order."""
        return (*self.gradient, *self.weight, *self.base, *self.after)

    @property
    def later(self) -> tuple[Call, ...]:
        """The calls per element that see what the base makes of the weight, before it is stored."""
        levels = (call for level in self.levels if level.after for call in level.element_calls)
        return (*levels, *self.after)

    @property
    def left(self) -> tuple[Call, ...]:
        """The sums of what the update pass left, in the order in which it takes them."""
        return (*self.observe, *self.meter)

    def element_calls(self) -> Iterator[Call]:
        """Every call that runs once per element."""
        for level in self.levels:
            for fill in level.fills:
                yield from fill.calls
            yield from level.element_calls
        yield from self.update
        yield from self.observe
        yield from self.meter

    def calls(self) -> Iterator[Call]:
        """Every call."""
        yield from self.element_calls()
        for level in self.levels:
            yield from level.scalars
            yield from level.finish

    def named(self, kind: Kind) -> tuple[str, ...]:
        """The names of one kind in order of first use."""
        refs = (ref for call in self.calls() for ref in (*call.args, *call.writes))
        found = dict.fromkeys(ref.name for ref in refs if ref.kind == kind)
        if kind == "total":
            found.update(dict.fromkeys(ref.name for level in self.levels for ref in level.totals))
        return tuple(found)

    @property
    def slots(self) -> tuple[str, ...]:
        """State tensors that are read or written element by element."""
        return self.named("slot")

    @functools.cached_property
    def scratch(self) -> dict[str, str]:
        """Of the slots those that are no state, and their dtypes: what functions of whole matrices make."""
        return {fill.result.name: fill.dtype for level in self.levels for fill in level.fills}

    @property
    def cells(self) -> tuple[str, ...]:
        """State tensors with one element per weight tensor."""
        return tuple(dict.fromkeys((*self.named("cell"), *self.kept)))

    def cell_dtype(self, name: str, weight: str) -> str:
        """A cell's or vector's dtype, where the weight has the dtype ``weight``."""
        return dict(self.cell_dtypes).get(name, "float64") or weight

    def along(self, axis: Axis) -> tuple[str, ...]:
        """The names of what is computed per row or column."""
        return self.named(axis)

    @property
    def tiled(self) -> bool:
        """Whether anything is summed or read per row or column: kernels then walk over tiles of a matrix."""
        return any(map(self.along, AXES))

    @property
    def shaped(self) -> bool:
        """Whether it matters where a weight's rows and columns lie in memory."""
        return self.tiled or bool(self.scratch)

    @property
    def needs_all_rows(self) -> bool:
        """Whether anything but elements depends on numbers per row: what is kept of them, or their sums."""
        calls = [call for level in self.levels for call in level.scalars if call.axis == "row"]
        kept = any(axis == "row" for _, axis in self.kept_vectors)
        return kept or any(ref.kind == "col" for call in calls for ref in call.writes)

    @property
    def kept_vectors(self) -> tuple[tuple[str, Axis], ...]:
        """Those of the vectors that the step writes."""
        written = {ref for level in self.levels for call in level.scalars for ref in call.writes}
        return tuple((name, axis) for name, axis in self.vectors if Ref(axis, name) in written)

    @property
    def stored_slots(self) -> frozenset[str]:
        """Slots that the update pass writes."""
        return frozenset(r.name for call in self.update for r in call.writes if r.kind == "slot")

    @property
    def has_totals(self) -> bool:
        """Whether any scalar waits for a sum over the whole optimizer."""
        return any(level.totals for level in self.levels)

    def reads(self, calls: tuple[Call, ...]) -> frozenset[Ref]:
        """What the calls read."""
        return frozenset(ref for call in calls for ref in call.args)


def needed(calls: Iterable[Call], sums: Iterable[Call]) -> tuple[Call, ...]:
    """Of some calls those whose results some sums read: others would load tensors for nothing."""
    return leading_to(calls, (ref for call in sums for ref in call.args))


def leading_to(calls: Iterable[Call], refs: Iterable[Ref]) -> tuple[Call, ...]:
    """Of some calls those that have a part in what some references are in the end."""
    wanted = set(refs)
    kept: list[Call] = []
    for call in reversed(tuple(calls)):
        if wanted & set(call.writes):
            kept.insert(0, call)
            wanted |= set(call.args)
    return tuple(kept)


def given(calls: Iterable[Call]) -> frozenset[Ref]:
    """What calls in order read that none of them wrote before."""
    found: set[Ref] = set()
    written: set[Ref] = set()
    for call in calls:
        found |= set(call.args) - written
        written |= set(call.writes)
    return frozenset(found)


def in_turn(calls: Iterable[Call]) -> list[tuple[Axis | None, list[Call]]]:
    """Calls that do not run per element, in order: those together that run over the same.

    What some of them sum over rows or columns is known to those that come after all of these.
    """
    groups: list[tuple[Axis | None, list[Call]]] = []
    for call in calls:
        last, some = groups[-1] if groups else (None, [])
        sums = {ref for one in some for ref in one.writes if last and ref.kind == "col"}
        if groups and last == call.axis and not sums & set(call.args):
            some.append(call)
        else:
            groups.append((call.axis, [call]))
    return groups
