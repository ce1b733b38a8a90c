"""RF8Linear against the same model with rounded weights: calls, gradients, saves, releases."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import assert_same, snapshot
from torch import Tensor, nn

import optx
from optx import MergeError, OptxError, TargetError, rf8
from optx.inject import _rf8_product

BATCHES = (0, 1, 3, _rf8_product.FEW["cpu"], _rf8_product.FEW["cpu"] + 1, 40)


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 50, bias=bias), nn.ReLU(), nn.Linear(50, 9, bias=bias))


def rounded(model: nn.Module) -> Any:
    made = copy.deepcopy(model)
    made.load_state_dict(rf8.unpack(rf8.pack(model)))
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("release", [True, False])
def test_it_computes_with_rounded_weights(release: bool, bias: bool) -> None:
    model = net(bias)
    wanted = rounded(model)
    optx.attach(model, optx.RF8Linear(release=release), targets=nn.Linear)
    for batch in BATCHES:
        x = torch.randn(batch, 70)
        torch.testing.assert_close(model(x), wanted(x), rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 3, 70)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x[0, 0]), wanted(x[0, 0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = net() if dtype == torch.float64 else net().to(dtype)
    wanted = rounded(model).double()
    optx.attach(model, optx.RF8Linear(), targets=nn.Linear)
    model.to(dtype)
    for batch in (2, 30):
        x = torch.randn(batch, 70).to(dtype)
        got = model(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted(x.double()), rtol=0.02, atol=0.02)
    if dtype == torch.bfloat16:
        model.float()
        with torch.autocast("cpu", dtype):
            assert model(torch.randn(2, 70)).dtype == dtype


def test_gradients_flow_to_the_input_and_not_to_weights() -> None:
    model = net()
    wanted = rounded(model)
    handle = optx.attach(model, optx.RF8Linear(), targets=nn.Linear)
    for batch in (2, 30):
        x, y = (torch.randn(batch, 70, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        model(x.requires_grad_()).square().sum().backward()
        wanted(y.requires_grad_()).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
    assert model[0].weight.grad is None
    assert not model[0].weight.requires_grad
    assert model[0].bias.grad is not None
    assert handle.parameters() == []
    handle.remove()
    assert model[0].weight.requires_grad


def test_adapters_train_on_released_weights() -> None:
    model, x = net(), torch.randn(9, 70)
    optx.attach(model, optx.RF8Linear(release=True), targets=nn.Linear)
    y = model(x)
    lora = optx.attach(model, optx.LoRA(rank=2), targets=nn.Linear)
    assert torch.equal(model(x), y)
    for _ in range(2):
        model(x).square().mean().backward()
        with torch.no_grad():
            for p in lora.parameters():
                p -= 0.5 * p.grad  # type: ignore[operator]
    assert not torch.allclose(model(x), y)
    lora.remove()
    assert torch.equal(model(x), y)


def test_remove_and_merge() -> None:
    model = net()
    before, wanted = snapshot(model), rounded(model).state_dict()
    handle = optx.attach(model, optx.RF8Linear(), targets=nn.Linear)
    x = torch.randn(30, 70)
    y = model(x)
    handle.merge()
    assert torch.equal(model[0].weight, wanted["0.weight"])
    torch.testing.assert_close(model(x), y)
    handle.unmerge()
    with handle.disable():
        assert not torch.equal(model(x), y)
    handle.remove()
    assert_same(model, before)
    optx.attach(model, optx.RF8Linear(), targets=nn.Linear).merge_and_unload()
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())


def test_an_adapter_merges_after_it() -> None:
    model = net()
    base = rounded(model)[0].weight.detach()
    handle = optx.attach(model, optx.RF8Linear(), targets="0")
    lora = optx.attach(model, optx.LoRA(rank=2), targets="0")
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_()
    x = torch.randn(9, 70)
    y = model(x)
    with pytest.raises(MergeError, match="'rf8' acts on '0' too and is not merged"):
        lora.merge()  # what computes with bytes would not see it
    handle.merge()
    lora.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert float((model[0].weight - base).detach().norm()) > 1
    lora.unmerge()
    assert torch.equal(model[0].weight, base)
    handle.unmerge()
    torch.testing.assert_close(model(x), y)


def test_a_released_model_keeps_keys_saves_and_loads(tmp_path: Path) -> None:
    model, other = net(), net()
    wanted = rounded(model).state_dict()
    with torch.no_grad():
        other[0].weight.mul_(3)
    handle = optx.attach(model, optx.RF8Linear(release=True), targets=nn.Linear)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    x = torch.randn(2, 70)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    handle.save(tmp_path / "out")
    model.load_state_dict(other.state_dict())  # strict, of the bare model: packed anew
    torch.testing.assert_close(model(x), rounded(other)(x))
    assert model[0].weight.numel() == 0
    model.load_state_dict(state)
    assert torch.equal(model(x), y)
    fresh = net()
    again = optx.attach(fresh, tmp_path / "out")
    assert torch.equal(fresh(x), y)
    assert again.injection == optx.RF8Linear(release=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict({**other.state_dict(), "0.weight": torch.zeros(3, 3)})
    with pytest.warns(UserWarning, match="the 2 weights that were released have RF8's numbers now"):
        handle.remove()
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())
    assert list(model.state_dict()) == list(wanted)


def test_a_released_weight_is_a_byte() -> None:
    model = nn.Sequential(nn.Linear(600, 500), nn.Linear(500, 400, bias=False))
    numbers = 600 * 500 + 500 * 400

    def resident() -> int:
        gc.collect()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
        return sum(held.values())

    before = resident()
    handle = optx.attach(model, optx.RF8Linear(release=True), targets=nn.Linear)
    assert (before, resident()) == (4 * (numbers + 500), numbers + 4 * 500 + 2)
    assert "300,001 bytes" in str(handle.report())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.long
def test_the_compiler_reads_it() -> None:
    model = net()
    optx.attach(model, optx.RF8Linear(), targets=nn.Linear)
    x = torch.randn(6, 70)
    wanted = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted)


def test_torchs_operations_decode_the_same() -> None:
    for e_max in (-100, -3, 90):
        packed = rf8.Packed(torch.arange(256, dtype=torch.uint8).view(16, 16), e_max)
        made = _rf8_product.decoded(packed.codes, torch.tensor(e_max, dtype=torch.int8), torch.float32)
        assert torch.equal(made, packed.unpack())


def test_copies_and_loads() -> None:
    model = net()
    handle = optx.attach(model, optx.RF8Linear(), targets=nn.Linear)
    x = torch.randn(6, 70)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    handle.load_state_dict({**handle.state_dict(), "0.rf8.e_max": torch.tensor(3, dtype=torch.int8)})
    assert not torch.allclose(model(x), wanted)


@pytest.mark.parametrize(
    ("make", "targets", "said"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 1)),
            "0",
            "serves torch's own Linear modules.*'0' is a Conv2d",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 2).double()),
            "0",
            "the weight of '0' is torch.float64; RF8 packs",
        ),
        (lambda: nn.Sequential(_infinite()), "0", "the weight of '0' has inf among its numbers"),
        (lambda: nn.Sequential(nn.Linear(2, 2, device="meta")), "0", "is on the meta device"),
        (lambda: _tied(), "1", r"1\.weight is tied \(0\.weight, 1\.weight are one tensor\).*release=False"),
    ],
)
def test_mistakes(make: Any, targets: str, said: str) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises((TargetError, OptxError), match=said):
        optx.attach(model, optx.RF8Linear(release=True), targets=targets)
    assert list(model.state_dict()) == keys
    assert all(p.numel() for p in model.parameters())


def _infinite() -> nn.Module:
    made = nn.Linear(2, 2)
    nn.init.constant_(made.weight, torch.inf)
    return made


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def test_what_is_merged_is_not_packed() -> None:
    model = net()
    lora = optx.attach(model, optx.LoRA(rank=2), targets="0")
    lora.merge()
    with pytest.raises(TargetError, match="something is merged into '0'"):
        optx.attach(model, optx.RF8Linear(), targets="0")


def test_the_optimizer_follows_it() -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters())
    handle = optx.attach(model, optx.RF8Linear(), targets=nn.Linear)
    wrapped = optx.wrap(opt, handle)
    held = {id(p) for group in wrapped.param_groups for p in group["params"]}
    assert id(model[0].weight) not in held
    assert id(model[0].bias) in held
