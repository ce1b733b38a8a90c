"""What `optx.attach` serves, by name, type or predicate, and what it refuses, changing nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from injections import assert_same, bert, llama, snapshot
from plain_mlp import mlp
from torch import nn

import optx
from optx import LoRA


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("0|2", ["0", "2"]),
        (nn.Linear, ["0", "2", "4"]),
        ((nn.Linear, nn.Conv2d), ["0", "2", "4"]),
        (["2", "4"], ["2", "4"]),
        (lambda path, module: getattr(module, "in_features", 0) == 6, ["0", "4"]),
    ],
    ids=["regex", "type", "types", "list", "predicate"],
)
def test_targets(targets: Any, paths: list[str]) -> None:
    handle = optx.attach(mlp(), LoRA(rank=2), targets=targets)
    assert [row.module for row in handle.report().rows] == paths


def test_a_list_of_names_matches_as_in_peft() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "xq_proj": nn.Linear(4, 4)})
    model["q_proj"] = nn.Linear(4, 4)
    by_list = optx.attach(model, LoRA(rank=2), targets=["q_proj"])
    assert [row.module for row in by_list.report().rows] == ["a.q_proj", "q_proj"]
    by_regex = optx.attach(model, LoRA(rank=2), targets="q_proj", name="second")
    assert [row.module for row in by_regex.report().rows] == ["q_proj"]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (r".*q_prj", r"no module matches targets='\.\*q_prj'\. Near: '[^']*q_proj'.* in all\)"),
        (nn.Conv2d, r"no module matches .*Conv2d.*The model has .*Linear"),
        ("(", r"targets='\(' is not a regular expression"),
        (3, r"targets is a int; it must be a regex, a module type, a list"),
        ([3], r"targets has 3 in its list"),
        (".*norm", r"LoRA serves .*; 'model.layers.0.input_layernorm' is a LlamaRMSNorm"),
        ({"a": "b"}, r"targets is a dict, but LoRA has no members"),
    ],
)
def test_bad_targets_change_nothing(targets: Any, says: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=says):
        optx.attach(model, LoRA(rank=2), targets=targets)
    assert_same(model, before)


def test_no_defaults_for_an_unknown_model() -> None:
    with pytest.raises(
        optx.TargetError,
        match=r'default targets for Llama.*Sequential is none of them.*targets=, "all-linear"',
    ):
        optx.attach(mlp(), LoRA())


def test_composite_targets_by_member() -> None:
    model = bert()
    handle = optx.attach(model, optx.MAM(prefix=2, rank=2), targets={"ffn": r".*layer\.0\.output"})
    paths = [row.module for row in handle.report().rows]
    assert sum(path.endswith("output") for path in paths) == 1
    assert sum(path.endswith("self") for path in paths) == 2
    with pytest.raises(optx.TargetError, match=r"MAM has no member 'ffm'\. Near: 'ffn'"):
        optx.attach(model, optx.MAM(), targets={"ffm": ".*"}, name="other")
    with pytest.raises(optx.TargetError, match="MAM serves several kinds of modules"):
        optx.attach(model, optx.MAM(), targets=".*", name="other")


def test_rank_larger_than_the_matrix() -> None:
    with pytest.raises(
        optx.TargetError, match=r"rank=7 is larger than the weight of '0', \(8, 6\).*at most 6"
    ):
        optx.attach(mlp(), LoRA(rank=7), targets="0")


def test_inside_multihead_attention_nothing_would_act() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(optx.TargetError, match=r"'self_attn.out_proj' is inside an nn.MultiheadAttention"):
        optx.attach(model, LoRA(rank=2), targets=r".*out_proj")


def test_a_sequential_would_run_what_is_added() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(optx.TargetError, match="'0' is a Sequential"):
        optx.attach(model, optx.ParallelAdapter(rank=2), targets="0")


@pytest.mark.filterwarnings("ignore:.*DataParallel:DeprecationWarning")
def test_wrapped_models_are_refused() -> None:
    with pytest.raises(optx.OptxError, match="a compiled model"):
        optx.attach(torch.compile(mlp(), backend="eager"), LoRA(rank=2), targets="0")  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="DataParallel, which has gathered"):
        optx.attach(nn.DataParallel(mlp()), LoRA(rank=2), targets="0")
    with pytest.raises(optx.OptxError, match="injection is 3; it must be"):
        optx.attach(mlp(), 3, targets="0")  # type: ignore[arg-type]


def test_an_attribute_called_optx_is_not_ours() -> None:
    model = mlp()
    model[0].optx = 3  # type: ignore[assignment]
    with pytest.raises(optx.OptxError, match="'0' has an attribute 'optx' of its own"):
        optx.attach(model, LoRA(rank=2), targets="0")


def test_a_bad_name() -> None:
    for name in ("not a name", "parts"):
        with pytest.raises(optx.OptxError, match="must be a Python identifier"):
            optx.attach(mlp(), LoRA(rank=2), targets="0", name=name)


def test_shared_modules_are_served_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleList([shared, shared])
    assert len(optx.attach(model, LoRA(rank=2), targets=nn.Linear)) == 1


@dataclass(frozen=True)
class Half(optx.Injection):
    """Fails at the second module."""

    name: ClassVar[str] = "halfway"
    role: ClassVar[str] = "linears"
    serves: ClassVar[str] = "Linear modules"

    def part(self, module: nn.Module, path: str) -> optx.Part:
        return Breaks() if path == "2" else optx.LoRA(rank=2).part(module, path)


class Breaks(optx.Part):
    @classmethod
    def overrides(cls, moment: str) -> bool:
        raise ZeroDivisionError


def test_failing_half_way_leaves_nothing() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        optx.attach(model, Half(), targets=nn.Linear)
    assert_same(model, before)
