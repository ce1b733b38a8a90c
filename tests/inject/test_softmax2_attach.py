"""Softmax2: which calls are served, what comes back, and what is refused by its class's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aside_models import gpt2, t5
from injections import eager, llama, run, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx import _softmax_rows
from optx._errors import OptxError, TargetError


class Counted:
    """How often rows were summed in two passes, by their lengths."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        softmax = _softmax_rows.softmax

        def counted(x: Tensor) -> Tensor:
            self.lengths.append(x.shape[-1])
            return softmax(x)

        monkeypatch.setattr(_softmax_rows, "softmax", counted)

    def taken(self) -> list[int]:
        found, self.lengths = self.lengths, []
        return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


class Gate(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


FORMS = [
    lambda x: torch.softmax(x, 1),
    lambda x: x.softmax(dim=1),
    lambda x: F.softmax(x, dim=1),
    lambda x: F.softmax(x.bfloat16(), 1, dtype=torch.float32),
    nn.Softmax(1),
    lambda x: nn.Softmax2d()(x[..., None, None]).flatten(1),
]


@pytest.mark.parametrize("call", FORMS)
def test_every_form_of_the_call(call: Any, counted: Counted) -> None:
    model = nn.Sequential(Gate(call))
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = model(x)
    handle = optx.attach(model, optx.Softmax2(), targets="0")
    found = model(x)
    assert counted.taken() == [9]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    weights = torch.linspace(-1, 1, 9)
    grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    handle.disable()
    assert torch.equal(model(x), wanted)
    handle.enable()
    handle.remove()
    assert torch.equal(model(x), wanted)
    assert counted.taken() == []
    assert "forward" not in vars(model[0])


def test_softmax_modules_by_default_and_short_rows(counted: Counted) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 3), nn.Softmax(-1))
    x = torch.randn(2, 4)
    wanted = model(x)
    handle = optx.attach(model, optx.Softmax2(min_row=5))
    torch.testing.assert_close(model(x), wanted)
    assert counted.taken() == [6]
    assert [(row.module, row.note) for row in handle.report().rows] == [
        ("1", "rows of 5 or more"),
        ("3", "rows of 5 or more"),
    ]
    assert not list(handle.parameters())
    assert not handle.state_dict()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    assert counted.taken() == [6]


def test_attention_that_is_written_out(counted: Counted) -> None:
    model: Any = eager()
    wanted = run(model)
    handle = optx.attach(model, optx.Softmax2(), targets=r".*\.self_attn")
    torch.testing.assert_close(run(model), wanted, rtol=1e-5, atol=1e-6)
    assert counted.taken() == [tokens().shape[1]] * 2
    model.train()
    run(model).sum().backward()
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad is not None
    model.set_attn_implementation("sdpa")
    with pytest.raises(TargetError, match=r"self_attn' \(LlamaAttention\).*scaled_dot_product_attention"):
        run(model)
    handle.remove()
    model.set_attn_implementation("eager")
    assert torch.equal(run(model.eval()), wanted)


@pytest.mark.parametrize(("make", "targets"), [(gpt2, r".*\.attn"), (t5, r".*Attention")])
def test_generating_is_what_it_was(make: Any, targets: str, counted: Counted) -> None:
    """GPT-2 and T5, whose decoder adds position biases and looks at an encoder: padding, cache, beams."""
    model: Any = make()
    model.set_attn_implementation("eager")
    model.double()
    mask = torch.ones_like(tokens())
    mask[0, :2] = 0
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    options: Any = {
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ways = ({"use_cache": True}, {"use_cache": False}, {"num_beams": 2})
    wanted = [model.generate(**inputs, **options, do_sample=False, **way) for way in ways]
    assert not counted.taken()
    with optx.attach(model, optx.Softmax2(), targets):
        found = [model.generate(**inputs, **options, do_sample=False, **way) for way in ways]
    assert counted.taken()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-10, atol=1e-10)


def test_refused_at_attach() -> None:
    for model, targets, words in (
        (llama(1), r".*self_attn", "LlamaAttention with attn_implementation='sdpa'"),
        (llama(1), None, "LlamaForCausalLM has none"),
        (nn.Sequential(nn.MultiheadAttention(4, 1)), "0", "'0' is a MultiheadAttention, whose softmax"),
        (nn.Sequential(nn.LogSoftmax(1)), "0", "'0' is a LogSoftmax"),
        (
            nn.Sequential(nn.Linear(4, 4)),
            "0",
            "serves modules that call softmax; '0' is a Linear, which does not",
        ),
    ):
        with pytest.raises(TargetError, match=words):
            optx.attach(model, optx.Softmax2(), targets=targets)
    with pytest.raises(OptxError, match="min_row is 0"):
        optx.Softmax2(min_row=0)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Gate(torch.relu), r"'0' \(Gate\) did nothing"),
        (
            nn.TransformerEncoderLayer(4, 1, 4).train(),
            "TransformerEncoderLayer.*multi_head_attention_forward",
        ),
        (Gate(lambda x: F.scaled_dot_product_attention(x, x, x).softmax(-1)), "Gate.*scaled_dot_product"),
    ],
)
def test_refused_at_the_first_call(module: nn.Module, words: str) -> None:
    model = nn.Sequential(module)
    optx.attach(model, optx.Softmax2(), targets="0")
    with pytest.raises(TargetError, match=words):
        model(torch.randn(3, 2, 4))
