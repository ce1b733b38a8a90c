"""A small Llama in Accelerate, Lightning and TRL, killed by SIGKILL in the middle, and resumed elsewhere."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

import optx

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("trl")

import lightning_run
from accelerate_run import SAVED, Run, same, spoil
from injections import llama
from killed import ended_by
from trainer_runs import Killed
from trl_runs import sft

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all three. What goes on from it below is a process that has run none of them."""
    folder = tmp_path_factory.mktemp("killed")
    torch.set_num_threads(1)
    alone = torch.nn.Parameter(torch.ones(2, 2))  # its step loads the code of theirs, once for all
    alone.grad = torch.ones(2, 2)
    optx.wrap(torch.optim.AdamW([alone]), optx.PerpGrad(), optx.AdamR(weight=0.05)).step()
    ended = [
        ended_by(lambda: Run().train(folder / "accelerate", kill=True)),
        ended_by(lambda: lightning_run.run(folder / "lightning", lightning_run.Killed())),
        ended_by(lambda: sft(folder / "trl", Killed(3))[0].train()),
    ]
    assert ended == 3 * [signal.SIGKILL]
    return folder


@pytest.mark.long
def test_accelerate_goes_on_bit_for_bit(killed: Path, tmp_path: Path) -> None:
    again = Run()
    spoil(again.bare)
    again.accelerator.load_state(str(killed / "accelerate"))
    again.train(tmp_path, SAVED)
    whole = Run().train(tmp_path)
    assert same(again.bare, whole.bare)
    assert again.loss.report() == whole.loss.report()


@pytest.mark.long
def test_lightning_goes_on_bit_for_bit(killed: Path, tmp_path: Path) -> None:
    again = lightning_run.run(tmp_path / "again", resume=killed / "lightning" / "last.ckpt")
    whole = lightning_run.run(tmp_path / "whole")
    assert same(again, whole)
    assert whole.average.any()


def test_sft_trainer_goes_on_bit_for_bit(killed: Path, tmp_path: Path) -> None:
    assert [path.name for path in (killed / "trl").glob("checkpoint-*")] == ["checkpoint-2"]
    made, again, _ = sft(killed / "trl")
    spoil(again)
    made.train(resume_from_checkpoint=True)
    whole, model, _ = sft(tmp_path, save_strategy="no")
    whole.train()
    assert same(again, model)
    assert made.state.global_step == 4
    logs = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (made, whole)]
    assert logs[0] == logs[1]


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
    optx.attach(ours, folder)
    theirs.model.norm.load_state_dict(run.bare.model.norm.state_dict())  # type: ignore[union-attr]
    wanted = run.bare.eval()(ids).logits
    assert torch.equal(ours(ids).logits, wanted)
    peft = PeftModel.from_pretrained(theirs, str(folder)).eval()
    torch.testing.assert_close(peft(ids).logits, wanted)
    assert not torch.allclose(llama(1)(ids).logits, wanted)


def test_a_folder_of_lightnings_has_what_trained_in_the_net(killed: Path) -> None:
    """And says what is of the LightningModule around it."""
    folder = next((killed / "lightning").glob("epoch=*.adapter"))
    saved = torch.load(f"{folder.with_suffix('')}.ckpt", weights_only=False)["state_dict"]
    net = llama(1)
    with pytest.warns(UserWarning, match=r"changed more than the model .*: average\. It is in"):
        optx.attach(net, folder)
    inside = {name: t for name, t in net.state_dict().items() if f"net.{name}" in saved}
    assert {"model.norm.weight"} < inside.keys()
    assert all(torch.equal(t, saved[f"net.{name}"]) for name, t in inside.items())
