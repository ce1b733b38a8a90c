"""finetune on two processes: the numbers of one, interrupted and resumed by as many processes or another."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import recipe_models
import torch
import torch.distributed as dist
from processes import FOLDER, Done, needs
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from optx.recipes import _parallel, _run, _text, finetune, grokking

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo"),
]

ARM = "adamw+hft+adamr"
SAME = ("loss", "curve", "distance", "answers", "state_bytes", "gradient_bytes")


def options(out: str, *more: str, model: str = "llama", arms: str = ARM) -> list[str]:
    """A run's, in the folder that all processes have."""
    place = Path(os.environ[FOLDER])
    texts = ["--data", str(place / "data.txt"), "--general", str(place / "general.txt")]
    small = ["--steps", "6", "--length", "32", "--eval-blocks", "4", "--lr", "0.01", "--answer-length", "6"]
    texts += ["--prompts", str(place / "prompts.txt")]
    return ["--model", str(place / model), *texts, *small, "--arms", arms, "--out", str(place / out), *more]


def results(out: str) -> dict[str, Any]:
    return json.loads((Path(os.environ[FOLDER]) / out / "results.json").read_text())


def arm(out: str, name: str = ARM) -> dict[str, Any]:
    found = results(out)["arms"][f"{name}/0"]
    return {key: found[key] for key in SAME}


def interrupted(at: int, *arguments: str, here: bool = True) -> None:
    """Run until a signal reaches this process, or another one, in the middle of a step."""
    batch, calls = _text.TextData.batch, []

    def preempted(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == at and here:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_text.TextData, "batch", preempted)
        with pytest.raises(SystemExit) as stopped:
            finetune.main(list(arguments))
    assert stopped.value.code == 130


# ---- on two processes -----------------------------------------------------------------------------------


@contextmanager
def started_as(rank: int) -> Iterator[None]:
    """What torchrun tells its processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            patch.setenv(name, str(value))
        yield


def whole_runs(rank: int) -> None:
    with started_as(rank):
        finetune.main(options("fsdp", "--fsdp", arms=f"adamw,{ARM}"))
        finetune.main(options("ddp", arms=f"adamw,{ARM}"))


def interrupted_and_resumed(rank: int) -> None:
    """The signal reaches one of them alone; dropout draws from each one's random state."""
    with started_as(rank):
        finetune.main(options("drops", "--fsdp", model="drops"))
        torch.manual_seed(100 + rank)
        interrupted(3, *options("parts", "--fsdp", model="drops"), here=rank == 1)
        torch.manual_seed(200 + rank)
        finetune.main(options("parts", "--fsdp", "--resume", model="drops"))


def resumed_by_others(rank: int) -> None:
    with started_as(rank):
        finetune.main(options("of_one", "--fsdp", "--resume"))
        interrupted(4, *options("of_two", "--fsdp"), here=rank == 0)


def refusals(rank: int) -> None:
    with started_as(rank):
        told = "--batch 3: it is all processes' together, and they are 2. Give a multiple of 2, as --batch 4."
        for arguments, said in (
            (options("none", "--batch", "3"), told),
            (options("fsdp", "--fsdp"), "results.json of an earlier run"),
            (options("none", arms="adam"), "adam is none of"),
        ):
            with pytest.raises(SystemExit) as stopped:
                finetune.main(arguments)
            # The first one speaks for both.
            assert said in str(stopped.value) if rank == 0 else stopped.value.code == 1


def weights_are_the_firsts(rank: int) -> None:
    """Whatever a launcher made of those on the others: shards of different models would join to none."""
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    torch.nn.init.normal_(model[1].running_mean)
    torch.manual_seed(0)
    first = torch.nn.Linear(3, 5)
    mean = torch.nn.init.normal_(torch.empty(5))
    _parallel.Team(rank, 2, "FSDP2").spread(model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert torch.equal(whole["0.weight"], first.weight)
        assert torch.equal(whole["0.bias"], first.bias)
    assert torch.equal(model[1].running_mean, mean)


def in_one_process(_: int) -> None:
    """What those on two are held against, and what they go on with."""
    place = Path(os.environ[FOLDER])
    recipe_models.llama(place / "llama")
    recipe_models.llama(place / "drops", dropout=0.1)
    recipe_models.texts(place)
    (place / "prompts.txt").write_text("who is dead?\nand who is king?\n")
    finetune.main(options("one", "--batch", "2", arms=f"adamw,{ARM}"))
    interrupted(4, *options("of_one", "--batch", "2"))


def resumed_by_one(_: int) -> None:
    place = Path(os.environ[FOLDER])
    shutil.copytree(place / "of_two", place / "again")
    finetune.main(options("of_two", "--batch", "2", "--resume"))


ON_TWO = (weights_are_the_firsts, whole_runs, interrupted_and_resumed, resumed_by_others)
NEEDED = [
    needs(1, in_one_process),
    needs(2, *ON_TWO),
    needs(1, resumed_by_one, stage=1),
    needs(2, refusals, stage=1),
]


def ran(test: Any) -> Any:
    """All runs are there for the test, in the folder that it asks for as they did."""
    for mark in (*NEEDED, pytest.mark.usefixtures("place"), pytest.mark.long):
        test = mark(test)
    return test


@pytest.fixture
def place(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (in_one_process, *ON_TWO, resumed_by_one):
        done.found(case)
    monkeypatch.setenv(FOLDER, str(done.files(__name__)))


@ran
def test_refusals_speak_with_one_voice(done: Done) -> None:
    done.found(refusals)


@ran
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_numbers_are_those_of_one_process(engine: str) -> None:
    one, two = results("one"), results(engine)
    assert two["settings"] == one["settings"]  # --batch is the number of processes, if nothing is said
    assert two["environment"]["processes"] == 2
    assert two["environment"]["engine"] == {"ddp": "DDP", "fsdp": "FSDP2"}[engine]
    assert two["before"] == one["before"]
    for name in two["arms"]:
        assert_as_one(two["arms"][name], one["arms"][name])
    assert (Path(os.environ[FOLDER]) / engine / "finetune.png").exists()


def assert_as_one(found: dict[str, Any], one: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(one["loss"], abs=1e-5)
    for point, wanted in zip(found["curve"], one["curve"], strict=True):
        assert point == pytest.approx(wanted, abs=1e-5)
    assert found["distance"] == pytest.approx(one["distance"], abs=1e-5)
    for name in ("answers", "state_bytes", "gradient_bytes"):
        assert found[name] == one[name]


@ran
def test_resumed_by_as_many_is_uninterrupted() -> None:
    assert arm("parts") == arm("drops")  # bit for bit: JSON keeps floats exactly


@ran
@pytest.mark.parametrize("out", ["of_one", "of_two"])
def test_resumed_by_another_number_is_as_good(out: str) -> None:
    assert_as_one(arm(out), arm("one"))


@ran
def test_another_number_has_another_batch_unless_it_is_said() -> None:
    with pytest.raises(SystemExit, match=r"holds a run with --batch 2, not 1\. Give the same options"):
        finetune.main(options("again", "--resume"))


def test_fsdp_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    how = r"Start them with\n    torchrun --nproc-per-node 2 -m optx\.recipes\.finetune --fsdp"
    with pytest.raises(SystemExit, match=how):
        finetune.main(["--fsdp"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(SystemExit, match="nobody said who is who"):
        finetune.main([])
    assert _parallel.processes() == 1


class Late(_parallel.Team):
    """A signal comes while the processes agree that there is none."""

    asked = 0

    def agrees(self, wanted: bool) -> bool:
        self.asked += 1
        if self.asked == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return wanted


def test_a_signal_is_not_lost(tmp_path: Path) -> None:
    run = _run.Run(tmp_path, {}, resume=False, team=Late())
    assert list(run.steps("a", 0, 9)) == [0]
    assert run.interrupt.wanted


def test_a_recipe_for_one_process_says_so(tmp_path: Path) -> None:
    with started_as(1), pytest.raises(SystemExit, match="2 processes were started: this recipe runs in one"):
        grokking.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
