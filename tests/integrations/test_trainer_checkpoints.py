"""Checkpoints of adapters under transformers' Trainer: what they hold, who reads them, and how runs go on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import llama
from killed import ended_by
from torch import nn

import optx

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from trainer_runs import Killed, Tokens, adapted, state, trainer

from optx.integrations.transformers import OptxCallback

pytestmark = pytest.mark.usefixtures("one_thread")
# Inside of its second epoch, a Trainer of 4.56 that is resumed reads other batches, with or without optx.
SETTING: dict[str, Any] = {
    "train_dataset": Tokens(24 if transformers.__version__ >= "5" else 64),
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
}
NO_WHOLE = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json")


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = state(a), state(b)
    return mine.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in mine.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, list[dict[str, Any]]]:
    """A whole run in this process, with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    model, handle = adapted()
    made = trainer(folder, model, handle, **SETTING)
    made.train()
    return folder, model, made.state.log_history


def logs(history: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in history if "loss" in row}


# ---- killed, and gone on with -----------------------------------------------------------------------------


def killed_at(step: int, folder: Path) -> None:
    model, handle = adapted()
    trainer(folder, model, handle, callbacks=[Killed(step)], **SETTING).train()


def test_a_killed_run_ends_with_the_weights_of_the_uninterrupted(run: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of step 5, after the checkpoint at 4; another process goes on from it."""
    _, model, history = run
    assert ended_by(lambda: killed_at(4, tmp_path)) == signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    again, handle = adapted()
    made = trainer(tmp_path, again, handle, **SETTING)
    made.train(resume_from_checkpoint=True)
    assert same(again, model)
    assert logs(made.state.log_history) == logs(history)


def test_a_checkpoint_that_was_cut_off_is_named(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    made = trainer(tmp_path, *adapted())
    with pytest.raises(optx.FileError, match=r"no trainer_state.json.*Resume from '.*checkpoint-2'"):
        made.train(resume_from_checkpoint=True)


# ---- what is in it ----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_alone_and_everyone_reads_it(run: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    folder, model, _ = run
    checkpoint = tmp_path / "moved"
    shutil.copytree(folder / "checkpoint-6", checkpoint)
    assert not [name for name in NO_WHOLE if (checkpoint / name).exists()]
    assert (checkpoint / "adapter_config.json").exists()
    ids = torch.arange(3, 11)[None]
    wanted = model.eval()(ids).logits
    bare = llama()
    with optx.attach(bare, checkpoint):
        assert torch.equal(bare.eval()(ids).logits, wanted)
    peft = PeftModel.from_pretrained(llama(), str(checkpoint)).eval()
    torch.testing.assert_close(peft(ids).logits, wanted)
    base = tmp_path / "base"
    llama().save_pretrained(base)
    loaded = type(bare).from_pretrained(base).eval()
    optx.attach(loaded, checkpoint)
    assert torch.equal(loaded(ids).logits, wanted)


def test_nothing_is_left_on_the_model_or_the_trainer(tmp_path: Path) -> None:
    """Also after an exception in a step, and in a save."""
    model, handle = adapted()
    before = set(vars(model))
    made = trainer(tmp_path, model, handle, max_steps=2)
    callback = next(one for one in made.callback_handler.callbacks if isinstance(one, OptxCallback))

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more")

    handle.save = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no more"):
        made.train()
    assert set(vars(model)) - before <= {"_is_accelerate_prepared"}  # Accelerate's own
    handle.remove()
    assert same(model, llama())
    made.save_model(str(tmp_path / "bare"))  # no handle is left: the whole model again
    assert (tmp_path / "bare" / "model.safetensors").exists()
    callback.remove()
    assert not {"log", "_save", "_load_from_checkpoint", "compute_loss"} & set(vars(made))


def test_the_best_is_kept_and_loaded(tmp_path: Path) -> None:
    """Of six checkpoints two stay, the best and the last; the model ends as in the best."""
    model, handle = adapted()
    made = trainer(
        tmp_path,
        model,
        handle,
        eval_dataset=Tokens(8),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is an early one
    )
    made.train()
    losses = {row["step"]: row["eval_loss"] for row in made.state.log_history if "eval_loss" in row}
    best = max(losses, key=lambda step: losses[step])
    kept = {int(p.name.rpartition("-")[2]) for p in tmp_path.iterdir()}
    assert kept == {best, 6}
    assert best != 6
    assert made.evaluate()["eval_loss"] == losses[best]
    made.save_model(str(tmp_path / "final"))
    files = {p.name for p in (tmp_path / "final").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not files & set(NO_WHOLE)
    with torch.no_grad():
        for p in handle.parameters():
            p.zero_()
    handle.load(tmp_path / "final")
    assert made.evaluate()["eval_loss"] == losses[best]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("kind", ["own format", "several", "head and more", "plain module"])
def test_other_adapters_go_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, list[optx.Handle]]:
        model: Any = llama()
        torch.manual_seed(1)
        if kind == "own format":
            handles = [optx.attach(model, optx.ParallelAdapter(rank=2))]
        elif kind == "several":
            handles = [optx.attach(model, optx.LoRA(rank=2)), optx.attach(model, optx.IA3())]
        else:
            handles = [optx.attach(model, optx.LoRA(rank=2), modules_to_save=["model.norm"])]
        optx.trainable_only(model, *handles)
        if kind == "head and more":  # no handle has it, so its values are in a file beside the adapter
            model.model.layers[0].input_layernorm.weight.requires_grad_(True)
        if kind == "plain module":
            model = Plain(model)
        return model, handles

    whole, handles = start()
    trainer(tmp_path, whole, *handles, max_steps=4).train()
    again, others = start()
    trainer(tmp_path, again, *others, max_steps=4).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert same(whole, again)
    assert not same(whole, start()[0])
    if kind == "head and more":
        optx.attach(fresh := llama(), tmp_path / "checkpoint-4")
        assert same(fresh, whole)
    files = {str(p.relative_to(tmp_path / "checkpoint-4")) for p in (tmp_path / "checkpoint-4").rglob("*.*")}
    assert not files & set(NO_WHOLE)
    wanted = {
        "own format": {"optx_adapter.safetensors"},
        "several": {"lora/adapter_model.safetensors", "ia3/adapter_model.safetensors"},
    }.get(kind, {"adapter_model.safetensors"})
    assert wanted <= files


class Plain(nn.Module):
    """No model of transformers, whose state dict the Trainer writes by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Any, labels: Any) -> Any:
        return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}


# ---- refused, or told -------------------------------------------------------------------------------------


def test_a_checkpoint_of_adapters_never_begins_from_the_base(run: Any, tmp_path: Path) -> None:
    checkpoint = str(run[0] / "checkpoint-4")
    bare, _ = adapted()
    with pytest.raises(ValueError, match="Can't find"):  # the Trainer's own
        trainer(tmp_path, bare).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(optx.OptxError, match=r"no handle to load them into.*OptxCallback\(handle\)"):
        trainer(tmp_path, llama(), callback={}).train(resume_from_checkpoint=checkpoint)


def test_another_adapter_or_model_is_refused(run: Any, tmp_path: Path) -> None:
    checkpoint = str(run[0] / "checkpoint-4")
    for injection, options, words in (
        (optx.LoRA(rank=3), {}, "rank"),
        (optx.IA3(), {}, "LoRA.*IA3"),
        (optx.LoRA(rank=2), {"targets": ["o_proj"]}, "o_proj"),
    ):
        model, handle = adapted(injection, **options)
        with pytest.raises(optx.FileError, match=words):
            trainer(tmp_path, model, handle).train(resume_from_checkpoint=checkpoint)
    model, handle = adapted()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    with pytest.warns(UserWarning, match=r"embed_tokens.* of the base model is not the one"):
        trainer(tmp_path, model, handle).train(resume_from_checkpoint=checkpoint)


def test_handles_that_can_not_be_saved_are_refused_at_set_up(tmp_path: Path) -> None:
    model, handle = adapted()
    with pytest.raises(optx.OptxError, match="is not in this LlamaForCausalLM"):
        trainer(tmp_path, llama(), handle)
    with pytest.raises(optx.OptxError, match="'lora' is no handle"):
        OptxCallback(["lora"])  # type: ignore[list-item]
    made = trainer(tmp_path, model, handle, max_steps=1)
    handle.merge()
    with pytest.raises(optx.MergeError, match=r"merged.*Call unmerge\(\) first"):
        made.train()
    with pytest.raises(optx.MergeError, match="merged"):
        made.save_model(str(tmp_path / "merged"))
    handle.unmerge()
    handle.remove()
    with pytest.raises(optx.OptxError, match="a handle was removed"):
        made.train()


def test_without_optimizer_state_the_run_is_told(tmp_path: Path) -> None:
    model, handle = adapted()
    trainer(tmp_path, model, handle, max_steps=2, save_only_model=True).train()
    model, handle = adapted()
    with pytest.warns(UserWarning, match=r"no optimizer.pt \(save_only_model=True\)"):
        trainer(tmp_path, model, handle, max_steps=3, save_only_model=True).train(resume_from_checkpoint=True)


def test_a_whole_checkpoint_of_before_still_resumes(tmp_path: Path) -> None:
    """Saved without the callback, or with ``adapters_only=False``."""
    whole, handle = adapted()
    trainer(tmp_path, whole, handle, callback={"adapters_only": False}, max_steps=4).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    again, handle = adapted()
    trainer(tmp_path, again, handle, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole, again)


def test_a_callback_added_later_serves_too(tmp_path: Path) -> None:
    model, handle = adapted()
    made = trainer(tmp_path, model, max_steps=2)
    made.add_callback(OptxCallback(handle))
    made.train()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    again, other = adapted()
    made = trainer(tmp_path, again, max_steps=3)
    callback = OptxCallback(other)
    made.add_callback(callback)
    callback.serve(made)
    made.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


def test_one_callback_serves_every_trainer_that_has_it(tmp_path: Path) -> None:
    model, handle = adapted()
    callback = OptxCallback(handle)
    stages = [trainer(tmp_path / name, model, max_steps=1, callbacks=[callback]) for name in "ab"]
    for stage in stages:
        stage.train()
        assert "optx/lr" in stage.state.log_history[0]
        stage.save_model()
        names = {path.name for path in Path(stage.args.output_dir).iterdir()}
        assert "adapter_model.safetensors" in names
        assert not names & set(NO_WHOLE)
    callback.remove()
    assert not any("log" in vars(stage) for stage in stages)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    model, handle = adapted()
    with pytest.raises(optx.OptxError, match=r"OptxCallback\(\[a, b\]\)"):
        trainer(tmp_path, model, handle, callbacks=[OptxCallback()])
