"""``layers=`` and ``exclude=`` of attach: PEFT's layers_to_transform and exclude_modules, with no silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_close, by_peft, config_in, gpt2, in_peft, llama, moved, outputs, shake
from expert_models import BOTH, ONE_PARAMETER, moe
from torch import nn

import optx
from optx import LoRA, TargetError


class Deep(nn.Module):
    """Two stacks of different depth, and modules outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(self.block() for _ in range(2))})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(self.block() for _ in range(12))})

    @staticmethod
    def block() -> nn.Module:
        return nn.ModuleDict({"attn": nn.Linear(4, 4), "experts": nn.ModuleList([nn.Linear(4, 4)] * 1)})


def served(model: nn.Module, targets: Any = nn.Linear, **options: Any) -> list[str]:
    with optx.attach(model, LoRA(rank=2), targets, **options) as handle:
        return [one.path for one in handle.served]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (1, ["encoder 1", "decoder 1"]),
        ([1, 11], ["encoder 1", "decoder 1", "decoder 11"]),
        (-1, ["encoder 1", "decoder 11"]),
        (range(-12, -10), ["decoder 0", "decoder 1"]),
        (range(0, 12, 5), ["encoder 0", "decoder 0", "decoder 5", "decoder 10"]),
        ((0, 0, -2), ["encoder 0", "decoder 0", "decoder 10"]),
        (torch.tensor([3]).tolist(), ["decoder 3"]),
    ],
)
def test_layers(layers: Any, wanted: list[str]) -> None:
    """An expert's number is not its layer's."""
    stacks = (one.split(" ") for one in wanted)
    places = {f"{stack}.layers.{number}." for stack, number in stacks}
    found = served(Deep(), layers=layers)
    assert {path[: path.rindex(".") + 1].removesuffix("experts.") for path in found} == places
    assert len(found) == 2 * len(places)


def test_layers_and_excluded_ones_are_pefts(tmp_path: Path) -> None:
    import peft

    names: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
    config = peft.LoraConfig(r=2, lora_alpha=16, exclude_modules=["self_attn.v_proj"], **names)
    theirs = by_peft(llama(), config, tmp_path / "theirs")
    model = llama()
    read = optx.attach(model, tmp_path / "theirs")
    assert_close(outputs(model), outputs(theirs))
    own = llama()
    handle = optx.attach(own, LoRA(rank=2), ["q_proj", "v_proj"], layers=-1, exclude=["self_attn.v_proj"])
    assert [one.path for one in handle.served] == [one.path for one in read.served]
    shake(handle.parameters())
    handle.save(tmp_path / "ours")
    assert config_in(tmp_path / "ours")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert_close(outputs(in_peft(llama(), tmp_path / "ours")), outputs(own))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("embed|decoder.*", 4),
        (["embed", "attn"], 14),
        (["decoder.layers.3.attn"], 28),
        (lambda path, module: "layers" in path, 1),
    ],
)
def test_excluded(exclude: Any, left: int) -> None:
    assert len(served(Deep(), exclude=exclude)) == left


def test_types_are_excluded() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 2))
    assert served(model, ["0", "1"], exclude=nn.Conv1d) == ["0"]
    assert served(model, "0|1", exclude=[nn.Conv1d]) == ["0"]


@ONE_PARAMETER
@pytest.mark.parametrize(
    ("targets", "exclude", "left"),
    [
        (["experts"], ["experts.down_proj"], [["gate_up_proj"], ["gate_up_proj"]]),
        (r".*\.experts", r".*1\..*\.gate_up_proj", [["gate_up_proj", "down_proj"], ["down_proj"]]),
        (BOTH, ["layers.0.mlp.experts"], [[], ["gate_up_proj", "down_proj"]]),
        (
            BOTH,
            ["0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj", "1.mlp.experts.down_proj"],
            [[], BOTH[:1]],
        ),
        ([*BOTH, "gate.weight"], lambda path, module: path.endswith("experts"), [["weight"], ["weight"]]),
    ],
)
def test_experts_are_excluded_by_their_parameters_names(
    targets: Any, exclude: Any, left: list[list[str]], tmp_path: Path
) -> None:
    model = moe()
    handle = optx.attach(model, LoRA(rank=2), targets, exclude=exclude)
    found = {one.path: one.part.parameter_names for one in handle.served}
    wanted = {
        number: tuple(name.removeprefix("experts.") for name in names) for number, names in enumerate(left)
    }
    assert {int(path.split(".")[2]): names for path, names in found.items()} == {
        number: names for number, names in wanted.items() if names
    }
    shake(handle.parameters())
    handle.save(tmp_path / "ours")
    assert_close(outputs(in_peft(moe(), tmp_path / "ours")), outputs(model))


@ONE_PARAMETER
def test_an_excluded_parameter_that_there_is_not() -> None:
    with pytest.raises(TargetError, match=r"exclude has 'experts.down_porj'.*Near: '.*experts.down_proj'"):
        optx.attach(moe(), LoRA(rank=2), ["experts"], exclude=["experts.down_porj"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"layers": 12},
            r"layers has 12, and no targeted .* \[0, 1\] of the 2 in 'encoder.layers', \[0",
        ),
        ({"layers": [0, -13]}, r"layers has -13, and no"),
        (
            {"layers": 3, "targets": "encoder.*attn"},
            r"layers has 3, .* of the 2 in 'encoder.layers'\.",
        ),
        (
            {"layers": 0, "targets": "embed"},
            r"none of the targeted .* numbered layer, as 'embed'",
        ),
        ({"layers": []}, r"layers is \[\], which is no layer"),
        ({"layers": range(3, 3)}, r"which is no layer"),
        ({"layers": 0.0}, r"layers is 0\.0; it must be a whole number"),
        ({"layers": True}, r"layers is True; it must be"),
        ({"layers": "0"}, r"layers is '0'; it must be"),
        ({"layers": [0, None]}, r"it must be a whole number, a range or a list"),
        ({"exclude": "lm_head"}, r"exclude has 'lm_head', which matches nothing that is targeted\. Near"),
        ({"exclude": ["attn", "layers"]}, r"exclude has 'layers', which matches nothing that is targeted"),
        ({"exclude": [nn.Linear, nn.Conv1d]}, r"exclude has .*Conv1d.*, which matches nothing"),
        ({"exclude": "("}, r"exclude='\(' is not a regular expression"),
        ({"exclude": 3}, r"exclude is a int; it must be a regex"),
        ({"exclude": ".*"}, r"exclude='\.\*' leave nothing to serve of 'embed', .* \(29 in all\)"),
        ({"layers": 0, "exclude": r".*\.0\.(attn|exp.*)"}, r"leave nothing to serve"),
    ],
)
def test_what_has_no_effect_is_an_error(options: dict[str, Any], why: str) -> None:
    model = Deep()
    targets = options.pop("targets", nn.Linear)
    with pytest.raises(TargetError, match=why):
        optx.attach(model, LoRA(rank=2), targets, **options)
    assert not any("optx" in name for name, _ in model.named_modules())


def test_every_member_of_a_mix_is_narrowed(tmp_path: Path) -> None:
    model = llama()
    handle = optx.attach(model, optx.MAM(prefix=2, rank=2), layers=0)
    assert {one.path.split(".")[2] for one in handle.served} == {"0"}
    handle.remove()
    with pytest.raises(TargetError, match=r"leave nothing to serve of 'model.layers.0.mlp'"):
        optx.attach(model, optx.MAM(prefix=2, rank=2), exclude=".*mlp")
    moved(model, LoRA(rank=2)).save(tmp_path)
    with pytest.raises(optx.OptxError, match=r"says itself which modules .* leave layers and exclude"):
        optx.attach(llama(), tmp_path, layers=0)


def test_gpt2s_layers_have_no_module_above_their_stack() -> None:
    assert served(gpt2().transformer, "h.*c_attn", layers=-1) == ["h.1.attn.c_attn"]
