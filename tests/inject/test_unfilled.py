"""Attached on the meta device: memory by to_empty() is no values yet, and nothing may compute with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import move
from torch import Tensor, nn

import optx

METHODS: dict[str, Callable[[], optx.Injection]] = {
    "LoRA": lambda: optx.LoRA(rank=2),
    "IA3": lambda: optx.IA3(feedforward=()),
    "adapter": lambda: optx.SequentialAdapter(rank=2),
    "BitFit": optx.BitFit,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def emptied(method: str) -> tuple[nn.Module, optx.Handle]:
    """A model with its weights, whose adapter has memory alone."""
    with torch.device("meta"):
        model = net()
    handle = optx.attach(model, METHODS[method](), targets="0|2")
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())  # of the bare model: as other libraries load it
    return model, handle


def data() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
def test_no_call_no_merge_and_no_file_without_values(method: str, tmp_path: Path) -> None:
    model, handle = emptied(method)
    twin = copy.deepcopy(model)
    for call in (lambda: model(data()), lambda: model[0](data()), lambda: twin(data())):
        for _ in range(2):
            with pytest.raises(
                optx.OptxError, match=r"^optx: .* has no values: .*to_empty\(\) gave it memory"
            ):
                call()
    for doing, call in (("merge", handle.merge), ("save", lambda: handle.save(tmp_path / "new"))):
        with pytest.raises(optx.OptxError, match=rf"^{doing}: .* has no values"):
            call()
    assert not (tmp_path / "new").exists()
    handle.remove()
    assert torch.equal(model(data()), net()(data()))
    assert not any(one._forward_pre_hooks for one in model.modules())


GIVEN: dict[str, Callable[[Any, Any, dict[str, Tensor]], Any]] = {
    "handle": lambda model, handle, values: handle.load_state_dict(values),
    "in place": lambda model, handle, values: [
        p.data.copy_(values[key]) for key, p in handle.state_dict().items()
    ],
    "assigned": lambda model, handle, values: model.load_state_dict(
        {name: values[key].clone() for (name, _), key in zip(handle.named_parameters(), values, strict=True)},
        strict=False,
        assign=True,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", GIVEN)
def test_values_given_in_any_way_are_seen(method: str, way: str) -> None:
    other = net()
    wanted = optx.attach(other, METHODS[method](), targets="0|2")
    move(wanted)
    model, handle = emptied(method)
    hooks = len(model[0]._forward_pre_hooks)
    GIVEN[way](model, handle, wanted.state_dict())
    assert torch.equal(model(data()), other(data()))
    assert len(model[0]._forward_pre_hooks) < hooks  # and nobody looks any more
    for p in handle.parameters():
        p.data.fill_(torch.nan)  # a training that went wrong is another matter
    assert model(data()).isnan().all()


def test_a_part_of_them_is_not_all() -> None:
    model, handle = emptied("LoRA")
    with torch.no_grad():
        handle.parameters()[0].zero_()
    with pytest.raises(optx.OptxError, match=r"'lora\.B', attached to a Linear, has no values"):
        model(data())


def test_no_file_of_what_is_on_the_meta_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = net()
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    with pytest.raises(optx.OptxError, match=r"^save: '0\.lora_A\.weight' is on the meta device"):
        handle.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
