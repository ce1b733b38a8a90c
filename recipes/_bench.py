"""What every benchmark's command line has: its numbers, with what they depend on, shown and written."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

import torch

from optx._files import written_aside

from ._options import path, positive
from ._run import command, environment, settings_of


def parser(name: str, doc: str | None, **options: dict[str, Any]) -> argparse.ArgumentParser:
    """A benchmark's options.

    Args:
        name: of the benchmark.
        doc: its module docstring; shown by ``--help``.
        options: keyword arguments of ``add_argument`` by option name, as for `_run.parser`.
    """
    made = argparse.ArgumentParser(
        prog=f"optx bench {name}",
        description=inspect.cleandoc(doc or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, keywords in options.items():
        made.add_argument(f"--{option.replace('_', '-')}", **keywords)
    made.add_argument("--threads", type=positive, help="of torch (default: as many as it takes by itself)")
    made.add_argument("--json", type=path, metavar="FILE", help="write every number to a file")
    return made


def parsed(options: argparse.ArgumentParser, arguments: Any) -> argparse.Namespace:
    """The options as typed; sets torch's threads."""
    args = options.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def results(options: argparse.ArgumentParser, args: argparse.Namespace, **measured: Any) -> dict[str, Any]:
    """What was measured, with what it depends on; written to ``--json`` if asked for.

    Args:
        options: that `args` were parsed by.
        args: of this run.
        measured: numbers, in lists and dicts.
    """
    settings = settings_of(args)
    about = {"command": command(options, settings), "settings": settings, "environment": environment()}
    found = {**about, **measured}
    if args.json:
        with written_aside(args.json) as aside:
            aside.write_text(json.dumps(found, indent=1) + "\n")
    return found


def heading(results: dict[str, Any]) -> str:
    """One line for the terminal: on what it ran."""
    return ", ".join(f"{name} {value}" for name, value in results["environment"].items())
