"""Nothing that exists is overwritten unless it is asked for, and then whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import optx
from optx import cli

COMMANDS = {
    "dare": ("delta", "dare", "base", "a"),
    "magnitude": ("delta", "magnitude", "base", "a"),
    "apply": ("delta", "apply", "base", "change.safetensors"),
    "save": ("delta", "save", "base", "a"),
    "merge": ("merge", "config.yaml"),
}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a")):
        Path(name).mkdir()
        save_file({"w": torch.arange(64.0).view(8, 8) * (1 + i)}, f"{name}/model.safetensors")
        Path(name, "config.json").write_text("{}")
    optx.Delta.between("base", "a").save("change.safetensors")
    Path("config.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 0.5}}]\n"
    )


def typed(command: str, out: str, *more: str) -> Result:
    return CliRunner().invoke(cli.app, [*COMMANDS[command], out, *more])


def said(result: Result) -> str:
    return " ".join(result.output.split())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def out_of(command: str) -> str:
    return "out.safetensors" if command == "save" else "out"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_is_refused_and_replaced_if_asked(command: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    out = out_of(command)
    assert typed(command, out).exit_code == 0
    first = files(tmp_path)
    again = typed(command, out)
    assert again.exit_code == 1
    assert f"out: '{out}' exists already. Give another name, or --overwrite to replace it." in said(again)
    assert files(tmp_path) == first
    made = next(p for p in (Path(out), Path(out, "model.safetensors")) if p.is_file())
    save_file({"w": torch.zeros(3)}, made)
    assert typed(command, out, "--overwrite").exit_code == 0
    assert files(tmp_path) == first  # and nothing hidden is left


@pytest.mark.parametrize("command", ["merge", "dare"])
def test_an_error_leaves_the_old_one(command: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    typed(command, "out")
    save_file({"w": torch.full((8, 8), torch.inf)}, "a/model.safetensors")
    before = files(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optx.delta._checkpoint_output._copy_others", _fails)
        assert typed(command, "out", "--overwrite").exit_code == 1
    assert {name: content for name, content in files(tmp_path).items() if ".new." not in name} == before


def _fails(*_: Any) -> None:
    raise OSError(28, "No space left on device")


REFUSED = {
    "foreign": ("it holds 'photo.jpg', which is no part of a model", "merge"),
    "folders": ("it holds 'sub', which is no part of a model", "merge"),
    "no model": ("it holds no *.safetensors file, so it is no model", "merge"),
    "link": ("it is a link", "merge"),
    "file": ("it is a file, and a folder is to be written", "merge"),
    "folder": ("it is a folder, and a file is to be written", "save"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_optx_did_not_write_stays(case: str, tmp_path: Path) -> None:
    why, command = REFUSED[case]
    out = Path(out_of(command))
    if case == "file":
        out.write_text("mine")
    elif case == "link":
        Path("elsewhere").mkdir()
        out.symlink_to("elsewhere")
    else:
        out.mkdir()
        if case == "foreign":
            save_file({"w": torch.zeros(3)}, out / "model.safetensors")
            (out / "photo.jpg").write_text("mine")
        elif case == "folders":
            (out / "sub").mkdir()
        elif case == "no model":
            (out / "notes.txt").write_text("mine")
    before = files(tmp_path)
    result = typed(command, str(out), "--overwrite")
    assert result.exit_code == 1
    assert f"is not overwritten: {why}. Give another name." in said(result)
    assert files(tmp_path) == before


@pytest.mark.parametrize("out", ["a", "base", ".", "../."])
def test_what_is_read_is_not_replaced(out: str, tmp_path: Path) -> None:
    before = files(tmp_path)
    for command in ("merge", "dare"):
        result = typed(command, out, "--overwrite")
        assert result.exit_code == 1
        assert "is not overwritten" in said(result)
    result = typed("apply", "change.safetensors", "--overwrite")
    assert "is not overwritten: 'change.safetensors' is read from it" in said(result)
    assert files(tmp_path) == before


def test_killed_between_the_renames(tmp_path: Path) -> None:
    """The next command puts the old one back first."""
    typed("dare", "out")
    before = files(tmp_path)
    os.replace("out", ".old.out")
    assert typed("dare", "out").exit_code == 1
    assert files(tmp_path) == before
    os.replace("out", ".old.out")
    assert typed("dare", "out", "--p", "0.5", "--overwrite").exit_code == 0
    kept = load_file("out/model.safetensors")["w"] != load_file("base/model.safetensors")["w"]
    assert kept.sum() > 20  # of 63, half
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its hidden name: what was written before is not made again."""
    typed("dare", "out")
    with monkeypatch.context() as patch:
        patch.setattr("optx.delta._checkpoint_output._copy_others", _interrupt)
        assert typed("dare", "out", "--p", "0.5", "--overwrite").exit_code == 130
    part = tmp_path / "..new.out.part" / "model.safetensors"
    stamp = part.stat().st_mtime_ns
    assert typed("dare", "out", "--p", "0.5", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob(".*"))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
