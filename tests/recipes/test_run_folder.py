"""A recipe's --out: an earlier run is refused, gone on with or replaced; never written over in silence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from optx.recipes._run import Run, parser


def run(folder: Path, *typed: str, lr: float = 0.1) -> Run:
    """As a recipe makes it from its command line."""
    options = {"resume": {"action": "store_true"}}
    args = parser("x", "", 3, **options).parse_args(["--out", str(folder), *typed])
    return Run(args.out, {"lr": lr}, args.resume, args.overwrite)


def finished(folder: Path) -> dict[str, Any]:
    made = run(folder)
    made.part("a", lambda: {"loss": 1.0})
    return json.loads(made.json.read_text())


def test_an_earlier_run_is_refused(tmp_path: Path) -> None:
    found = finished(tmp_path / "out")
    assert found["settings"] == {"lr": 0.1}  # --overwrite is none of the run's
    said = (
        r"--out: .*out has a results\.json of an earlier run\. .* --resume .*, or --overwrite to replace it"
    )
    with pytest.raises(SystemExit, match=said):
        run(tmp_path / "out", lr=0.2)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert run(tmp_path / "out", "--resume").finished("a")


@pytest.mark.parametrize("name", ["checkpoint.pt", "finetune.png", "results.json"])
def test_a_file_of_that_name_is_not_lost(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match=f"has a {name} of an earlier run"):
        run(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoint.pt", "finetune.png", "results.json"])
def test_a_link_of_that_name_is_not_lost(name: str, tmp_path: Path) -> None:
    """A disk may be back tomorrow."""
    link = tmp_path / name
    link.symlink_to(tmp_path / "away")
    with pytest.raises(SystemExit, match=f"has a {name} of an earlier run"):
        run(tmp_path)
    if name != "finetune.png":
        with pytest.raises(SystemExit, match=f"{name} is a link to nothing"):
            run(tmp_path, "--resume")
    assert link.is_symlink()


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize("name", ["checkpoint.pt", "results.json"])
def test_a_folder_of_that_name(name: str, option: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=f"has a folder {name}"):
        run(tmp_path, *option)


@pytest.mark.parametrize("name", ["file/sub", "x" * 300, "link", "/proc", "/proc/x"])
@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",)])
def test_a_folder_that_cannot_be(name: str, option: tuple[str, ...], tmp_path: Path) -> None:
    if name.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no folder that is nobody's to write into")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "away")
    with pytest.raises(SystemExit, match=r"^--out: .*\. Give (a folder|the name of a folder)"):
        run(tmp_path / name, *option)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"settings": ', "Expecting value"),
        (b"\xff\xfe", "can't decode byte"),
        (b"[]", "it has no settings"),
        (b'{"settings": {"lr": 0.1}, "environment": {}, "arms": []}', "it has no arms"),
    ],
)
def test_results_that_are_none_are_not_gone_on_with(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"--resume: .*results\.json is not what a run writes: .*{said}"):
        run(tmp_path, "--resume")
    assert (tmp_path / "results.json").read_bytes() == content


def test_a_checkpoint_that_is_none_is_not_gone_on_with(tmp_path: Path) -> None:
    first = run(tmp_path)
    first.save("a", {"step": 1})
    whole = first.checkpoint.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], pickle.dumps([1])):
        first.checkpoint.write_bytes(content)
        with pytest.raises(SystemExit, match=r"--resume: .*checkpoint\.pt is not what a run writes: "):
            run(tmp_path, "--resume").load("a")
    for state in ([], {"arm": "a"}):
        torch.save(state, first.checkpoint)
        with pytest.raises(SystemExit, match="it has no settings, arm and random state"):
            run(tmp_path, "--resume").load("a")


def test_a_run_is_gone_on_with_or_replaced(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(SystemExit, match=r"--resume goes on with the run that --overwrite replaces"):
        run(tmp_path, "--resume", "--overwrite")


def test_other_files_are_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    finished(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",)])
def test_a_file_is_no_folder(option: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit, match=r"--out: .*out is a file\. Give the name of a folder"):
        run(tmp_path / "out", *option)


def test_overwritten_at_the_first_result_and_not_before(tmp_path: Path) -> None:
    """Stopped before it has one, the earlier run can be gone on with."""
    first = run(tmp_path)
    first.save("a", {"step": 1})
    run(tmp_path, "--overwrite", lr=0.2)
    assert run(tmp_path, "--resume").load("a") is not None
    new = run(tmp_path, "--overwrite", lr=0.2)
    new.part("b", lambda: {"loss": 2.0})
    assert json.loads(new.json.read_text())["settings"] == {"lr": 0.2}
    assert not new.checkpoint.exists()


def test_its_own_checkpoint_stays(tmp_path: Path) -> None:
    run(tmp_path).save("a", {"step": 1})
    new = run(tmp_path, "--overwrite", lr=0.2)
    new.save("b", {"step": 2})
    new.write()
    again = run(tmp_path, "--resume", lr=0.2)
    assert (again.load("b") or {})["step"] == 2
    again.part("a", lambda: {"loss": 1.0})
    assert again.checkpoint.exists()
