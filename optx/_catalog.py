"""What optx offers, read off its own public names and docstrings: nothing here is kept by hand.

A method's docstring begins with what it does; a line ``Source: ...`` in it or in its module names the paper.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pkgutil
import re
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


@dataclass(frozen=True)
class Card:
    """All that a method says of itself.

    Attributes:
        entry: its line in the list.
        signature: how it is called, with the defaults.
        body: its docstring from the second paragraph on.
        links: where its papers are.
        shown: the commands of the recipes that use it.
    """

    entry: Entry
    signature: str
    body: str
    links: list[str]
    shown: list[str]


def card(name: str) -> Card | None:
    """A method by its name, in whatever case and with or without ``optx.``; None if there is none."""
    plain = name.removeprefix("optx.").lower()
    for thing, entry in _methods().items():
        if entry.name.lower() != plain:
            continue
        doc = inspect.getdoc(thing) or ""
        source = f"{entry.paper} {_source(doc) or _source(inspect.getdoc(inspect.getmodule(thing)) or '')}"
        links = [f"https://arxiv.org/abs/{n}" for n in dict.fromkeys(_NUMBER.findall(source))]
        links += re.findall(r"https?://[^\s,;)]+", source)
        used = re.compile(rf"\boptx\.{re.escape(entry.name)}\b")
        shown = [f"optx run {recipe}" for recipe, text in _recipe_texts() if used.search(text)]
        signature = f"optx.{entry.name}{_defaults(thing)}"
        return Card(entry, signature, doc.partition("\n")[2].strip(), links, shown)
    return None


def methods() -> list[Entry]:
    """Everything public that implements a method, by verb and name."""
    order = list(dict.fromkeys(_VERBS.values()))
    return sorted(_methods().values(), key=lambda entry: (order.index(entry.verb), entry.name.lower()))


def _methods() -> dict[Any, Entry]:
    import optx

    names = [(name, thing) for name, thing in vars(optx).items() if not name.startswith("_")]
    for module in ("analysis", "scaling"):
        if part := _module(f"optx.{module}"):
            names += [(f"{module}.{name}", vars(part)[name]) for name in part.__all__]
    classes = {thing.__module__ for _, thing in names if inspect.isclass(thing)}
    found: dict[Any, Entry] = {}
    # What is done with a delta is a method of it; those that are a paper's name their source.
    operations = inspect.getmembers(optx.Delta, inspect.isfunction)
    names += [
        (f"Delta.{name}", operation)
        for name, operation in operations
        if not name.startswith("_") and _source(inspect.getdoc(operation) or "")
    ]
    for name, thing in names:
        verb = "delta" if name.startswith("Delta.") else _verb(thing)
        # A loss that comes as a class and as a function is one method.
        twin = inspect.isfunction(thing) and verb == "loss" and thing.__module__ in classes
        if verb and not twin and (inspect.isclass(thing) or inspect.isfunction(thing)):
            found[thing] = Entry(name, verb, _summary(thing), _paper(thing), _use(name, verb, thing))
    return found


def recipes() -> list[Entry]:
    """The recipes, without importing them (each imports what it needs to run)."""
    return [
        Entry(name, "run", _first_line(doc), _arxiv(doc), f"optx run {name}")
        for name, text in _recipe_texts()
        for doc in (ast.get_docstring(ast.parse(text)) or "",)
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


_NUMBER = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


def _source(doc: str) -> str:
    """What a docstring names as its source."""
    source = re.search(
        r"^Source[^:\n]*:\s*(.+?)(?:\n\s*\n|\Z)", inspect.cleandoc(doc), re.DOTALL | re.MULTILINE
    )
    return " ".join(source.group(1).split()) if source else ""


def _arxiv(doc: str) -> str:
    """The source that a docstring names: its arXiv numbers, else the line."""
    text = _source(doc)
    numbers = _NUMBER.findall(text)
    return ", ".join(f"arXiv {number}" for number in dict.fromkeys(numbers)) or text


def _use(name: str, verb: str, thing: Any) -> str:
    call = f"optx.{name}({', '.join(_required(thing))})"
    if name.startswith("Delta."):
        arguments = ", ".join(_required(thing)[1:])
        return f"optx.Delta.between(base, tuned).{name.removeprefix('Delta.')}({arguments})"
    if verb == "wrap":
        return f"optx.wrap(optimizer, {call})"
    if verb == "attach":
        return f"optx.attach(model, {call})"
    forward = getattr(thing, "forward", None)
    return f"{call}({', '.join(_required(forward)[1:])})" if forward else call


def _defaults(thing: Any) -> inspect.Signature:
    """A signature without annotations: the docstring says them in words."""
    signature = inspect.signature(thing)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=plain, return_annotation=signature.empty)


def _required(function: Any) -> list[str]:
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in plain]


def _recipe_texts() -> list[tuple[str, str]]:
    """Name and source of every recipe."""
    import optx.recipes

    names = {m.name for m in pkgutil.iter_modules(optx.recipes.__path__) if not m.name.startswith("_")}
    folders = map(Path, optx.recipes.__path__)
    files = [folder / f"{name}.py" for folder in folders for name in names]
    return sorted((file.stem, file.read_text(encoding="utf-8")) for file in files if file.exists())


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
