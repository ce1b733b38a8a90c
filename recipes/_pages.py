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
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import shlex
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
        once: those of them that have samples enough with one seed.
    """

    options: Callable[[], argparse.ArgumentParser]
    tables: Callable[[dict[str, Any]], list[Table]]
    arms: Sequence[str] | None = None
    once: Collection[str] = ()


def names() -> list[str]:
    """All that has results, found by looking: recipes, benchmarks, the audit, and the table of engines."""
    modules = [info.name for info in pkgutil.iter_modules(optx.recipes.__path__)]
    benches = [name[1:].replace("_", "-") for name in modules if name.startswith("_bench_")]
    return [*(name for name in modules if not name.startswith("_")), *benches, "audit", "engines"]


def source(name: str) -> Source:
    """Where results of this name come from."""
    _known(name)
    told = name in ("audit", "engines")
    if told or name.startswith("bench-"):
        module = _module(f"_{name}_report" if told else f"_{name.replace('-', '_')}")
        return Source(module.options, module.tables)
    module = _module(name)
    usual = defaults(module.options())
    arms = usual["arms"].split(",") if "arms" in usual else list(module.ARMS)
    return Source(module.options, _module(f"_{name}_report").tables, arms, getattr(module, "ONCE", ()))


def _known(name: str) -> None:
    if name not in names():
        raise PageError(f"pages: {name!r} is none of {', '.join(names())}.")


def _module(name: str) -> Any:
    return importlib.import_module(f"optx.recipes.{name}")


# ---- taking a run in -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A run as recipes/results has it.

    Args:
        name: of what was run.
        text: the results.
        picture: a PNG file; None of a benchmark.
    """

    name: str
    text: str
    picture: bytes | None

    def write(self, root: Path) -> None:
        """Write both files, or neither."""
        folder = root / RESULTS
        folder.mkdir(exist_ok=True)
        with contextlib.ExitStack() as files:
            if self.picture is not None:
                files.enter_context(written_aside(folder / f"{self.name}.png")).write_bytes(self.picture)
            files.enter_context(written_aside(folder / f"{self.name}.json")).write_text(self.text)


def add(*runs: Path, root: Path = ROOT) -> list[str]:
    """Copy finished runs' results and pictures; gives their names.

    All is read, checked and made before anything is written, the pages with these results too.

    Raises:
        PageError: one of them is not a whole run that the pages can tell of.
    """
    kept = [taken(run) for run in runs]
    made_anew(root, {one.name: json.loads(one.text) for one in kept})
    for one in kept:
        one.write(root)
    return [one.name for one in kept]


def taken(run: Path) -> Kept:
    """A finished run, read and checked."""
    if run.is_dir():
        name, picture, file = _in_folder(run)
    elif run.is_file():
        name, picture, file = run.stem, None, run
        if source(name).arms is not None:
            raise PageError(f"add: {run} is of a recipe. Give its run's folder, which has the picture too.")
    else:
        raise PageError(f"add: there is no folder of a run and no benchmark's file {run}.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        text = written(rounded(results)) + "\n"
    except ValueError as error:  # not JSON, not UTF-8, or with a number that is none
        raise PageError(f"add: {file} is not a file of results: {error}.") from None
    if wrong := complaints(name, results):
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PageError(f"add: {run} is not a whole run of {name}: {'; '.join(wrong[:3])}{more}.")
    told(name, json.loads(text), "")
    return Kept(name, text, _small(picture, text) if picture else None)


def _in_folder(run: Path) -> tuple[str, Path, Path]:
    """A recipe's name, its picture and its results."""
    pictures = [file for file in run.glob("*.png") if file.stem in names()]
    if len(pictures) != 1:
        raise PageError(f"add: {run} has no picture of a recipe, so the run has not come to its end.")
    picture, file = pictures[0], run / "results.json"
    if not file.is_file():
        raise PageError(f"add: {run} has no results.json.")
    if (run / "checkpoint.pt").exists() or picture.stat().st_mtime < file.stat().st_mtime:
        raise PageError(f"add: the run in {run} goes on or was interrupted; its picture is older than it.")
    return picture.stem, picture, file


def complaints(name: str, results: Any) -> list[str]:
    """What is missing for these to be the results of a whole run, with enough seeds."""
    made = source(name)
    wanted = made.arms
    parts = ("settings", "environment", *(("arms",) if wanted is not None else ()))
    found = results if isinstance(results, dict) else {}
    missing = [f"it has no {part}" for part in parts if not isinstance(found.get(part), dict)]
    if wanted is None or missing:
        return missing
    keys = {tuple(key.rpartition("/")[::2]) for key in found["arms"]}
    seeds = sorted({key[-1] for key in keys})
    arms = dict.fromkeys([*wanted, *sorted(key[0] for key in keys)])
    needed = [(arm, seed) for arm in arms for seed in seeds[: 1 if arm in made.once else None]]
    absent = [f"it has no {arm}/{seed}" for arm, seed in needed if (arm, seed) not in keys]
    return absent + ([f"{len(seeds)} seeds, of at least {SEEDS}"] if len(seeds) < SEEDS else [])


def rounded(value: Any) -> Any:
    """The same with all floats to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def written(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of a dict, and lists in one line; nan is a ValueError."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(key)}: {written(one, inner)}" for key, one in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _small(picture: Path, results: str) -> bytes:
    """A picture in 128 colours, with its results' checksum in it."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("results", checksum(results))
    made = io.BytesIO()
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            image.convert("RGB").quantize(128).save(made, format="png", optimize=True, pnginfo=about)
    except (OSError, SyntaxError, ValueError) as error:  # as PIL says it of a file that is broken
        raise PageError(f"add: {picture} is not a whole PNG picture: {error}.") from None
    return made.getvalue()


def checksum(results: str) -> str:
    """Of a results file, by which a picture knows it."""
    return hashlib.sha256(results.encode()).hexdigest()


# ---- writing pages -------------------------------------------------------------------------------------


def write(root: Path = ROOT) -> list[str]:
    """Make all blocks anew; gives the pages that this changed."""
    changed = made_anew(root)
    for page, text in changed.items():
        with written_aside(root / page) as aside:
            aside.write_text(text)
    return list(changed)


def made_anew(root: Path, fresh: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The pages that change, and their new texts; with `fresh` results, by name, in place of the folder's."""
    old = {page: (root / page).read_text() for page in PAGES}
    new = {page: rewritten(text, page, root, fresh) for page, text in old.items()}
    return {page: text for page, text in new.items() if text != old[page]}


def rewritten(text: str, page: str, root: Path = ROOT, fresh: Mapping[str, Any] | None = None) -> str:
    """A page's text with its blocks made anew; one without results stays as it is."""
    folder = "results" if page.startswith("recipes/") else RESULTS

    def anew(found: re.Match[str]) -> str:
        name, wanted = found[1], found[2]
        _known(name)
        file = root / RESULTS / f"{name}.json"
        if fresh and name in fresh:
            results = fresh[name]
        elif file.exists():
            results = json.loads(file.read_text())
        else:
            return found.group()
        parts = told(name, results, f"{folder}/{name}.png")
        if unknown := set(wanted.split()) - set(parts):
            raise PageError(
                f"{page}: a block of {name} asks for {', '.join(unknown)}, not {', '.join(parts)}."
            )
        inside = "\n\n".join(parts[part] for part in wanted.split() or parts)
        return f"<!-- results:{name}{wanted} -->\n{inside}\n<!-- /results -->"

    return BLOCK.sub(anew, text)


def told(name: str, results: dict[str, Any], picture: str) -> dict[str, str]:
    """All that a page may say of results, by part.

    Raises:
        PageError: they lack something of it, or it has a comment's mark: blocks end with one.
    """
    try:
        parts = _parts(name, results, picture)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PageError(
            f"pages: results of {name} lack something that the page says: {type(error).__name__}: {error}."
        ) from error
    if mark := next((mark for mark in ("<!--", "-->") for part in parts.values() if mark in part), None):
        raise PageError(f"pages: results of {name} have {mark} in a name, which would end their block.")
    return parts


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
        words += f" --arms {shlex.quote(','.join(arms))}"
    return words


def _seeds(results: Mapping[str, Any]) -> int:
    return max(len(found) for found in by_seed(results["arms"]).values())


def about(made: Source, results: Mapping[str, Any]) -> str:
    """Settings, day and machine; and where the recipe's defaults are others by now."""
    settings, where = results["settings"], dict(results["environment"])
    given = {name: v for name, v in settings.items() if v is not None and v is not False and v != ""}
    words = [_said(name, value) for name, value in given.items()]
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
    new = [name for name in usual if name not in (*settings, *NOT_SETTINGS)]
    other += [f"no {name} yet" for name in new if usual[name] not in (None, False)]  # off: it is as it was
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
    for name in add(*options.runs) if options.command == "add" else ():
        print(f"{RESULTS}/{name}.json")
    for page in write():
        print(page)


if __name__ == "__main__":
    main()
