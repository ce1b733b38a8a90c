"""The recipes end to end, at a size that takes seconds: a tiny random Llama, a text of a few kilobytes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recipe_models
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from optx.recipes import _drift, _finetune_report, _run, finetune, grokking

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its dropout needs torch's random state in a resumed run too."""
    return recipe_models.llama(tmp_path_factory.mktemp("llama"), dropout=0.1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return recipe_models.texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def options(llama: Path, texts: list[str]) -> list[str]:
    small = ["--steps", "6", "--length", "32", "--eval-blocks", "4", "--lr", "0.01", "--answer-length", "6"]
    return ["--model", str(llama), *texts, *small]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_finetune(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = [*finetune.ARMS, "adamw@0.5"]
    finetune.main([*options, "--seeds", "2", "--arms", ",".join(every), "--out", str(tmp_path)])
    found = results(tmp_path)
    assert list(found["arms"]) == [f"{arm}/{seed}" for seed in (0, 1) for arm in every]
    assert found["settings"]["steps"] == 6
    assert found["environment"]["torch"] == torch.__version__
    before = found["before"]
    assert before["drift_general"] == pytest.approx(0, abs=1e-6)
    assert before["drift_answers"] == pytest.approx(0, abs=1e-6)
    assert before["same_tokens"] == 1
    for arm in found["arms"].values():
        assert len(arm["loss"]) == 6
        assert [point["step"] for point in arm["curve"]] == [2, 4, 6]
        assert all(point["drift_general"] > 0 < point["drift_answers"] for point in arm["curve"])
        assert len(arm["answers"]) == len(before["answers"]) == 12
        assert arm["distance"] > 0
    adamw, hft, adamr, halved = list(found["arms"].values())[:4]
    assert halved["distance"] < adamw["distance"]
    assert halved["state_bytes"] == adamw["state_bytes"]
    assert adamw["curve"][-1]["held_out"] < before["held_out"]
    assert hft["state_bytes"] < adamw["state_bytes"]
    assert hft["gradient_bytes"] < adamw["gradient_bytes"] == 4 * parameters(options)
    assert hft["distance"] < adamw["distance"]
    assert adamr["distance"] < hft["distance"]
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "checkpoint.pt").exists()
    shown = capsys.readouterr().out
    assert "drift, answers" in shown
    assert "adamw+hft+adamr" in shown
    assert _drift.PROMPTS[0] in shown


def parameters(options: list[str]) -> int:
    model, _ = finetune._assets.language_model(options[options.index("--model") + 1])
    return sum(p.numel() for p in model.parameters())


SPLIT = ["--state", "8bit", "--master", "split"]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(("arm", "kept"), [*((arm, []) for arm in finetune.ARMS), ("adamw", SPLIT)])
def test_interrupted_and_resumed_is_uninterrupted(
    arm: str, kept: list[str], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*options, *kept]
    finetune.main([*options, "--arms", arm, "--out", str(tmp_path / "whole")])

    again = [*options, "--arms", arm, "--out", str(tmp_path / "parts")]
    interrupt_in_step(3, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(again)
    assert stopped.value.code == 130
    assert (tmp_path / "parts" / "checkpoint.pt").exists()
    assert not results(tmp_path / "parts")["arms"]
    torch.manual_seed(1234)  # whatever happened meanwhile
    finetune.main([*again, "--resume"])

    whole, parts = (results(tmp_path / name)["arms"][f"{arm}/0"] for name in ("whole", "parts"))
    for name in ("loss", "curve", "distance", "state_bytes", "gradient_bytes", "answers"):
        assert whole[name] == parts[name]  # bit for bit: JSON keeps floats exactly
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_formats_are_counted_and_told(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main([*options, "--arms", "adamw", *SPLIT, "--out", str(tmp_path)])
    found = results(tmp_path)
    assert (found["settings"]["state"], found["settings"]["master"]) == ("8bit", "split")
    # Weight, gradient, rest, two codes, two scales for 32 of them: and a last group of fewer, and steps.
    resident = found["arms"]["adamw/0"]["resident_bytes"]
    assert 2 + 2 + 1 + 1 + 1 + 4 / 32 <= resident < 7.2
    shown = " ".join(capsys.readouterr().out.split())
    assert f"bytes a parameter {resident:.3f}" in shown
    assert "1 seed, state 8bit, master split" in shown


def test_a_master_wants_a_state(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--master split16: its weights .* --state float32, "):
        finetune.main([*options, "--master", "split16", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def interrupt_in_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the middle of a step, once."""
    batch, calls = finetune._text.TextData.batch, []

    def pressed(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(*args)

    monkeypatch.setattr(finetune._text.TextData, "batch", pressed)


def test_resume_keeps_finished_arms(options: list[str], tmp_path: Path) -> None:
    finetune.main([*options, "--arms", "adamw", "--out", str(tmp_path)])
    first = results(tmp_path)["arms"]["adamw/0"]
    finetune.main([*options, "--arms", "adamw,adamw+hft", "--out", str(tmp_path), "--resume"])
    found = results(tmp_path)["arms"]
    assert found["adamw/0"] == first  # the times too: it was not run again
    assert list(found) == ["adamw/0", "adamw+hft/0"]


def test_resume_refuses_other_settings(options: list[str], tmp_path: Path) -> None:
    finetune.main([*options, "--arms", "adamw", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"holds a run with --lr 0\.01, not 0\.5"):
        finetune.main([*options, "--lr", "0.5", "--out", str(tmp_path), "--resume"])


def test_unknown_arm_and_short_text(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--arms: adam is none of adamw, adamw"):
        finetune.main([*options, "--arms", "adam", "--out", str(tmp_path)])
    for factor in ("x", "0", "-1", "inf", "nan"):
        with pytest.raises(SystemExit, match="after @ stands a factor on the learning rate"):
            finetune.main([*options, "--arms", f"adamw,adamw@{factor}", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="has only"):
        finetune.main([*options, "--length", "100000", "--out", str(tmp_path)])


def test_answers_and_prompts_are_shown_as_they_stand(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Brackets are rich's markup elsewhere."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[bold]hi[/nope] [/]")
    said = lambda *_: ["x[/INST] w[b]"]  # noqa: E731
    monkeypatch.setattr(_drift.Answers, "texts", property(said), raising=False)
    arms = ["--arms", "adamw @0.50, adamw@.5, adamw+hft", "--prompts", str(prompts)]
    finetune.main([*options, *arms, "--steps", "1", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert shown.count("x[/INST]") >= 2
    assert "[bold]hi[/nope] [/]" in shown
    assert list(results(tmp_path / "out")["arms"]) == ["adamw@0.5/0", "adamw+hft/0"]
    prompts.write_text("another")
    with pytest.raises(SystemExit, match="asked other prompts than --prompts has now"):
        finetune.main([*options, *arms, "--steps", "1", "--out", str(tmp_path / "out"), "--resume"])


def test_every_arm_is_in_the_picture(options: list[str], tmp_path: Path) -> None:
    arms = [f"adamw@{factor:g}" for factor in range(2, 11)]
    finetune.main([*options, "--arms", ",".join(arms), "--steps", "1", "--out", str(tmp_path)])
    run = _run.Run(tmp_path, results(tmp_path)["settings"], resume=True)
    figure = _finetune_report.drawn(run.results)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == arms


@pytest.fixture
def _pythons_handler() -> Iterator[None]:
    """Python installs its own only where a shell has not said to ignore the signal, as it does behind `&`."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("_pythons_handler")
def test_a_second_interrupt_is_pythons_own() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _run.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_grokking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--p", "7", "--steps", "30", "--seeds", "2", "--width", "32", "--out", str(tmp_path)]
    grokking.main(small)
    found = results(tmp_path)
    assert list(found["arms"]) == [f"{arm}/{seed}" for arm in grokking.ARMS for seed in (0, 1)]
    for log in found["arms"].values():
        assert log["epoch"] == [0, 10, 20, 29]
        assert log["loss"][-1] < log["loss"][0]
        assert len(log["alignment"]) == len(log["collapse"]) == len(log["gradient"]) == 4
    assert set(found["generalised_at"]) == set(grokking.ARMS)
    assert (tmp_path / "grokking.png").read_bytes().startswith(b"\x89PNG")
    assert "95 % in test at" in capsys.readouterr().out
    # More seeds of the same setting: the finished ones are kept.
    grokking.main([*small[:-2], "--seeds", "3", "--out", str(tmp_path), "--resume"])
    assert results(tmp_path)["arms"]["adamw/0"] == found["arms"]["adamw/0"]
    assert len(results(tmp_path)["arms"]) == 9


def test_grokking_has_its_own_model(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no meaning here"):
        grokking.main(["--model", "x", "--out", str(tmp_path)])


@pytest.mark.long
def test_perpgrad_generalises_where_adamw_does_not(tmp_path: Path) -> None:
    """The paper's claim at p = 23, with more of the pairs so that it fits in seconds."""
    size = ["--p", "23", "--share", "0.6", "--steps", "300", "--seeds", "1"]
    grokking.main([*size, "--arms", "adamw,adamw+perpgrad", "--out", str(tmp_path)])
    alone, with_perpgrad = (results(tmp_path)["arms"][f"{arm}/0"] for arm in ("adamw", "adamw+perpgrad"))
    assert alone["train"][-1] == with_perpgrad["train"][-1] == 1.0
    assert with_perpgrad["test"][-1] > alone["test"][-1] + 0.3


def test_stablemax_is_the_softmax_of_its_logits() -> None:
    from optx import stablemax_cross_entropy

    logits = torch.randn(5, 7, dtype=torch.float64) * 9
    target = torch.arange(5)
    expected = torch.nn.functional.cross_entropy(grokking.to_softmax(logits), target)
    torch.testing.assert_close(stablemax_cross_entropy(logits, target), expected)
