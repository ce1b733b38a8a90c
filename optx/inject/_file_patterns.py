r"""Regular expressions out of files: matched in bounded time, or refused.

Python's matcher goes back and tries again, so that ``(a+)+$`` takes longer than the universe has. An
expression whose tries can be counted and are few is left to it; any other is matched by following all of its
ways at once (Thompson 1968), letter by letter, to the same yes or no. What can be neither is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from optx._errors import FileError

try:
    from re import _constants as C  # pyright: ignore[reportAttributeAccessIssue]
    from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # Python 3.10
    import sre_constants as C
    import sre_parse as parser

_LONGEST, _TRIES, _STATES, _NAME = 1 << 18, 1 << 16, 20_000, 256
_REPEATS = (C.MAX_REPEAT, C.MIN_REPEAT)
_FLAGS = re.IGNORECASE | re.LOCALE | re.MULTILINE | re.ASCII
_Test: TypeAlias = Callable[[str, int], bool]
"""Whether a letter of a text, or a place in it, will do."""


def full_match(pattern: str, text: str, who: str) -> bool:
    """Whether a whole text matches.

    Args:
        pattern: the expression, of a stranger.
        text: a module's path.
        who: where the expression stands, for messages.

    Raises:
        FileError: it is none, or can't be matched in bounded time.
    """
    return _matcher(pattern, who)(text)


def check_simple(pattern: str, who: str) -> None:
    """Raise unless Python's own matcher is sure to be quick with an expression.

    Raises:
        FileError: it is none, or could take long.
    """
    if _tries(_parsed(pattern, who)) > _TRIES:
        raise _refused(pattern, who)


def _refused(pattern: str, who: str) -> FileError:
    return FileError(
        f"{who}: the pattern {_short(pattern)} can't be matched in bounded time. Write it simpler."
    )


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")


def _parsed(pattern: str, who: str) -> Any:
    try:
        if len(pattern) > _LONGEST:
            raise _refused(pattern, who)
        re.compile(pattern)
        return parser.parse(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise FileError(f"{who}: {_short(pattern)} is not a regular expression ({why}).") from None


@functools.lru_cache(256)
def _matcher(pattern: str, who: str) -> Callable[[str], bool]:
    tree = _parsed(pattern, who)
    if _tries(tree) <= _TRIES:
        return lambda text: re.fullmatch(pattern, text) is not None
    ways = _Ways()
    try:
        if tree.state.flags & _FLAGS:
            raise _Unknown
        start = ways.add(tree, ways.end)
    except (_Unknown, RecursionError):
        raise _refused(pattern, who) from None
    return lambda text: ways.match(start, text, 0, whole=True)


# ---- what Python's own matcher would take ---------------------------------------------------------------


def _tries(tree: Iterable[Any]) -> int:
    """How many ways there are to go through an expression with a text of a path's length, at most."""
    tries = 1
    for kind, what in tree:
        if kind in _REPEATS or kind is getattr(C, "POSSESSIVE_REPEAT", None):
            least, most, inner = what
            inside = _tries(inner)
            if most > 1 and inside > 1:
                return _TRIES + 1  # choices within choices
            tries *= inside * max(1, min(int(most) - int(least) + 1, _NAME))
        elif kind is C.BRANCH:
            tries *= sum(_tries(branch) for branch in what[1])
        elif kind is C.SUBPATTERN:
            tries *= _tries(what[-1])
        elif kind in (C.ASSERT, C.ASSERT_NOT):
            tries *= _tries(what[1])
        elif kind not in (C.LITERAL, C.NOT_LITERAL, C.ANY, C.IN, C.AT):
            return _TRIES + 1
        if tries > _TRIES:
            return tries
    return tries


# ---- all ways at once -----------------------------------------------------------------------------------


class _Unknown(Exception):
    """Something that is no choice of ways, such as a reference to a group; or too many ways."""


class _Ways:
    """An expression as states: each is a test and where it leads, or a place where ways part."""

    def __init__(self) -> None:
        self._tests: list[_Test | None] = []
        self._steps: list[int] = []  # letters that a test takes
        self._next: list[tuple[int, ...]] = []
        self._depth = 0
        self.end = self._state(None, 0, ())

    def _state(self, test: _Test | None, step: int, then: tuple[int, ...]) -> int:
        if len(self._next) >= _STATES:
            raise _Unknown
        self._tests.append(test)
        self._steps.append(step)
        self._next.append(then)
        return len(self._next) - 1

    def add(self, tree: Iterable[Any], then: int) -> int:
        """A sequence, from its last part to its first; where it begins."""
        for kind, what in reversed(list(tree)):
            then = self._part(kind, what, then)
        return then

    def _part(self, kind: Any, what: Any, then: int) -> int:
        if kind in _REPEATS:
            least, most, inner = what
            return self._repeat(least, most, inner, then)
        if kind is C.BRANCH:
            return self._state(None, 0, tuple(self.add(branch, then) for branch in what[1]))
        if kind is C.SUBPATTERN:
            if what[1] or what[2]:  # flags of its own
                raise _Unknown
            return self.add(what[3], then)
        if kind in (C.ASSERT, C.ASSERT_NOT):
            return self._state(self._ahead(kind is C.ASSERT, *what), 0, (then,))
        if kind is C.AT:
            return self._state(_place(what), 0, (then,))
        return self._state(_letter(kind, what), 1, (then,))

    def _repeat(self, least: int, most: int, inner: Any, then: int) -> int:
        if most is C.MAXREPEAT:
            loop = self._state(None, 0, ())
            self._next[loop] = (self.add(inner, loop), then)
            then = loop
        else:
            for _ in range(int(most) - int(least)):
                then = self._state(None, 0, (self.add(inner, then), then))
        for _ in range(int(least)):
            then = self.add(inner, then)
        return then

    def _ahead(self, wanted: bool, direction: int, inner: Any) -> _Test:
        if direction < 0 or self._depth:  # one within another is asked at every place of every place
            raise _Unknown
        self._depth += 1
        start = self.add(inner, self.end)
        self._depth -= 1
        return lambda text, at: self.match(start, text, at, whole=False) == wanted

    def match(self, start: int, text: str, at: int, whole: bool) -> bool:
        """Whether a way leads from a place of the text to the end, of the text if it is to match whole."""
        here = self._closure([start], text, at)
        while True:
            if self.end in here and (at == len(text) or not whole):
                return True
            if at == len(text) or not here:
                return False
            found = [
                to
                for state in here
                if self._steps[state] and (test := self._tests[state]) and test(text, at)
                for to in self._next[state]
            ]
            at += 1
            here = self._closure(found, text, at)

    def _closure(self, states: list[int], text: str, at: int) -> set[int]:
        """All states that are reached without taking a letter."""
        seen, waiting = set[int](), states
        while waiting:
            state = waiting.pop()
            if state in seen:
                continue
            seen.add(state)
            test = self._tests[state]
            if not self._steps[state] and (test is None or test(text, at)):
                waiting.extend(self._next[state])
        return seen


def _letter(kind: Any, what: Any) -> _Test:
    if kind is C.LITERAL:
        return lambda text, at: ord(text[at]) == what
    if kind is C.NOT_LITERAL:
        return lambda text, at: ord(text[at]) != what
    if kind is C.ANY:
        return lambda text, at: text[at] != "\n"
    if kind is C.IN:
        negated = what[0][0] is C.NEGATE
        tests = [_member(*one) for one in what[negated:]]
        return lambda text, at: any(test(text, at) for test in tests) != negated
    raise _Unknown


_CATEGORIES: dict[Any, str] = {
    C.CATEGORY_DIGIT: r"\d",
    C.CATEGORY_NOT_DIGIT: r"\D",
    C.CATEGORY_SPACE: r"\s",
    C.CATEGORY_NOT_SPACE: r"\S",
    C.CATEGORY_WORD: r"\w",
    C.CATEGORY_NOT_WORD: r"\W",
}


def _member(kind: Any, what: Any) -> _Test:
    if kind is C.RANGE:
        return lambda text, at: what[0] <= ord(text[at]) <= what[1]
    if kind is C.CATEGORY and what in _CATEGORIES:
        compiled = re.compile(_CATEGORIES[what])
        return lambda text, at: compiled.match(text, at) is not None
    return _letter(kind, what)


def _place(what: Any) -> _Test:
    if what in (C.AT_BEGINNING, C.AT_BEGINNING_STRING):
        return lambda text, at: at == 0
    if what is C.AT_END:
        return lambda text, at: text[at:] in ("", "\n")
    if what is C.AT_END_STRING:
        return lambda text, at: at == len(text)
    if what in (C.AT_BOUNDARY, C.AT_NON_BOUNDARY):
        compiled = re.compile(r"\b" if what is C.AT_BOUNDARY else r"\B")
        return lambda text, at: compiled.match(text, at) is not None
    raise _Unknown
