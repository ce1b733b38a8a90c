"""Regular expressions out of adapters' files: Python's answer, in bounded time, or a refusal."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optx import FileError
from optx.inject import _file_patterns
from optx.inject._file_patterns import check_simple, full_match

HOSTILE = [
    r"(a+)+$", r"(a|a)*b", r"(a|aa)+$", r"(a*)*b", r"(.*)*x", r".*.*.*.*.*.*.*x", "a?" * 40 + "a" * 40,
    r"([a-z]+)*\d", r"((a+)+)+b", r"(a+){10}(a+){10}b", r"(?=(a+)+$)a*b", r"(?!(a|a)*b)(a|a)*c",
    r"(\w+\.?)+!",
    r"(?:(?:a|b|ab)+){2,}z", r"(a{1,30}){1,30}b", "(" * 40 + "a*" + ")*" * 40 + "b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE)
def test_what_would_take_for_ever_takes_a_moment(pattern: str) -> None:
    _file_patterns._matcher.cache_clear()
    start = time.process_time()
    for text in ("a" * 60, "a" * 60 + "!", "model.layers.10.self_attn.q_proj" * 4):
        full_match(pattern, text, "file")
    assert time.process_time() - start < 1


REFUSED = [
    r"(.*)*\1x", r"(?<=a)(b+)+", r"(x{0,1000}){0,1000}y", r"(?i)(a+)+b", r"(a+)+(?=(?=(b+)+)b)c",
    r"((a)|b)*(?(2)a|b)",
    r"(a{1000}){1000}b*c*d*e*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_can_not_be_bounded_is_refused(pattern: str) -> None:
    took: list[float] = []
    for _ in range(3):  # a collection of all the process's garbage may fall into one of them
        start = time.process_time()
        with pytest.raises(FileError, match=r"file: the pattern .* can't be matched in bounded time"):
            full_match(pattern, "aaaa", "file")
        took.append(time.process_time() - start)
    assert min(took) < 1


@pytest.mark.parametrize("pattern", ["[", "(", "a{2,1}", "(" * 3000 + ")" * 3000, "*", "(?P<a", "\\"])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    with pytest.raises(FileError, match=r"file: .* is not a regular expression"):
        full_match(pattern, "a", "file")


def test_a_very_long_one_is_refused() -> None:
    with pytest.raises(FileError, match="can't be matched in bounded time"):
        full_match("a|" * 200_000, "a", "file")


USUAL = [
    r".*\.(q|v)_proj", r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj", r"(.*\.)?layers\.(1|2|3)\.mlp\..*",
    r"^(?!.*visual)(?:.*\.)?(?:q_proj|k_proj)$", r".*(?:language|text).*\.(?:self_attn|mlp)\.[a-z_]+_proj",
    r"(?:.*?(?:language|model).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj).*?)",
    r"(^|.*\.)lm_head($|\..*)",
]  # fmt: skip
PATHS = [
    "", "model.layers.10.self_attn.q_proj", "model.layers.2.mlp.down_proj", "visual.blocks.0.attn.q_proj",
    "model.language_model.layers.0.self_attn.k_proj", "base.lm_head.x", "layers.1.mlp.up", "q_proj",
    "lm_head", "é.q_proj",
]  # fmt: skip


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("pattern", USUAL)
def test_the_usual_forms_match_as_in_python(
    pattern: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow:
        monkeypatch.setattr(_file_patterns, "_TRIES", 0)
    _file_patterns._matcher.cache_clear()
    for path in PATHS:
        assert full_match(pattern, path, "file") == (re.fullmatch(pattern, path) is not None), path
    _file_patterns._matcher.cache_clear()


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\d",
        r"\w",
        r"\W",
        r"\s",
        r"\.",
        "[ab]",
        "[^a]",
        "[a-c1]",
        r"[\d_]",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\Z",
    ]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        inner.map("(?:{})*".format),
        inner.map("({})+?".format),
        inner.map("(?:{})?".format),
        inner.map("(?:{}){{1,3}}".format),
        inner.map("(?:{}){{2}}".format),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
    ),
    max_leaves=7,
)


@given(pattern=PATTERNS, text=st.text(alphabet="ab1._\n ", max_size=7))
@settings(max_examples=400, deadline=None)
def test_all_ways_at_once_lead_where_pythons_do(pattern: str, text: str) -> None:
    tree = _file_patterns._parsed(pattern, "file")
    ways = _file_patterns._Ways()
    try:
        start = ways.add(tree, ways.end)
    except _file_patterns._Unknown:
        return
    assert ways.match(start, text, 0, whole=True) == (re.fullmatch(pattern, text) is not None)


def test_simple_ones() -> None:
    for pattern in (r"a.*b\d+", "|".join(f"layers\\.{i}\\.mlp" for i in range(2000)), "", "layers|h|blocks"):
        check_simple(pattern, "file")
    for pattern in (r"(a+)+", r"a*b*c*d*", r"(a|bc)*"):
        with pytest.raises(FileError, match="bounded time"):
            check_simple(pattern, "file")
