"""What MESA refuses, in one sentence each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx._errors import FileError, OptxError, ShapeError


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))


class One(nn.Module):
    """Logits (theta x, 0)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((self.theta * x, 0 * x), -1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"beta": 1.1}, "beta is 1.1; it must be between 0.0 and 1.0"),
        ({"weight": -1}, "weight is -1"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"start_epoch": -1}, "start_epoch is -1"),
    ],
)
def test_options_out_of_range(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptxError, match=re.escape(words)):
        optx.MESA(net(), **given)


class Outer(nn.Module):
    """A forward that is not its own copy's: a hook holds the model's own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        weight = self.inner.weight
        self.inner.register_forward_hook(lambda module, args, out: out + args[0] @ weight.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True))


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x), 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Outer, "computes with weights of the model itself"),
        (lambda: Noisy(5, 4), "draws random numbers in eval mode"),
        (lambda: Odd(5, 4), "returns a tuple without logits; give output="),
    ],
)
def test_models_whose_copy_does_not_do(make: Callable[[], nn.Module], words: str) -> None:
    model, x = make(), torch.randn(3, 5)
    mesa = optx.MESA(model, start_epoch=0)
    mesa.set_epoch(1)
    out = model(x)
    with pytest.raises(OptxError, match=words):
        mesa(out[0] if isinstance(out, tuple) else out, x)
    if isinstance(model, Odd):
        mesa = optx.MESA(model, start_epoch=0, output=lambda out: out[0])
        mesa.set_epoch(1)
        assert mesa(out[0], x) == 0


def test_other_mistakes() -> None:
    model, x = net(), torch.randn(3, 5)
    mesa = optx.MESA(model, start_epoch=0)
    with pytest.raises(OptxError, match="no epoch was set"):
        mesa(model(x), x)
    mesa.set_epoch(1)
    with pytest.raises(OptxError, match="need no gradient"):
        mesa(model(x).detach(), x)
    with pytest.raises(ShapeError, match=r"shape \(2, 4\) and the averaged model gave \(3, 4\)"):
        mesa(model(x)[:2], x)
    optx.attach(model, optx.LoRA(rank=2), targets=nn.Linear)
    with pytest.raises(OptxError, match="parameters changed since MESA was made"):
        mesa.set_epoch(2)
    with pytest.raises(OptxError, match="no parameter that is trained"):
        optx.MESA(net().requires_grad_(False))
    state = optx.MESA(net()).state_dict()
    with pytest.raises(FileError, match=r"'1\.bias', which only one of them has"):
        optx.MESA(nn.Sequential(nn.Linear(5, 8))).load_state_dict(state)
    with pytest.raises(FileError, match=r"'theta' has shape \(2,\) in the state and \(1,\) here"):
        optx.MESA(One()).load_state_dict({**state, "tensors": {"theta": torch.ones(2)}})
    with pytest.raises(FileError, match="none of MESA's"):
        mesa.load_state_dict({"epoch": 1})
