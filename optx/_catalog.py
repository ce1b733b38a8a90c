"""What optx offers, read off its own public names and docstrings: nothing here is kept by hand.

A method is whatever is public and names its paper, by ``Source: ...`` in its docstring; what it does is the
first line, and what else a person may call it or look for is in ``Keywords: ...``.
"""

from __future__ import annotations

import ast
import difflib
import doctest
import functools
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optx import _everything
from optx.step.bases import fused_classes

# The verbs, by where a method is public, else by the package that it lives in.
_VERBS = {
    "optx.transforms": "wrap",
    "optx.step": "wrap",
    "optx.inject": "attach",
    "optx.signal": "loss",
    "optx.thinking": "loss",
    "optx.policy": "loss",
    "optx.flow": "loss",
    "optx.delta": "delta",
    "optx.rf8": "delta",
    "optx.pruning": "prune",
    "optx.lipschitz": "attach",
    "optx.init": "tell",
    "optx.scaling": "tell",
    "optx.analysis": "tell",
    "optx._config": "config",
    "optx._config_written": "config",
}
# What an operation of an object is called on; other objects by their own name.
_OBJECTS = {"Delta": "optx.Delta.between(base, tuned)"}
# What is done with an object of a class; with others nothing more.
_FRAMES = {
    "Transform": "optx.wrap(optimizer, {})",
    "Injection": "optx.attach(model, {})",
    "Composite": "optx.attach(model, {})",
    "MergeMethod": "optx.merge(base, models, {})",
    "PruneMethod": "optx.prune(model, {})",
    "ComPEFT": "optx.compress(delta, {})",
}


@dataclass(frozen=True)
class Entry:
    """One method or recipe.

    Attributes:
        name: as it is typed.
        verb: ``wrap``, ``attach``, ``loss``, ``delta``, ``prune``, ``tell`` (it changes nothing), ``config``,
            ``engine`` (for other people's trainers) or ``run``.
        summary: the first line of its docstring.
        paper: an arXiv number where its source has one, else the source's title; empty if it names none.
        use: one line of code, or the command.
        keywords: what else it is called or looked for by.
        text: its whole docstring.
    """

    name: str
    verb: str
    summary: str
    paper: str
    use: str
    keywords: tuple[str, ...] = ()
    text: str = field(default="", repr=False)


@dataclass(frozen=True)
class Card:
    """All that a method says of itself.

    Attributes:
        entry: its line in the list.
        calls: how it is called: with all defaults, and in its verb.
        example: its docstring's, as a file would have it, with what it prints as comments.
        short: what a person needs in order to call it: what it does, limits, the paper's values, arguments.
        body: its docstring from the second paragraph on.
        links: where its papers are.
        shown: the commands of the recipes that use it.
        also: other methods that have the word in their names by which this one was asked for.
    """

    entry: Entry
    calls: list[str]
    example: str
    short: list[str]
    body: str
    links: list[str]
    shown: list[str]
    also: list[str]


def card(name: str) -> Card | None:
    """A method by its name or by a keyword that it alone has, in whatever case, with or without ``optx.``."""
    plain = name.removeprefix("optx.").lower()
    found = _named(plain)
    if found is None:
        return None
    thing, entry = found
    source = _source(entry.text)
    links = [f"https://arxiv.org/abs/{n}" for n in dict.fromkeys(_NUMBER.findall(source))]
    links += re.findall(r"https?://[^\s,;)]+", source)
    used = re.compile(rf"\boptx\.{re.escape(entry.name)}\b")
    shown = [f"optx run {recipe}" for recipe, text in _recipe_texts() if used.search(text)]
    also = [other.name for other in methods() if plain in other.name.lower() and other.name != entry.name]
    body = entry.text.partition("\n")[2].strip()
    return Card(
        entry, _calls(thing, entry), _example(entry.text), _short(entry.text), body, links, shown, also
    )


def _named(plain: str) -> tuple[Any, Entry] | None:
    """By the whole name, else by its last part, else by a keyword, if one method alone has it."""
    every = _methods()
    whole = [pair for pair in every if pair[1].name.lower() == plain]
    last = [pair for pair in every if pair[1].name.lower().rpartition(".")[2] == plain]
    keyword = [pair for pair in every if plain in map(str.lower, pair[1].keywords)]
    return next((found[0] for found in (whole, last, keyword) if len(found) == 1), None)


def similar(name: str) -> list[str]:
    """Methods that a name is a slip of the fingers for; of three letters, two alike are none."""
    names = {entry.name.lower(): entry.name for entry in methods()}
    close = difflib.get_close_matches(name.removeprefix("optx.").lower(), names, n=3, cutoff=0.7)
    return [names[one] for one in close]


def search(word: str) -> tuple[list[Entry], list[Entry]]:
    """What has a word (or several in a row) in its name, first line, keywords or paper; names first.

    And what has it elsewhere in its docstring only. Words of up to three letters are found whole, others
    where a word begins: "SAM" is not in "sample", and "grok" is in "grokking".
    """
    body = r"[\s-]+".join(re.escape(part) for part in re.split(r"[\s-]+", word.strip()))
    end = r"(?!\w)" if len(word.strip()) <= 3 else ""
    pattern = re.compile(rf"(?<!\w){body}{end}", re.IGNORECASE)
    every = [*methods(), *functions(), *engines(), *recipes()]
    named = [entry for entry in every if word.strip().lower() in entry.name.lower()]
    headed = [e for e in every if pattern.search(" | ".join([e.summary, e.paper, *e.keywords]))]
    first = [*named, *(entry for entry in headed if entry not in named)]
    return first, [entry for entry in every if entry not in first and pattern.search(entry.text)]


def fused(name: str) -> str:
    """Which optimizers of this name `optx.wrap` fuses, in a sentence; empty if none."""
    plain = name.strip().rpartition(".")[2].lower()
    found = [f"{library}'s {cls}" for library, cls in fused_classes() if cls.lower() == plain]
    return f"optx.wrap fuses {' and '.join(found)}; help(optx.register_base) has all." if found else ""


def functions() -> list[Entry]:
    """The public functions that implement no paper: what methods are used with."""
    known = {thing for thing, _ in _methods()}
    found = [(name, thing, inspect.getdoc(thing) or "") for name, thing in public() if "." not in name]
    return [
        Entry(name, _verb(thing) or "wrap", _first_line(doc), "", _use(name, thing), _keywords(doc), doc)
        for name, thing, doc in found
        if inspect.isfunction(thing) and thing not in known
    ]


def engines() -> list[Entry]:
    """What is there for other people's trainers, without importing them."""
    folder = Path(__file__).parent / "integrations"
    found: list[Entry] = []
    for file in sorted(folder.glob("[a-z]*.py")):
        room, tree = f"integrations.{file.stem}", ast.parse(file.read_text(encoding="utf-8"))
        parts = [one for one in tree.body if isinstance(one, ast.FunctionDef | ast.ClassDef)]
        named = [(f"{room}.{one.name}", one) for one in parts if not one.name.startswith("_")]
        for name, node in [(room, tree), *named]:
            doc = ast.get_docstring(node) or ""
            called = f"({_asked(node)})" if isinstance(node, ast.FunctionDef) else ""
            use = f"optx.{name}{called}"
            found.append(Entry(name, "engine", _first_line(doc), "", use, _keywords(doc), doc))
    return found


def _asked(node: ast.FunctionDef) -> str:
    """The arguments that a function can't do without, and those that it takes any number of."""
    names = [one.arg for one in node.args.args]
    many = [f"*{node.args.vararg.arg}"] if node.args.vararg else []
    return ", ".join([*names[: len(names) - len(node.args.defaults)], *many])


def methods() -> list[Entry]:
    """Everything public that implements a method, by verb and name."""
    order = list(dict.fromkeys(_VERBS.values()))
    return sorted((entry for _, entry in _methods()), key=lambda e: (order.index(e.verb), e.name.lower()))


def public() -> Iterator[tuple[str, Any]]:
    """Every public name but modules, with what it names: of optx, and of its modules that list theirs."""
    import optx

    _everything.load()
    for name, thing in list(vars(optx).items()):
        if inspect.ismodule(thing):
            yield from ((f"{name}.{each}", vars(thing)[each]) for each in vars(thing).get("__all__", ()))
        elif not name.startswith("_"):
            yield name, thing


@functools.cache  # a look through every public class; a card needs it twice
def _methods() -> tuple[tuple[Any, Entry], ...]:
    """Each once, under its shortest name."""
    found: dict[Any, Entry] = {}
    for name, thing in sorted([*public(), *_operations()], key=lambda pair: len(pair[0])):
        doc = inspect.getdoc(thing) or ""
        verb = _VERBS.get(f"optx.{name.partition('.')[0]}") or _verb(thing)
        if verb and callable(thing) and thing not in found and _source(doc):
            line, use = _first_line(doc), _use(name, thing)
            found[thing] = Entry(name, verb, line, _arxiv(doc), use, _keywords(doc), doc)
    return tuple(found.items())


def _operations() -> Iterator[tuple[str, Any]]:
    """The methods, in Python's sense, of the public classes."""
    for owner, thing in public():
        if inspect.isclass(thing):
            members = inspect.getmembers(thing, inspect.isroutine)
            yield from ((f"{owner}.{name}", part) for name, part in members if not name.startswith("_"))


def recipes() -> list[Entry]:
    """The recipes, without importing them (each imports what it needs to run)."""
    return [
        Entry(name, "run", _first_line(doc), _arxiv(doc), f"optx run {name}", _keywords(doc), doc)
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


# What an object of a class is for, wherever the class lives.
_KINDS = {"Transform": "wrap", "Injection": "attach", "Composite": "attach"}


def _verb(thing: Any) -> str | None:
    kinds = [kind.__name__ for kind in getattr(thing, "__mro__", ())]
    if verb := next((_KINDS[kind] for kind in kinds if kind in _KINDS), None):
        return verb
    module = str(getattr(thing, "__module__", ""))
    return next((verb for package, verb in _VERBS.items() if f"{module}.".startswith(f"{package}.")), None)


def _first_line(doc: str) -> str:
    return doc.strip().partition("\n")[0]


_NUMBER = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


def _source(doc: str) -> str:
    """What a docstring names as its source."""
    source = re.search(
        r"^Source[^:\n]*:\s*(.+?)(?:\n\s*\n|\Z)", inspect.cleandoc(doc), re.DOTALL | re.MULTILINE
    )
    return " ".join(source.group(1).split()) if source else ""


_TITLES = (
    *("Args", "Attributes", "Group keys", "Returns", "Raises", "Example"),
    *("Paper values", "Limits", "Evidence", "Keywords", "Source"),
)


def sections(doc: str) -> list[tuple[str, str]]:
    """A docstring's parts, each with its title: of plain paragraphs, none."""
    title = re.compile(rf"({'|'.join(_TITLES)})\b[^:\n]*:")
    parts = re.split(r"\n\s*\n(?=\S)", doc.strip())
    return [(found[1] if (found := title.match(part)) else "", part) for part in parts]


def _short(doc: str) -> list[str]:
    """The paragraph after the first line, limits, the paper's values and arguments, if there are any."""
    parts = sections(doc)
    opening = [text for title, text in parts[1:2] if not title]
    titled = {title: text for title, text in parts if title}
    return opening + [titled[title] for title in ("Limits", "Paper values", "Args") if title in titled]


def _example(doc: str) -> str:
    """The docstring's example without prompts."""
    text = dict(sections(doc)).get("Example", "")
    lines: list[str] = []
    for one in doctest.DocTestParser().get_examples(text):
        lines += [one.source.rstrip(), *(f"# {line}" for line in one.want.splitlines())]
    return "\n".join(lines)


def _keywords(doc: str) -> tuple[str, ...]:
    line = " ".join(dict(sections(doc)).get("Keywords", "").removeprefix("Keywords:").split())
    return tuple(word.strip() for word in line.rstrip(".").split(",") if word.strip())


def _arxiv(doc: str) -> str:
    """The source that a docstring names: its arXiv numbers, else the line."""
    text = _source(doc)
    numbers = _NUMBER.findall(text)
    return ", ".join(f"arXiv {number}" for number in dict.fromkeys(numbers)) or text


def _use(name: str, thing: Any) -> str:
    owner, _, last = name.rpartition(".")
    called = f"{_OBJECTS.get(owner, owner.lower())}.{last}" if _is_bound(thing) else f"optx.{name}"
    call = f"{called}({', '.join(_required(thing))})"
    if forward := getattr(thing, "forward", None):
        return f"{call}({', '.join(_required(forward))})"
    kinds = [kind.__name__ for kind in getattr(thing, "__mro__", ())]
    return next((_FRAMES[kind] for kind in kinds if kind in _FRAMES), "{}").format(call)


def _calls(thing: Any, entry: Entry) -> list[str]:
    """With the defaults, and in its verb where that says more; an operation after what makes its object."""
    owner, _, last = entry.name.rpartition(".")
    if _is_bound(thing):
        return [f"{owner.lower()} = {_OBJECTS[owner]}", f"{owner.lower()}.{last}{_defaults(thing)}"]
    full = f"optx.{entry.name}{_defaults(thing)}"
    bare = f"optx.{entry.name}({', '.join(_required(thing))})"
    return [full] if entry.use == bare else [entry.use, full]


def _is_bound(thing: Any) -> bool:
    """Whether it is called on an object."""
    return len(_parameters(thing)) < len(inspect.signature(thing).parameters)


def _defaults(thing: Any) -> inspect.Signature:
    """A signature without annotations, which the docstring says in words, and with dots for made defaults."""
    plain = [p.replace(annotation=p.empty, default=_shown(p.default)) for p in _parameters(thing)]
    return inspect.Signature(plain)


class _Dots:
    def __repr__(self) -> str:
        return "..."


def _shown(default: Any) -> Any:
    made = callable(default) and default is not inspect.Parameter.empty
    return _Dots() if made or type(default).__module__ == "dataclasses" else default


def _parameters(thing: Any) -> list[inspect.Parameter]:
    """Those that a caller gives: without self."""
    every = list(inspect.signature(thing).parameters.values())
    return every[1:] if every and every[0].name == "self" else every


def _required(function: Any) -> list[str]:
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in _parameters(function) if p.default is p.empty and p.kind in plain]


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
