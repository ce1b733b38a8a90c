"""Folders of adapters that are refused, by a sentence that names what is wrong, with the model unchanged."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import CONFIG, OWN, TENSORS, WHERE, Both, description, refuses
from adapter_models import attached, by_peft, outputs, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optx
from optx.inject import _folder


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
    refuses(tmp_path, plain(), rf"has no {lost}\. It has README.md, {left}")


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
    with pytest.raises(optx.FileError, match=r"'base_model.model.head.lora_A.weight' is missing"):
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
