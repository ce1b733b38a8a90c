"""YAML files of strangers: read within bounds of size, depth and repetition, or refused in one sentence.

YAML's aliases let a file hold itself, or grow to billions of values out of ten lines. So its events are
looked at one by one first, with what they would grow to; only a small and finite file is made into a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from optx._errors import FileError, OptxError

_BYTES = 1 << 17
"""Of a file: a merge with its own settings for each of a hundred layers takes a quarter."""
_DEPTH = 32
_VALUES = 1 << 15
"""In all, each alias counted with what it stands for."""
_BITS = 3400
"""Of an integer; Python does not even show one of more than 4300 digits."""


def load_yaml(path: Path, what: str = "config") -> Any:
    """What a file holds: tables by name, lists, words, numbers, true, false and None, and nothing else.

    Args:
        path: the file.
        what: the argument's name, for messages.

    Raises:
        FileError: it can't be read, is no YAML, is too large, too deep, or holds itself.
        OptxError: it has a key twice, or a value of another kind (a date, a set); or pyyaml is missing.
    """
    try:
        import yaml
    except ImportError:
        raise OptxError(f"{what}: reading YAML needs pyyaml. Type: python -m pip install pyyaml") from None
    who = f"{what}: {str(path)!r}"
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{who} can't be read ({reason}).") from None
    if len(data) > _BYTES:
        raise FileError(f"{who} has more than {_BYTES >> 10} KiB, which no merge's description needs.")
    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_growth(yaml.parse(data, Loader=kind), who)
        loader = kind(data)
        try:
            node = loader.get_single_node()
            _check_keys(node, who)
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except OptxError:
        raise
    except RecursionError:
        raise FileError(f"{who} is no YAML: it is nested too deep.") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # Not all are YAML's own: a date such as 2026-13-01 is a ValueError, "!!bool maybe" a KeyError.
        raise FileError(f"{who} is no YAML: {_short(' '.join(str(error).split()), 300)}") from None
    _check_plain(value, who)
    return value


def _check_growth(events: Any, who: str) -> None:
    """Refuse what is too deep, too long with its aliases written out, or holds itself."""
    sizes: dict[str, int] = {}  # of what each finished anchor stands for
    above: list[tuple[str | None, int]] = []  # the anchors that are open, and the values before each
    count = 0
    for event in events:
        kind = type(event).__name__
        anchor: Any = getattr(event, "anchor", None)
        if kind.endswith("EndEvent") and kind.startswith(("Mapping", "Sequence")):
            name, before = above.pop()
            if name is not None:
                sizes[name] = count - before
        elif kind == "AliasEvent":
            if any(name == anchor for name, _ in above):
                raise FileError(f"{who} holds itself: *{_short(anchor)} stands within &{_short(anchor)}.")
            count += sizes.get(anchor, 1)  # of one that was never set, the loader says so
        elif kind in ("ScalarEvent", "MappingStartEvent", "SequenceStartEvent"):
            if kind != "ScalarEvent":
                above.append((anchor, count))
            elif anchor is not None:
                sizes[anchor] = 1
            count += 1
        if len(above) > _DEPTH:
            raise FileError(f"{who} is nested more than {_DEPTH} deep.")
        if count > _VALUES:
            raise FileError(f"{who} has more than {_VALUES} values, with its aliases written out.")


def _check_keys(node: Any, who: str) -> None:
    """Refuse a key that a table has twice: the loader would take the last without a word."""
    waiting, seen = [node], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        found = set[tuple[str, str]]()
        for item in node.value:
            if not isinstance(item, tuple):
                waiting.append(item)
                continue
            key, value = cast(tuple[Any, Any], item)
            waiting += [key, value]
            if isinstance(key.value, str):
                mark = (str(key.tag), key.value)
                if mark in found:
                    raise OptxError(
                        f"{who} has the key {_short(key.value)!r} twice in one table, in line "
                        f"{key.start_mark.line + 1}; which one is meant?"
                    )
                found.add(mark)


def _check_plain(value: Any, who: str) -> None:
    """Refuse what a merge's description has no use for."""
    waiting: list[tuple[Any, Any]] = [("the file", value)]
    seen = set[int]()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict | list):
            if id(value) in seen:
                continue
            seen.add(id(value))  # an alias stands for the same object
        if isinstance(value, dict):
            table = cast(dict[Any, Any], value)
            for key in table:
                _check_word(key, "a key", who)
            waiting += table.items()
        elif isinstance(value, list):
            waiting += ((name, item) for item in cast(list[Any], value))
        else:
            _check_word(value, repr(name), who)


def _check_word(value: Any, name: str, who: str) -> None:
    if not isinstance(value, str | int | float | None):
        kind = type(value).__name__
        raise OptxError(f"{who}: {name} is a {kind}; a word that looks like one must be in quotes.")
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise OptxError(f"{who}: {name} is a number of more than a thousand digits.")


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
