"""``optx audit``: what the GPU kernels compile to, without a GPU.

Compiles every Triton kernel ahead of time for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942 and reads the
machine code: registers, spills, shared memory, the width of loads and stores in the main loop, and the bytes
moved per parameter, next to the bytes that the program's roles imply. Exits with 1 if a kernel spills,
accesses memory by less than 128 bits in its main loop, or moves other bytes than implied.
"""
# Triton's compiler has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optx.kernels.audit.assembly import Machine, inspect, widths
from optx.kernels.audit.kernels import ACCESS, OTHERS, Case, Kernel, Target, kernels
from optx.kernels.step.layout import GROUP

TARGETS = [
    Target("cuda", 80, 32),
    Target("cuda", 90, 32),
    Target("cuda", 100, 32),
    Target("hip", "gfx942", 64),
]
QUICK = [TARGETS[1], TARGETS[3]]
# Memory bandwidth in bytes per second, from the vendors' data sheets.
DEVICES = {"A100-80G": 2.04e12, "H100-SXM": 3.35e12, "MI300X": 5.3e12}


@dataclass(frozen=True)
class Row:
    """What one kernel became on one target."""

    program: str
    kernel: str
    target: str
    machine: Machine
    loads: list[int]  # widths in bits
    stores: list[int]
    bytes: float  # counted, per element
    implied: float
    instructions: float  # of the main loop, per element
    problems: list[str]


# ---- compiling --------------------------------------------------------------------------------------


def measure(kernel: Kernel, target: Target) -> Row:
    """Compile a kernel for a target and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel.function, kernel.signature, kernel.constexprs, kernel.attrs)
    options = {**kernel.options, "num_warps": kernel.warps}
    gpu = GPUTarget(target.backend, target.arch, target.wave)
    machine = inspect(triton.compile(source, target=gpu, options=options))
    per_thread = kernel.elements / (kernel.warps * target.wave) or 1.0
    loop = machine.loop if kernel.elements else ()
    counted = machine.bytes / per_thread if kernel.elements else 0.0
    counted -= len(_scales(kernel, machine)) * 2 * (1 / per_thread - 1 / GROUP)
    if rows := _rows(kernel, machine, per_thread):
        counted -= sum(a.bytes for a in rows) / machine.turns / per_thread
        counted += (
            kernel.rows[0] * _width(rows, False) + kernel.rows[1] * _width(rows, True)
        ) / kernel.across
    if kernel.again:  # what is beyond the implied bytes, up to what these numbers may be
        counted -= min(max(counted - kernel.bytes, 0.0), 4 * kernel.again / per_thread)
    return Row(
        kernel.program,
        kernel.name,
        str(target),
        machine,
        widths(loop, store=False),
        widths(loop, store=True),
        counted,
        kernel.bytes,
        machine.instructions / machine.turns / per_thread if kernel.elements else 0.0,
        list(_problems(kernel, machine, counted, per_thread)),
    )


def _scales(kernel: Kernel, machine: Machine) -> list[Any]:
    """The accesses to scales in the main loop: each moment's is loaded once, and stored at most once."""
    halves = [a for a in machine.loop if a.bytes == 2]
    return halves[: 2 * kernel.scales] if kernel.scales else []


def _rows(kernel: Kernel, machine: Machine, per_thread: float) -> list[Any]:
    """The accesses to numbers per row in the main loop: of each at most one a row that a thread has."""
    found: list[Any] = []
    for count, store in zip(kernel.rows, (False, True), strict=True):
        low = [a for a in machine.loop if a.bytes < ACCESS // 8 and a.store == store]
        found += low[: round(count * per_thread * machine.turns)]
    return found


def _again(kernel: Kernel, machine: Machine) -> list[Any]:
    """The narrow loads of numbers that several threads load, as many as there may be."""
    low = [a for a in machine.loop if a.bytes < ACCESS // 8 and not a.store]
    return low[: kernel.again * machine.turns]


def _width(rows: Sequence[Any], store: bool) -> int:
    """Bytes of one of them."""
    return max((a.bytes for a in rows if a.store == store), default=0)


def _problems(kernel: Kernel, machine: Machine, counted: float, per_thread: float) -> Iterator[str]:
    if machine.spills:
        yield f"spills {machine.spills}"
    if not kernel.elements:
        return
    if not machine.loop:
        yield "has no loop that accesses memory"
        return
    octets = round(kernel.octets * per_thread / 8 * machine.turns)
    bytewise = [a for a in machine.loop if a.bytes == 1 and not a.store][:octets]
    bytewise += [*_scales(kernel, machine), *_rows(kernel, machine, per_thread), *_again(kernel, machine)]
    narrowest = min((8 * a.bytes for a in machine.loop if not any(a is b for b in bytewise)), default=ACCESS)
    if narrowest < kernel.narrowest:
        yield f"accesses memory by {narrowest} bits"
    if abs(counted - kernel.bytes) > 0.01:
        yield f"moves {counted:.2f} bytes per element where its roles imply {kernel.bytes:.2f}"


def audit(cases: Sequence[Case], targets: Sequence[Target], others: Iterable[str] = OTHERS) -> Iterator[Row]:
    """Measure all kernels on all targets; kernels of several programs with one text are measured once."""
    for target in targets:
        seen: set[tuple[str, str]] = set()
        of_cases = (k for case in cases for k in kernels(case, target))
        besides = (k for name in others for k in OTHERS[name](target))
        for kernel in (*of_cases, *besides):
            key = (kernel.name, kernel.function.cache_key)
            if kernel.elements or key not in seen:
                seen.add(key)
                yield measure(kernel, target)


# ---- telling ----------------------------------------------------------------------------------------


def _table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    table = Table(title="Kernels as compiled: widths in bits; bytes and instructions per parameter")
    for name in ("program", "kernel", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("regs", "spills", "smem", "loads", "stores", "bytes", "implied", "instr"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for r in sorted(rows, key=lambda r: (r.program, r.kernel)):
        head = (r.program, r.kernel) if last != (r.program, r.kernel) else ("", "")
        last = (r.program, r.kernel)
        m = r.machine
        numbers = [str(m.registers), str(m.spills), str(m.shared)]
        if r.implied:
            numbers += [" ".join(map(str, width)) or "-" for width in (r.loads, r.stores)]
            numbers += [f"{r.bytes:g}", f"{r.implied:g}", f"{r.instructions:.0f}"]
        table.add_row(*head, r.target, *numbers, style="bold red" if r.problems else None)
    return table


def traffic(rows: Iterable[Row]) -> dict[str, float]:
    """Bytes per parameter of a whole step, by program: all its passes, on the target that moves most."""
    passes: dict[tuple[str, str], float] = {}
    for r in rows:
        if r.implied:
            passes[r.program, r.target] = passes.get((r.program, r.target), 0.0) + r.bytes
    programs = dict.fromkeys(program for program, _ in passes if program not in OTHERS)
    return {p: max(b for (program, _), b in passes.items() if program == p) for p in programs}


FLOORS = "A step's traffic, and the milliseconds per billion parameters that it takes at least"


def floors(moved: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of what the bytes per parameter of each program take on each device."""
    rows = [
        [program, f"{count:g}", *(f"{count * 1e12 / bandwidth:.1f}" for bandwidth in DEVICES.values())]
        for program, count in moved.items()
    ]
    return ["program", "bytes per parameter", *DEVICES], rows


def _floors(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    headers, lines = floors(traffic(rows))
    table = Table(title=FLOORS)
    table.add_column(headers[0], no_wrap=True)
    for header in headers[1:]:
        table.add_column(header, justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def options() -> argparse.ArgumentParser:
    """The command line of ``optx audit``."""
    parser = argparse.ArgumentParser(prog="optx audit", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="one target per family: sm_90 and gfx942")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help=f"programs whose name matches ({', '.join(OTHERS)} too)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")
    return parser


def main(
    cases: Callable[[], Sequence[Case]],
    arguments: Sequence[str] | None = None,
    about: Callable[[], Mapping[str, Any]] = dict,
) -> int:
    """The command ``optx audit``; returns the exit code.

    Args:
        cases: gives the programs to compile; from above, as kernels know no optimizer and no transform.
        arguments: of the command line.
        about: gives what is written beside the rows, as the day and the versions.
    """
    parser = options()
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it.")
    chosen = [case for case in cases() if re.search(args.only, case.name)]
    others = [name for name in OTHERS if re.search(args.only, name)]
    rows = list(_progress(audit(chosen, QUICK if args.quick else TARGETS, others)))
    if args.json:
        settings = {"quick": args.quick, "only": args.only}
        found: dict[str, Any] = {"settings": settings, "environment": {**about()}, "traffic": traffic(rows)}
        found["rows"] = [_written(row) for row in rows]
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return _tell(rows)


def _written(row: Row) -> dict[str, Any]:
    """Without the single accesses: their widths and their sum are in the row."""
    written = asdict(row)
    del written["machine"]["loop"]
    return written


def _progress(rows: Iterator[Row]) -> Iterator[Row]:
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        for count, row in enumerate(rows, start=1):
            progress.update(
                task, description=f"{count} kernels: {row.program}, {row.kernel} for {row.target}"
            )
            yield row


def _tell(rows: Sequence[Row]) -> int:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(rows))
    console.print(_floors(rows))
    bad = [(r, problem) for r in rows for problem in r.problems]
    for r, problem in bad:
        console.print(f"{r.program}, {r.kernel} on {r.target}: {problem}", style="bold red", highlight=False)
    console.print(f"{len(rows)} kernels compiled, {len(bad)} problems.", highlight=False)
    return 1 if bad or not rows else 0
