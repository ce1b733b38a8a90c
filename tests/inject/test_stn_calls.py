"""Self-tuning networks: which axis is that of the examples, and models that backward computes again."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stn_loop import batch, mlp, noisy, sgd, train_step, tuned, valid_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import optx

# ---- activation checkpointing ---------------------------------------------------------------------------


class Again(nn.Module):
    """A model of which all but the first layer is computed again in backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.rest(x)
        return checkpoint(self.rest, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def rest(self, x: Tensor) -> Tensor:
        return self.last(self.drop(x.tanh()))


def loss_of(model: nn.Module, stn: optx.SelfTuning, step: int = 0) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(noisy(stn, x)), y)


each_kind = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
each_gate = pytest.mark.parametrize("options", [{}, {"delta": True}, {"shared": True}], ids=str)


@each_kind
@each_gate
def test_what_backward_computes_again_is_the_same(reentrant: bool, options: dict[str, Any]) -> None:
    found: list[list[Tensor | None]] = []
    for kind in (None, reentrant):
        model = Again(kind)
        stn = tuned(model, **options)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in stn.parameters():
                p.normal_(std=0.3)
        with stn.train_batch(8):
            loss_of(model, stn).backward()
        with stn.valid_batch(8):
            loss_of(model, stn, 1).backward()
        found.append([p.grad for p in (*model.parameters(), stn.hparams.raw, stn.hparams.raw_sigma)])
    assert all(one is not None for one in found[0])
    torch.testing.assert_close(found[0], found[1])


@each_kind
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the evaluation
@pytest.mark.parametrize("learn", ["all", "general", "response", "valid"])
@pytest.mark.parametrize("shared", [False, True])
def test_computing_again_outside_of_the_batch_is_refused(reentrant: bool, learn: Any, shared: bool) -> None:
    model = Again(reentrant)
    delta = learn in ("general", "response")
    # Without perturbations only dropout can tell: a layer of "general" computes the same at any time.
    dropout = None if shared and learn != "general" else "drop"
    stn = tuned(model, delta=delta, shared=shared, dropout=dropout)
    with stn.valid_batch(8) if learn == "valid" else stn.train_batch(8, learn=learn):
        loss = loss_of(model, stn)
    with torch.no_grad():
        model(batch(1)[0])  # an evaluation in between does not hide it
    says = r"backward computes the model again.*Call loss\.backward\(\) within the same stn\.train_batch"
    with pytest.raises(optx.OptxError, match=says):
        loss.backward()


@each_kind
def test_computing_again_in_another_batch_is_refused(reentrant: bool) -> None:
    model = Again(reentrant)
    stn = tuned(model, shared=True)
    with stn.train_batch():
        loss = loss_of(model, stn)
    with stn.train_batch(), pytest.raises(optx.OptxError, match="computes the model again"):
        loss.backward()


def test_a_value_that_is_read_again_is_refused_too() -> None:
    """No responding layer is in what is checkpointed, only a strength."""
    model = nn.Sequential(nn.Linear(6, 3))
    stn = tuned(model, dropout=None, shared=True)
    x = torch.randn(8, 6, requires_grad=True)
    with stn.train_batch():
        found: Any = checkpoint(lambda x: x * stn.hparams["noise"].value, x, use_reentrant=True)
    with pytest.raises(optx.OptxError, match="computes the model again"):
        found.sum().backward()


@each_kind
def test_gradients_outside_of_batches_are_as_they_were(reentrant: bool) -> None:
    """At the values in force: before any batch, and after one whose backward was within."""
    model = Again(reentrant)
    stn = tuned(model)
    opt = sgd(model)
    for step in range(2):
        loss_of(model, stn).backward()
        opt.zero_grad()
        train_step(model, stn, opt, step)
        valid_step(model, stn, step)


def test_backward_without_computing_again_may_be_anywhere() -> None:
    found: list[Any] = []
    for inside in (True, False):
        model = Again(None)
        stn = tuned(model)
        torch.manual_seed(1)
        with stn.train_batch(8):
            loss = loss_of(model, stn)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


# ---- the axis of examples -------------------------------------------------------------------------------


class Sequences(nn.Module):
    """(time, batch, features) or (batch, time, features): nothing in it can tell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.drop = nn.Linear(4, 3), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.inner(x))


def sequences(sigma: float = 1.0, **options: Any) -> tuple[Sequences, optx.SelfTuning]:
    model = Sequences()
    hparams = optx.HParams(drop=optx.hp(0.4, (0, 0.9), sigma=sigma))
    stn = optx.attach(model, optx.STN(hparams, dropout="drop", **options))
    with torch.no_grad():
        for p in stn.parameters():
            p.normal_(std=0.5)
    return model, stn


@given(
    time=st.integers(1, 5),
    size=st.integers(1, 5),
    middle=st.lists(st.integers(1, 3), max_size=1),
    seed=st.integers(0, 9),
)
def test_time_first_is_batch_first_with_its_axes_exchanged(
    time: int, size: int, middle: list[int], seed: int
) -> None:
    """Also where both are as long."""
    (first, a), (second, b) = sequences(batch_axis=0, seed=seed), sequences(batch_axis=1, seed=seed)
    second.load_state_dict(first.state_dict())
    x = torch.randn(size, time, *middle, 4)
    with a.train_batch(size), b.train_batch(size):
        torch.testing.assert_close(first.inner(x), second.inner(x.transpose(0, 1)).transpose(0, 1))
        pooled = torch.randn(size, 4)  # two axes: examples are along the first, whatever is said
        torch.testing.assert_close(first.inner(pooled), second.inner(pooled))


def test_dropout_has_the_rate_of_each_example_where_they_are() -> None:
    for axis in (0, 1):
        model, stn = sequences(sigma=2.0, batch_axis=axis)
        with stn.train_batch(6):
            rate = stn.hparams["drop"].value
            x = torch.ones(6, 6, 3000)
            zeros = [model.drop(x) == 0, stn.dropout(x, "drop") == 0]
        for zero in zeros:
            torch.testing.assert_close(zero.float().mean((1 - axis, 2)), rate, rtol=0, atol=0.04)


def test_an_input_that_may_be_either_is_refused() -> None:
    model, stn = sequences()
    says = r"the input of 'inner' has shape \(5, 5, 4\), and two of its axes are as long as the batch of 5"
    with stn.train_batch(5), pytest.raises(optx.OptxError, match=says):
        model(torch.randn(5, 5, 4))
    with stn.train_batch(5), pytest.raises(optx.OptxError, match=r"'drop' has shape \(5, 5, 4\)"):
        model.drop(torch.randn(5, 5, 4))
    with stn.train_batch(5), pytest.raises(optx.OptxError, match=r"stn\.dropout\(x, 'drop'\) has shape \(5"):
        stn.dropout(torch.randn(5, 5, 4), "drop")
    with stn.train_batch(1):
        model(torch.randn(1, 1, 4))  # of one example it does not matter
    with stn.train_batch(5):
        model(torch.randn(5, 2, 4))  # this tells
    with stn.train_batch(5):
        model(torch.randn(5, 5, 4))
    with stn.train_batch(5), pytest.raises(optx.OptxError, match="along the first axis"):
        model(torch.randn(2, 5, 4))
    model, stn = sequences(batch_axis=1)
    with stn.train_batch(5), pytest.raises(optx.OptxError, match="along the second axis"):
        model(torch.randn(5, 2, 4))
    with stn.train_batch(5), pytest.raises(optx.OptxError, match=r"'drop'.*along the second axis"):
        model.drop(torch.randn(5, 2, 4))


def test_a_batch_does_not_say_which_of_its_axes_is_time() -> None:
    _, stn = sequences(batch_axis=1)
    with (
        pytest.raises(optx.OptxError, match="with batch_axis=1 pass the number of examples"),
        stn.train_batch(torch.ones(5, 2)),
    ):
        pass


def test_a_model_that_says_it_has_time_first_is_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2))
    keys = list(model.state_dict())
    hparams = optx.HParams(h=optx.hp(0.0))
    with pytest.raises(optx.TargetError, match=r"'0\.self_attn' has batch_first=False.*batch_axis=1"):
        optx.attach(model, optx.STN(hparams), r".*linear\d")
    assert list(model.state_dict()) == keys
    for options in ({"batch_axis": 1}, {"batch_axis": 0}, {"shared": True}):
        optx.attach(model, optx.STN(hparams, **options), r".*linear\d").remove()
    first = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    optx.attach(first, optx.STN(hparams), r".*linear\d")


def test_pytorchs_encoder_with_time_first_is_perturbed_by_example() -> None:
    """Property 8, in nn.TransformerEncoderLayer as it is by default, with as many tokens as examples."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    stn = optx.attach(layer, optx.STN(optx.HParams(h=optx.hp(0.0)), batch_axis=1), r"linear\d")
    with torch.no_grad():
        for p in stn.parameters():
            p.normal_(std=0.5)
    x = torch.randn(4, 4, 8)
    with stn.train_batch(4):
        before = layer(x)
        shift: Any = stn.hparams.draw.shift  # type: ignore[union-attr]
        shift[2] += 1
        same = (layer(x) == before).all(-1)
    assert same.all(0).tolist() == [True, True, False, True]
    assert not same[:, 2].any()


# ---- copies and removal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copys_hyperparameters_are_the_copys(copied: Any) -> None:
    model = mlp()
    stn = tuned(model)
    twin, other = copied((model, stn))
    for own in (stn, other):
        with pytest.raises(optx.OptxError, match="these HParams are tuned on another model already"):
            optx.attach(mlp(), optx.STN(own.hparams))
    free = copy.deepcopy(stn.hparams)  # by themselves they belong to nobody
    optx.attach(mlp(), optx.STN(free))
    other.remove()
    optx.attach(twin, optx.STN(other.hparams))
    gone = copy.deepcopy(other)
    optx.attach(mlp(), optx.STN(gone.hparams))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_what_remove_leaves_is_the_same_model_only_where_it_is_said(delta: bool, scale: bool) -> None:
    model = mlp()
    stn = tuned(model, delta=delta, scale=scale)
    with torch.no_grad():
        for p in stn.parameters():
            p.normal_(std=0.3)
    x = batch(0)[0]
    before = model.eval()(x)
    stn.remove()
    assert torch.equal(model(x), before) == (delta and not scale)


# ---- no batch at all --------------------------------------------------------------------------------------


def test_a_loop_that_enters_no_batch_is_told_once() -> None:
    model = mlp()  # two layers are served
    stn = tuned(model)
    x, _ = batch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            for _ in range(300):
                model(x)
        model.eval()
        for _ in range(300):
            model(x)
        model.train()
        for _ in range(127):
            model(x)
        train_step(model, stn, sgd(model), 0)  # a batch: counted anew
        for _ in range(127):
            model(x)
    with pytest.warns(UserWarning, match=r"256 times in training mode outside of stn.train_batch\(\)"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            model(x)
