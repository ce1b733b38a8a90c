"""SAF and MESA when a training goes back, copies, replaces weights, or writes them past torch."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def at(saf: optx.SAF, epoch: int, *rows: list[float], index: Any = None) -> float:
    saf.set_epoch(epoch)
    z = torch.tensor(rows, requires_grad=True)
    return saf(z, range(len(rows)) if index is None else index).item()


def short(**options: Any) -> optx.SAF:
    return optx.SAF(2, lookback=1, start_epoch=0, **options)


# ---- SAF ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:SAF. in epoch 1 ")  # of a sample left out, on purpose
def test_an_epoch_begun_again_is_no_mistake() -> None:
    """After a crash: without a warning, and without what the lost course recorded."""
    saf = short()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in (0, 1, 2, 0, 1):
            at(saf, epoch, [1.0, 0.0], [0.0, 1.0])
    saf.set_epoch(0)
    assert saf.report()["recorded"] == 0
    at(saf, 0, [1.0, 0.0])
    at(saf, 1, [1.0, 0.0])  # the second sample is not seen on this course
    assert at(saf, 2, [5.0, 0.0], index=[1]) == 0


def again(how: str, thing: Any) -> Any:
    return copy.deepcopy(thing) if how == "deepcopy" else pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_saf_has_a_record_of_its_own(how: str) -> None:
    saf = short()
    at(saf, 0, [1.0, 0.0], [0.0, 1.0])
    other = again(how, saf)
    at(other, 1, [1.0, 0.0], [0.0, 1.0])
    assert other.state_dict()["record"]["tags"].tolist() == [[1, 1]]
    assert saf.state_dict()["record"]["tags"].tolist() == [[0, 0]]
    resumed = short()
    resumed.load_state_dict(other.state_dict())
    assert at(resumed, 2, [3.0, 0.0], [0.0, 1.0]) == at(other, 2, [3.0, 0.0], [0.0, 1.0]) > 0


def test_the_temperature_of_a_record_with_top_k_stays() -> None:
    saf, whole = short(top_k=1), short()
    for one in (saf, whole):
        at(one, 0, [3.0, 0.0, 1.0], [1.0, 2.0, 3.0])
        one.tau = 1.0
    assert at(whole, 1, [3.0, 0.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(optx.OptxError, match=r"tau is 1.0 now and was 5.0 when SAF was made"):
        at(saf, 1, [3.0, 0.0, 1.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: r.pop("tags"), "record is not whole"),
        (lambda r: r.pop("audit"), "record is not whole"),
        (lambda r: r.update(values=torch.zeros(3)), "record's values do not have the shape"),
        (lambda r: r.update(values=None), "record's values do not have the shape"),
        (lambda r: r.update(classes=torch.zeros(3)), "record's classes do not have the shape"),
        (lambda r: r.update(tags=r["tags"].float() + 0.5), "record's tags do not have the shape and dtype"),
    ],
)
def test_a_damaged_state_changes_nothing(damage: Callable[[dict[str, Any]], Any], words: str) -> None:
    saf = short()
    at(saf, 0, [1.0, 0.0], [0.0, 1.0])
    state = copy.deepcopy(saf.state_dict())
    damage(state["record"])
    with pytest.raises(optx.FileError, match=words):
        saf.load_state_dict(state)
    assert at(saf, 1, [3.0, 0.0], [0.0, 1.0]) > 0


def test_a_loss_within_a_compiled_function() -> None:
    """It runs as it is, between two graphs; what dynamo would warn of is an error here."""
    model = net()
    losses: list[list[float]] = []
    for compiled in (False, True):
        saf, mesa = optx.SAF(5, lookback=1, start_epoch=0), optx.MESA(model, start_epoch=0)

        def loss(x: Tensor, index: Tensor, saf: optx.SAF = saf, mesa: optx.MESA = mesa) -> Tensor:
            z = model(x)
            return z.square().mean() + saf(z, index) + mesa(z, x)

        run = torch.compile(loss, backend="aot_eager") if compiled else loss
        losses.append([])
        for epoch in range(3):
            saf.set_epoch(epoch)
            mesa.set_epoch(epoch)
            losses[-1].append(run(X + epoch, torch.arange(5)).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("options", [{"weight": float("inf")}, {"tau": float("inf")}, {"tau": float("nan")}])
def test_options_are_finite(options: dict[str, Any]) -> None:
    for make in (lambda: optx.SAF(2, **options), lambda: optx.MESA(net(), **options)):
        with pytest.raises(optx.OptxError, match=f"{next(iter(options))} is"):
            make()


# ---- MESA -----------------------------------------------------------------------------------------------


def test_frozen_parameters_that_are_replaced_are_shared_anew() -> None:
    model = net()
    model[0].requires_grad_(False)
    mesa = optx.MESA(model, start_epoch=0)
    mesa.set_epoch(1)
    assert mesa(model(X), X).item() == 0
    state = {"0.weight": torch.randn(6, 4), "0.bias": torch.randn(6)}
    model.load_state_dict(state, strict=False, assign=True)
    model[0].requires_grad_(False)
    mesa.set_epoch(2)
    assert mesa(model(X), X).item() == 0
    assert mesa.ema[0].weight is model[0].weight
    assert mesa.ema[0].bias is model[0].bias


def test_steps_that_nobody_notices() -> None:
    """A loop of its own that writes ``p.data``."""
    model = net()
    mesa = optx.MESA(model, beta=0.5, start_epoch=0)
    mesa.set_epoch(1)
    z = model(X)
    mesa(z, X)
    mesa(z, X)  # of one step's micro-batches
    for p in model.parameters():
        p.data.mul_(0.5)
    with pytest.raises(optx.OptxError, match=r"call mesa.stepped\(\) after each step"):
        mesa(z, X)
    for _ in range(2):  # the second call is of the same step
        mesa.stepped() if mesa.state_dict()["steps"] == 1 else None
        assert mesa(model(X), X).item() > 0
        torch.testing.assert_close(mesa.ema[0].weight, 1.5 * model[0].weight)


def test_there_is_no_average_to_swap_before_the_first_call() -> None:
    """The copy has the weights that the model had when MESA was made, before it was loaded perhaps."""
    model = net()
    mesa = optx.MESA(model)
    with pytest.raises(optx.OptxError, match="no average before the first call"), mesa.swap_ema():
        pass
    mesa.set_epoch(0)
    mesa(model(X), X)
    with mesa.swap_ema():
        assert torch.equal(model[0].weight, mesa.ema[0].weight)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_mesa_is_told_of_steps(how: str) -> None:
    """torch's fused optimizers do not count their writes: a copy without the hook would miss them."""
    model, mesa = again(how, (m := net(), optx.MESA(m, beta=0.5, start_epoch=0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    mesa.set_epoch(1)
    for _ in range(3):
        z = model(X)
        (z.square().mean() + mesa(z, X)).backward()
        optimizer.step()
    assert mesa.state_dict()["steps"] == 3
    file = io.BytesIO()
    torch.save(mesa.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["steps"] == 3


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_in_the_place_of_logits(grad: bool) -> None:
    mesa, saf = optx.MESA(net()), optx.SAF(5)
    with torch.set_grad_enabled(grad):
        for call in (lambda: mesa({"logits": X}, X), lambda: saf({"logits": X}, range(5))):  # type: ignore[arg-type]
            with pytest.raises(optx.OptxError, match="logits are dict; give the tensor"):
                call()


# ---- with_index -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [({"train": [1]}, "a dict has datasets by name"), (optx.with_index([1]), "gives its indices already")],
)
def test_datasets_that_have_no_items_or_indices_already(data: Any, words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        optx.with_index(data)
