"""What a user forgets beside the optimizer, or gives another base: told at the first step, and once."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from width_models import llama

import optx


def gpt2(width: int) -> Any:
    import transformers

    sizes = {"vocab_size": 48, "n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)


def mlp(width: int) -> nn.Module:
    sizes = (8, width), (width, width), (width, 3)
    return nn.Sequential(*(nn.Linear(*size) for size in sizes))


def model_and_shapes(config: Callable[[int], Any], width: int = 64) -> tuple[Any, Any]:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(width))
    return model, optx.scaling.shapes(model, base=config(16), delta=config(32))


def complete(model: Any, shapes: Any, without: str = "") -> None:
    """All that a user does before the optimizer, but one thing."""
    if without != "init_":
        optx.scaling.init_(model, shapes)
    for one in (optx.MuReadout, optx.MuAttention):
        if without != one.__name__:
            optx.attach(model, one(shapes))


def said_in_two_steps(model: Any, shapes: Any, **options: Any) -> list[str]:
    opt = torch.optim.AdamW(model.named_parameters(), lr=3e-3, weight_decay=0.1)
    return said_by(optx.wrap(opt, optx.MuAdamW(shapes, **options)), model)


def said_by(opt: Any, model: Any) -> list[str]:
    ids = torch.arange(12)[None]
    given = {"input_ids": ids} if hasattr(model, "config") else {"input": torch.ones(2, 8)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            output = model(**given)
            (output if isinstance(output, torch.Tensor) else output.logits).square().mean().backward()
            opt.step()
    return [str(one.message) for one in said if "Ignore this if the model does it itself" in str(one.message)]


FORGOTTEN = {
    "MuReadout": r"'lm_head.weight' reads out, .* multiplied by 0.25, which no optx.MuReadout does",
    "MuAttention": r"attn' has heads 32 wide, 8 in the base",
    "init_": "proj.weight' has the size that the model was made with|c_attn.weight' has the size that the",
}


@pytest.mark.parametrize("config", [llama, gpt2])
@pytest.mark.parametrize("forgotten", ["", *FORGOTTEN])
def test_what_is_forgotten_is_named(config: Callable[[int], Any], forgotten: str) -> None:
    model, shapes = model_and_shapes(config)
    complete(model, shapes, forgotten)
    said = said_in_two_steps(model, shapes)
    assert len(said) == bool(forgotten)
    if forgotten:
        (one,) = said
        assert one.startswith("MuAdamW: ")
        assert re.search(FORGOTTEN[forgotten], one)
        assert one.count("before training") == 1  # and nothing else


def test_at_the_base_width_nothing_can_be_forgotten() -> None:
    assert said_in_two_steps(*model_and_shapes(llama, 16)) == []


def test_a_multiplier_of_another_parametrization_or_base_is_named() -> None:
    for given, own in (("mup-table3", "mup"), ("ntk", "mup"), ("mean_field", "ntk"), ("mup", "mup-table3")):
        model = mlp(64)
        shapes = optx.scaling.shapes(model, base=mlp(16))
        optx.scaling.init_(model, shapes, own)
        optx.attach(model, optx.MuReadout(shapes, parametrization=given))
        (said,) = said_in_two_steps(model, shapes, parametrization=own)
        assert "is multiplied by" in said
        assert "the parametrization that the optimizer has" in said
    model = mlp(64)
    shapes, other = (optx.scaling.shapes(model, base=mlp(width)) for width in (16, 32))
    optx.scaling.init_(model, shapes)
    optx.attach(model, optx.MuReadout(other, output_mult=3.0))
    (said,) = said_in_two_steps(model, shapes)
    assert "'2.weight' is multiplied by 0.5, and its learning rate is for 0.25" in said


def test_a_factor_of_hidden_weights_is_missed_too() -> None:
    model = mlp(64)
    shapes = optx.scaling.shapes(model, base=mlp(16))
    optx.scaling.init_(model, shapes, "ntk")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    (said,) = said_by(optx.scaling.mup(opt, shapes, parametrization="ntk"), model)
    assert "'1.weight' is of kind 'matrix'" in said
    assert "multiplied by 0.5" in said


def test_an_output_multiplier_of_ones_own_is_no_fault() -> None:
    model, shapes = model_and_shapes(llama)
    optx.scaling.init_(model, shapes)
    optx.attach(model, optx.MuReadout(shapes, output_mult=4.0))
    optx.attach(model, optx.MuAttention(shapes))
    assert said_in_two_steps(model, shapes) == []


def test_first_weights_or_attention_of_another_base_are_named() -> None:
    import transformers

    model, shapes = model_and_shapes(llama)
    narrower = optx.scaling.shapes(transformers.LlamaForCausalLM(llama(64)), base=llama(32))
    optx.scaling.init_(model, narrower)
    optx.attach(model, optx.MuReadout(shapes))
    optx.attach(model, optx.MuAttention(narrower))
    (said,) = said_in_two_steps(model, shapes)
    assert "no optx.MuAttention of these shapes" in said
    assert "multiplied by 0.707107 for width, and these shapes and this parametrization ask for 0.5" in said


def test_trained_weights_are_not_taken_for_fresh() -> None:
    model, shapes = model_and_shapes(llama)
    complete(model, shapes)
    trained = copy.deepcopy(model.state_dict())
    resumed, shapes = model_and_shapes(llama)
    complete(resumed, shapes, "init_")
    resumed.load_state_dict(trained)
    assert said_in_two_steps(resumed, shapes) == []
