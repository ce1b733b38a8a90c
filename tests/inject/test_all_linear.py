"""``targets="all-linear"`` is PEFT's, over all families; alternatives that match nothing are said."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
from adapter_models import by_peft, llama, outputs
from family_models import BY_LABEL
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import optx
from optx.inject._alternatives import idle
from optx.inject._peft_match import task_of

peft = pytest.importorskip("peft")


def pefts(model: Any, task: str | None) -> set[str]:
    """What PEFT reads the word as, before it goes on to experts that are no modules in transformers 5."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    found: Any = _maybe_include_all_linear_layers(config, model).target_modules
    heads = ("score", "classifier") if task else ()
    return {name for name in found if name.split(".")[0] not in heads}  # which it trains whole


@pytest.mark.parametrize("label", BY_LABEL)
def test_as_in_peft(label: str) -> None:
    model = BY_LABEL[label].make()
    task = task_of(model) if task_of(model) == "SEQ_CLS" else None
    wanted = pefts(model, task)
    with_experts = label in ("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V2", "DeepSeek-V3")
    says = pytest.warns(
        UserWarning, match=r"leaves out 'model\.layers\.\d\.mlp\.experts\.gate_up_proj' and \d"
    )
    if label == "Mamba":  # PEFT adapts it, and the adapter does nothing
        wanted = {path for path in wanted if not path.endswith("dt_proj")}
        says = pytest.warns(UserWarning, match=r"'all-linear' leaves out '.*dt_proj' and 1 more")
    with says if with_experts or label == "Mamba" else nullcontext():
        handle = optx.attach(model, optx.LoRA(rank=8), targets="all-linear")
    assert {one.path for one in handle.served} == wanted
    assert {one.part.rank for one in handle.served} == {8}  # type: ignore[union-attr]
    head = model.get_output_embeddings()
    assert head is None or head not in [one.module for one in handle.served]


def test_of_any_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 1, 1), nn.ModuleDict({"head": nn.Linear(8, 8)}))
    assert [one.path for one in optx.attach(model, optx.FLoRA(rank=2), targets="All-Linear").served] == [
        "0",
        "2.head",
    ]


def test_what_it_finds_is_a_file_for_peft(tmp_path: Any) -> None:
    model = llama()
    adapted = by_peft(llama(), peft.LoraConfig(r=2, target_modules="all-linear"), tmp_path)
    handle = optx.attach(model, optx.LoRA(rank=2, alpha=8), targets="all-linear")
    handle.load(tmp_path)
    assert (outputs(model) - outputs(adapted)).abs().max() < 1e-6


def test_a_rank_that_someone_named_a_module_for_is_checked() -> None:
    model = nn.Sequential(nn.Linear(8, 1))
    with pytest.raises(optx.TargetError, match=r"rank=8 is larger than the weight of '0', \(1, 8\)"):
        optx.attach(model, optx.LoRA(rank=8), targets="0")
    assert len(optx.attach(model, optx.LoRA(rank=8), targets="all-linear")) == 1


# ---- alternatives -------------------------------------------------------------------------------------

PATHS = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj", "head"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r".*(q|v)_proj", []),
        (r".*\.(q_proj|v_porj)", ["v_porj"]),
        (r".*q_proj|.*hed", [".*hed"]),
        (r"layers\.(0|7)\.(q|v)_proj", ["7"]),
        (r"layers\.[0|7]\.(?:q|v)_proj", []),
        (r"layers\.[]|]?[^|]\.(?P<which>q|w)_proj", ["w"]),
        (r"(?!x|y).*", []),
        (r"(?i).*Q_PROJ|.*Z", [".*Z"]),
        (r"(?:l|a|y|e|r|s|\.|\d)+q_proj", []),
        (r"layers\.(0|1)\.\|?(q|v)_proj", []),
        (r"(?:layers\.0\.(q|v)|head|tail)(?:_proj)?", ["tail"]),
        (r"(l)ayers\.(0\.q_proj|\1.*)", [r"\1.*"]),
    ],
)
def test_alternatives_that_match_nothing(pattern: str, found: list[str]) -> None:
    assert idle(pattern, PATHS) == found


@given(
    names=st.lists(
        st.sampled_from(["q_proj", "v_proj", "k_porj", "x|y", "(z", "[a"]), min_size=1, unique=True
    )
)
def test_every_alternative_that_is_left_matches(names: list[str]) -> None:
    pattern = rf".*\.({'|'.join(map(re.escape, names))})"
    assert idle(pattern, PATHS) == [
        re.escape(name) for name in names if len(names) > 1 and name not in ("q_proj", "v_proj")
    ]


def test_they_are_warned_of() -> None:
    """A sibling of the case list_typo.py."""
    with pytest.warns(UserWarning, match=r"has 'v_porj' among its alternatives, .* Near: .*v_proj"):
        handle = optx.attach(llama(), optx.LoRA(rank=2), targets=r".*\.(q_proj|v_porj)")
    assert len(handle) == 2


def test_a_list_with_a_typo_is_refused() -> None:
    """The case list_typo.py."""
    with pytest.raises(
        optx.TargetError, match=r"'v_porj' in its list, which matches no module\. Near: .*v_proj"
    ):
        optx.attach(llama(), optx.LoRA(rank=2), targets=["q_proj", "v_porj"])
