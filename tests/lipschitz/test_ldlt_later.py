"""What is done to a layer after attach, that its certificate does not know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optx


def test_a_weight_parametrized_later_has_no_certificate() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    handle = optx.attach(model, optx.LDLT(L=1.0), targets=["0", "2"])
    assert handle.certificate().holds
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(optx.OptxError, match=r"certificate: 0\.weight has been parametrized after attach"):
        handle.certificate()
