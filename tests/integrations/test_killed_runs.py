"""A small Llama in Accelerate and in Lightning, killed by SIGKILL in the middle, and resumed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import optx

pytest.importorskip("accelerate")
pytest.importorskip("lightning")

import lightning_run
from accelerate_run import SAVED, Run, same, spoil
from injections import llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both runs, which ``accelerate launch`` started."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("killed_runs.py")
    given = ["--cpu", "--num_processes", "1", "--num_cpu_threads_per_process", "1", str(script), str(folder)]
    launch_command(launch_command_parser().parse_args(given))
    assert (folder / "signals").read_text().split() == 2 * [str(int(signal.SIGKILL))]
    return folder


def test_accelerate_goes_on_bit_for_bit(killed: Path, tmp_path: Path) -> None:
    whole = Run().train(tmp_path)
    again = Run()
    spoil(again.bare)
    again.accelerator.load_state(str(killed / "accelerate"))
    again.train(tmp_path, SAVED)
    assert same(again.bare, whole.bare)
    assert again.loss.report() == whole.loss.report()


def test_lightning_goes_on_bit_for_bit(killed: Path, tmp_path: Path) -> None:
    whole = lightning_run.run(tmp_path / "whole")
    again = lightning_run.run(tmp_path / "again", resume=killed / "lightning" / "last.ckpt")
    assert same(again, whole)
    assert whole.average.any()


def test_checkpoints_are_small_and_read_by_attach_and_peft(killed: Path) -> None:
    from peft import PeftModel

    folder = killed / "accelerate"
    assert not list(folder.glob("model*"))
    run = Run()
    adapter = 4 * sum(p.numel() for p in run.handle.parameters())
    assert (folder / "adapter_model.safetensors").stat().st_size < adapter + 2000  # header and description
    run.accelerator.load_state(str(folder))
    ids = torch.arange(3, 10)[None]
    ours, theirs = llama(1), llama(1)
    with pytest.warns(UserWarning, match=r"model here has its own model\.norm\.weight\. They are in"):
        optx.attach(ours, folder)
    for model in (ours, theirs):
        model.model.norm.load_state_dict(run.bare.model.norm.state_dict())  # type: ignore[union-attr]
    wanted = run.bare.eval()(ids).logits
    assert torch.equal(ours(ids).logits, wanted)
    peft = PeftModel.from_pretrained(theirs, str(folder)).eval()
    torch.testing.assert_close(peft(ids).logits, wanted)
    assert not torch.allclose(llama(1)(ids).logits, wanted)
