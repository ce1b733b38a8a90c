"""A merge's YAML by a stranger: refused in one sentence and within a second, whatever it would grow to."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import optx
from optx import FileError, OptxError
from optx.delta import _yaml
from optx.delta._yaml import load_yaml

BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a: &a0 {x: 1}\n" + "".join(
    f"b{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
)

REFUSED: dict[str, tuple[str | bytes, str]] = {
    # alias_loop.yaml
    "a table in itself": ("merge_method: ties\nbase_model: &b {model: *b}", r"holds itself: \*b stands"),
    "a list in itself": ("models: &m [1, *m]", r"holds itself: \*m"),
    "two steps": ("a: &a {b: &b {c: *a}}", "holds itself"),
    "a key in itself": ("? &a {*a : 1}\n: 1", "holds itself"),
    "a merge of itself": ("a: &a {<<: *a}", "holds itself"),
    "a bomb": (BOMB, "more than 32768 values, with its aliases written out"),
    "a bomb of merges": (MERGES, "more than 32768 values"),
    "a bomb with an anchor set twice": (BOMB.replace("&a5", "&a4"), "more than 32768|is no YAML"),
    "lists": ("[" * 40, "nested more than 32 deep"),
    "lists, far too deep": ("a: " + "[" * 60_000, "nested more than 32 deep|is no YAML|more than 128 KiB"),
    "tables": ("{a: " * 60_000, "nested more than 32 deep|is no YAML|more than 128 KiB"),
    "blocks": ("".join(" " * i + "a:\n" for i in range(400)), "nested more than 32 deep"),
    "lists of blocks": ("- " * 60_000, "nested more than 32 deep|is no YAML|more than 128 KiB"),
    "a long file": ("a: 1 # " + "x" * 200_000, "has more than 128 KiB"),
    "many values": ("[" + "1," * 64_000 + "*x]", "undefined alias|more than"),
    "an unknown alias": ("a: *b", "undefined alias"),
    "an alias of a later anchor": ("a: *b\nb: &b 1", "undefined alias"),
    "a key twice": ("a:\n  x: 1\n  x: 2", "has the key 'x' twice in one table, in line 3"),
    "a list as key": ("[1, 2]: 3", "is no YAML: .*unhashable"),
    "a date as key": ("2026-01-01: 2", "a key is a date; a word"),
    "a huge key": ("0x" + "f" * 900 + ": 1", "a key is a number of more than a thousand digits"),
    "a huge number": ("a: 0x" + "f" * 100_000, "'a' is a number of more than a thousand digits"),
    "a long number": ("a: " + "9" * 100_000, "is no YAML|more than a thousand"),
    "minutes of minutes": ("a: 1" + ":59" * 40_000, "more than a thousand|is no YAML"),
    "a date": ("a: 2026-01-01", "'a' is a date; a word that looks like one"),
    "a set": ("a: !!set {x, y}", "'a' is a set"),
    "bytes": ("a: !!binary aGk=", "'a' is a bytes"),
    "pairs": ("a: !!pairs [x: 1]", "'a' is a tuple"),
    "an object": ("a: !!python/object/apply:os.system [id]", "is no YAML: could not determine a constructor"),
    "a word for a bool": ("a: !!bool maybe", "is no YAML"),
    "two files in one": ("a: 1\n---\nb: 2", "is no YAML: expected a single document"),
    "no text": (b"\xff\xfe\x00\xd8\x00", "is no YAML"),
    "zeros": (b"\0" * 1000, "is no YAML"),
}


@pytest.mark.parametrize("fast", [True, False], ids=["libyaml", "python"])
@pytest.mark.parametrize("case", REFUSED)
def test_hostile_files_are_refused(
    case: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = REFUSED[case]
    if not fast:
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    started = time.process_time()
    with pytest.raises(OptxError, match=message) as error:
        load_yaml(path)
    assert time.process_time() - started < 4  # of what is read in Python, 1.3 on a slow machine
    assert str(error.value).startswith(f"config: {str(path)!r}")
    assert len(str(error.value)) < 500


def test_what_people_write_is_read(tmp_path: Path) -> None:
    """Anchors, merges, comments, words of every kind; as pyyaml reads it."""
    text = """# a comment
defaults: &d {weight: 0.5, density: [0, 0.5, 1]}
models:
  - model: A  # here
    parameters: {<<: *d, weight: 1e-1}
  - {model: "B", parameters: *d}
  - parameters:
      weight: [{filter: mlp, value: .5}, {value: -1}]
normalize: no
empty:
"""
    (tmp_path / "a.yaml").write_text(text)
    assert load_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)
    (tmp_path / "a.yaml").write_text("")
    assert load_yaml(tmp_path / "a.yaml") is None
    (tmp_path / "a.yaml").write_bytes("a: é".encode("utf-16"))
    assert load_yaml(tmp_path / "a.yaml") == {"a": "é"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("/dev/zero"), tmp_path / "a\0b", tmp_path / ("x" * 3000)):
        with pytest.raises(FileError, match=r"can't be read|more than 128 KiB"):
            load_yaml(path)


def test_the_command_says_one_sentence(tmp_path: Path) -> None:
    """alias_loop.yaml"""
    text = "merge_method: ties\nbase_model: &b {model: *b}\nmodels: [{model: A, parameters: {weight: 1}}]\n"
    (tmp_path / "loop.yaml").write_text(text)
    code = "from optx.cli import main; main()"
    command: list[Any] = [sys.executable, "-c", code, "merge", tmp_path / "loop.yaml", tmp_path / "out"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 1
    assert "holds itself" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize("key", ["merge_method", "model", "filter", "parameter", "key"])
def test_long_words_are_shown_in_part(key: str) -> None:
    word, filters = "x" * 100_000, [{"value": 1}, "x" * 100_000]
    config: dict[str, Any] = {
        "merge_method": word if key == "merge_method" else "linear",
        "models": [{"model": word if key == "model" else "."}],
        "parameters": {"weight": filters} if key == "filter" else {word: 1} if key == "parameter" else {},
    }
    if key == "key":
        config[word] = 1
    with pytest.raises(optx.OptxError) as told:
        optx.merge_yaml(config, "out")
    assert len(str(told.value)) < 1000


def test_bounds_leave_room() -> None:
    """Five models with a gradient for each of a hundred layers' seven matrices are well within them."""
    text = "models:\n" + "".join(
        f"  - model: models/number-{m}\n    parameters:\n      weight:\n"
        + "".join(f"        - {{filter: layers.{i}.mlp, value: 0.{i}}}\n" for i in range(100))
        for m in range(5)
    )
    assert 4 * len(text) < _yaml._BYTES
