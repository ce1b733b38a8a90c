"""Which modules PEFT's configurations mean, by PEFT's own functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from adapter_models import (
    bert,
    gpt2,
    llama,
    peft_talk,
    plain,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from optx.inject._peft_match import kept_whole, targeted

WORDS = ["a", "fc", "xfc", "layers", "h", "0", "1", "12", "q_proj"]
PATHS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)
NAMES = st.lists(PATHS, max_size=3)
REGEXES = st.sampled_from([r".*fc", "q_proj", r".*\.(0|12)\..*", r".*layers\.\d+\.fc", ""])
LAYERS = st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 12), max_size=2))


@settings(max_examples=400)
@given(
    paths=st.lists(PATHS, min_size=1, max_size=6, unique=True),
    wanted=st.one_of(NAMES, REGEXES),
    excluded=st.one_of(st.none(), NAMES, REGEXES),
    whole=st.one_of(st.none(), NAMES),
    layers=LAYERS,
    stack=st.sampled_from([None, [], "layers", ["h", "layers"]]),
)
def test_modules_are_matched_as_peft_matches_them(
    paths: list[str], wanted: Any, excluded: Any, whole: Any, layers: Any, stack: Any
) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = {
        "target_modules": wanted,
        "exclude_modules": excluded,
        "modules_to_save": whole,
        "layers_to_transform": layers,
        "layers_pattern": stack,
    }
    theirs = [
        p for p in paths if check_target_module_exists(SimpleNamespace(**config, target_parameters=None), p)
    ]
    assert targeted(config, nn.Identity(), paths) == theirs


def test_lists_match_the_ends_of_paths_and_strings_whole_paths() -> None:
    paths = ["a.q_proj", "q_proj", "xq_proj"]
    assert targeted({"target_modules": ["q_proj"]}, nn.Identity(), paths) == ["a.q_proj", "q_proj"]
    assert targeted({"target_modules": "q_proj"}, nn.Identity(), paths) == ["q_proj"]


@pytest.mark.parametrize("names", [["norm"], ["head"], ["fc", "conv"], ["1"]])
def test_modules_that_peft_trains_whole(names: list[str]) -> None:
    from peft.utils.other import ModulesToSaveWrapper

    model = plain()
    with peft_talk():
        adapted = peft.get_peft_model(
            copy.deepcopy(model), LoraConfig(target_modules=["emb"], modules_to_save=names)
        )
    wrapped = [
        name.removeprefix("base_model.model.")
        for name, module in adapted.base_model.named_modules(prefix="base_model")
        if isinstance(module, ModulesToSaveWrapper)
    ]
    assert sorted(kept_whole({"modules_to_save": names}, model)) == sorted(wrapped)


@pytest.mark.parametrize("make", [llama, bert, gpt2, plain])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_all_linear_is_pefts(make: Callable[[], Any], task: str | None) -> None:
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    model = make()
    config = LoraConfig(target_modules="all-linear", task_type=task)
    wanted = _maybe_include_all_linear_layers(config, model).target_modules
    names = [name for name, _ in model.named_modules()]
    found = targeted({"target_modules": "all-linear", "task_type": task}, model, names)
    heads = {"classifier", "score"} if task else set()  # those PEFT adds to modules_to_save, so never adapts
    assert set(found) == {path for path in wanted if path not in heads}
