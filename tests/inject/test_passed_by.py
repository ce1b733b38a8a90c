"""Modules that something else computes for, without calling what is served in them: hub kernels do."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from expert_models import BOTH, ONE_PARAMETER, moe
from injections import llama, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx import LoRA


def kernel(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Gpt-oss' MLP as a hub's kernel has it: from the weights, without a call of router or experts."""
    flat, router, experts = hidden.flatten(0, 1), self.router, self.experts
    logits = F.linear(flat, router.weight, router.bias)
    best, where = logits.topk(router.top_k)
    scores = torch.zeros_like(logits).scatter(1, where, best.softmax(1))
    gate_up = torch.einsum("th,ehf->etf", flat, experts.gate_up_proj) + experts.gate_up_proj_bias[:, None]
    out = experts._apply_gate(gate_up) @ experts.down_proj + experts.down_proj_bias[:, None]
    return torch.einsum("eth,te->th", out, scores).view_as(hidden), best


def kernelize(model: Any, forward: Any = kernel) -> None:
    """As the package kernels does it."""
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(forward, layer.mlp)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens() % 64).logits


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@ONE_PARAMETER
@pytest.mark.parametrize("targets", [BOTH, ["router"], [*BOTH, "q_proj"]])
@pytest.mark.parametrize("first", [True, False])
def test_a_kernel_that_reads_the_experts_is_told_at_the_first_call(targets: list[str], first: bool) -> None:
    model = moe("GptOss")
    base = logits(model)
    if first:
        kernelize(model)
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
    handle = optx.attach(model, LoRA(rank=2), targets)
    if not first:
        logits(model)
        kernelize(model)
    before = hooks(model)
    for _ in range(2):  # a router's weight is seen by the look at all first calls too
        with pytest.raises(optx.OptxError, match=r"'?lora'? on '.*(experts|router)'.* did not act"):
            logits(model)
    assert hooks(model) <= before
    with handle.disable():
        logits(model)
    handle.remove()
    logits(model)


def test_a_forward_that_calls_what_is_served_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.inject import _passed_by

    model, seen = llama(), list[int]()
    handle = optx.attach(model, LoRA(rank=2), ["gate_proj", "q_proj"])
    want, before = logits(model), hooks(model)
    ends = _passed_by.FirstCall._judge

    def judge(self: Any, *rest: Any) -> None:
        seen.append(1)
        ends(self, *rest)

    monkeypatch.setattr(_passed_by.FirstCall, "_judge", judge)
    kernelize(model, type(model.model.layers[0].mlp).forward)  # the same function is no other
    assert torch.equal(logits(model), want)
    assert not seen
    kernelize(model, lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
    for again in (lambda: model, lambda: model, lambda: copy.deepcopy(model)):
        one = again()
        assert torch.equal(logits(one), want)
        assert hooks(one) == before
    assert len(seen) == len(model.model.layers)
    kernelize(model, lambda self, x: self.down_proj(x @ self.gate_proj.weight.T))
    with pytest.raises(optx.OptxError, match="'gate_proj' of a LlamaMLP did not act"):
        logits(model)
    handle.remove()


def test_an_error_in_such_a_call_is_its_own() -> None:
    model = llama()
    optx.attach(model, LoRA(rank=2), ["gate_proj"])
    before = hooks(model)

    def broken(self: Any, x: Tensor) -> Tensor:
        raise ValueError("no such kernel")

    kernelize(model, broken)
    with pytest.raises(ValueError, match="no such kernel"):
        logits(model)
    assert hooks(model) == before
