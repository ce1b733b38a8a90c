"""Record the golden runs of methods anew and show what that changes: ``python tests/golden/record.py NAME``.

A change that is not meant to change results leaves these files as they are; one that is, says in its commit
message why the losses moved.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import golden_runs

import optx
from optx._errors import near
from optx._files import written_aside

Losses = Mapping[str, Sequence[float]]


def record(name: str) -> dict[str, list[float]]:
    """Run a method and write its file; gives its losses by run."""
    losses = {label: run() for label, run in golden_runs.runs(name).items()}
    told = {"optx": optx.__version__, "platform": golden_runs.platform_here(), "losses": losses}
    golden_runs.FOLDER.mkdir(exist_ok=True)
    with written_aside(golden_runs.FOLDER / f"{name}.json") as aside:
        aside.write_text(json.dumps(told, indent=1) + "\n")
    return losses


def differences(old: Losses, new: Losses) -> list[str]:
    """A line a run: what is new, gone, the same, or from which step on it differs."""
    lines: list[str] = []
    for label in {**old, **new}:
        if label not in new or label not in old:
            lines.append(f"{label}: {'new' if label in new else 'gone'}")
        elif (step := golden_runs.first_difference(old[label], new[label], 0.0)) is None:
            lines.append(f"{label}: the same")
        else:
            apart = golden_runs.apart(old[label], new[label])
            last = f"{old[label][-1]!r} -> {new[label][-1]!r}"
            lines.append(f"{label}: differs from step {step} on, by up to {apart:.1e}; at the end {last}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Record what is named."""
    known = list(golden_runs.methods())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--all", action="store_true", help="every method")
    options = parser.parse_args(arguments)
    names = known if options.all else options.names
    if not names:
        parser.error("name a method, or --all")
    for name in names:
        if name not in known:
            parser.error(f"there is no method {name!r}. {near(name, known)}")
    golden_runs.one_thread()
    for name in names:
        file = golden_runs.FOLDER / f"{name}.json"
        old = golden_runs.recorded(name)["losses"] if file.exists() else {}
        for line in differences(old, record(name)):
            print(f"{name}, {line}", flush=True)


if __name__ == "__main__":
    main()
