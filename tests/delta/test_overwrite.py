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
from optx.delta._overwrite import output

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
        patch.setattr("optx.delta._checkpoint_output.copy_others", _fails)
        assert typed(command, "out", "--overwrite").exit_code == 1
    assert {name: content for name, content in files(tmp_path).items() if ".new." not in name} == before


def _fails(*_: Any) -> None:
    raise OSError(28, "No space left on device")


REFUSED = {
    "foreign": ("it holds 'photo.jpg', which neither optx nor transformers wrote", "merge"),
    "folders": ("it holds 'sub', which neither optx nor transformers wrote", "merge"),
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
            (out / "config.json").write_text("mine")
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
        patch.setattr("optx.delta._checkpoint_output.copy_others", _interrupt)
        assert typed("dare", "out", "--p", "0.5", "--overwrite").exit_code == 130
    part = tmp_path / "..new.out.part" / "model.safetensors"
    stamp = part.stat().st_mtime_ns
    assert typed("dare", "out", "--p", "0.5", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob(".*"))


FOREIGN = ("train.py", "notes.md", "results.json", "README.md", "delta.safetensors", "model.jinja")


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_somebody_else_are_not_deleted(name: str, tmp_path: Path) -> None:
    """A copy of the base's file is none; once it was changed it is."""
    Path("base/README.md").write_text("the base's")
    typed("dare", "out")
    assert typed("dare", "out", "--overwrite").exit_code == 0
    save_file({"x": torch.zeros(1)}, f"out/{name}")
    before = files(tmp_path)
    result = typed("dare", "out", "--overwrite")
    assert f"it holds {name!r}, which neither optx nor transformers wrote" in said(result)
    assert files(tmp_path) == before


def test_a_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    typed("dare", "out")

    def meanwhile() -> None:
        with output(Path("out"), True, [Path("base")]) as new:
            new.mkdir()
            Path("out/notes.md").write_text("mine")

    with pytest.raises(optx.OptxError, match="The new one is"):
        meanwhile()
    assert Path("out/notes.md").read_text() == "mine"
    assert Path(".new.out").is_dir()


PARTS = [
    "a/model.safetensors",
    "base/../a/model.safetensors",
    "link/model.safetensors",
    "a/sub/deep",
    "a/sub",
]


@pytest.mark.parametrize("out", PARTS)
def test_a_part_of_an_input_is_not_replaced(out: str, tmp_path: Path) -> None:
    Path("link").symlink_to("a")
    Path("a/sub/deep").mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, "a/sub/deep/model.safetensors")
    before = files(tmp_path)
    for command in ("merge", "dare", "magnitude"):
        result = typed(command, out, "--overwrite")
        assert result.exit_code == 1
        assert "is not overwritten" in said(result)
    assert files(tmp_path) == before


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("out", ["out", "blob.safetensors"])
def test_what_links_lead_to_is_not_replaced(out: str, hops: int, tmp_path: Path) -> None:
    """Nor a link on the way, without which the input would lead nowhere."""
    there = Path(out, "model.safetensors") if out == "out" else Path(out)
    there.parent.mkdir(exist_ok=True)
    Path("a/model.safetensors").rename(there if hops == 1 else "real")
    if hops == 2:
        there.symlink_to(Path("real").absolute())
    Path("a/model.safetensors").symlink_to(Path("..", there))
    before = files(tmp_path)
    for command in ("merge", "dare"):
        result = typed(command, out, "--overwrite")
        assert result.exit_code == 1
        assert "'a' is read from it" in said(result)
    assert files(tmp_path) == before


def test_shards_elsewhere_and_hidden_inputs_are_not_replaced(tmp_path: Path) -> None:
    Path("out").mkdir()
    Path("a/model.safetensors").rename("out/model.safetensors")
    Path("a/model.safetensors").symlink_to("../out/model.safetensors")
    assert "'a' is read from it" in said(typed("dare", "out", "--overwrite"))
    for name in (".new.x", ".old.x", ".gone.x", ".x.part", "..new.x.part"):
        os.replace("base", name)
        before = files(tmp_path)
        said_ = said(CliRunner().invoke(cli.app, ["delta", "dare", name, "a", "x", "--overwrite"]))
        assert f"{name!r} is read from it" in said_
        assert files(tmp_path) == before
        os.replace(name, "base")


def test_another_name_of_the_same_file(tmp_path: Path) -> None:
    """A disk that does not tell capitals from small letters shows a file under other names in its folder."""
    os.link("change.safetensors", "Change.safetensors")
    assert "is read from it" in said(typed("apply", "Change.safetensors", "--overwrite"))
    os.link("a/model.safetensors", "elsewhere.safetensors")  # the input stays when this one goes
    whole = Path("a/model.safetensors").read_bytes()
    assert typed("dare", "elsewhere.safetensors", "--overwrite").exit_code == 0
    assert Path("a/model.safetensors").read_bytes() == whole


def test_no_file_is_added_to_an_input(tmp_path: Path) -> None:
    before = files(tmp_path)
    for command in ("save", "dare", "merge"):
        assert "would be a part of the model 'a'" in said(typed(command, "a/more.safetensors"))
    assert files(tmp_path) == before
    assert typed("dare", "a/merged").exit_code == 0  # a folder of its own is no part


@pytest.mark.parametrize("out", ["nowhere", "nowhere/x", "config.yaml/x", "nowhere.safetensors", "loop"])
def test_an_output_that_can_not_be(out: str, tmp_path: Path) -> None:
    for link in ("nowhere", "nowhere.safetensors"):
        Path(link).symlink_to("missing")
    Path("loop").symlink_to("loop")
    for command in ("dare", "merge", "apply"):
        for more in ((), ("--overwrite",)):
            result = typed(command, out, *more)
            assert isinstance(result.exception, SystemExit)
            assert "out: " in said(result)
            assert "Errno" not in said(result)
            assert ("is a link to" in said(result)) == Path(out).is_symlink()
    assert os.readlink("nowhere.safetensors") == "missing"
    with pytest.raises(optx.OptxError, match="exists already"):
        optx.Delta.between("base", "a").apply("base", "nowhere")


def test_killed_in_the_last_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the old one is never put in the place of the new one."""
    typed("dare", "out")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", _stops_half_way)
        with pytest.raises(SystemError):
            CliRunner().invoke(cli.app, [*COMMANDS["dare"], "out", "--overwrite"], catch_exceptions=False)
    os.replace("out", "moved")
    assert typed("dare", "out").exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "moved")
    assert typed("dare", "out", "--overwrite").exit_code == 0
    assert not list(tmp_path.glob(".*"))


def _stops_half_way(path: Path) -> None:
    Path(path, "model.safetensors").unlink()
    raise SystemError


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
