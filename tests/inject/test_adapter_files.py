"""Folders of adapters: what is written, what comes back, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from adapter_models import (
    assert_close,
    attached,
    bert,
    by_peft,
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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optx
from optx.inject import _folder

OWN, CONFIG, TENSORS = "optx_adapter.safetensors", "adapter_config.json", "adapter_model.safetensors"


ONE, TWO = optx.LoRA(rank=1), (optx.IA3(), optx.BitFit())


@dataclass(frozen=True)
class Both(optx.Composite):
    """Two methods as options of a third."""

    name: ClassVar[str] = "both"
    first: optx.Injection = ONE
    rest: tuple[optx.Injection, ...] = TWO

    def members(self) -> dict[str, optx.Injection]:
        return {"first": self.first, **{f"rest{i}": one for i, one in enumerate(self.rest)}}


def description(folder: Path) -> dict[str, Any]:
    [file] = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
        return json.loads(opened.metadata()["optx"])


# ---- round trips ------------------------------------------------------------------------------------

WHERE = {"first": "fc", "rest0": "conv|fc", "rest1": r"conv1|block\.\w+"}


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
    assert [entry.name for entry in tmp_path.iterdir()] == [OWN]
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


def test_sharded_adapters_are_saved_whole_and_loaded_in_shards(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = plain()
        handle = attached(model, optx.LoRA(rank=2), targets="fc|head")
        wanted = {key: t.clone() for key, t in handle.state_dict().items()}
        mesh = distributed.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        assert all(isinstance(t, DTensor) for t in handle.state_dict().values())
        handle.save(tmp_path)
        found = tensors_in(tmp_path)
        assert all(torch.equal(found[f"base_model.model.{key}"], t) for key, t in wanted.items())
        shake(p.to_local() for p in handle.parameters())  # type: ignore[attr-defined]
        handle.load(tmp_path)
        assert all(torch.equal(t.full_tensor(), wanted[k]) for k, t in handle.state_dict().items())  # type: ignore[attr-defined]
    finally:
        distributed.destroy_process_group()


# ---- writing ----------------------------------------------------------------------------------------


def test_folders_are_made_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    lora, svfit = (attached(plain(), one, targets="fc") for one in (optx.LoRA(rank=2), optx.SVFit(rank=2)))
    for handle, files in ((lora, [CONFIG, TENSORS]), (svfit, [OWN]), (lora, [CONFIG, TENSORS])):
        handle.save(folder)
        assert sorted(entry.name for entry in folder.iterdir()) == files
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


# ---- refusals ---------------------------------------------------------------------------------------


def refuses(folder: Path, model: nn.Module, match: str, error: type[Exception] = optx.FileError) -> None:
    """The folder isn't attached, with that message; nothing is changed."""
    before = {key: t.clone() for key, t in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        optx.attach(model, folder)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def saved(folder: Path, injection: optx.Injection | None = None, **more: Any) -> Path:
    """A folder with LoRA on ``fc`` of `plain`, or something else."""
    attached(plain(), injection or optx.LoRA(rank=2), **{"targets": "fc", **more}).save(folder)
    return folder


def own_file(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of SVFit on ``fc``, written by optx."""
    saved(folder, optx.SVFit(rank=2))
    with safe_open(folder / OWN, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_no_such_folder(tmp_path: Path) -> None:
    refuses(
        tmp_path / "none", plain(), r"none' is no folder\. An adapter of the Hub must be downloaded first"
    )


def test_the_file_instead_of_its_folder(tmp_path: Path) -> None:
    refuses(
        saved(tmp_path) / TENSORS, plain(), r"adapter_model.safetensors' is a file; pass the folder it is in"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    refuses(tmp_path, plain(), r"has no adapter_config.json\. It has nothing")


@pytest.mark.parametrize(("lost", "left"), [(CONFIG, TENSORS), (TENSORS, CONFIG)])
def test_half_of_the_files(lost: str, left: str, tmp_path: Path) -> None:
    (saved(tmp_path) / lost).unlink()
    refuses(tmp_path, plain(), rf"has no {lost}\. It has {left}")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    adapted = by_peft(plain(), __import__("peft").LoraConfig(r=2, target_modules=["fc"]), tmp_path)
    (tmp_path / TENSORS).unlink()
    torch.save(adapted.state_dict(), tmp_path / "adapter_model.bin")
    refuses(
        tmp_path, plain(), r"adapter_model.bin' is a pickle, which can run any code .*save_pretrained writes"
    )


def test_two_adapters_in_one_folder(tmp_path: Path) -> None:
    own_file(tmp_path)
    os.replace(tmp_path / OWN, tmp_path / "kept")
    saved(tmp_path)
    os.replace(tmp_path / "kept", tmp_path / OWN)
    refuses(tmp_path, plain(), r"has both optx_adapter.safetensors and adapter_config.json\. Delete the one")


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    (saved(tmp_path) / CONFIG).write_text(text)
    refuses(tmp_path, plain(), r"adapter_config.json' is damaged \(")


@pytest.mark.parametrize("injection", [optx.LoRA(rank=2), optx.SVFit(rank=2)])
@settings(max_examples=25)
@given(share=st.floats(0, 0.999))
def test_files_that_are_cut_off(injection: optx.Injection, share: float, tmp_path_factory: Any) -> None:
    folder = saved(tmp_path_factory.mktemp("cut"), injection)
    [file] = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refuses(folder, plain(), r"safetensors' is damaged or cut off \(")


def test_a_header_of_noise(tmp_path: Path) -> None:
    file = saved(tmp_path) / TENSORS
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    refuses(tmp_path, plain(), r"is damaged or cut off \(")


def test_a_safetensors_file_of_something_else(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / OWN, metadata={"format": "pt"})
    refuses(tmp_path, plain(), r"is not an adapter file: its metadata has no 'optx'")


@pytest.mark.parametrize("said", ["{", "{}", '{"injection": 3, "served": {}, "modules_to_save": []}'])
def test_a_description_that_says_nothing(said: str, tmp_path: Path) -> None:
    tensors, _ = own_file(tmp_path)
    save_file(tensors, tmp_path / OWN, metadata={"optx": said})
    refuses(tmp_path, plain(), r"is damaged")


def test_an_injection_that_is_not_known_here(tmp_path: Path) -> None:
    tensors, metadata = own_file(tmp_path)
    save_file(tensors, tmp_path / OWN, metadata={"optx": metadata["optx"].replace('"SVFit"', '"SVFat"')})
    refuses(tmp_path, plain(), r"injection 'SVFat', which is not known here\. Import .*Near: 'SVFit'")


def test_an_option_of_another_version(tmp_path: Path) -> None:
    tensors, metadata = own_file(tmp_path)
    save_file(tensors, tmp_path / OWN, metadata={"optx": metadata["optx"].replace('"rank"', '"rnak"')})
    refuses(tmp_path, plain(), r"SVFit: no option is called 'rnak'\. Near: 'rank'", optx.OptxError)


def changed(how: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(tensors)
    if how == "missing":
        del tensors[sorted(tensors)[0]]
    if how == "extra":
        tensors["fc.svfit.more"] = torch.zeros(1)
    if how == "shape":
        tensors[sorted(tensors)[0]] = torch.zeros(7)
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"'fc\.svfit\.\w+' is missing"),
        ("extra", r"'fc.svfit.more' has no place in this model\. Near: "),
        ("shape", r"'fc\.svfit\.\w+' has shape \(7,\), the model needs \("),
    ],
)
def test_tensors_that_do_not_fit(how: str, message: str, tmp_path: Path) -> None:
    tensors, metadata = own_file(tmp_path)
    save_file(changed(how, tensors), tmp_path / OWN, metadata=metadata)
    refuses(tmp_path, plain(), message)
    handle = attached(plain(), optx.SVFit(rank=2), targets="fc")
    before = {key: t.clone() for key, t in handle.state_dict().items()}
    with pytest.raises(optx.FileError, match=message):
        handle.load(tmp_path)
    assert all(torch.equal(t, before[key]) for key, t in handle.state_dict().items())


def test_a_file_for_another_model(tmp_path: Path) -> None:
    own_file(tmp_path)
    refuses(tmp_path, nn.Sequential(nn.Linear(6, 5)), r"saved for another model: it serves 'fc', .*Near: '0'")
    other = plain()
    other.fc = nn.Linear(6, 9)
    refuses(tmp_path, other, r"has shape \(\d+(, \d+)?,?\), the model needs|rank")


def test_a_module_trained_whole_that_is_not_there(tmp_path: Path) -> None:
    saved(tmp_path, optx.SVFit(rank=2), modules_to_save=["head"])
    other: Any = plain()
    other.top = other.head
    del other.head
    refuses(tmp_path, other, r"it serves 'head', and this one has no such module")


def test_targets_are_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(optx.OptxError, match=r"a saved adapter says itself which modules it serves"):
        optx.attach(plain(), saved(tmp_path), targets="fc")


@pytest.mark.parametrize(
    ("injection", "message"),
    [
        (optx.IA3(), r"holds LoRA, and this handle is of IA3"),
        (optx.LoRA(rank=2, alpha=8), r"saved with alpha=\{'fc': 16.0\}, and this handle has \{'fc': 8\}"),
        (optx.LoRA(rank=2, rslora=True), r"saved with rslora=False, and this handle has True"),
        (optx.LoRA(rank=3), r"saved with rank=\{'fc': 2\}, and this handle has \{'fc': 3\}"),
    ],
)
def test_loading_into_another_injection(injection: optx.Injection, message: str, tmp_path: Path) -> None:
    """Shapes may fit where the scale does not."""
    handle = attached(plain(), injection, targets="fc")
    before = outputs(handle.model)
    with pytest.raises(optx.FileError, match=message):
        handle.load(saved(tmp_path))
    assert torch.equal(outputs(handle.model), before)


def test_patterns_are_compared_by_what_they_mean(tmp_path: Path) -> None:
    lora = optx.LoRA(rank=2, dropout=0.5, rank_pattern={"fc": 3})
    model = plain()
    attached(model, lora, targets="fc").save(tmp_path)
    handle = optx.attach(plain(), optx.LoRA(rank=3, alpha_pattern={"f.": 16}), targets="fc")
    handle.load(tmp_path)
    assert torch.equal(outputs(handle.model), outputs(model))


def test_loading_into_other_targets(tmp_path: Path) -> None:
    handle = attached(plain(), optx.LoRA(rank=2), targets="fc|head")
    with pytest.raises(optx.FileError, match=r"'head.lora_A.weight' is missing"):
        handle.load(saved(tmp_path))


def test_loading_into_a_merged_adapter(tmp_path: Path) -> None:
    handle = attached(plain(), optx.LoRA(rank=2), targets="fc")
    handle.merge()
    with pytest.raises(optx.MergeError, match=r"merged into the weights"):
        handle.load(saved(tmp_path))


def test_an_adapter_that_is_there_already(tmp_path: Path) -> None:
    model = plain()
    optx.attach(model, saved(tmp_path))
    with pytest.raises(optx.OptxError, match=r"'fc' has a 'lora' attached already"):
        optx.attach(model, tmp_path)
    optx.attach(model, tmp_path, name="second")


def test_a_failure_after_attaching_takes_it_off_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(_folder, "fill", fails)
    refuses(saved(tmp_path), plain(), "no memory", RuntimeError)


def test_copies_of_a_handle_save_the_same(tmp_path: Path) -> None:
    handle = attached(plain(), Both(), targets=WHERE)
    handle.save(tmp_path / "one")
    copy.deepcopy(handle).save(tmp_path / "two")
    assert description(tmp_path / "one") == description(tmp_path / "two")
    one, two = (load_file(tmp_path / name / OWN) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
