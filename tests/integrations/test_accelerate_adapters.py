"""`optx.integrations.accelerate`: checkpoints of adapters, metrics in trackers, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

pytest.importorskip("accelerate")

from accelerate.utils import DistributedType
from accelerate_run import SAVED, Run, fresh, same, spoil
from injections import llama
from stn_loop import mlp, sgd, train_step, tuned, valid_step

from optx.integrations.accelerate import adapters_only

pytestmark = pytest.mark.usefixtures("one_thread")


def size(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)


# ---- resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "scaled"])
def test_mixed_precision_resumes(precision: str, tmp_path: Path) -> None:
    """On a CPU Accelerate makes no scaler itself; one that it has is stepped, saved and loaded as any."""

    def start() -> Run:
        return Scaled() if precision == "scaled" else Run(mixed_precision="bf16")

    whole = start().train(tmp_path)
    again = start()
    again.accelerator.load_state(str(tmp_path))
    assert same(again.train(tmp_path / "b", SAVED).bare, whole.bare)
    if precision == "scaled":
        assert whole.stepper.step_was_skipped is False
        assert again.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale() == 2.0**5
        before = [p.clone() for p in whole.handle.parameters()]
        for factor, skipped in ((float("inf"), True), (1.0, False)):
            whole.accelerator.gradient_state._set_sync_gradients(True)
            ids = torch.arange(3, 10)[None]
            whole.accelerator.backward(factor * whole.model(input_ids=ids, labels=ids).loss)
            whole.stepper.step()
            whole.stepper.zero_grad()
            assert whole.stepper.step_was_skipped is skipped
            assert all(map(torch.equal, before, whole.handle.parameters())) is skipped


class Scaled(Run):
    """With a GradScaler."""

    def optimizer(self) -> optx.Wrapped:
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=4)
        return super().optimizer()


# ---- what is in a checkpoint ------------------------------------------------------------------------------


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 3),
        nn.Linear(3, 2),
    )


def two_models() -> tuple[Any, list[nn.Module], list[optx.Handle], list[Any]]:
    """One with two adapters, and one that trains as it is, which is prepared first."""
    accelerator = fresh()
    first, second = convolutions(), nn.Linear(2, 2)
    handles = [
        optx.attach(first, optx.LoRA(rank=2), targets="4"),
        optx.attach(first, optx.IA3(), targets="5"),
    ]
    optx.trainable_only(first, *handles)
    opt = torch.optim.AdamW([*handles[0].parameters(), *handles[1].parameters()], lr=0.1)
    other = torch.optim.SGD(second.parameters(), lr=0.1)
    prepared = accelerator.prepare(second, first, opt, other)
    return accelerator, [first, second], handles, [*prepared[2:], *prepared[:2]]


def train(accelerator: Any, parts: list[Any], steps: int = 3) -> None:
    opt, other, second, first = parts
    for step in range(steps):
        x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        accelerator.backward(second(first(x)).square().sum())
        for one in (opt, other):
            one.step()
            one.zero_grad()


def test_several_handles_running_statistics_and_another_model(tmp_path: Path) -> None:
    accelerator, models, handles, parts = two_models()
    saving = adapters_only(accelerator, *handles)
    accelerator.save_state(str(tmp_path / "bare"))
    train(accelerator, parts)
    accelerator.save_state(str(tmp_path / "a"))
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert {"lora", "ia3", "model.safetensors", "optx_checkpoint.safetensors"} <= set(names)
    assert "model_1.safetensors" not in names
    assert size(tmp_path / "a", "model.safetensors") < 400  # of the second, which is the first prepared
    left = tensors(tmp_path / "a" / "optx_checkpoint.safetensors")
    assert sorted(left) == [
        f"model.1.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")
    ]
    assert not tensors(tmp_path / "bare" / "optx_checkpoint.safetensors")
    train(accelerator, parts)

    accelerator, again, handles, parts = two_models()
    adapters_only(accelerator, *handles)
    for model in again:
        spoil(model)
    accelerator.load_state(str(tmp_path / "a"))
    train(accelerator, parts)
    assert all(map(same, again, models))

    saving.remove()
    saving.remove()
    accelerator = saving._accelerator
    accelerator.save_state(str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model_1.safetensors").exists()
    assert not (tmp_path / "whole" / "lora").exists()
    accelerator.load_state(str(tmp_path / "whole"))


def test_each_of_two_models_has_a_folder_and_what_only_moved_is_saved(tmp_path: Path) -> None:
    """Also an order, whose sum stays the same: of 4096 numbers, and of 8."""

    def start() -> tuple[Any, list[nn.Module], list[optx.Handle]]:
        accelerator, models = fresh(), [convolutions(), convolutions()]
        for model in models:
            model.register_buffer("order", torch.arange(4096))
            model.register_buffer("mask", torch.arange(8) < 4)
        handles = [optx.attach(model, optx.LoRA(rank=2), targets="4") for model in models]
        accelerator.prepare(*models)
        for handle in handles:
            adapters_only(accelerator, handle)
        return accelerator, models, handles

    accelerator, models, handles = start()
    for number, (model, handle) in enumerate(zip(models, handles, strict=True), 1):
        spoil(model)
        model.get_buffer("order").copy_(torch.arange(4096).roll(number))
        model.get_buffer("mask").copy_(torch.arange(8) % 2 == 0)
        handle.load_state_dict({name: t + number for name, t in handle.state_dict().items()})
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "model_1" / "adapter_model.safetensors").exists()
    accelerator, again, _ = start()
    accelerator.load_state(str(tmp_path))
    assert all(map(same, again, models))


def tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_handles_own_state_goes_along(tmp_path: Path) -> None:
    """STN's schedule and its Adam are in no folder of an adapter; the weights train beside it."""

    def start() -> tuple[Any, Any, Any, Any]:
        accelerator = fresh()
        model: nn.Module = mlp()
        stn = tuned(model)
        model, opt = accelerator.prepare(model, sgd(model))
        adapters_only(accelerator, stn)
        return accelerator, model, stn, opt

    def turn(parts: tuple[Any, Any, Any, Any], step: int) -> None:
        _, model, stn, opt = parts
        torch.manual_seed(step)
        train_step(model, stn, opt, step)
        valid_step(model, stn, step)

    one, other = start(), start()
    turn(one, 0)
    one[0].save_state(str(tmp_path))
    turn(one, 1)
    other[0].load_state(str(tmp_path))
    turn(other, 1)
    assert same(one[1], other[1])
    states = one[2].state_dict(), other[2].state_dict()
    assert all(torch.equal(t, states[1][key]) for key, t in states[0].items())
    assert one[2].progress.steps == 2


# ---- told -------------------------------------------------------------------------------------------------


def lora() -> tuple[Any, nn.Module, optx.Handle]:
    accelerator, model = fresh(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    optx.trainable_only(model, handle)
    return accelerator, model, handle


def test_what_is_wrong_is_told_at_set_up() -> None:
    accelerator, model, handle = lora()
    with pytest.raises(optx.OptxError, match=r"no model that this Accelerator has prepared.*prepare\(model"):
        adapters_only(accelerator, handle)
    with pytest.raises(optx.OptxError, match="prepared has a handle in it"):
        adapters_only(accelerator)
    with pytest.raises(optx.OptxError, match=r"is no accelerate\.Accelerator"):
        adapters_only(model, handle)  # type: ignore[arg-type]
    accelerator.prepare(model)
    other = optx.attach(nn.Sequential(nn.Linear(8, 8)), optx.LoRA(rank=2), targets="0")
    with pytest.raises(optx.OptxError, match="is not in this Sequential"):
        adapters_only(accelerator, handle, other)
    saving = adapters_only(accelerator, handle)
    with pytest.raises(optx.OptxError, match="called for this model already"):
        adapters_only(accelerator, handle)
    saving.remove()
    adapters_only(accelerator, handle)


def plugin_of(kind: str) -> Any:
    """A plugin of Accelerate's own; it puts what it is told into the environment."""
    from accelerate import utils

    if kind == "DEEPSPEED":
        return utils.DeepSpeedPlugin(zero_stage=2)
    if kind == "MEGATRON_LM":
        return utils.MegatronLMPlugin()
    return utils.FullyShardedDataParallelPlugin(fsdp_version=1)


@pytest.mark.parametrize(
    ("kind", "attribute", "words"),
    [
        ("FSDP", "fsdp_plugin", r"saves with FSDP1.*FullyShardedDataParallelPlugin\(fsdp_version=2\)"),
        ("DEEPSPEED", "deepspeed_plugins", r"saves with DeepSpeed.*handle.save.*use DDP or.*fsdp_version=2"),
        ("MEGATRON_LM", "megatron_lm_plugin", r"saves with Megatron-LM.*handle.save\(folder\)"),
    ],
)
def test_other_engines_of_accelerates_are_refused(
    kind: str, attribute: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their plugins are left aside on a CPU, so the state is what they would have made of it."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    accelerator, model, handle = lora()
    accelerator.prepare(model)
    setattr(accelerator.state, attribute, plugin_of(kind))
    accelerator.state.distributed_type = DistributedType(kind)
    assert getattr(accelerator, "deepspeed_plugin", None) is not None or kind != "DEEPSPEED"
    with pytest.raises(optx.OptxError, match=words):
        adapters_only(accelerator, handle)
    accelerator.state.distributed_type = DistributedType.NO
    assert not accelerator._save_model_state_pre_hook
    adapters_only(accelerator, handle)


def test_what_is_wrong_is_told_when_it_is_saved_or_loaded(tmp_path: Path) -> None:
    accelerator, model, handle = lora()
    accelerator.prepare(model)
    adapters_only(accelerator, handle)
    accelerator.save_state(str(tmp_path / "a"))
    handle.merge()
    with pytest.raises(optx.MergeError, match=r"is merged into the weights.*unmerge"):
        accelerator.save_state(str(tmp_path / "b"))
    handle.unmerge()
    with torch.no_grad():
        model[1].bias.add_(1)  # type: ignore[index, union-attr, operator]
    with pytest.warns(UserWarning, match=r"'1.bias' of the base model is not the one"):
        accelerator.load_state(str(tmp_path / "a"))
    accelerator.save_state(str(tmp_path / "c"))  # what has changed goes along
    with torch.no_grad():
        model[1].bias.sub_(1)  # type: ignore[index, union-attr, operator]
    accelerator.load_state(str(tmp_path / "c"))
    assert "model.1.bias" in tensors(tmp_path / "c" / "optx_checkpoint.safetensors")
    (tmp_path / "c" / "optx_checkpoint.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(optx.FileError, match="is damaged"):
        accelerator.load_state(str(tmp_path / "c"))


# ---- metrics ----------------------------------------------------------------------------------------------


def test_tensorboard_has_what_optx_knows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(log_with="tensorboard", project_dir=str(tmp_path))
    run.accelerator.init_trackers("run")
    told = lambda: optx.integrations.accelerate.metrics(run.accelerator, run.handle)  # noqa: E731
    seen = [told()]
    for step in range(2):
        run.train(tmp_path, step, step + 1)
        seen.append(told())
        run.accelerator.log(seen[-1], step=step)
    run.accelerator.end_training()
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    assert {"optx/lr", "lora/trainable"} <= set(seen[-1])
    for name, value in seen[-1].items():
        events = read.Scalars(name)
        assert events[-1].value == pytest.approx(value, rel=1e-6)
        assert events[-1].step == 1


def test_several_optimizers_have_names_of_their_own() -> None:
    accelerator = fresh()
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    opts = [
        optx.wrap(torch.optim.SGD(layer.parameters(), lr=lr), optx.PerpGrad())
        for layer, lr in zip(layers, (0.1, 0.2), strict=True)
    ]
    accelerator.prepare(*layers, *opts, torch.optim.SGD(layers[0].parameters(), lr=1.0))
    found = optx.integrations.accelerate.metrics(accelerator)
    assert (found["optx/lr"], found["optx_2/lr"]) == (0.1, 0.2)
    assert not any("3" in name for name in found)


# ---- models larger than memory ----------------------------------------------------------------------------


def on_disk(model: Any, folder: Path) -> Any:
    from accelerate import dispatch_model

    places = {name: "cpu" for name, _ in model.named_children()}
    del places["model"]
    inside = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return dispatch_model(model, {**places, **inside, **layers}, main_device="cpu", offload_dir=str(folder))


def offloaded(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("place", [on_disk, offloaded])
def test_offloaded_models_train_are_evaluated_and_resume(place: Any, tmp_path: Path) -> None:
    """Attached after the model was placed: the adapter stays, and the base comes and goes."""
    ids = torch.arange(3, 10)[None]

    def start(placed: bool) -> tuple[Any, Any, Any, optx.Handle]:
        accelerator, model = fresh(), llama(2)
        if placed:
            model = place(model, tmp_path / "offload")
        handle = optx.attach(model, optx.LoRA(rank=2))
        optx.trainable_only(model, handle)
        opt = optx.wrap(torch.optim.AdamW(handle.parameters(), lr=1e-2), optx.PerpGrad())
        model, opt = accelerator.prepare(model, opt, device_placement=[not placed, True])
        adapters_only(accelerator, handle)
        return accelerator, model, opt, handle

    def train(parts: tuple[Any, Any, Any, optx.Handle]) -> Tensor:
        accelerator, model, opt, _ = parts
        for _ in range(2):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            opt.step()
            opt.zero_grad()
        with torch.no_grad():
            return model(ids).logits

    here, there = start(placed=False), start(placed=True)
    assert any(p.is_meta for p in there[1].parameters())
    train(here)
    train(there)
    there[0].save_state(str(tmp_path / "state"))
    wanted = train(here)
    torch.testing.assert_close(train(there), wanted)
    again = start(placed=True)
    again[0].load_state(str(tmp_path / "state"))
    torch.testing.assert_close(train(again), wanted)
    assert all(map(torch.equal, again[3].parameters(), there[3].parameters()))
