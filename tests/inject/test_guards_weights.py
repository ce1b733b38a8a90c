"""What keeps weights that are codes, offloaded, or somebody else's from being read or written amiss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from injections import move
from test_quantised import Codes, Packed, data, dense, eight_bit, four_bit, linear, torchao
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import optx
from optx.inject import _quantised


def test_a_merge_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
    with pytest.raises(optx.MergeError, match="is on the meta device and has no values yet"):
        handle.merge()
    assert not handle.merged


def test_codes_that_are_offloaded_are_not_read() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(Codes(linear()))
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    with pytest.raises(optx.TargetError, match=r"0\.weight is quantised and offloaded, or on the meta"):
        optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")


def test_a_merge_into_shared_codes_leaves_the_other_module() -> None:
    model = nn.Sequential(four_bit("nf4", False)(linear(False)), four_bit("nf4", False)(linear(False)))
    model[1].weight = shared = model[0].weight
    before = model[1](data())
    handle = optx.attach(model, optx.LoRA(rank=4), targets="0")
    move(handle)
    want = dense(model)
    with pytest.warns(UserWarning, match="rounded"):
        handle.merge(untie=True)
    assert (dense(model) - want).norm() < 0.2 * want.norm()
    assert torch.equal(model[1](data()), before)
    assert model[1].weight is shared
    handle.unmerge()
    assert model[0].weight is shared
    assert model[0].quant_state is shared.quant_state


def test_merged_codes_stand_for_numbers_of_the_bases_dtype() -> None:
    model = nn.Sequential(four_bit("nf4", False)(linear(False)))
    kind: Any = type(model[0].weight)
    model[0].weight = kind(linear().weight.data.bfloat16(), False, quant_type="nf4", module=model[0]).to(
        "cpu"
    )
    own = model[0].weight.quant_state.dtype
    assert own is torch.bfloat16
    handle = optx.attach(model, optx.LoRA(rank=4), targets="0")
    move(handle)
    with pytest.warns(UserWarning, match="rounded"):
        handle.merge()
    assert model[0].weight.quant_state.dtype == own


def test_eight_bits_merged_before_and_after_a_call() -> None:
    """The module's first call takes codes and scales from its weight, and keeps them."""
    for called in (False, True):
        model, fresh = (nn.Sequential(eight_bit(linear())) for _ in range(2))
        want = fresh(data())
        if called:
            model(data())
        handle = optx.attach(model, optx.LoRA(rank=4), targets="0")
        move(handle)
        for _ in range(2):
            adapted = model(data()) if called else None
            with pytest.warns(UserWarning, match="rounded"):
                handle.merge()
            merged = model(data())
            assert adapted is None or (merged - adapted).norm() < 0.1 * adapted.norm()
            assert not torch.allclose(merged, want, atol=0.01)
            handle.unmerge()
        handle.remove()
        assert torch.equal(model(data()), want)


def test_blocks_of_a_size_that_nothing_writes_are_refused() -> None:
    torchao_tensor: Any = pytest.importorskip("torchao.quantization").Int8Tensor
    model = nn.Sequential(torchao("Int8WeightOnlyConfig")(linear(False)))
    own: Any = model[0].weight
    pairs = torchao_tensor(own.qdata, own.scale[::2], [2, 64], own.dtype)
    model[0].weight = nn.Parameter(pairs, requires_grad=False)
    handle = optx.attach(model, optx.LoRA(rank=4), targets="0")
    move(handle)
    kept = model[0].weight
    with pytest.raises(optx.MergeError, match="can't be written with these blocks"):
        handle.merge()
    assert model[0].weight is kept
    assert not handle.merged


def test_asking_for_the_kind_of_a_weight_takes_no_step_of_a_spectral_norm() -> None:
    module: Any = parametrizations.spectral_norm(nn.Linear(6, 6)).train()
    u = module.parametrizations.weight[0]._u.clone()
    assert _quantised.kind_of(module) == ""
    assert torch.equal(module.parametrizations.weight[0]._u, u)


class Dropping(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_weight_is_found_by_calls_without_dropout_and_autocast(autocast: bool) -> None:
    model = nn.Sequential(Dropping(linear())).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        handle = optx.attach(model, optx.LoRA(rank=2, dora=True), targets="0")
    assert model[0].training
    want = dense(model.eval()).norm(dim=1)
    torch.testing.assert_close(handle.served[0].part.magnitude.detach(), want, rtol=1e-5, atol=1e-5)


def test_calls_for_a_weight_are_exact_within_autocast() -> None:
    model = nn.Sequential(Packed(linear()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _quantised.by_calling(model[0], "0")
    torch.testing.assert_close(found, dense(model), rtol=1e-6, atol=1e-6)


# ---- whose a module's output is ------------------------------------------------------------------------


class Kept(nn.Linear):
    pass


class Own(nn.Parameter):
    pass


def subclass(model: nn.Sequential) -> None:
    model[0].__class__ = Kept


def own_forward(model: nn.Sequential) -> None:
    model[0].forward = model[0].forward


def own_weight(model: nn.Sequential) -> None:
    model[0].weight.__class__ = Own


def hooked(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda *_: None)


def everywhere(_: nn.Sequential) -> Any:
    return torch.nn.modules.module.register_module_forward_hook(lambda *_: None)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


WHOSE: list[Callable[[nn.Sequential], Any]] = [subclass, own_forward, own_weight, hooked, everywhere]


@pytest.mark.parametrize("change", WHOSE)
def test_an_output_that_somebody_else_may_hold_is_not_the_parts_own(change: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    if change is hooked:
        change(model)
    part = optx.attach(model, optx.LoRA(rank=2), targets="0").served[0].part
    assert part.owns(model[0]) == (change is not hooked)
    around: Any = change(model) if change is not hooked else None
    try:
        assert not part.owns(model[0])
    finally:
        if around is not None:
            around.remove()


@pytest.mark.parametrize("what", ["mode", "class"])
def test_nor_is_that_of_another_forward_or_within_a_mode(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    part = optx.attach(model, optx.LoRA(rank=2), targets="0").served[0].part
    scope: AbstractContextManager[Any] = Mode() if what == "mode" else nullcontext()
    if what == "class":
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    with scope:
        assert not part.owns(model[0])
