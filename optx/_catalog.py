"""What optx offers, read off its own public names and docstrings: nothing here is kept by hand.

A method's docstring begins with what it does; a line ``Source: ...`` in it or in its module names the paper.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optx.step.transform import Transform

# The five verbs, by the package that a method lives in.
_VERBS = {
    "optx.transforms": "wrap",
    "optx.inject": "attach",
    "optx.signal": "loss",
    "optx.delta": "delta",
    "optx.scaling": "tell",
    "optx.analysis": "tell",
}


@dataclass(frozen=True)
class Entry:
    """One method or recipe.

    Attributes:
        name: as it is typed.
        verb: ``wrap``, ``attach``, ``loss``, ``delta``, ``tell`` (it changes nothing) or ``run``.
        summary: the first line of its docstring.
        paper: an arXiv number where its source has one, else the source's title; empty if it names none.
        use: one line of code, or the command.
    """

    name: str
    verb: str
    summary: str
    paper: str
    use: str


def methods() -> list[Entry]:
    """Everything public that implements a method, by verb and name."""
    import optx

    names = [(name, thing) for name, thing in vars(optx).items() if not name.startswith("_")]
    for module in ("analysis", "scaling"):
        if part := _module(f"optx.{module}"):
            names += [(f"{module}.{name}", getattr(part, name)) for name in getattr(part, "__all__", ())]
    classes = {thing.__module__ for _, thing in names if inspect.isclass(thing)}
    found: dict[Any, Entry] = {}
    for name, thing in names:
        verb = _verb(thing)
        # A loss that comes as a class and as a function is one method.
        twin = inspect.isfunction(thing) and verb == "loss" and thing.__module__ in classes
        if verb and not twin and (inspect.isclass(thing) or inspect.isfunction(thing)):
            found[thing] = Entry(name, verb, _summary(thing), _paper(thing), _use(name, verb, thing))
    order = list(dict.fromkeys(_VERBS.values()))
    return sorted(found.values(), key=lambda entry: (order.index(entry.verb), entry.name.lower()))


def recipes() -> list[Entry]:
    """The recipes, without importing them (each imports what it needs to run)."""
    return [
        Entry(name, "run", _first_line(doc), _arxiv(doc), f"optx run {name}")
        for name, doc in sorted(_recipe_docs())
    ]


def missing_requirements(extra: str) -> list[str]:
    """The distributions of an extra of optx-torch that are not installed."""
    try:
        wanted = importlib.metadata.requires("optx-torch") or []
    except importlib.metadata.PackageNotFoundError:  # run from a bare checkout: let the import tell
        return []
    asked = [line for line in wanted if re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", line)]
    names = [found.group() for line in asked if (found := re.match(r"[\w.-]+", line))]
    return [name for name in names if not _installed(name)]


def install_command(extra: str) -> str:
    """The pip command that brings an extra, for a clone or for an installed package."""
    clone = Path(__file__).parent.parent
    here = (clone / "pyproject.toml").exists()
    return (
        f"python -m pip install -e '{clone}[{extra}]'"
        if here
        else f"python -m pip install 'optx-torch[{extra}]'"
    )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def _verb(thing: Any) -> str | None:
    if thing is Transform:
        return None
    module = str(getattr(thing, "__module__", ""))
    if module.rpartition(".")[2].startswith("_"):  # shared machinery, not a method
        return None
    return next((verb for package, verb in _VERBS.items() if f"{module}.".startswith(f"{package}.")), None)


def _summary(thing: Any) -> str:
    return _first_line(inspect.getdoc(thing) or "")


def _first_line(doc: str) -> str:
    return doc.strip().partition("\n")[0]


def _paper(thing: Any) -> str:
    return _arxiv(inspect.getdoc(thing) or "") or _arxiv(inspect.getdoc(inspect.getmodule(thing)) or "")


def _arxiv(doc: str) -> str:
    """The source that a docstring names: its arXiv numbers, else the line."""
    source = re.search(
        r"^Source[^:\n]*:\s*(.+?)(?:\n\s*\n|\Z)", inspect.cleandoc(doc), re.DOTALL | re.MULTILINE
    )
    if not source:
        return ""
    text = " ".join(source.group(1).split())
    numbers = re.findall(r"arXiv[ :](\d{4}\.\d{4,5})", text)
    return ", ".join(f"arXiv {number}" for number in dict.fromkeys(numbers)) or text


def _use(name: str, verb: str, thing: Any) -> str:
    call = f"optx.{name}({', '.join(_required(thing))})"
    if verb == "wrap":
        return f"optx.wrap(optimizer, {call})"
    if verb == "attach":
        return f"optx.attach(model, {call}, targets=...)"
    forward = getattr(thing, "forward", None)
    return f"{call}({', '.join(_required(forward)[1:])})" if forward else call


def _required(function: Any) -> list[str]:
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in plain]


def _recipe_docs() -> Iterator[tuple[str, str]]:
    import optx.recipes

    for found in pkgutil.iter_modules(optx.recipes.__path__):
        if not found.name.startswith("_"):
            for folder in optx.recipes.__path__:
                if (file := Path(folder) / f"{found.name}.py").exists():
                    yield found.name, ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
