"""Masks on models: found, set and looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optx
from optx import Masks, OptxError


def test_masks_of_another_model_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masks = optx.prune(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), optx.Magnitude())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        OptxError, match=r"masks of another model: this one, a Sequential, has no parameter '2.weight'"
    ):
        masks.apply_(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_of_is_what_was_pruned() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masks = optx.prune(model, optx.Magnitude())
    masks.verify(model)
    assert Masks.of(model) == masks
