"""What trains beside an attached model: flags, modules trained whole, half precision, state dicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from injections import assert_same, move, snapshot
from plain_mlp import mlp, run_mlp

import optx
from optx import LoRA

# ---- training ---------------------------------------------------------------------------------------------


def test_trainable_only() -> None:
    model = mlp()
    model[4].weight.requires_grad_(False)  # type: ignore[union-attr]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    first = optx.attach(model, LoRA(rank=2), targets="0")
    second = optx.attach(model, optx.BitFit(), targets="2")
    optx.trainable_only(model, first, second, also="4")
    on = {name for name, p in model.named_parameters() if p.requires_grad}
    assert on == {"0.optx.lora.A", "0.optx.lora.B", "2.optx.bitfit.delta", "4.weight", "4.bias"}
    first.remove()
    assert not model[0].weight.requires_grad  # type: ignore[union-attr]
    second.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_trainable_only_restores_at_once() -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    with optx.trainable_only(model, handle):
        assert not model[4].weight.requires_grad  # type: ignore[union-attr]
    assert model[4].weight.requires_grad  # type: ignore[union-attr]


def test_trainable_only_refuses() -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    with pytest.raises(optx.OptxError, match="no handle is given"):
        optx.trainable_only(model)
    with pytest.raises(optx.OptxError, match=r"also='5' matches no module\. Near"):
        optx.trainable_only(model, handle, also="5")
    with pytest.raises(optx.OptxError, match="is not attached to this model"):
        optx.trainable_only(mlp(), handle)
    handle.remove()
    with pytest.raises(optx.OptxError, match="removed> is not attached"):
        optx.trainable_only(model, handle)


def test_modules_to_save_are_trained_whole_and_given_back() -> None:
    model = mlp()
    before = snapshot(model)
    handle = optx.attach(model, LoRA(rank=2), targets="0", modules_to_save=["4"])
    optx.trainable_only(model, handle)
    opt = torch.optim.SGD(handle.parameters(), lr=0.1)
    model(torch.ones(3, 6)).sum().backward()
    opt.step()
    opt.zero_grad()
    trained = run_mlp(model)
    assert not torch.equal(model[4].weight, before["state"]["4.weight"])  # type: ignore[arg-type]
    state = {key: t.clone() for key, t in handle.state_dict().items()}
    assert {"4.weight", "4.bias"} < set(state)
    handle.remove()
    assert_same(model, before)
    again = optx.attach(model, LoRA(rank=2), targets="0", modules_to_save=["4"])
    again.load_state_dict(state)
    assert torch.equal(run_mlp(model), trained)
    with pytest.raises(optx.TargetError, match=r"modules_to_save has '7', no module\. Near"):
        optx.attach(mlp(), LoRA(rank=2), targets="0", modules_to_save=["7"])
    with pytest.raises(optx.TargetError, match="every target is in modules_to_save"):
        optx.attach(mlp(), LoRA(rank=2), targets="0", modules_to_save=["0"])


def test_half_precision_bases_get_float32_adapters() -> None:
    model = mlp().to(torch.bfloat16)
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    output = model(torch.ones(3, 6, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.parameters())


# ---- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("0.lora_A.weight"), r"'0\.lora_A\.weight' is missing"),
        (
            lambda state: state.update({"0.lora_C": torch.ones(1)}),
            r"'0\.lora_C' has no place in this model\. Near",
        ),
        (
            lambda state: state.update({"0.lora_A.weight": torch.ones(3, 6)}),
            r"'0\.lora_A\.weight' has shape \(3, 6\), the model needs \(2, 6\)",
        ),
    ],
)
def test_a_wrong_state_dict_changes_nothing(change: Any, says: str) -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    move(handle)
    state = {key: t.clone() + 1 for key, t in handle.state_dict().items()}
    before = snapshot(model)
    change(state)
    with pytest.raises(optx.FileError, match=says):
        handle.load_state_dict(state)
    assert_same(model, before)


def test_part_of_an_adapter_in_a_checkpoint_is_an_error() -> None:
    model = mlp()
    optx.attach(model, LoRA(rank=2), targets="0")
    state = model.state_dict()
    del state["0.optx.lora.A"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.optx\.lora\.A"):
        model.load_state_dict(state)
