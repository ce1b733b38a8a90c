"""What SAF and MESA would do in silence, or tell epochs later: each is said where it can first be known."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import optx
from optx._errors import OptxError, ShapeError

LOGITS = torch.randn(4, 3, requires_grad=True)


def saf(**options: Any) -> optx.SAF:
    made = optx.SAF(4, **options)
    made.set_epoch(0)
    return made


def test_probabilities_and_a_single_class_are_refused() -> None:
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    mesa = optx.MESA(model)
    mesa.set_epoch(0)
    with pytest.raises(OptxError, match="sums to 1, as probabilities"):
        saf()(LOGITS.softmax(-1), range(4))
    with pytest.raises(OptxError, match="sums to 1, as probabilities"):
        mesa(model(x).softmax(-1), x)
    with pytest.raises(ShapeError, match="of one class softmax says 1"):
        saf()(LOGITS[:, :1], range(4))
    assert saf()(LOGITS.log_softmax(-1), range(4)) == 0  # as good as logits


@pytest.mark.parametrize(("name", "value"), [("weight", -1.0), ("weight", float("inf")), ("tau", 0.0)])
def test_what_is_set_later_is_looked_at_too(name: str, value: float) -> None:
    for made in (saf(), optx.MESA(nn.Linear(5, 3))):
        before = getattr(made, name)
        with pytest.raises(OptxError, match=f"{name} is"):
            setattr(made, name, value)
        assert getattr(made, name) == before


@pytest.mark.parametrize("index", [None, 3, [0.0, 1.5, 2.0, 3.0], "abcd"])
def test_an_index_that_is_none(index: Any) -> None:
    with pytest.raises(OptxError, match="it must be whole numbers, one a sample, as optx"):
        saf()(LOGITS, index)


@pytest.mark.parametrize("first", [0, 1])
def test_first_epochs_have_no_past_and_no_warning(first: int) -> None:
    made = optx.SAF(4, lookback=3, start_epoch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(first, first + 6):
            made.set_epoch(epoch)
            made(LOGITS, range(4))
    assert made.report()["served"] == 1
    forgetful = optx.SAF(4, lookback=3, start_epoch=2)
    forgetful.set_epoch(8)
    forgetful(LOGITS, range(4))
    with pytest.warns(UserWarning, match="is load_state_dict called"):
        forgetful.set_epoch(9)


def test_mesa_looks_at_its_inputs_in_the_first_call() -> None:
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    mesa = optx.MESA(model, start_epoch=5)
    mesa.set_epoch(0)
    with pytest.raises(ShapeError, match="give mesa the inputs that these logits are of"):
        mesa(model(x), x[:2])
    mesa = optx.MESA(model, start_epoch=5)
    mesa.set_epoch(0)
    calls: list[int] = []
    mesa.ema.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        assert mesa(model(x), x) == 0
    assert calls == [1]


def test_mesa_that_begins_late_says_so() -> None:
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    mesa = optx.MESA(model)
    mesa.set_epoch(3)
    with pytest.warns(UserWarning, match="the average begins in epoch 3.*load_state_dict"):
        mesa(model(x), x)
    resumed = optx.MESA(model)
    resumed.load_state_dict(mesa.state_dict())
    resumed.set_epoch(4)
    resumed(model(x), x)


def test_what_mesa_is_made_of() -> None:
    model: Any = nn.Linear(5, 3)
    with pytest.raises(OptxError, match="it must be the model itself"):
        optx.MESA(model.parameters())
    with pytest.raises(OptxError, match="output is 'logits'; it must be a function"):
        optx.MESA(model, output="logits")  # type: ignore[arg-type]


def test_a_sample_that_others_saw_is_not_compared_with_an_older_epoch() -> None:
    """As in one of several processes with ``gather``: the table has its past, the exact rows do not."""
    torch.manual_seed(0)
    made = optx.SAF(4, lookback=1, start_epoch=0, dtype=torch.float32)
    for epoch in range(4):
        made.set_epoch(epoch)
        rows = (3 * torch.randn(4, 3)).requires_grad_()
        made(rows, range(4))
        if epoch == 2:
            made._audit.rows[0] = 9.0  # type: ignore[index]
            made._audit.epochs[0] = [1] * 4 + [-1] * 4
    assert made.report()["error"] < 1e-5
