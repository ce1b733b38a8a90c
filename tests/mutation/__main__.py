"""Plant faults one by one in a copy of the tree, and see whether the tests notice: see README.md."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

# Before torch: every mutant's process is a fork of this one.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="passive")

from mutants import Mutant, planted, sample
from table import TABLE, path_of

ROOT = Path(__file__).resolve().parents[2]
# What takes seconds to import, and knows nothing of optx.
_LIBRARIES = (
    "torch torch.testing torch.distributed.checkpoint numpy numba numba.core.ccallback hypothesis pytest "
    "hypothesis.strategies safetensors.torch peft mergekit.merge_methods rich typer transformers"
)
_MODELS = "llama gpt2 bert roberta opt t5 vit"
PRELOAD = [*_LIBRARIES.split(" "), *(f"transformers.models.{m}.modeling_{m}" for m in _MODELS.split(" "))]


class Watch:
    """A pytest plugin: cheap and likely tests first, and a file that says what failed or took how long."""

    def __init__(
        self, seconds: dict[str, float], files: list[str], slowest: float, budget: float, log: Path
    ) -> None:
        self.seconds, self.files, self.log = seconds, files, log
        self.slowest, self.budget = slowest, budget
        self.took: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Order by time, with a handicap for files further down the list."""
        places = {Path(name).name: i for i, name in enumerate(self.files)}

        def cost(item: Any) -> float:
            return (self.seconds.get(item.nodeid, 1.0) + 0.01) * (1 + places.get(item.path.name, 0) / 2)

        items.sort(key=cost)
        total, kept = 0.0, list[Any]()
        for item in items:
            seconds = self.seconds.get(item.nodeid, 0.0)
            if seconds <= self.slowest and total + seconds <= self.budget:
                kept.append(item)
                total += seconds
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """So that the test in which the process died is known."""
        self._write(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Times of all phases; the first line of what went wrong."""
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = (crash.message if crash else str(report.longrepr))[:300]

    def pytest_collectreport(self, report: Any) -> None:
        """A module that can't be imported fails too."""
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-300:]

    def pytest_sessionfinish(self) -> None:
        """The whole record."""
        self._write("")

    def _write(self, running: str) -> None:
        self.log.write_text(json.dumps({"running": running, "took": self.took, "failed": self.failed}))


class Tree:
    """A copy of what the tests need, in which modules are changed and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info", ".git", ".hypothesis", "runs")
        shutil.copytree(ROOT, folder, symlinks=True, ignore=skip, dirs_exist_ok=True)
        self.clock = int(time.time()) - 100_000

    def put(self, module: str, code: str) -> None:
        """Write a module with a time of its own: caches compare times and sizes."""
        path = self.folder / module
        path.write_text(code)
        self.clock += 10
        os.utime(path, (self.clock, self.clock))

    def run(self, files: list[str], watch: Watch, options: list[str], timeout: float) -> str:
        """Run test files in a fork: "passed", "failed" or "timeout"."""
        child = os.fork()
        if not child:
            self._child(files, watch, options)
        ends = time.monotonic() + timeout
        outcome = "timeout"
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                outcome = "passed" if status == 0 else "failed"
                break
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what a test may have left running
        if outcome == "timeout":
            os.waitpid(child, 0)
        return outcome

    def _child(self, files: list[str], watch: Watch, options: list[str]) -> None:
        os.setsid()
        code: int = 99
        try:
            with (self.folder / "output").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder)
            sys.path[0] = str(self.folder)
            sys.dont_write_bytecode = True
            import pytest

            quiet = ["-q", "-n", "0", "-o", "addopts=", "-p", "no:cacheprovider", "--strict-markers"]
            quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # what was imported for all of them
            code = pytest.main([*quiet, *options, *files], plugins=[watch])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def main() -> None:
    """Sample, run, tell."""
    args = arguments()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ["OPTX_CACHE_DIR"] = str((out / "cache").resolve())
    modules = [m for m in TABLE if any(fnmatch.fnmatch(m, pattern) for pattern in args.modules)]
    if not modules:
        raise SystemExit(f"no module of the table matches {' '.join(args.modules)}")
    sources = {m: (ROOT / m).read_text() for m in modules}
    results: dict[str, dict[str, Any]] = read(out / "results.json")
    times: dict[str, dict[str, Any]] = read(out / "times.json")
    left: list[Mutant] = []
    if args.again:
        known = [r for r in results.values() if r["outcome"] in args.again and r["module"] in sources]
        left = [one for r in known if (one := planted(sources[r["module"]], r)) is not None]
    elif not args.show:
        left = [one for one in sample(sources, args.number, args.seed) if one.key not in results]
    print(f"{len(left)} to examine", flush=True)
    if left:
        preload()
        with tempfile.TemporaryDirectory(prefix="optx-mutation-") as folder:
            tree = Tree(Path(folder) / "tree")
            for one in left[: args.at_most]:
                found = (path_of(name, tree.folder) for name in TABLE[one.module].split())
                files = [file for file in found if file]
                for file in files:
                    stamp = (tree.folder / file).stat().st_mtime
                    if times.get(file, {}).get("stamp") != stamp:
                        times[file] = {"stamp": stamp, **baseline(tree, file)}
                        save(out / "times.json", times)
                results[one.key] = examine(tree, one, files, times, args.slowest, args.budget)
                save(out / "results.json", results)
                say(results[one.key])
    tell([r for r in results.values() if r["module"] in modules])
    print(f"{len(left[args.at_most :]) if args.at_most else 0} left to examine")


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python tests/mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", default=["*"], help="patterns over the table's modules")
    parser.add_argument("--number", type=int, default=300, help="of mutants in the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutation")
    parser.add_argument("--at-most", type=int, default=None, help="examine so many, then stop")
    parser.add_argument("--slowest", type=float, default=5.0, help="leave slower tests out, seconds")
    parser.add_argument("--budget", type=float, default=120.0, help="of tests for one mutant, seconds")
    parser.add_argument(
        "--again",
        nargs="*",
        default=[],
        choices=["survived", "timeout", "killed"],
        help="examine known ones again, instead of a sample",
    )
    parser.add_argument("--show", action="store_const", const=True, help="only tell what is known")
    return parser.parse_args()


def preload() -> None:
    """Import what is the same for all mutants, once."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PRELOAD:
            try:
                importlib.import_module(name)
            except ImportError:
                print(f"not here, not preloaded: {name}")
    gc.collect()
    gc.freeze()


def baseline(tree: Tree, file: str) -> dict[str, Any]:
    """How long each test of a file takes as things are, and which fail here whatever the code."""
    log = tree.folder / "log.json"
    warm = Watch({}, [], 1e9, 1e9, log)
    began = time.monotonic()
    ended = tree.run([file], warm, ["--timeout=120"], 900)
    record = read(log)
    if not record.get("took"):
        raise SystemExit(f"{file} cannot be run:\n{(tree.folder / 'output').read_text()[-3000:]}")
    failed = list(record.get("failed", {}))
    print(
        f"{file}: {time.monotonic() - began:.0f} s, {len(record['took'])} tests, {ended} {failed}", flush=True
    )
    if ended == "timeout":
        raise SystemExit(f"{file} does not end")
    return {"took": record["took"], "failed": failed}


def examine(
    tree: Tree, one: Mutant, files: list[str], times: dict[str, Any], slowest: float, budget: float
) -> dict[str, Any]:
    """One mutant's fate."""
    seconds: dict[str, float] = {}
    out: list[str] = []
    for file in files:
        seconds |= times[file]["took"]
        out += [f"--deselect={test}" for test in times[file]["failed"]]
    known = [s for s in seconds.values() if s <= slowest]
    log = tree.folder / "log.json"
    log.unlink(missing_ok=True)
    original = (tree.folder / one.module).read_text()
    began = time.monotonic()
    tree.put(one.module, one.code)
    try:
        options = ["-x", f"--timeout={max(20.0, 10 * slowest):.0f}", *out]
        ended = tree.run(
            files, Watch(seconds, files, slowest, budget, log), options, 60 + 4 * min(sum(known), budget)
        )
    finally:
        tree.put(one.module, original)
    record = read(log)
    by, why = next(
        iter(record.get("failed", {}).items()), (record.get("running", ""), "died or ran too long")
    )
    if "Timeout" in why:
        ended = "timeout"
    outcome = {"passed": "survived", "failed": "killed"}.get(ended, ended)
    took = round(time.monotonic() - began, 1)
    found = {"module": one.module, "line": one.line, "operator": one.operator, "diff": one.diff}
    return found | {
        "outcome": outcome,
        "by": by if outcome != "survived" else "",
        "why": why,
        "seconds": took,
    }


def read(path: Path) -> dict[str, Any]:
    """A JSON file; {} if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, what: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(what, indent=1))
    aside.replace(path)


def say(result: dict[str, Any]) -> None:
    """One line while it runs."""
    place = f"{result['module']}:{result['line']}"
    print(
        f"{result['outcome']:9}{result['seconds']:6.1f} s  {place} {result['operator']}  {result['by']}",
        flush=True,
    )


def tell(found: list[dict[str, Any]]) -> None:
    """Survivors as diffs, and a table."""
    counts: dict[str, Counter[str]] = {}
    for result in found:
        counts.setdefault(result["module"], Counter())[result["outcome"]] += 1
        if result["outcome"] == "survived":
            print("\n" + result["diff"], end="")
    print(f"\n{'module':36} killed timeout survived")
    for module, count in sorted(counts.items()):
        print(f"{module:36} {count['killed']:6} {count['timeout']:7} {count['survived']:8}")
    total = sum(counts.values(), Counter[str]())
    share = (total["killed"] + total["timeout"]) / max(len(found), 1)
    print(f"{'all':36} {total['killed']:6} {total['timeout']:7} {total['survived']:8}   {share:.1%} noticed")


if __name__ == "__main__":
    main()
