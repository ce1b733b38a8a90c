"""Folders of adapters: what is written, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from adapter_folders import CONFIG, OWN, TENSORS, WHERE, Both, description, refuses
from adapter_models import (
    assert_close,
    attached,
    bert,
    config_in,
    edit_config,
    in_peft,
    llama,
    outputs,
    plain,
    rewrite,
    shake,
    tensors_in,
)
from torch import Tensor, nn

import optx

# ---- round trips ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("injection", "more"),
    [
        (optx.BitFit(), {}),
        (optx.SVFit(rank=2), {"targets": "fc|head"}),
        (optx.FLoRA(rank=2), {"targets": "fc|conv1", "modules_to_save": ["block.norm", "head"]}),
        (Both(), {"targets": WHERE}),
        (Both(optx.LoRA(rank=2, dora=True), (optx.IA3(feedforward="fc"),)), {"targets": {**WHERE} | {}}),
        (Both(optx.LoRA(rank=1, rank_pattern={"fc": 3}), ()), {"targets": {"first": "fc|head"}}),
    ],
    ids=["biases", "svfit", "flora", "composite", "composite of two", "composite of one"],
)
def test_other_methods_come_back_bit_for_bit(
    injection: optx.Injection, more: dict[str, Any], tmp_path: Path
) -> None:
    if isinstance(injection, optx.Composite):
        more = {"targets": {key: more["targets"][key] for key in injection.members()}}
    model = plain()
    base = outputs(model)
    handle = attached(model, injection, **more)
    handle.save(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["README.md", OWN]
    fresh = plain()
    again = optx.attach(fresh, tmp_path)
    assert again.injection == injection
    assert [(one.path, one.name) for one in again.served] == [(one.path, one.name) for one in handle.served]
    assert torch.equal(outputs(fresh), outputs(model))
    again.remove()
    assert torch.equal(outputs(fresh), base)


def test_what_the_file_says(tmp_path: Path) -> None:
    handle = attached(plain(), Both(), targets=WHERE)
    handle.save(tmp_path)
    said = description(tmp_path)
    assert said["injection"]["injection"] == "Both"
    assert said["injection"]["options"]["first"] == {
        "injection": "LoRA",
        "options": {**optx.LoRA(rank=1).options()},
    }
    assert said["served"] == {
        "first": ["fc"],
        "rest0": ["conv", "fc"],
        "rest1": ["conv1", "block.fc", "block.norm"],
    }
    assert said["version"][0].isdigit()


def test_a_name_of_ones_own_is_not_in_the_file(tmp_path: Path) -> None:
    model = plain()
    handle = attached(model, optx.SVFit(rank=2), targets="fc", name="mine")
    handle.save(tmp_path)
    fresh = plain()
    again = optx.attach(fresh, tmp_path, name="yours")
    assert hasattr(fresh.fc.optx, "yours")
    assert torch.equal(outputs(fresh), outputs(model))
    third = optx.attach(plain(), optx.SVFit(rank=2), targets="fc")
    third.load(tmp_path)
    assert again.state_dict().keys() != third.state_dict().keys()
    assert torch.equal(outputs(third.model), outputs(model))


def test_biases_of_a_merged_module_are_its_own(tmp_path: Path) -> None:
    """PEFT's file has whole biases: the model's plus ours, and not what else is merged into them."""
    model = bert()
    below = attached(model, optx.LoRA(rank=2, lora_bias=True), name="below")
    handle = optx.attach(model, optx.LoRA(rank=2, bias="all"))
    shake(handle.parameters(), seed=9)
    handle.save(tmp_path / "apart")
    below.merge()
    handle.merge()
    handle.save(tmp_path / "merged")
    apart, merged = tensors_in(tmp_path / "apart"), tensors_in(tmp_path / "merged")
    assert all(torch.equal(merged[key], tensor) for key, tensor in apart.items())
    handle.unmerge()
    rewrite(tmp_path / "apart", {k: t for k, t in apart.items() if not k.endswith(("delta", "bitfit.delta"))})
    before = {key: t.clone() for key, t in handle.state_dict().items()}
    handle.load(tmp_path / "apart")
    assert all((t - before[key]).abs().max() < 1e-6 for key, t in handle.state_dict().items())


def test_buffers_of_modules_trained_whole_go_along(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, x = make(), torch.randn(8, 4)
    handle = optx.attach(model, optx.LoRA(rank=1), targets="0", modules_to_save=["1"])
    model.train()(x)
    handle.save(tmp_path)
    fresh = make().eval()
    again = optx.attach(fresh, tmp_path)
    assert torch.equal(fresh(x), model.eval()(x))
    assert tensors_in(tmp_path)["base_model.model.1.num_batches_tracked"] == 1
    again.remove()
    assert torch.equal(fresh(x), make().eval()(x))


def test_half_precision_bases_have_float32_files(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    handle = attached(model, optx.LoRA(rank=2))
    handle.save(tmp_path)
    assert {t.dtype for t in tensors_in(tmp_path).values()} == {torch.float32}
    fresh = llama().to(torch.bfloat16)
    optx.attach(fresh, tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))


# ---- paths that wrappers change ---------------------------------------------------------------------


def checkpointed(module: nn.Module) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


compiles = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own affair


@compiles
@pytest.mark.filterwarnings("ignore:optx.attach. this model has been given to torch.compile")
@pytest.mark.parametrize("wrap", [torch.compile, checkpointed], ids=["compiled", "checkpointed"])
def test_wrappers_inside_the_model_leave_no_trace_in_files(
    wrap: Callable[[Any], Any], tmp_path: Path
) -> None:
    def wrapped_block() -> Any:
        model = plain()
        model.block["fc"] = wrap(model.block["fc"])
        return model

    model = plain()
    lora = optx.LoRA(rank=2, rank_pattern={"block.fc": 3})
    handle = attached(model, lora, targets=r"fc|block\.fc", modules_to_save=["block.norm"])
    handle.save(tmp_path / "bare")
    other: Any = wrapped_block()
    served = optx.attach(other, tmp_path / "bare")
    assert served.served[1].path in ("block.fc._orig_mod", "block.fc._checkpoint_wrapped_module")
    assert served.report().trainable == handle.report().trainable
    served.save(tmp_path / "wrapped")
    bare, again = tensors_in(tmp_path / "bare"), tensors_in(tmp_path / "wrapped")
    assert bare.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in bare.items())
    assert config_in(tmp_path / "bare") == config_in(tmp_path / "wrapped")
    assert_close(outputs(in_peft(plain(), tmp_path / "wrapped")), outputs(model))


@compiles
def test_a_model_compiled_later_saves_as_before(tmp_path: Path) -> None:
    model = plain()
    handle = attached(model, optx.LoRA(rank=1), targets="fc")
    torch.compile(model)
    nn.DataParallel(model)
    handle.save(tmp_path)
    assert all(key.startswith("base_model.model.fc.") for key in tensors_in(tmp_path))


@pytest.mark.usefixtures("group_of_one")
def test_sharded_adapters_are_saved_whole_and_loaded_in_shards(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = plain()
    handle = attached(model, optx.LoRA(rank=2), targets="fc|head")
    wanted = {key: t.clone() for key, t in handle.state_dict().items()}
    mesh = distributed.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in handle.parameters())
    handle.save(tmp_path)
    found = tensors_in(tmp_path)
    assert all(torch.equal(found[f"base_model.model.{key}"], t) for key, t in wanted.items())
    shake(p.to_local() for p in handle.parameters())  # type: ignore[attr-defined]
    handle.load(tmp_path)
    assert all(torch.equal(t, wanted[k]) for k, t in handle.state_dict().items())


# ---- writing ----------------------------------------------------------------------------------------


def test_folders_are_made_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    lora, svfit = (attached(plain(), one, targets="fc") for one in (optx.LoRA(rank=2), optx.SVFit(rank=2)))
    for handle, files in ((lora, [CONFIG, TENSORS]), (svfit, [OWN]), (lora, [CONFIG, TENSORS])):
        handle.save(folder)
        assert sorted(entry.name for entry in folder.iterdir()) == ["README.md", *files]
        fresh = plain()
        optx.attach(fresh, str(folder))
        assert torch.equal(outputs(fresh), outputs(handle.model))


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    attached(plain(), optx.LoRA(rank=2), targets="fc").save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("injection", [optx.LoRA(rank=2), optx.SVFit(rank=2)])
def test_a_kill_in_mid_save_leaves_the_old_file_whole(
    injection: optx.Injection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = attached(plain(), injection, targets="fc")
    handle.save(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    shake(handle.parameters())

    def killed(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        handle.save(tmp_path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_kill_between_tensors_and_config_is_noticed(tmp_path: Path) -> None:
    """Without that, the new tensors would be scaled by the old alpha."""
    attached(plain(), optx.LoRA(rank=2, alpha=4), targets="fc").save(tmp_path)
    old = (tmp_path / CONFIG).read_text()
    attached(plain(), optx.LoRA(rank=2, alpha=8), targets="fc").save(tmp_path)
    (tmp_path / CONFIG).write_text(old)
    refuses(
        tmp_path,
        plain(),
        r"written with lora_alpha=8, and adapter_config.json beside it has 4: a save was cut",
    )


def test_what_says_nothing_of_the_outputs_may_be_edited(tmp_path: Path) -> None:
    model = plain()
    attached(model, optx.LoRA(rank=2), targets="fc").save(tmp_path)
    edit_config(tmp_path, base_model_name_or_path="me/mine", inference_mode=False, peft_version="1")
    fresh = plain()
    optx.attach(fresh, tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    handle = optx.attach(plain(), optx.LoRA(rank=2), targets="fc")
    with pytest.raises(optx.OptxError, match=r"out' is a file; pass the name of a folder"):
        handle.save(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@dataclass(frozen=True)
class Unspeakable(optx.BitFit):
    """An option that JSON has no word for."""

    name: ClassVar[str] = "unspeakable"
    dtype: Any = torch.float32


def test_options_that_json_cannot_hold(tmp_path: Path) -> None:
    handle = optx.attach(plain(), Unspeakable())
    with pytest.raises(optx.OptxError, match=r"Unspeakable\(\) can't be written as JSON .*dtype is not JSON"):
        handle.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    lossy = optx.attach(plain(), Unspeakable(dtype={1: "one"}), name="other")
    with pytest.raises(optx.OptxError, match=r"would not be the same when read again"):
        lossy.save(tmp_path / "new")


def test_a_removed_handle_neither_saves_nor_loads(tmp_path: Path) -> None:
    handle = optx.attach(plain(), optx.LoRA(rank=2), targets="fc")
    handle.save(tmp_path)
    handle.remove()
    for act in (handle.save, handle.load):
        with pytest.raises(optx.OptxError, match=r"this handle has been removed"):
            act(tmp_path)


def test_a_folder_of_two_adapters_is_refused(tmp_path: Path) -> None:
    attached(plain(), optx.LoRA(rank=2), targets="fc").save(tmp_path)
    (tmp_path / OWN).touch()
    with pytest.raises(optx.FileError, match=rf"has both {OWN} and {CONFIG}\. Delete the one"):
        optx.attach(plain(), tmp_path)


def test_options_of_the_training_alone_may_differ(tmp_path: Path) -> None:
    attached(plain(), optx.LoRA(rank=2), targets="fc").save(tmp_path)
    handle = optx.attach(plain(), optx.LoRA(rank=2, dropout=0.5, init="gaussian"), targets="fc")
    handle.load(tmp_path)
    assert handle.injection.options()["dropout"] == 0.5
