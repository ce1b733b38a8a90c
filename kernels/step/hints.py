"""Hints at the memory that a kernel's next runs will read or write, where a processor gains by them."""

from __future__ import annotations

from collections.abc import Sequence

from optx.kernels import cpu, processor
from optx.kernels.step.cpu_lines import SCALE, Use

AHEAD = 2048  # bytes
# Where a processor fetches ahead by itself, it does so within a page. A hint at a page 16 pages on has that
# page's address found by the time that it is read: a sum of squares alone is 4 (AVX2) to 10 % (AVX-512)
# faster, a step with a pass that only reads 2 to 5 %. A pass that writes gains nothing.
PAGE, PAGES_AHEAD = 4096, 65536


def hints(use: Use, written: Sequence[str], size: int = cpu.RUN) -> tuple[list[str], list[str]]:
    """The intrinsics that a chunk's hints need, and the hints of a run of so many elements."""
    made: dict[str, None] = {}
    lines: list[str] = []
    by_itself = processor.fetches_ahead()
    for role in () if by_itself and written else use.addressed:
        if role.endswith(SCALE):
            continue  # a line of them lasts for several runs
        # A run's bits are a quarter of a line.
        count = 1 if by_itself or role in use.packed else size * use.itemsize(role) // 64
        write = role in written
        hint = f"{'write' if write else 'read'}_{count}"
        made[f"{hint} = prefetch({count}, {write})"] = None
        at = use.moved(role, "at")
        ahead = f"({at} + {PAGES_AHEAD}) & -{PAGE}" if by_itself else f"{at} + {AHEAD}"
        lines.append(f"{hint}({ahead})")
    return list(made), lines
