"""Weights that are codes: bitsandbytes, torchao, and classes that nobody has heard of (case quantised.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from injections import move
from torch import Tensor, nn
from torch.nn import functional as F

import optx


class Codes(nn.Linear):
    """Integer codes with a scale per row, of a class that optx knows nothing of."""

    def __init__(self, lin: nn.Linear) -> None:
        super().__init__(lin.in_features, lin.out_features, bias=lin.bias is not None)
        w = lin.weight.detach()
        self.register_buffer("s", w.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((w / self.s).round().to(torch.int8), requires_grad=False)
        if lin.bias is not None:
            self.bias = nn.Parameter(lin.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.s, self.bias)


class Packed(nn.Module):
    """No weight at all: two 4-bit codes to a byte, as GPTQ's, AWQ's and BitNet's modules have."""

    def __init__(self, lin: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = lin.in_features, lin.out_features
        w = lin.weight.detach()
        self.register_buffer("scales", w.abs().amax(1, keepdim=True) / 7)
        codes = (w / self.scales).round().int() + 8
        self.register_buffer("qweight", (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8))
        self.bias = None if lin.bias is None else nn.Parameter(lin.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.qweight // 16, self.qweight % 16], dim=-1).flatten(1).float() - 8
        return F.linear(x, codes * self.scales, self.bias)


def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


def four_bit(kind: str, double: bool) -> Callable[[nn.Linear], nn.Module]:
    def make(lin: nn.Linear) -> nn.Module:
        made = bnb().nn.Linear4bit(
            lin.in_features,
            lin.out_features,
            lin.bias is not None,
            compute_dtype=torch.float32,
            compress_statistics=double,
            quant_type=kind,
        )
        made.load_state_dict(lin.state_dict())
        return made.to("cpu")

    return make


def eight_bit(lin: nn.Linear) -> nn.Module:
    made = bnb().nn.Linear8bitLt(
        lin.in_features, lin.out_features, lin.bias is not None, has_fp16_weights=False
    )
    made.load_state_dict(lin.state_dict())
    return made.to("cpu")


def torchao(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(lin: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(copy.deepcopy(lin))
        quantization.quantize_(model, getattr(quantization, name)(**options))
        return model[0]

    return make


def intx(lin: nn.Linear) -> nn.Module:
    granularity = pytest.importorskip("torchao.quantization.granularity")
    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity.PerGroup(32))(lin)


KNOWN = {
    "nf4": four_bit("nf4", False),
    "nf4, twice": four_bit("nf4", True),
    "fp4": four_bit("fp4", False),
    "int8 of bitsandbytes": eight_bit,
    "int8 of torchao": torchao("Int8WeightOnlyConfig"),
    "int4 of torchao": intx,
}
FOREIGN = {"codes": Codes, "packed": Packed}
ALL = {**KNOWN, **FOREIGN}


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 128, bias=bias)


def data(rows: int = 5) -> Tensor:
    return torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(1))


def net(kind: str, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(ALL[kind](linear(bias)))


def dense(model: nn.Sequential) -> Tensor:
    """The weight that its call uses, found by calling it; in training mode, where nothing is repacked."""
    with torch.no_grad():
        zero = model[0](torch.zeros(1, 64))
        return (model[0](torch.eye(64)) - zero).T


def stored(weight: Any) -> Tensor:
    """The codes themselves."""
    return weight.qdata if hasattr(weight, "qdata") else weight.data


@pytest.mark.parametrize("kind", ALL)
def test_lora_is_the_bases_own_call_and_the_product(kind: str) -> None:
    model, x = net(kind), data()
    before = model(x)
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    part = handle.served[0].part
    assert torch.equal(model(x), before)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    assert part.A.shape == (2, 64)
    move(handle)
    torch.testing.assert_close(model(x), before + part.scale * x @ part.A.T @ part.B.T)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())
    handle.remove()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ALL)
def test_dora_and_svfit_see_the_weight_and_not_its_codes(kind: str) -> None:
    model, x = net(kind), data()
    rough = "of bitsandbytes" in kind  # it computes in half precision
    tolerance = {"rtol": 0.01, "atol": 0.02} if rough else {"rtol": 1e-4, "atol": 1e-5}
    W = dense(model)
    handle = optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")
    part = handle.served[0].part
    torch.testing.assert_close(part.magnitude.detach(), W.norm(dim=1), **tolerance)
    move(handle)
    whole = W + part.scale * part.B @ part.A
    whole = whole * (part.magnitude / whole.norm(dim=1))[:, None]
    torch.testing.assert_close(model(x), F.linear(x, whole, model[0].bias), **tolerance)
    handle.remove()
    handle = optx.attach(model, optx.SVFit(), targets="0")
    part = handle.served[0].part
    torch.testing.assert_close((part.U * part.sigma0) @ part.V, W, **tolerance)


METHODS = {
    "LoRA": lambda: optx.LoRA(rank=4),
    "DoRA": lambda: optx.LoRA(rank=4, dora=True),
    "SVFit": lambda: optx.SVFit(rank=8),
    "FLoRA": lambda: optx.FLoRA(rank=4),
    "IA3": lambda: optx.IA3(feedforward=()),
    "IA3, in": lambda: optx.IA3(feedforward="0"),
    "linear": lambda: optx.HiddenDelta(form="linear", rank=4),
}


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_states_its_error_and_comes_undone(kind: str, method: str) -> None:
    model, x = net(kind), data()
    handle = optx.attach(model, METHODS[method](), targets="0")
    move(handle)
    base, want, exact = model[0].weight, model(x), dense(model)
    codes = stored(base).clone()
    with pytest.warns(UserWarning, match=r"1 quantised weights were rounded .*of the merged weight"):
        handle.merge()
    rounding = handle.rounding["0"]
    assert 0 < rounding.relative < 0.2
    assert rounding.of_change > rounding.relative / 10
    found = dense(model)
    assert abs((found - exact).norm() / exact.norm() - rounding.relative) < 0.01
    assert type(model[0].weight) is type(base)
    assert model[0].weight is not base
    assert (model(x) - want).norm() / want.norm() < 0.2
    model.eval()(x)  # where bitsandbytes packs the new codes for the processor
    model.train()
    handle.unmerge()
    assert handle.rounding == {}
    assert model[0].weight is base
    assert torch.equal(stored(base), codes)
    assert torch.equal(model(x), want)
    handle.remove()


@pytest.mark.parametrize("kind", FOREIGN)
def test_codes_that_nothing_writes_are_not_merged_into(kind: str) -> None:
    model, x = net(kind), data()
    handle = optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")
    move(handle)
    want = model(x)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(
            optx.MergeError, match=rf"merge: the weight of '0' is .*codes of a {kind.title()}"
        ):
            merge()
    assert not handle.merged
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", ["nf4, twice", "int8 of bitsandbytes"])
def test_after_a_call_in_eval_mode_that_packs_the_codes(kind: str) -> None:
    model, x = net(kind).eval(), data()
    W = dense(model.train())
    before = model.eval()(x)
    handle = optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")
    torch.testing.assert_close(handle.served[0].part.magnitude.detach(), W.norm(dim=1), rtol=0.02, atol=0.02)
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)
    with pytest.warns(UserWarning, match="quantised"):
        handle.merge()
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)
    handle.remove()
    assert torch.equal(model(x), before)


def test_merge_and_unload_keeps_codes() -> None:
    model, x = net("nf4"), data()
    handle = optx.attach(model, optx.LoRA(rank=4), targets="0")
    move(handle)
    want = model(x)
    with pytest.warns(UserWarning, match="rounded"):
        bare = handle.merge_and_unload()
    assert type(bare[0]) is bnb().nn.Linear4bit
    assert type(bare[0].weight) is bnb().nn.Params4bit
    assert (bare(x) - want).norm() / want.norm() < 0.2


def test_a_second_merge_starts_from_the_bases_own_codes() -> None:
    """Rounded after each of two merges, the error would grow with every merge."""
    model = net("nf4")
    one, two = (optx.attach(model, optx.LoRA(rank=4), targets="0", name=name) for name in ("one", "two"))
    for seed, handle in enumerate((one, two)):
        move(handle, seed)
    exact = dense(model)
    for handle in (one, two):
        with pytest.warns(UserWarning, match="rounded"):
            handle.merge()
    assert one.rounding == two.rounding
    assert abs((dense(model) - exact).norm() / exact.norm() - one.rounding["0"].relative) < 1e-3
    one.unmerge()
    with pytest.warns(UserWarning, match="rounded"):
        one.merge()
    two.unmerge()
    one.unmerge()
    torch.testing.assert_close(dense(model), exact, rtol=1e-4, atol=1e-5)


def test_bitsandbytes_weights_that_are_not_codes_yet() -> None:
    model = nn.Sequential(bnb().nn.Linear4bit(64, 128, quant_type="nf4"))
    handle = optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")
    torch.testing.assert_close(
        handle.served[0].part.magnitude.detach(), model[0].weight.data.norm(dim=1), rtol=1e-5, atol=1e-6
    )


def test_codes_on_the_meta_device() -> None:
    model = nn.Sequential(Codes(linear())).to("meta")
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    assert all(p.is_meta for p in handle.parameters())
    handle.remove()
    with pytest.raises(optx.TargetError, match=r"0\.weight is on the meta device"):
        optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")


class Squared(Codes):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def test_a_module_of_codes_that_is_not_linear_is_refused_where_its_weight_is_needed() -> None:
    model = nn.Sequential(Squared(linear()))
    with pytest.raises(optx.TargetError, match="is not linear in its input"):
        optx.attach(model, optx.SVFit(), targets="0")
    assert not hasattr(model[0], "optx")


def test_fp8_of_transformers_is_read_by_its_scales() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    made = fp8.FP8Linear(64, 128, block_size=(32, 32))
    with torch.no_grad():
        made.weight.copy_(torch.randn(128, 64).to(made.weight.dtype))
        made.weight_scale_inv.copy_(torch.rand(4, 2) + 0.5)
    scale = made.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
    handle = optx.attach(nn.Sequential(made), optx.LoRA(rank=2, dora=True), targets="0")
    want = (made.weight.float() * scale).norm(dim=1)
    torch.testing.assert_close(handle.served[0].part.magnitude.detach(), want.detach())
    with pytest.raises(optx.MergeError, match="float8_e4m3fn codes of a FP8Linear"):
        handle.merge()
