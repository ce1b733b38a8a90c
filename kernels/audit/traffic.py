"""Counts the bytes a program must move: the floor under its time."""

from __future__ import annotations

from collections.abc import Iterable

from optx.kernels.step.layout import EIGHT, GROUP, Layout
from optx.kernels.step.program import Call, Fill, Program, given

SIZES: dict[str, float] = {
    **{"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2},
    **{"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8},
    **{"bits": 0.125, "ones": 0},  # packed slots
    **dict.fromkeys(EIGHT, 1 + 2 / GROUP),  # a code, and its share of a scale
}
_BESIDE = {"kahan": 2, "split8": 1, "split16": 2}  # what a weight has more


def call_bytes(program: Program, layout: Layout, calls: Iterable[Call], stores: bool) -> float:
    """Bytes per element that some calls must read and, in the update, write."""
    size = {"w": SIZES[layout.dtypes[0]], "g": SIZES[layout.dtypes[1]]}
    size |= {name: SIZES[dtype] for name, dtype in zip(program.slots, layout.dtypes[2:], strict=True)}
    size["w"] += _BESIDE.get(layout.rounding, 0)
    read = {"w" if r.name == "w0" else r.name for r in given(calls) if r.kind in ("reg", "slot")}
    written: set[str] = {"w", *program.stored_slots} if stores else set()
    return sum(size[role] for role in read) + sum(size[role] for role in written)


def fill_bytes(program: Program, layout: Layout, fill: Fill) -> float:
    """Bytes per element that storing what a function of whole matrices is given must move."""
    return call_bytes(program, layout, fill.calls, stores=False) + SIZES[fill.dtype]


def step_bytes(program: Program, layout: Layout) -> float:
    """Bytes per element of a whole step: every level's passes and the update, no function of matrices."""
    total = call_bytes(program, layout, (*program.update, *program.observe), stores=True)
    for level in program.levels:
        total += sum(fill_bytes(program, layout, fill) for fill in level.fills)
        if level.sums:
            total += call_bytes(program, layout, level.element_calls, stores=False)
    return total


def row_numbers(calls: Iterable[Call]) -> tuple[int, int]:
    """How many numbers per row some calls per element read, and how many sums over rows they take."""
    calls = tuple(calls)
    read = {ref for call in calls for ref in call.args if ref.kind == "row"}
    return len(read), sum(ref.kind == "row" for call in calls for ref in call.writes)


def row_bytes(layout: Layout, calls: Iterable[Call], across: int) -> float:
    """Bytes per element that these take, where a program sees so many columns at once.

    Those of columns are loaded once, and stored once, while it walks down hundreds of rows.
    """
    read, summed = row_numbers(calls)
    return (read * (8 if layout.dtypes[0] == "float64" else 4) + summed * 8) / across
