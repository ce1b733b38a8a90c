"""`optx.attach` of a trainer's folder gives the trained model: adapters, and what changed beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optx

pytest.importorskip("accelerate")

from accelerate_run import fresh, same

from optx.integrations.accelerate import adapters_only

REST = "optx_checkpoint.safetensors"


def net(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(width, 2))


def trained(folder: Path, *more: Any) -> nn.Module:
    """LoRA on two layers, batch norm and the head beside it, two steps, saved."""
    model = net()
    handles = [optx.attach(model, one, targets="0|2") for one in (optx.LoRA(rank=2), *more)]
    optx.trainable_only(model, *handles, also=["1", "3"])
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerator = fresh()
    model, opt = accelerator.prepare(model, opt)
    adapters_only(accelerator, *handles)
    for step in range(2):
        accelerator.backward(model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).sum())
        opt.step()
        opt.zero_grad()
    accelerator.save_state(str(folder))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, trained(folder)


def test_one_line_gives_the_trained_model(saved: tuple[Path, nn.Module], recwarn: Any) -> None:
    folder, wanted = saved
    model = net()
    handle = optx.attach(model, folder)
    assert not recwarn.list
    assert same(model, wanted)
    assert model[1].num_batches_tracked == 2  # type: ignore[union-attr]
    x = torch.ones(3, 4)
    assert torch.equal(model.eval()(x), wanted(x))
    bias = model[3].bias.clone()  # type: ignore[operator, union-attr]
    handle.remove()  # what is the model's own stays
    assert torch.equal(model[3].bias, bias)  # type: ignore[arg-type]
    assert torch.equal(model[0].weight, net()[0].weight)  # type: ignore[arg-type]


def test_several_adapters_are_attached_one_by_one(tmp_path: Path) -> None:
    wanted = trained(tmp_path, optx.IA3())
    model = net()
    optx.attach(model, tmp_path / "lora")
    assert torch.equal(model[3].bias, wanted[3].bias)  # type: ignore[index, arg-type]
    optx.attach(model, tmp_path / "ia3")
    assert same(model, wanted)


def test_what_has_no_place_is_refused_and_nothing_is_changed(saved: tuple[Path, nn.Module]) -> None:
    model = net(7)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(optx.FileError, match=r"'3.weight' has shape \(2, 6\).*adapter alone, attach a copy"):
        optx.attach(model, saved[0])
    del model[3]
    with pytest.raises(optx.FileError, match=r"'3.bias' has no place in this model.*attach a copy"):
        optx.attach(model, saved[0])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_another_base_is_told(saved: tuple[Path, nn.Module]) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.add_(1)  # type: ignore[operator, union-attr]
    with pytest.warns(UserWarning, match=r"'2.weight' of the base model is not the one.*before attaching"):
        optx.attach(model, saved[0])


def test_an_adapter_that_was_saved_over_is_not_mixed_with_what_was_beside_the_earlier(
    saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    handle = optx.attach(net(), tmp_path)
    with torch.no_grad():
        handle.parameters()[0].add_(1)
    handle.save(tmp_path)
    model = net()
    with pytest.raises(optx.FileError, match=rf"saved over since {REST} was.*a folder of its own"):
        optx.attach(model, tmp_path)
    assert same(model, net())


def test_a_model_without_values_is_refused(saved: tuple[Path, nn.Module]) -> None:
    model = net()
    model[3] = nn.Linear(6, 2, device="meta")
    with pytest.raises(optx.FileError, match=r"'3\.bias' has no values here.*meta.*values first"):
        optx.attach(model, saved[0])


def test_one_tensor_is_not_given_the_values_of_two(saved: tuple[Path, nn.Module]) -> None:
    model = net()
    model[1].weight = model[1].bias  # type: ignore[union-attr]
    with pytest.raises(optx.FileError, match=r"'1\.weight' and '1\.bias' are one tensor in this model"):
        optx.attach(model, saved[0])


def test_a_folder_by_a_relative_name(
    saved: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trained(tmp_path, optx.IA3())
    monkeypatch.chdir(tmp_path / "lora")
    model = net()
    optx.attach(model, ".")
    assert torch.equal(model[3].bias, wanted[3].bias)  # type: ignore[index, arg-type]


def test_if_one_tensor_fails_all_are_as_they_were(
    saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    model[1].running_mean = torch.zeros(()).expand(6)  # can't be written  # type: ignore[union-attr]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="single memory location"):
        optx.attach(model, saved[0])
    found = model.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in found.items())


def test_a_config_that_fails_later_takes_it_back(saved: tuple[Path, nn.Module]) -> None:
    model = net()
    config = {"attach": [{"path": str(saved[0])}], "optimizer": {"name": "AdamW", "lr": -1.0}}
    with pytest.raises(ValueError, match="-1"):
        optx.from_config(config, model=model)
    assert same(model, net())
    del config["optimizer"]
    optx.from_config(config, model=model)
    assert same(model, saved[1])


def test_the_same_base_in_bfloat16_is_no_other(saved: tuple[Path, nn.Module], recwarn: Any) -> None:
    model = net().bfloat16()
    optx.attach(model, saved[0])
    assert not recwarn.list
    assert torch.equal(model[3].bias, saved[1][3].bias.bfloat16())  # type: ignore[index, operator, union-attr]


def test_an_adapter_of_a_part_takes_what_is_of_that_part(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.net(x)

    model = Whole()
    handle = optx.attach(model.net, optx.LoRA(rank=2), targets="0")
    optx.trainable_only(model, handle, also="net.1")
    model.scale.requires_grad_(True)
    accelerator = fresh()
    accelerator.prepare(model)
    adapters_only(accelerator, handle)
    model(torch.ones(5, 4))
    accelerator.save_state(str(tmp_path))
    part = net()
    with pytest.warns(UserWarning, match=r"changed more than the model .* attached to: scale\. It is in"):
        optx.attach(part, tmp_path)
    assert same(part, model.net)


@pytest.mark.parametrize("damage", ["bytes", "marks", "places"])
def test_a_damaged_file_is_named(damage: str, saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / REST
    if damage == "bytes":
        file.write_bytes(b"\0" * 64)
    else:
        marks = {"0.weight": ["torch.load", [], 1]} if damage == "marks" else {}
        places = "[]" if damage == "places" else "{}"
        text = {"optx_left_out": json.dumps(marks), "optx_places": places, "optx_adapters": "{}"}
        save_file(load_file(file), file, metadata=text)
    model = net()
    with pytest.raises(optx.FileError, match=f"{REST}' is damaged"):
        optx.attach(model, tmp_path)
    assert same(model, net())
