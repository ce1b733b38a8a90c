"""Keep what the pages say in step with the runs that they tell of; for who maintains optx, in a clone of it.

    python -m optx.recipes._pages add FOLDER_OR_FILE ...
    python -m optx.recipes._pages write

``add`` takes finished runs into recipes/results: a recipe's folder (``--out``), or the file that a benchmark
wrote (``--json``), which is named after it: bench-step.json, audit.json. Numbers are kept to five significant
digits, and nothing is left out; the picture is kept in 128 colours, with a checksum of its results in it.
``write`` makes every block ``<!-- results:NAME -->`` to ``<!-- /results -->`` of README.md and
recipes/README.md anew from there. A block may ask for less: ``<!-- results:NAME tables picture -->``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optx.recipes
from optx._files import written_aside

from ._report import Table, by_seed
from ._run import NOT_SETTINGS, command, defaults

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "recipes/README.md")
RESULTS = "recipes/results"
SEEDS = 3
BLOCK = re.compile(r"<!-- results:([\w-]+)((?: \w+)*) -->\n(.*?)<!-- /results -->", re.DOTALL)


class PageError(SystemExit):
    """Said in one line, without a traceback."""


@dataclass(frozen=True)
class Source:
    """Something that results come from.

    Args:
        options: makes its command line.
        tables: makes its tables, from its results.
        arms: keys of the usual run's results, without the seed; None for a benchmark, which has no seeds.
    """

    options: Callable[[], argparse.ArgumentParser]
    tables: Callable[[dict[str, Any]], list[Table]]
    arms: Sequence[str] | None = None


def names() -> list[str]:
    """All that has results, found by looking: recipes, benchmarks, and the audit."""
    modules = [info.name for info in pkgutil.iter_modules(optx.recipes.__path__)]
    benches = [name[1:].replace("_", "-") for name in modules if name.startswith("_bench_")]
    return [*(name for name in modules if not name.startswith("_")), *benches, "audit"]


def source(name: str) -> Source:
    """Where results of this name come from."""
    _known(name)
    if name == "audit" or name.startswith("bench-"):
        module = _module("_audit_report" if name == "audit" else f"_{name.replace('-', '_')}")
        return Source(module.options, module.tables)
    module = _module(name)
    usual = defaults(module.options())
    arms = usual["arms"].split(",") if "arms" in usual else list(module.ARMS)
    return Source(module.options, _module(f"_{name}_report").tables, arms)


def _known(name: str) -> None:
    if name not in names():
        raise PageError(f"pages: {name!r} is none of {', '.join(names())}.")


def _module(name: str) -> Any:
    return importlib.import_module(f"optx.recipes.{name}")


# ---- taking a run in -----------------------------------------------------------------------------------


def add(run: Path, root: Path = ROOT) -> str:
    """Copy a finished run's results and picture; gives its name."""
    if run.is_dir():
        pictures = [file for file in run.glob("*.png") if file.stem in names()]
        if len(pictures) != 1:
            raise PageError(f"add: {run} has no picture of a recipe, so the run has not come to its end.")
        name, picture, file = pictures[0].stem, pictures[0], run / "results.json"
        if (run / "checkpoint.pt").exists() or picture.stat().st_mtime < file.stat().st_mtime:
            raise PageError(
                f"add: the run in {run} goes on or was interrupted; its picture is older than it."
            )
    elif run.is_file():
        name, picture, file = run.stem, None, run
    else:
        raise PageError(f"add: there is no folder of a run and no benchmark's file {run}.")
    results = rounded(json.loads(file.read_text()))
    if wrong := complaints(name, results):
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PageError(f"add: {run} is not a whole run of {name}: {'; '.join(wrong[:3])}{more}.")
    folder = root / RESULTS
    folder.mkdir(exist_ok=True)
    text = written(results) + "\n"
    with written_aside(folder / f"{name}.json") as aside:
        aside.write_text(text)
    if picture:
        _keep_picture(picture, folder / f"{name}.png", text)
    return name


def complaints(name: str, results: Mapping[str, Any]) -> list[str]:
    """What is missing for these to be the results of a whole run, with enough seeds."""
    wanted = source(name).arms
    missing = [part for part in ("settings", "environment") if part not in results]
    if wanted is None:
        return [f"it has no {part}" for part in missing]
    keys = {tuple(key.rsplit("/", 1)) for key in results.get("arms", {})}
    seeds = sorted({key[-1] for key in keys})
    arms = dict.fromkeys([*wanted, *sorted(key[0] for key in keys)])
    absent = [f"{arm}/{seed}" for arm in arms for seed in seeds if (arm, seed) not in keys]
    few = [f"{len(seeds)} seeds, of at least {SEEDS}"] if len(seeds) < SEEDS else []
    return [*(f"it has no {part}" for part in (*missing, *absent)), *few]


def rounded(value: Any) -> Any:
    """The same with all floats to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def written(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of a dict, and lists in one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(key)}: {written(one, inner)}" for key, one in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _keep_picture(picture: Path, target: Path, results: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("results", checksum(results))
    with Image.open(picture) as image, written_aside(target) as aside:
        image.convert("RGB").quantize(128).save(aside, format="png", optimize=True, pnginfo=about)


def checksum(results: str) -> str:
    """Of a results file, by which a picture knows it."""
    return hashlib.sha256(results.encode()).hexdigest()


# ---- writing pages -------------------------------------------------------------------------------------


def write(root: Path = ROOT) -> list[str]:
    """Make all blocks anew; gives the pages that this changed."""
    changed: list[str] = []
    for page in PAGES:
        old = (root / page).read_text()
        if (new := rewritten(old, page, root)) != old:
            with written_aside(root / page) as aside:
                aside.write_text(new)
            changed.append(page)
    return changed


def rewritten(text: str, page: str, root: Path = ROOT) -> str:
    """A page's text with its blocks made anew; one without results stays as it is."""
    folder = "results" if page.startswith("recipes/") else RESULTS

    def anew(found: re.Match[str]) -> str:
        name, wanted = found[1], found[2]
        _known(name)
        file = root / RESULTS / f"{name}.json"
        if not file.exists():
            return found.group()
        results = json.loads(file.read_text())
        parts = _parts(name, results, f"{folder}/{name}.png")
        if unknown := set(wanted.split()) - set(parts):
            raise PageError(
                f"{page}: a block of {name} asks for {', '.join(unknown)}, not {', '.join(parts)}."
            )
        inside = "\n\n".join(parts[part] for part in wanted.split() or parts)
        return f"<!-- results:{name}{wanted} -->\n{inside}\n<!-- /results -->"

    return BLOCK.sub(anew, text)


def _parts(name: str, results: dict[str, Any], picture: str) -> dict[str, str]:
    made = source(name)
    tables = made.tables(results)
    parts = {
        "command": f"```sh\n{_command(made, results)}\n```",
        "settings": _wrapped(about(made, results)),
        "tables": "\n\n".join(markdown(table) for table in tables),
    }
    if made.arms is not None:
        parts["picture"] = f"![{tables[0].title or name}]({picture})"
    return parts


def _command(made: Source, results: Mapping[str, Any]) -> str:
    """What one types today for such a run."""
    options = made.options()
    words = command(options, results["settings"])
    if made.arms is not None and (seeds := _seeds(results)) != defaults(options).get("seeds"):
        words += f" --seeds {seeds}"
    if made.arms is not None and set(arms := by_seed(results["arms"])) != set(made.arms):
        words += f" --arms {','.join(arms)}"
    return words


def _seeds(results: Mapping[str, Any]) -> int:
    return max(len(found) for found in by_seed(results["arms"]).values())


def about(made: Source, results: Mapping[str, Any]) -> str:
    """Settings, day and machine; and where the recipe's defaults are others by now."""
    settings, where = results["settings"], dict(results["environment"])
    words = [
        _said(name, value) for name, value in settings.items() if value is not None and value is not False
    ]
    if made.arms is not None:
        words.insert(0, f"{_seeds(results)} seeds")
    date, device, threads, python = (where.pop(name) for name in ("date", "device", "threads", "python"))
    versions = ", ".join(f"{name} {version}" for name, version in where.items())
    ran = (
        f"{', '.join(words) or 'No options'}. Run on {date} with {versions}, Python {python}: {device}, "
        f"{threads} thread{'s' * (threads != 1)}."
    )
    usual = defaults(made.options())
    other = [
        f"{_said(name, value)} (default: {usual[name]})" if name in usual else f"{name}, which is gone"
        for name, value in settings.items()
        if name not in usual or value != usual[name]
    ]
    other += [f"no {name} yet" for name in usual if name not in (*settings, *NOT_SETTINGS, "overwrite")]
    return f"{ran} **Other than by default:** {', '.join(other)}." if other else ran


def _said(name: str, value: Any) -> str:
    if value is True:
        return name
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def markdown(table: Table) -> str:
    """A table as the page has it: its title, cells, and note."""
    headers, rows = table.laid()
    rule = ["---", *["---:"] * (len(headers) - 1)]
    cells = [_line(headers), _line(rule), *map(_line, rows)]
    return "\n\n".join(filter(None, (f"**{table.title}**", "\n".join(cells), _wrapped(table.note))))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 116, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m optx.recipes._pages",
        description=inspect.cleandoc(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add").add_argument("runs", nargs="+", type=Path)
    commands.add_parser("write")
    options = parser.parse_args(arguments)
    if not (ROOT / "recipes").is_dir() or not (ROOT / PAGES[0]).exists():
        raise PageError(f"pages: {ROOT} is not a clone of optx, so there is no page to write.")
    for run in options.runs if options.command == "add" else ():
        print(f"{RESULTS}/{add(run)}.json")
    for page in write():
        print(page)


if __name__ == "__main__":
    main()
