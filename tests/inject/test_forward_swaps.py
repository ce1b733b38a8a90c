"""Parts that go around a call, while other libraries exchange the module's forward (case "
"forward_replaced.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from injections import llama, move, tokens
from torch import Tensor, nn

import optx

accelerate = pytest.importorskip("accelerate")

AROUND: dict[str, Callable[[], optx.Injection]] = {
    "prefix": lambda: optx.PrefixTuning(length=3),
    "heads": lambda: optx.MultiHeadParallelAdapter(rank=2),
    "highway": lambda: optx.Aside(rank=2),
    "layerwise": lambda: optx.Aside(rank=2, variant="layerwise"),
    "both": lambda: optx.IAA(rank=2, aside=2),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def dispatch(model: Any) -> None:
    spread = {"model": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, spread, main_device="cpu", force_hooks=True)


def undo(model: Any) -> None:
    accelerate.hooks.remove_hook_from_submodules(model)
    accelerate.hooks.remove_hook_from_module(model)


@pytest.mark.parametrize("method", AROUND)
@pytest.mark.parametrize("order", ["attach dispatch undo remove", "attach dispatch remove undo",
                                   "dispatch attach undo remove", "dispatch attach remove undo"])  # fmt: skip
def test_accelerates_hooks_come_and_go(method: str, order: str) -> None:
    model: Any = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # dispatch ties nothing
    base = logits(model)
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    move(optx.attach(expected, AROUND[method]()))
    tuned = logits(expected)
    assert not torch.equal(tuned, base)
    handle: Any = None
    for step in order.split():
        if step == "attach":
            torch.manual_seed(0)
            handle = optx.attach(model, AROUND[method]())
            move(handle)
        elif step == "dispatch":
            dispatch(model)
        elif step == "undo":
            undo(model)
        else:
            handle.remove()
        assert torch.equal(logits(model), base if handle is None or handle.removed else tuned), step
    for module in model.modules():
        own = module.__dict__.get("forward")
        assert own is None or own.__func__ is type(module).forward


def test_another_handle_stays_while_hooks_are_there() -> None:
    model: Any = llama()
    base = logits(model)
    dispatch(model)
    one, two = (optx.attach(model, optx.PrefixTuning(length=3), name=name) for name in ("one", "two"))
    one.remove()
    want = logits(model)
    assert not torch.equal(want, base)
    undo(model)
    assert torch.equal(logits(model), want)
    two.remove()
    assert torch.equal(logits(model), base)


class Wraps:
    """A library that wraps a forward and says nothing of it."""

    def __init__(self, module: nn.Module) -> None:
        inner = module.forward
        module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def test_an_unknown_wrapper_that_calls_the_old_forward() -> None:
    model: Any = llama()
    base = logits(model)
    handle = optx.attach(model, optx.PrefixTuning(length=3))
    want = logits(model)
    for layer in model.model.layers:
        Wraps(layer.self_attn)
    assert torch.equal(logits(model), want)
    handle.remove()
    assert torch.equal(logits(model), base)
    handle = optx.attach(model, optx.PrefixTuning(length=3))
    assert not torch.equal(logits(model), base)
    handle.remove()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("method", ["prefix", "layerwise"])
def test_a_forward_that_drops_the_old_one_is_told(method: str) -> None:
    model: Any = llama()
    base = logits(model)
    handle = optx.attach(model, AROUND[method]())
    served = handle.served[0].module
    served.forward = type(served).forward.__get__(served)  # as someone who kept it from before puts it back
    with pytest.raises(optx.OptxError, match="did not act in this call: the module's forward was replaced"):
        logits(model)
    with handle.disable():
        assert torch.equal(logits(model), base)
    handle.remove()
    assert torch.equal(logits(model), base)
