"""``python -m optx.kernels.device_check``: every Triton kernel on the GPU that is here, in minutes.

Results against the CPU's kernels, bandwidth against a copy on the device, 64, 96 and 128 registers side by
side, launches, and CUDA graphs that replay with another learning rate. Prints one table and writes JSON. What
goes wrong is a row: checks run in a process of their own, which is started again where one breaks the device
or does not end; when the time is over, what is left is said. NVIDIA's and AMD's alike.

Without a GPU it says so and exits with 2; ``--interpret`` runs the same at small sizes in Triton's
interpreter, where figures of time mean nothing. Exits with 1 if anything was wrong.
"""
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from optx.kernels.device import others, steps
from optx.kernels.device.checks import Check, Place, Row, run

SECONDS = 440  # all together: under eight minutes, with what a start takes
LONGEST = 90  # seconds of one check
_MARK = "\x1eoptx "
# What is looked at in all ways, and first: the commonest, the one with most roles, and bfloat16.
_MAIN = ("AdamW", "AdamR + AdamW", "PerpGrad + AdamW", "AdamW bf16 stochastic")


def every() -> list[Check]:
    """All checks, the most telling first."""
    # Kernels know no optimizer: what programs there are, the front is asked for by name.
    cases: list[Any] = importlib.import_module("optx._audit").all_cases()
    cases.sort(key=lambda case: _MAIN.index(case.name) if case.name in _MAIN else len(_MAIN))
    of_steps = list(steps.checks(cases, len(_MAIN)))
    main = [check for check in of_steps if check.what in _MAIN]
    return [*main, *others.checks(), *(check for check in of_steps if check.what not in _MAIN)]


def place_of(interpret: bool) -> Place:
    """Sizes that fit where this runs."""
    if interpret:
        return Place("cpu", 4096, (1, 1023, 1025), 1)
    free, _ = torch.cuda.mem_get_info()
    elements = min(1 << 26, free // 4 // 64)  # a quarter of the memory, 64 bytes an element at most
    return Place("cuda", elements, (0, 1, 1023, 1025, 70_001, 1_000_003), 20)


# ---- the process that checks ---------------------------------------------------------------------------


def work(interpret: bool) -> int:
    """Run the checks that stdin names, and print a line for each; ends early where the device is broken."""
    names: list[str] = json.loads(sys.stdin.readline())
    known, place = {check.name: check for check in every()}, place_of(interpret)
    for name in names:
        row = run(known[name], place)
        print(_MARK + json.dumps(asdict(row)), flush=True)
        if row.state == "error" and not interpret:
            try:
                torch.cuda.synchronize()
                torch.zeros(8, device="cuda").add_(1).cpu()
            except Exception:
                return 3  # nothing works in this process any more
    return 0


class Worker:
    """A process that checks, and its lines as they come."""

    def __init__(self, names: Sequence[str], interpret: bool) -> None:
        environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if interpret else {})}
        command = [sys.executable, "-m", "optx.kernels.device_check", "--worker"]
        command += ["--interpret"] if interpret else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(list(names)) + "\n")
            self.process.stdin.flush()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        self.last = ""  # what it said besides

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def row(self, seconds: float) -> Row | str:
        """The next row, or why there is none."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                self.stop()
                return f"no end after {seconds:.0f} s"
            if line is None:
                code = self.process.wait()
                return "broken" if code == 3 else f"the process ended with {code}: {self.last[-300:]}"
            if line.startswith(_MARK):
                return Row(**json.loads(line.removeprefix(_MARK)))
            self.last = (self.last + line)[-2000:]

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self._reader.join(5.0)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def rows(checks: Sequence[Check], interpret: bool, seconds: float, longest: float = LONGEST) -> Iterator[Row]:
    """All rows, within a time, whatever single checks do."""
    end, left = time.monotonic() + seconds, list(checks)
    while left and time.monotonic() < end:
        worker, first = Worker([check.name for check in left], interpret), True
        while left:
            rest = end - time.monotonic()
            # The first row has the process's start in it.
            found = worker.row(min(rest, longest + 60.0 * first)) if rest > 0 else "the time is over"
            first = False
            if isinstance(found, str):
                break
            left.pop(0)
            yield found
        else:
            worker.stop()
            return
        worker.stop()
        if found != "broken" and time.monotonic() < end:
            check = left.pop(0)
            yield Row(check.kind, check.what, "error", said=found)
    for check in left:
        yield Row(check.kind, check.what, "left out", said=f"the {seconds:.0f} s are over")


# ---- telling -------------------------------------------------------------------------------------------


def table(found: Sequence[Row]) -> Any:
    """The rows, kind by kind."""
    from rich.table import Table

    made = Table(title="Kernels on this device")
    for name in ("check", "kernels", "", "figures", "s"):
        made.add_column(name, overflow="fold", justify="right" if name == "s" else "left")
    styles = {"wrong": "bold red", "error": "bold red", "left out": "dim"}
    for row in sorted(found, key=lambda row: row.kind):
        figures = ", ".join(f"{name} {value}" for name, value in row.figures.items())
        said = row.said.splitlines()[0][:160] if row.said else ""
        line = (row.kind, row.what, row.state, figures or said, f"{row.seconds:.1f}")
        made.add_row(*line, style=styles.get(row.state))
    return made


def about(interpret: bool) -> dict[str, Any]:
    """The device and the versions."""
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "interpreted": interpret}
    if not interpret:
        found["device"] = torch.cuda.get_device_name(0)
        found["memory"] = torch.cuda.mem_get_info()[1]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m optx.kernels.device_check", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="without a GPU, at small sizes")
    parser.add_argument("--only", default="", metavar="REGEX", help="checks whose 'kind: kernels' match")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all checks (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("device_check.json"), metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.interpret and not torch.cuda.is_available():
        print("device_check: torch sees no GPU here. --interpret runs the same in Triton's interpreter.")
        return 2
    if args.worker:
        return work(args.interpret)
    chosen = [check for check in every() if re.search(args.only, check.name)]
    found = list(_shown(rows(chosen, args.interpret, args.seconds), len(chosen)))
    told = {"about": about(args.interpret), "rows": [asdict(row) for row in found]}
    args.json.write_text(json.dumps(told, indent=1) + "\n")
    return tell(found, args.json)


def tell(found: Sequence[Row], file: Path) -> int:
    """Print the table; the exit code."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(found))
    counts = {
        state: sum(row.state == state for row in found) for state in ("ok", "wrong", "error", "left out")
    }
    console.print(f"{', '.join(f'{n} {state}' for state, n in counts.items())}; {file}", highlight=False)
    return 1 if counts["wrong"] or counts["error"] or not counts["ok"] else 0


def _shown(found: Iterator[Row], total: int) -> Iterator[Row]:
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("checking", total=total)
        for row in found:
            progress.update(task, advance=1, description=f"{row.kind}: {row.what}")
            yield row


if __name__ == "__main__":
    sys.exit(main())
