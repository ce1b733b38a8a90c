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


def net() -> tuple[nn.Sequential, optx.LDLTHandle]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, optx.attach(model, optx.LDLT(L=1.0), targets=["0", "2", "4"])


def test_an_activation_exchanged_later_has_no_certificate() -> None:
    model, handle = net()
    model[1] = nn.LeakyReLU(-50.0)
    with pytest.raises(optx.OptxError, match=r"changed after attach.*behind '0'.*slopes in \[-50\.0, 1\.0\]"):
        handle.certificate()
    model[1] = nn.LeakyReLU(0.1)  # slopes that the weights would have been made otherwise for
    with pytest.raises(optx.OptxError, match="not what it was at attach"):
        handle.certificate()
    model[1] = nn.ReLU()
    assert handle.certificate().holds
    handle.merge()
    assert handle.certificate().holds


@pytest.mark.parametrize("how", ["hook", "pre-hook", "weight_norm"])
def test_a_hook_has_no_certificate(how: str) -> None:
    model, handle = net()
    if how == "hook":
        kept = model[2].register_forward_hook(lambda module, args, output: 50 * output)
    elif how == "pre-hook":
        kept = model[2].register_forward_pre_hook(lambda module, args: (50 * args[0],))
    else:
        torch.nn.utils.weight_norm(model[2])
        kept = None
    with pytest.raises(optx.OptxError, match="'2' has a forward hook"):
        handle.certificate()
    if kept is not None:
        kept.remove()
        assert handle.certificate().holds
