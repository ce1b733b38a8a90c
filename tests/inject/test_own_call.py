"""Subclasses of torch's modules with a forward of their own: served where that has a meaning, merged where
the merged weight means the same, else refused before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import move
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx.inject._own_call import adds_bias, has_own_call


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("mask", torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Ternary(nn.Linear):
    """As BitNet's while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class InputScaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Standardised(nn.Conv2d):
    """As BiT's WeightStandardizedConv2d and timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        w = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class InnerStandardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


def patched() -> nn.Module:
    module: Any = nn.Linear(6, 6)
    module.forward = lambda x: F.linear(x, module.weight / module.weight.norm(), module.bias)
    return module


def fake_quantised() -> nn.Module:
    module: Any = nn.Linear(6, 6)
    module.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    made = torch.ao.nn.qat.Linear.from_float(module)
    made(torch.randn(8, 6))  # sees how large its weight is
    with torch.no_grad():
        made.weight.mul_(0.02)
    return made.apply(torch.ao.quantization.disable_observer)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "masked": Masked,
    "ternary": lambda: Ternary(6, 6),
    "input scaled": lambda: InputScaled(6, 6),
    "activated": lambda: Activated(6, 6),
    "standardised": lambda: Standardised(6, 6, 3),
    "standardised within": lambda: InnerStandardised(6, 6, 3),
    "patched": patched,
    "fake quantised": fake_quantised,
}


def given(module: nn.Module) -> Tensor:
    return torch.randn(2, 6, 5, 5) if isinstance(module, nn.Conv2d) else torch.randn(3, 6)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("make", [optx.LoRA, optx.FLoRA, optx.IA3], ids=lambda make: make.__name__)
def test_what_means_something_else_is_served_and_not_merged(kind: str, make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OTHERS[kind]()).eval()
    x, weight = given(model[0]), model[0].weight.detach().clone()
    base = model(x)
    injection = make() if make is optx.IA3 else make(rank=2)
    handle = optx.attach(model, injection, targets="0")
    assert torch.equal(model(x), base)
    move(handle)
    want = model(x)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(optx.MergeError, match="makes something else of its weight or input than a"):
            merge()
    assert torch.equal(model(x), want)
    assert torch.equal(model[0].weight, weight)
    handle.remove()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("kind", ["masked", "standardised"])
@pytest.mark.parametrize(
    "injection",
    [optx.LoRA(rank=2, dora=True), optx.LoRA(rank=2, init="pissa"), optx.SVFit()],
    ids=["DoRA", "PiSSA", "SVFit"],
)
def test_what_works_with_the_weight_itself_is_refused(kind: str, injection: optx.Injection) -> None:
    model = nn.Sequential(OTHERS[kind]())
    with pytest.raises(optx.TargetError, match="this method works with the weight itself"):
        optx.attach(model, injection, targets="0")
    assert [name for name, _ in model.named_modules()] == ["", "0"]


@pytest.mark.parametrize(
    "injection",
    [optx.LoRA(rank=2, dora=True), optx.LoRA(rank=2, init="olora"), optx.SVFit(rank=2)],
    ids=["DoRA", "OLoRA", "SVFit"],
)
def test_a_weight_without_values_is_none_to_work_with(injection: optx.Injection) -> None:
    model = nn.Sequential(nn.Linear(6, 6, device="meta"))
    with pytest.raises(optx.TargetError, match=r"0\.weight is on the meta device and has no values yet"):
        optx.attach(model, injection, targets="0")


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    handle = optx.attach(nn.Sequential(nn.Linear(6, 6, device="meta")), optx.LoRA(rank=2), targets="0")
    with pytest.raises(optx.OptxError, match=r"'.*lora_A\.weight' is on the meta device and has no values"):
        handle.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Cast(nn.Linear):
    """As those that compute in another precision: the same function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.weight.double(), self.bias.double()).to(x.dtype)


class Noted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return super().forward(x)


@pytest.mark.parametrize(
    "make", [lambda: Cast(6, 6), lambda: Noted(6, 6, 3, padding=1, stride=2, dilation=2)]
)
@pytest.mark.parametrize("dora", [False, True])
def test_what_means_the_same_is_merged(make: Callable[[], nn.Module], dora: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).train()
    handle = optx.attach(model, optx.LoRA(rank=2, dora=dora), targets="0")
    move(handle)
    x = given(model[0])
    want = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert model[0].training


def test_a_look_takes_no_random_numbers_and_leaves_nothing() -> None:
    class Dropped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    model = nn.Sequential(Dropped(6, 6))
    state = torch.get_rng_state()
    handle = optx.attach(model, optx.BitFit(), targets="0")
    assert torch.equal(torch.get_rng_state(), state)
    handle.merge()
    assert model.training
    assert model[0].training
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "0.optx.bitfit.delta"]


class Pair(nn.Linear):
    """As Megatron's: the output and the bias."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight), self.bias


class SamePadding(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 1, 1)))


@pytest.mark.parametrize(
    ("module", "says"),
    [(Pair(6, 6), "hands out a tuple and no tensor"), (SamePadding(6, 6, 3), r"makes \(1, 6, .* widths say")],
)
def test_outputs_that_nothing_can_be_added_to(module: nn.Module, says: str) -> None:
    with pytest.raises(optx.TargetError, match=says):
        optx.attach(nn.Sequential(module), optx.LoRA(rank=2), targets="0")


def test_a_call_that_cannot_be_looked_at_is_attached_to_and_not_merged() -> None:
    class Needs(nn.Linear):
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return super().forward(x) * scale

    model = nn.Sequential(Needs(6, 6))
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    assert model[0](torch.randn(2, 6), scale=2.0).shape == (2, 6)
    with pytest.raises(optx.MergeError, match="a call of it to see what that makes of its weight failed"):
        handle.merge()


# ---- biases -----------------------------------------------------------------------------------------


class Behind(nn.GroupNorm):
    """As BiT's BitGroupNormActivation and timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ChannelsSecond(nn.LayerNorm):
    """As ConvNeXt's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_bias_with_an_activation_behind_it_is_left_and_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Behind(2, 6))
    with pytest.raises(optx.TargetError, match="does more after its bias is added"):
        optx.attach(model, optx.BitFit(), targets="1")
    with pytest.warns(UserWarning, match=r"1 biases are left as they are .*1\.bias"):
        handle = optx.attach(model, optx.BitFit())
    assert [one.path for one in handle.served] == ["0"]


def test_a_table_of_relative_positions_is_no_bias_that_is_left() -> None:
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(4, 2), "out": nn.Linear(2, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = optx.attach(model, optx.BitFit())
    assert [one.path for one in handle.served] == ["out"]


@pytest.mark.parametrize("size", [4, 6])
def test_a_layer_norm_of_images_has_its_channels_second(size: int) -> None:
    """With images as wide as their channels are many, the wrong axis would fit as well."""
    model = nn.Sequential(ChannelsSecond(6))
    handle = optx.attach(model, optx.BitFit(), targets="0")
    move(handle)
    x = torch.randn(2, 6, size, size)
    want = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), want)


def test_torchs_own_are_not_looked_at() -> None:
    own = (nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.LayerNorm(3))
    assert not any(has_own_call(module) for module in own)
    assert all(adds_bias(module) for module in own)
    assert has_own_call(Behind(2, 6))
