"""Reads wrong files of every format, with little memory: each is taken, or refused in a sentence.

    python tests/fuzz/run.py --count 100000 --seed 0

A file that ends in another error than an `optx.OptxError`, takes a second of the processor's time, or kills
the process is a finding: it is kept in the folder that ``--keep`` names, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch

import optx

sys.path.insert(0, str(Path(__file__).parent))
from formats import FORMATS, Format, mutated, other_files

SECOND = 1.0
MEMORY = 1 << 30
"""What a file may ask for beyond what the process has when it begins."""


class TooSlow(BaseException):
    """The alarm."""


def _alarm(*_: Any) -> None:
    raise TooSlow


def _limit(extra: int) -> None:
    """No more address space than there is now and some."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def one(form: Format, folder: Path, tally: Counter[str]) -> tuple[str, float]:
    """Read a folder: what came of it, and the time it took."""
    signal.setitimer(signal.ITIMER_PROF, SECOND)
    start = time.process_time()
    try:
        form.read(folder)
        outcome = "taken"
    except optx.OptxError as error:
        outcome = (
            "refused"
            if str(error).strip() and len(str(error)) < 10_000
            else f"a message: {str(error)[:80]!r}"
        )
    except TooSlow:
        outcome = "too slow"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:100]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    took = time.process_time() - start
    if took > SECOND and outcome in ("taken", "refused"):
        outcome = "too slow"
    tally[outcome] += 1
    return outcome, took


def work(name: str, seed: int, begin: int, end: int, place: Path, keep: Path, progress: Path) -> None:
    """Some files of one format, in a process of its own."""
    form, folder = FORMATS[name], place / "now"
    others = other_files(place)
    folder.mkdir()
    form.make(folder)
    good = {file: (folder / file).read_bytes() for file in form.mutate}
    form.read(folder)  # imports and compiles
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _alarm)
    _limit(MEMORY)
    tally, slowest, findings = Counter[str](), (0.0, -1), dict[str, int]()
    for number in range(begin, end):
        progress.write_text(str(number))
        mutated(form, good, folder, Random(f"{seed}:{name}:{number}"), others)
        outcome, took = one(form, folder, tally)
        slowest = max(slowest, (took, number))
        if outcome not in ("taken", "refused") and outcome not in findings:
            findings[outcome] = number
            shutil.copytree(folder, keep / f"{name.replace(' ', '-')}-{number}", dirs_exist_ok=True)
    told = {"tally": tally, "slowest": slowest, "findings": findings}
    progress.with_suffix(".json").write_text(json.dumps(told))


def run(name: str, count: int, seed: int, keep: Path) -> dict[str, Any]:
    """All files of one format; a process that dies is a finding, and the next goes on after it."""
    whole: dict[str, Any] = {"tally": Counter[str](), "slowest": (0.0, -1), "findings": {}}
    begin = 0
    while begin < count:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
            progress = Path(place, "progress")
            sys.stdout.flush()
            child = os.fork()
            if not child:
                status = 1
                try:
                    work(name, seed, begin, count, Path(place), keep, progress)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            _, status = os.waitpid(child, 0)
            if not progress.exists():
                sys.exit(f"{name}: the good files could not be read")
            reached = int(progress.read_text())
            if not status:
                told = json.loads(progress.with_suffix(".json").read_text())
                whole["tally"].update(told["tally"])
                whole["slowest"] = max(whole["slowest"], tuple(told["slowest"]))
                whole["findings"].update(told["findings"])
                break
            whole["findings"][f"died with status {status}"] = reached
            begin = reached + 1
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="all", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--count", type=int, default=1000, help="files of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), "optx-fuzz"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.keep.mkdir(parents=True, exist_ok=True)
    bad = False
    for name in FORMATS if options.format == "all" else [options.format]:
        start = time.time()
        told = run(name, options.count, options.seed, options.keep)
        took, number = told["slowest"]
        print(
            f"{name}: {told['tally']['refused']} refused, {told['tally']['taken']} taken, slowest "
            f"{took * 1000:.0f} ms (number {number}), {time.time() - start:.0f} s in all",
            flush=True,
        )
        for finding, where in told["findings"].items():
            print(f"  FINDING (number {where}): {finding}", flush=True)
            bad = True
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
