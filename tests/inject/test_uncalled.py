"""Weights used without a call of their module: cases weight_without_call.py and encoder_fast_path.py."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from injections import llama, move, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import optx
from optx.inject._uncalled import Watch, reader_of


class Block(nn.Module):
    """A linear module that is called, and one that is used in some other way."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.used = nn.Linear(6, 6), nn.Linear(6, 6)

    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.used.weight, self.used.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(torch.tanh(self.called(x)))


def helper(x: Tensor, module: nn.Linear) -> Tensor:
    return x @ module.weight.t()


class ByAlias(Block):
    def use(self, x: Tensor) -> Tensor:
        one = self.used
        return F.linear(x, one.weight, one.bias)


class ByHelper(Block):
    def use(self, x: Tensor) -> Tensor:
        return helper(x, self.used)


class OnSomePath(Block):
    """As Mamba's projections: a fused path uses the weight, another one calls the module."""

    fused = True

    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.used.weight) if self.fused else self.used(x)


class Both(Block):
    def use(self, x: Tensor) -> Tensor:
        return self.used(x) + F.linear(x, self.used.weight)


class Asks(Block):
    """What is asked of a weight is no use of it."""

    def use(self, x: Tensor) -> Tensor:
        if self.used.bias is not None and isinstance(self.used.weight, Tensor) and self.used.weight.ndim == 2:
            x = x.to(self.used.weight.dtype).to(self.used.weight.device)
        return self.used(x + x.new_zeros(self.used.weight.shape[0]) + torch.zeros_like(self.used.bias))


def stack(kind: type[Block]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(), nn.ModuleList([nn.Linear(6, 6)])[0])


def looks(model: nn.Module) -> int:
    """How many hooks wait for the first call."""
    hooks = (
        h for one in model.modules() for h in (*one._forward_pre_hooks.values(), *one._forward_hooks.values())
    )
    return sum(isinstance(getattr(hook, "__self__", None), Watch) for hook in hooks)


@pytest.mark.parametrize("injection", [optx.LoRA(rank=2), optx.SVFit(rank=2), optx.BitFit(), optx.IA3(())])
def test_what_its_source_shows_is_refused_before_anything_changes(injection: optx.Injection) -> None:
    model = stack(Block)
    keys = list(model.state_dict())
    with pytest.raises(optx.TargetError, match=r"'0\.used' is in a Block, which uses its weight without"):
        optx.attach(model, injection, targets=r"0\.\w+")
    assert list(model.state_dict()) == keys
    optx.attach(model, injection, targets=r"0\.called")


@pytest.mark.parametrize("kind", [ByAlias, ByHelper, OnSomePath])
def test_what_the_first_call_shows_is_refused_in_every_call(kind: type[Block]) -> None:
    model, x = stack(kind), torch.randn(2, 6)
    base = model(x)
    handle = optx.attach(model, optx.LoRA(rank=2), targets=r"0\.\w+")
    for _ in range(2):
        with pytest.raises(optx.TargetError, match=r"lora on '0\.used' did not act: in this call of a"):
            model(x)
    with pytest.raises(optx.TargetError, match=r"lora on 'used' did not act: in this call of a \w+"):
        model[0](x)
    handle.remove()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("kind", [Asks, OnSomePath])
def test_where_it_is_called_nothing_is_said_and_nothing_stays(kind: type[Block], monkeypatch: Any) -> None:
    monkeypatch.setattr(OnSomePath, "fused", False)
    model, x = stack(kind), torch.randn(2, 6)
    optx.attach(model, optx.LoRA(rank=2), targets=r"0\.\w+")
    assert looks(model) > 0
    model(x)
    assert looks(model) == 0


def test_what_parts_do_with_a_weight_is_no_use_of_it() -> None:
    model = stack(Block)
    for name in ("one", "two"):
        optx.attach(model, optx.LoRA(rank=2, dora=True), targets=r"0\.called", name=name)
    model(torch.randn(2, 6))
    assert looks(model) == 0


def test_a_second_use_beside_the_call_is_warned_of() -> None:
    model = stack(Both)
    optx.attach(model, optx.LoRA(rank=2), targets=r"0\.used")
    with pytest.warns(
        UserWarning, match=r"acts where the module is called, but this call of a Sequential has"
    ):
        model(torch.randn(2, 6))


def test_a_tied_head_is_a_call_of_its_own() -> None:
    model: Any = llama()
    optx.attach(model, optx.LoRA(rank=2), targets=r".*(embed_tokens|lm_head)")
    model(tokens())


def test_an_error_in_the_call_is_the_callers() -> None:
    model = stack(ByAlias)
    handle = optx.attach(model, optx.LoRA(rank=2), targets=r"0\.called")
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 5))
    model(torch.randn(2, 6))
    handle.remove()
    assert torch._C._len_torch_function_stack() == 0


def test_a_copy_looks_for_itself_and_a_dropped_model_is_gone() -> None:
    model = stack(ByAlias)
    optx.attach(model, optx.LoRA(rank=2), targets=r"0\.\w+")
    other = copy.deepcopy(model)
    for one in (model, other):
        with pytest.raises(optx.TargetError, match="did not act"):
            one(torch.randn(2, 6))
    gone = weakref.ref(model[0])
    gc.disable()
    try:
        del model, one
        other = None
        assert gone() is None
    finally:
        gc.enable()


def test_mamba() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config).eval()
    for name in ("conv1d", "dt_proj"):
        with pytest.raises(optx.TargetError, match=rf"'backbone\.layers\.0\.mixer\.{name}' is in a Mamba"):
            optx.attach(model, optx.LoRA(rank=2), targets=rf".*{name}")
    with pytest.raises(optx.TargetError, match="uses its weight without calling it"):
        optx.attach(model, optx.BitFit())
    base = model(tokens()).logits
    move(optx.attach(model, optx.LoRA(rank=2), targets=r".*(in|x|out)_proj"))
    assert not torch.equal(model(tokens()).logits, base)


def test_classes_without_a_source_are_no_error() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x): return x @ self.fc.weight", space)
    model = space["Hidden"]()
    model.fc = nn.Linear(6, 6)
    assert reader_of(model, "fc") is None
    handle = optx.attach(model, optx.LoRA(rank=2), targets="fc")
    with pytest.raises(optx.TargetError, match="did not act"):
        model(torch.randn(2, 6))
    handle.remove()


# ---- torch's encoder
# -----------------------------------------------------------------------------------------


def encoder(norm: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16) if norm else None).eval()


def padded() -> tuple[Tensor, Tensor]:
    pad = torch.zeros(3, 5, dtype=torch.bool)
    pad[1, 3:] = True
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)), pad


ENCODED: dict[str, tuple[optx.Injection, str | None]] = {
    "LoRA": (optx.LoRA(rank=2), r".*linear[12]"),
    "last": (optx.LoRA(rank=2), r"layers\.1\.linear2"),
    "Aside": (optx.Aside(rank=2), None),
    "IA3": (optx.IA3(), r".*linear2"),
    "adapter": (optx.SequentialAdapter(rank=2), r".*linear2"),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("method", ENCODED)
@torch.no_grad()
def test_an_encoder_with_a_padding_mask(method: str, norm: bool) -> None:
    model, (x, pad) = encoder(norm), padded()
    injection, targets = ENCODED[method]
    base = model(x, src_key_padding_mask=pad)
    float_pad = torch.zeros(3, 5).masked_fill(pad, -torch.inf)
    handle = optx.attach(model, injection, targets=targets)
    second = optx.attach(model, optx.LoRA(rank=1), targets=r".*linear1", name="second")
    for mask in (pad, float_pad):
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), base, rtol=1e-5, atol=1e-5)
    move(handle)
    tuned = model(x, src_key_padding_mask=pad)
    alone = model(x[1:2, :3])  # without what is padding
    torch.testing.assert_close(tuned[1:2, :3], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tuned, base, atol=1e-3)
    handle.remove()
    assert not model.use_nested_tensor
    second.remove()
    assert model.use_nested_tensor
    assert torch.equal(model(x, src_key_padding_mask=pad), base)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("injection", [optx.BitFit(), optx.LoRA(rank=2, bias="all")])
def test_biases_that_no_call_adds_are_named(injection: optx.Injection) -> None:
    model, (x, pad) = encoder(), padded()
    targets = None if isinstance(injection, optx.BitFit) else r".*linear1"
    with pytest.warns(UserWarning, match=r"4 biases are left as they are .*in_proj_bias, .*out_proj\.bias"):
        handle = optx.attach(model, injection, targets=targets)
    base = model(x, src_key_padding_mask=pad)
    move(handle)
    assert not torch.allclose(model(x, src_key_padding_mask=pad), base)


def test_biases_of_recurrent_and_parametrized_modules_are_named() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4), "masked": nn.Linear(4, 4)})
    prune.l1_unstructured(model["masked"], "bias", 0.5)
    with pytest.warns(UserWarning, match=r"3 biases .*rnn\.bias_ih_l0, rnn\.bias_hh_l0, masked\.bias_orig"):
        handle = optx.attach(model, optx.BitFit())
    assert [one.path for one in handle.served] == ["fc"]


def test_a_first_call_that_is_traced_is_not_looked_at() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optx.attach(model, optx.LoRA(rank=2), targets="0|1")
    x = torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(model, x)  # pyright: ignore
    torch.testing.assert_close(traced(x), model(x))
