"""What someone is told who gives `optx.KeepMask` the wrong thing, or gives it to the wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import optx


def pruned() -> tuple[nn.Module, optx.Masks]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    return model, optx.prune(model, optx.Magnitude(0.5), targets="0", progress=False)


def test_masks_of_another_model_object_say_what_to_pass() -> None:
    first, masks = pruned()
    again = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    again.load_state_dict(first.state_dict())
    with pytest.raises(optx.TransformError, match="for another one, pass model=model"):
        optx.wrap(torch.optim.SGD(again.parameters(), lr=0.1), optx.KeepMask(masks))
    wrapped = optx.wrap(torch.optim.SGD(again.parameters(), lr=0.1), optx.KeepMask(masks, model=again))
    assert wrapped.keep_mask.current() == masks


def test_names_that_are_known_are_not_blamed() -> None:
    model, masks = pruned()
    base = torch.optim.SGD([{"params": [*model.named_parameters()], "keep_mask": False}], lr=0.1)
    with pytest.raises(optx.TransformError, match=r"nothing to keep\.$"):
        optx.wrap(base, optx.KeepMask(masks))


@pytest.mark.parametrize("make", [optx.KeepMask, lambda masks: optx.Perp(adapter="mask", masks=masks)])
def test_a_path_is_told_how_it_is_loaded(make: Any) -> None:
    with pytest.raises(optx.OptxError, match=r"Of a file: optx.Masks.load\(path\)"):
        make("masks.safetensors")


def test_a_model_is_told_its_argument() -> None:
    with pytest.raises(optx.OptxError, match=r"A model goes in as KeepMask\(model=model\)"):
        optx.KeepMask(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_a_transform_that_is_attached_is_sent_to_wrap() -> None:
    model, masks = pruned()
    with pytest.raises(optx.OptxError, match=r"KeepMask goes around an optimizer: optx.wrap"):
        optx.attach(model, optx.KeepMask(masks))  # pyright: ignore[reportArgumentType]
    with pytest.raises(optx.OptxError, match=r"or a folder\.$"):
        optx.attach(model, 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("fused", [True, False])
def test_dense_weights_that_come_between_two_steps_are_not_pruned_in_silence(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And weights are looked at only where somebody wrote into them."""
    model = nn.Linear(16, 8)
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    masks = optx.prune(model, optx.Magnitude(0.5), targets="", progress=False)
    opt = optx.wrap(torch.optim.AdamW(model.parameters()), optx.KeepMask(masks), fused=fused)
    looked: list[int] = []
    check = optx.KeepMask._check
    monkeypatch.setattr(optx.KeepMask, "_check", lambda self, owner: (looked.append(1), check(self, owner)))

    def step() -> None:
        opt.zero_grad()
        model(torch.ones(2, 16)).square().sum().backward()
        opt.step()

    for _ in range(3):
        step()
    assert looked == []
    model.load_state_dict(dense)
    with pytest.raises(optx.OptxError, match="masked weights that are not 0"):
        step()
    assert torch.equal(model.weight, dense["weight"])
    masks.apply_(model)
    step()
    step()
    assert len(looked) == 2
    masks.verify(model)
