"""Saving as a whole: killed, on a full disk, beside other files; and the model card."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import yaml
from adapter_models import attached, bert, llama, outputs, plain, shake
from torch import nn

import optx
from optx.inject import _folder_output

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("other", ["same", "other"])
def test_a_kill_leaves_one_save_or_the_other(other: str, tmp_path: Path) -> None:
    """kill -9 at any moment: what has the final name is whole."""
    script, folder = Path(__file__).with_name("save_again.py"), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), other], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen: set[str] = set()
    process.stdout.readline()
    process.stdout.readline()
    for number in range(25):
        os.kill(process.pid, signal.SIGSTOP)
        model = nn.Sequential(nn.Linear(64, 64))
        # Stopped there, it is as if it had been killed there: nobody else looks at what it left.
        seen.add(str(optx.attach(model, folder).injection))
        assert {name for name in names(folder) if not name.startswith(".")} <= {
            *FILES,
            "optx_adapter.safetensors",
        }
        if number < 24:
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.003 + 0.0007 * number)
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(seen) == 2


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_what_was_there(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    handle = attached(nn.Sequential(nn.Linear(64, 64)), optx.LoRA(rank=16), targets="0")
    before: dict[str, bytes] = {}
    if there:
        handle.save(folder)
        before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
        shake(handle.parameters())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"can't be written|too large"):
            handle.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == (["out"] if there else [])
    assert not there or {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before
    handle.save(folder)
    fresh = nn.Sequential(nn.Linear(64, 64))
    assert torch.equal(next(iter(optx.attach(fresh, folder).state_dict().values())), handle.served[0].part.A)


def test_a_save_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    handle = attached(plain(), optx.LoRA(rank=2), targets="fc")
    folder = tmp_path / "out"
    handle.save(folder)
    folder.chmod(0o750)
    first = folder.stat().st_ino
    shake(handle.parameters())
    handle.save(folder)
    assert names(folder) == FILES
    assert names(tmp_path) == ["out"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert folder.stat().st_ino != first or sys.platform != "linux"  # the whole folder is another
    mode = tmp_path / "mode"
    mode.touch()
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in folder.iterdir()} == {
        stat.S_IMODE(mode.stat().st_mode)
    }


HOWS = ["other files", "no exchange", "refused", "link", "inside", "inside, by its path", "no writing above"]


@pytest.mark.parametrize("how", HOWS)
def test_where_the_folder_must_stay(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files take their places one by one, and what is not ours stays."""
    folder, place = tmp_path / "out", tmp_path / "out"
    attached(plain(), optx.SVFit(rank=2), targets="fc").save(folder)
    if how == "other files":
        (folder / "optimizer.pt").write_text("mine")
        (folder / "runs").mkdir()
    if how == "no exchange":
        monkeypatch.setattr(_folder_output.ctypes, "CDLL", lambda *_, **__: None)
    if how == "refused":
        refuses = SimpleNamespace(renameat2=lambda *_: (ctypes.set_errno(errno.EINVAL), -1)[1])
        monkeypatch.setattr(_folder_output.ctypes, "CDLL", lambda *_, **__: refuses)
    if how == "no writing above":
        monkeypatch.setattr(_folder_output.os, "access", lambda *_: False)
    if how == "link":
        place = tmp_path / "link"
        place.symlink_to(folder)
    if how.startswith("inside"):
        monkeypatch.chdir(folder)
        place = Path(".") if how == "inside" else folder
    first = folder.stat().st_ino
    handle = attached(plain(), optx.LoRA(rank=2), targets="fc")
    handle.save(place)
    assert folder.stat().st_ino == first
    assert names(folder) == [*FILES, *(["optimizer.pt", "runs"] if how == "other files" else [])]
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    fresh = plain()
    optx.attach(fresh, folder)
    assert torch.equal(outputs(fresh), outputs(handle.model))


def test_what_comes_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    """Another process's files, while these are written; and what only has the name of one of ours."""
    folder = tmp_path / "out"
    with _folder_output.written_folder(folder, ("a", "b"), lambda file: file.name != "b") as aside:
        (aside / "a").write_text("new")
        folder.mkdir()
        (folder / "thesis").write_text("mine")
        (folder / "a").write_text("old")
        (folder / "b").write_text("mine")
    assert {entry.name: entry.read_text() for entry in folder.iterdir()} == {
        "a": "new",
        "b": "mine",
        "thesis": "mine",
    }
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(0o750)
    attached(plain(), optx.LoRA(rank=2), targets="fc").save(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert names(folder) == FILES


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    handle = attached(plain(), optx.LoRA(rank=2), targets="fc")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        handle.save(tmp_path / "file" / "out")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(optx.OptxError, match=r"link' is a link to nothing\. Make the folder"):
        handle.save(tmp_path / "link")
    assert names(tmp_path) == ["file", "link"]


# ---- the card ---------------------------------------------------------------------------------------


def card_in(folder: Path) -> tuple[dict[str, Any], str]:
    """Its header as YAML, and its text."""
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_trained(tmp_path: Path) -> None:
    model = bert()
    model.config._name_or_path = "google-bert/bert-base-uncased"
    handle = optx.attach(model, optx.LoRA(rank=2, rank_pattern={"layer.0.*|x": 3}))
    handle.save(tmp_path)
    head, body = card_in(tmp_path)
    assert head == {
        "base_model": "google-bert/bert-base-uncased",
        "library_name": "peft",
        "tags": ["lora", "optx"],
    }
    report = handle.report()
    assert f"| trained | {report.trainable:,} of {report.total:,} numbers" in body
    assert "| on | 2 x `query`, 2 x `value` |" in body
    assert "| trained whole | `classifier` |" in body
    assert r"'layer.0.*\|x': 3" in body
    assert f"| optx | {optx.__version__} |" in body
    assert "from_pretrained" in body


def test_the_hubs_own_reader_and_pefts_writer_take_it(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = llama()
    model.config._name_or_path = "me/mine"
    attached(model, optx.LoRA(rank=2)).save(tmp_path)
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("me/mine", "peft", "text-generation")
    assert data.tags == ["lora", "optx"]
    from adapter_models import in_peft, peft_talk

    theirs = in_peft(llama(), tmp_path)
    with peft_talk():
        theirs.save_pretrained(tmp_path)
    assert isinstance(theirs, peft.PeftModel)
    assert "PEFT" in (tmp_path / "README.md").read_text()


def test_a_folder_of_somebodys_machine_is_no_name(tmp_path: Path) -> None:
    for name in (str(tmp_path), "", "../model", None):
        model = llama()
        model.config._name_or_path = name
        attached(model, optx.SVFit(rank=2)).save(tmp_path)
        head, body = card_in(tmp_path)
        assert head == {"library_name": "optx", "tags": ["svfit", "optx"]}
        assert str(tmp_path) not in body
        assert "PEFT" not in body


def test_a_card_of_a_persons_own_is_kept(tmp_path: Path) -> None:
    handle = attached(plain(), optx.LoRA(rank=2), targets="fc")
    handle.save(tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text(
        "\n".join(line for line in card.read_text().splitlines() if "<!--" not in line) + "\nMine."
    )
    mine = card.read_text()
    handle.save(tmp_path / "out")
    assert card.read_text() == mine
    assert names(tmp_path / "out") == FILES
