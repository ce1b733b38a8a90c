"""The commands by which the page starts several processes, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recipe_models
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from optx.recipes import reweight

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo"),
]
PAGE = (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
SECTION = PAGE.split("\n## From one machine to a cluster\n")[1].split("\n## ")[0]


def command(start: str, **changed: str) -> list[str]:
    """A command of the page, by how it begins, with words in it replaced by what is here."""
    [line] = [line for line in SECTION.splitlines() if line.startswith(start)]
    for name, here in changed.items():
        assert name in line
        line = line.replace(name, here)
    words = shlex.split(line)
    return [str(Path(sys.executable).parent / words[0]), *words[1:]]


def started(words: list[str], log: Path) -> subprocess.Popen[str]:
    if not Path(words[0]).exists():
        words = [shutil.which(Path(words[0]).name) or words[0], *words[1:]]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("w") as said:
        return subprocess.Popen(words, stdout=said, stderr=said, text=True, env={**os.environ, **hidden})


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def reweighted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """Options of a run of a second, and what it gives in one process."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "text.txt").write_text("the king is dead and the crown lies upon the ground. " * 60)
    small = ["--steps", "2", "--length", "16", "--width", "8", "--every", "1", "--seeds", "1"]
    small += ["--arms", "linupper", "--data", str(folder / "text.txt")]
    reweight.main([*small, "--out", str(folder / "run")])
    return small, results(folder / "run")


def assert_as_one(folder: Path, one: dict[str, Any]) -> None:
    found = results(folder)
    assert found["settings"] == one["settings"]
    assert (found["environment"]["processes"], found["environment"]["engine"]) == (2, "FSDP2")
    found, one = found["arms"]["linupper/0"], one["arms"]["linupper/0"]
    assert found["held_out"] == pytest.approx(one["held_out"], abs=1e-5)
    for part in ("weights", "losses"):
        for kind, wanted in one[part].items():
            assert found[part][kind] == pytest.approx(wanted, abs=1e-4, nan_ok=True)


@pytest.mark.long
def test_two_machines(tmp_path: Path, reweighted: tuple[list[str], dict[str, Any]]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        here = {"node0:29400": f"localhost:{free.getsockname()[1]}", "finetune": "reweight"}
    small, one = reweighted
    words = [*command("torchrun --nnodes 2", **here), *small, "--out", str(tmp_path / "out")]
    machines = [started(words, tmp_path / name) for name in ("first", "second")]
    ended = [machine.wait(240) for machine in machines]
    said = [(tmp_path / name).read_text() for name in ("first", "second")]
    assert ended == [0, 0], said
    assert_as_one(tmp_path / "out", one)
    assert sorted(text.count("held-out loss") for text in said) == [0, 1]  # the first process alone speaks


@pytest.mark.long
def test_accelerate(tmp_path: Path, reweighted: tuple[list[str], dict[str, Any]]) -> None:
    [config] = [
        yaml for yaml in re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL) if "fsdp_config" in yaml
    ]
    (tmp_path / "fsdp2.yaml").write_text(config)
    small, one = reweighted
    here = {"fsdp2.yaml": str(tmp_path / "fsdp2.yaml"), "finetune": "reweight"}
    words = [*command("accelerate launch", **here), *small, "--out", str(tmp_path / "out")]
    assert started(words, tmp_path / "said").wait(240) == 0, (tmp_path / "said").read_text()
    assert_as_one(tmp_path / "out", one)


@pytest.mark.long
def test_one_machine(tmp_path: Path) -> None:
    """Its numbers are held against one process in test_recipe_parallel; there signals stop it, too."""
    recipe_models.llama(tmp_path / "llama")
    small = ["--arms", "adamw", "--steps", "2", "--length", "32"]
    small += ["--eval-blocks", "2", "--answer-length", "2"]
    small += ["--model", str(tmp_path / "llama"), *recipe_models.texts(tmp_path)]
    words = [*command("torchrun --nproc-per-node 2"), *small, "--out", str(tmp_path / "two")]
    assert started(words, tmp_path / "said").wait(240) == 0, (tmp_path / "said").read_text()
    found = results(tmp_path / "two")
    assert (found["environment"]["processes"], found["environment"]["engine"]) == (2, "FSDP2")
    assert len(found["arms"]["adamw/0"]["loss"]) == 2
