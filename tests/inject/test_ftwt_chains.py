"""Which convolutions FTWT finds in a model, how they hang together, and what it says of the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conv_models import MODELS, Basic, Controlled, head, images, stem, trained, vgg
from injections import assert_same, snapshot
from torch import Tensor, nn

import optx
from optx.inject._conv_chains import Chain, chains_of


def found(model: nn.Module, shape: Any = None, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """End, activation, source and reasons by path."""

    def bare(path: str | None) -> str:
        return (path or "").removeprefix(prefix)

    def row(one: Chain) -> tuple[str, ...]:
        return bare(one.end), one.said.lower().rstrip("_"), bare(one.source), one.refused, one.left

    return {bare(path): row(one) for path, one in chains_of(model, shape).items()}


SHORTCUT = "it is a shortcut beside other convolutions"
WANTED = {
    "vgg": {"0": ("1", "relu", ""), "3": ("4", "relu", "0"), "7": ("8", "relu", "3")},
    "vgg, no norm": {"0": ("0", "relu", ""), "2": ("2", "relu", "0"), "5": ("5", "relu", "2")},
    "resnet": {
        "0": ("1", "relu", ""),
        "3.conv1": ("3.bn1", "relu", "0"),
        "3.conv2": ("3.bn2", "", "3.conv1"),
        "4.downsample.0": ("4.downsample.1", "", "", "", SHORTCUT),
        "4.conv1": ("4.bn1", "relu", ""),
        "4.conv2": ("4.bn2", "", "4.conv1"),
        "5.conv1": ("5.bn1", "relu", ""),
        "5.conv2": ("5.bn2", "", "5.conv1"),
    },
    "bottleneck": {
        "0": ("1", "relu", ""),
        "3.conv1": ("3.bn1", "relu", "0"),
        "3.conv2": ("3.bn2", "relu", "3.conv1"),
        "3.conv3": ("3.bn3", "", "3.conv2"),
        "4.conv1": ("4.bn1", "relu", ""),
        "4.conv2": ("4.bn2", "relu", "4.conv1"),
        "4.conv3": ("4.bn3", "", "4.conv2"),
    },
    "preactivation": {
        "0": ("1", "relu", ""),
        "3.conv1": ("3.bn2", "relu", ""),
        "3.conv2": ("3.conv2", "", "3.conv1"),
        "4.conv1": ("4.bn2", "relu", ""),
        "4.conv2": ("4.conv2", "", "4.conv1"),
    },
    "mobilenet": {
        "0": ("1", "relu", ""),
        "3": ("4", "relu", "0"),
        "6": ("7", "relu", "3"),
        "9": ("10", "relu", "6"),
        "12": ("13", "relu", "9"),
    },
    "inverted": {
        "0": ("1", "relu", ""),
        **{
            f"{block}.layers.{i}": (f"{block}.layers.{i + 1}", act, f"{block}.layers.{i - 3}" if i else first)
            for block, first in ((3, "0"), (4, ""))
            for i, act in ((0, "relu6"), (3, "relu6"), (6, ""))
        },
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_chains(kind: str) -> None:
    """The same by torch.fx, by a call, and in a model that only a call can trace; nothing is changed."""
    wanted = {path: (*row, "", "")[:5] for path, row in WANTED[kind].items()}
    model = trained(kind).train()
    before, state = snapshot(model), torch.get_rng_state()
    assert found(model) == wanted
    assert found(model, (1, 3, 8, 8)) == wanted
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert found(Controlled(model), prefix="inner.") == wanted


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "mobilenet"])
def test_models_of_transformers(kind: str) -> None:
    import transformers

    if kind == "mobilenet":
        config = transformers.MobileNetV2Config(depth_multiplier=0.25, expand_ratio=2, num_labels=3)
        model: Any = transformers.MobileNetV2ForImageClassification(config)
        shortcuts = 0
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": kind}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))
        shortcuts = 1
    convolutions = [path for path, one in model.named_modules() if isinstance(one, nn.Conv2d)]
    chains = chains_of(model)
    assert set(chains) == set(convolutions)
    assert sum(bool(one.left) for one in chains.values()) == shortcuts
    assert all(one.end == path.replace("convolution", "normalization") for path, one in chains.items())
    x = images(2, 32)
    model.eval()
    before = model(x).logits
    handle = optx.attach(model, optx.FTWT())
    assert torch.equal(model(x).logits, before)
    assert len(handle.flops().layers) == len(convolutions)


class Odd(nn.Module):
    """One of each that is refused or left."""

    def __init__(self) -> None:
        super().__init__()
        self.forked, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.group, self.groups = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.gate, self.squeeze = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fine, self.aside, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forked(x)
        x = self.norm(x) + x
        x = self.twice(self.twice(x))
        x = self.groups(self.group(x)) * torch.sigmoid(self.gate(x))
        x = x * torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = torch.relu(self.fine(x))
        if self.training:
            x = x + self.aside(x)
        return self.last(x).flatten(1)


def test_what_is_not_served_is_told() -> None:
    model = Odd().eval()
    wanted = {
        "forked": "its output goes to a norm and elsewhere",
        "twice": "it, or its norm, is called more than once",
        "group": "what follows is a norm that mixes channels",
        "gate": "sigmoid of 0 is not 0",
        "squeeze": "its input is pooled to one position",
        "last": "its output is the model's",
        "aside": "the model does not call it in evaluation mode",
    }
    x = images()
    before = model(x)
    with optx.attach(model, optx.FTWT()) as handle:
        rows = {row.module: row.note for row in handle.report().rows}
        assert rows.pop("fine") == "4 filters from 4 numbers"
        assert rows == {path: f"not served: {why}" for path, why in wanted.items()}
        assert "twice" in str(handle.report())
        assert torch.equal(model(x), before)
    for path in ("forked", "twice", "group", "gate", "aside"):
        with pytest.raises(optx.TargetError, match=f"FTWT can't serve '{path}': {wanted[path]}"):
            optx.attach(model, optx.FTWT(), targets=[path])
    handle = optx.attach(model, optx.FTWT(), targets=["last", "squeeze"])  # which may be asked for
    assert handle.report().rows[0].note == "4 filters from 4 numbers"


def test_chains_are_those_of_evaluation_mode_whatever_the_mode() -> None:
    model = Odd()
    assert found(model.train()) == found(model.eval())
    assert "aside" not in found(model.train())
    assert model.training


def test_nothing_to_serve_is_an_error() -> None:
    for model in (nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), *head(4))):
        before = snapshot(model)
        with pytest.raises(optx.TargetError, match=r"FTWT serves nn\.Conv2d modules .* none that it can"):
            optx.attach(model, optx.FTWT())
        assert_same(model, before)
    with pytest.raises(optx.TargetError, match="'0' is a Linear"):
        optx.attach(nn.Sequential(nn.Linear(3, 3)), optx.FTWT(), targets="0")


def test_a_model_that_cannot_be_traced_needs_a_shape() -> None:
    model = Controlled(nn.Sequential(*stem(4), nn.Flatten(), nn.Linear(4 * 49, 2)))
    with pytest.raises(optx.OptxError, match=r"can't be traced .* Pass shape="):
        optx.attach(model, optx.FTWT())
    handle = optx.attach(model, optx.FTWT(shape=(1, 3, 7, 7)))
    assert [one.path for one in handle.served] == ["inner.0", "inner.1"]


def test_shortcuts_and_branches_of_residual_blocks() -> None:
    """The branch is masked before the addition, and its target is taken there."""
    model = nn.Sequential(Basic(3, 4, 2), *head(4)).train()
    handle = optx.attach(model, optx.FTWT(), targets=[r"conv2"])
    part: Any = handle.served[0].part
    with torch.no_grad():
        part.bias.fill_(-20)
    block: Any = model[0]
    block.eval()
    x = images()
    assert torch.equal(block(x), torch.relu(block.downsample(x)))


def test_it_comes_off_and_checkpoints_stay_as_they_are() -> None:
    model = trained("resnet")
    before, x = snapshot(model), images()
    dense = model(x)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    handle = optx.attach(model, optx.FTWT())
    model.load_state_dict(state)  # strict
    assert {key for key in model.state_dict() if "optx" not in key} == set(state)
    assert set(handle.state_dict()) == {
        f"{path}.ftwt.{name}"
        for path in ("0", "3.conv1", "3.conv2", "4.conv1", "4.conv2", "5.conv1", "5.conv2")
        for name in ("weight", "bias")
    }
    with pytest.raises(optx.MergeError):
        handle.merge()
    handle.remove()
    assert_same(model, before)
    assert torch.equal(model(x), dense)


def test_saved_apart_from_the_model(tmp_path: Any) -> None:
    model = trained("resnet")
    handle = optx.attach(model, optx.FTWT(r=0.9, embedding=20))
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape))
    handle.save(tmp_path / "predictors")
    other = trained("resnet")
    again = optx.attach(other, tmp_path / "predictors")
    assert again.injection == optx.FTWT(r=0.9, embedding=20)
    assert torch.equal(other(images()), model(images()))
    copied, copies = copy.deepcopy((model, handle))
    assert torch.equal(copied(images()), model(images()))
    assert copies.flops().samples == handle.flops().samples == 6


def test_targets_leave_the_others_whole() -> None:
    model = vgg().eval()
    handle = optx.attach(model, optx.FTWT(), targets=["3"])
    model(images())
    notes = {row.module: row.note for row in handle.report().rows}
    assert notes["0"] == notes["7"] == "not served: not asked for"
    assert [row.kept == row.total for row in handle.flops().layers] == [True] * 3
