"""Alternatives in a regex over module names, as ``(q|v)_proj``: one that matches nothing is a mistake."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_MOST = 200  # a regex of more is made by a program, which knows its modules


@dataclass
class _Group:
    """An open group: where its inside starts, and its alternatives end; ``plain`` if each may stand alone."""

    start: int
    plain: bool
    bars: list[int] = field(default_factory=list[int])


def idle(pattern: str, paths: Sequence[str]) -> list[str]:
    """The alternatives of a regex that no path needs: without any other, nothing matches."""
    found: list[str] = []
    for number, (start, end, text) in enumerate(_alternatives(pattern)):
        if number == _MOST:
            break
        try:
            alone = re.compile(pattern[:start] + text + pattern[end:]).fullmatch
        except re.error:  # a reference to a group that is in another alternative
            continue
        if not any(alone(path) for path in paths):
            found.append(text)
    return found


def _alternatives(pattern: str) -> Iterator[tuple[int, int, str]]:
    """For each alternative of each group: where the group's inside starts and ends, and the alternative."""
    flags = re.match(r"\(\?[aiLmsu]+\)", pattern)
    opened = [_Group(flags.end() if flags else 0, plain=True)]
    i = opened[0].start
    while i < len(pattern):
        letter = pattern[i]
        if letter == "\\":
            i += 1
        elif letter == "[":
            i = _after_class(pattern, i)
        elif letter == "(":
            head = re.compile(r"\((?:\?(?::|P<\w+>))?").match(pattern, i)
            assert head is not None
            plain = opened[-1].plain and pattern[head.end() : head.end() + 1] != "?"
            opened.append(_Group(head.end(), plain))
            i = head.end() - 1
        elif letter == "|":
            opened[-1].bars.append(i)
        elif letter == ")" and len(opened) > 1:
            repeated = pattern[i + 1 : i + 2] in ("*", "+", "{")
            yield from () if repeated else _of(opened.pop(), pattern, i)
            if repeated:
                opened.pop()
        i += 1
    if len(opened) == 1:
        yield from _of(opened[0], pattern, len(pattern))


def _of(group: _Group, pattern: str, end: int) -> Iterator[tuple[int, int, str]]:
    if group.bars and group.plain:
        edges = [group.start - 1, *group.bars, end]
        for before, after in itertools.pairwise(edges):
            yield group.start, end, pattern[before + 1 : after]


def _after_class(pattern: str, start: int) -> int:
    """The end of a character class, whose first letter may be a bracket."""
    i = start + 1 + (pattern[start + 1 : start + 2] == "^")
    i += pattern[i : i + 1] == "]"
    while i < len(pattern) and pattern[i] != "]":
        i += 1 + (pattern[i] == "\\")
    return i
