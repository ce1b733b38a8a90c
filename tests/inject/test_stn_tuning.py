"""Self-tuning networks: who gets which gradient, the schedule, and being off."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from stn_loop import batch, frozen, mlp, noisy, sgd, train_step, tuned, valid_step
from torch import Tensor, nn
from torch.nn import functional as F

import optx

# ---- gradients (property 6) -----------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [False, True])
def test_each_batch_moves_its_own(delta: bool) -> None:
    model = mlp()
    stn = tuned(model, delta=delta)
    opt = sgd(model)
    assert not {id(p) for g in opt.param_groups for p in g["params"]} & {
        id(stn.hparams.raw),
        id(stn.hparams.raw_sigma),
    }
    for step in range(3):
        raw, sigma = frozen(stn)
        train_step(model, stn, opt, step)
        assert torch.equal(raw, stn.hparams.raw)
        assert torch.equal(sigma, stn.hparams.raw_sigma)
        assert stn.hparams.raw.grad is None
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, y = batch(5)
    model[0].weight.grad = torch.ones_like(model[0].weight)  # type: ignore[union-attr]
    with stn.valid_batch(x):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())
        F.cross_entropy(model(x), y).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.weight"]
    assert torch.equal(model[0].weight.grad, torch.ones(12, 6))  # type: ignore[union-attr]
    assert stn.hparams.raw.grad is not None
    assert stn.hparams.raw.grad.ne(0).all()
    stn.step_hparams()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not torch.equal(raw, stn.hparams.raw)
    assert not torch.equal(sigma, stn.hparams.raw_sigma)


def test_what_was_frozen_stays_frozen_also_after_an_exception() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    model[1].eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    stn = tuned(model)
    with pytest.raises(ZeroDivisionError), stn.valid_batch(8):
        raise ZeroDivisionError
    assert {name: p.requires_grad for name, p in model.named_parameters() if "optx" not in name} == flags
    assert [module.training for module in model] == [True, False, True, True, True]
    assert stn.hparams.draw is None
    with stn.train_batch(8):
        pass


def test_the_gradient_of_a_hyperparameter_is_the_finite_difference_of_the_validation_loss() -> None:
    model = mlp().double()
    stn = tuned(model, sigma_lr=0.0)
    with torch.no_grad():
        for p in stn.parameters():
            p.normal_(std=0.3)
    x, y = batch(0)
    with stn.valid_batch():
        F.cross_entropy(model(x.double()), y).backward()
    model.eval()
    for i in range(2):
        values: list[float] = []
        for side in (1e-6, -1e-6):
            with torch.no_grad():
                stn.hparams.raw[i] += side
                values.append(F.cross_entropy(model(x.double()), y).item())
                stn.hparams.raw[i] -= side
        assert stn.hparams.raw.grad is not None
        assert stn.hparams.raw.grad[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_entropy() -> None:
    """Property 5: H of two at sigma 0.5, and its slope 1 / sigma, which a step adds."""
    hparams = optx.HParams(a=optx.hp(0.0), b=optx.hp(0.0))
    sigma = hparams.sigma()
    entropy = (sigma * math.sqrt(2 * math.pi * math.e)).log().sum()
    assert entropy.item() == pytest.approx(1.45158271, abs=1e-6)
    entropy.backward()
    assert hparams.raw_sigma.grad is not None
    wanted = hparams.raw_sigma.grad.clone()
    torch.testing.assert_close(wanted, torch.sigmoid(hparams.raw_sigma.detach()) / 0.5)
    hparams.raw_sigma.grad = None
    model = nn.Sequential(nn.Linear(2, 2))
    stn = optx.attach(model, optx.STN(hparams, tau=0.7))
    hparams.read.update("ab")
    with stn.train_batch(2):
        pass
    hparams.raw.grad, hparams.raw_sigma.grad = torch.zeros(2), torch.ones(2)
    stn._prepare_gradients(None)
    torch.testing.assert_close(hparams.raw_sigma.grad, (1 - 0.7 * wanted).float())


def test_gradients_of_several_batches_add_up() -> None:
    found: list[Tensor] = []
    for sizes in ((8,), (4, 4)):
        model = mlp()
        stn = tuned(model, sigma_lr=0.0)
        x, y = batch(0)
        for xs, ys in zip(x.split(sizes[0]), y.split(sizes[0]), strict=True):
            with stn.valid_batch():
                (F.cross_entropy(model(xs), ys) / len(sizes)).backward()
                (0 * model(xs).sum()).backward()  # a second backward of one batch has a graph of its own
        assert stn.hparams.raw.grad is not None
        found.append(stn.hparams.raw.grad)
    torch.testing.assert_close(*found)


def test_delta_stns_two_steps() -> None:
    model = mlp()
    stn = tuned(model, delta=True)
    added = {name for name, _ in stn.named_parameters()}
    x, y = batch(0)
    for learn, wanted in (("general", False), ("response", True)):
        with stn.train_batch(x, learn=learn):  # type: ignore[arg-type]
            assert (stn.hparams["drop"].value.ndim == 1) == wanted
            F.cross_entropy(model(noisy(stn, x)), y).backward()
        got = {name for name, p in model.named_parameters() if p.grad is not None}
        assert got == (added if wanted else {name for name, _ in model.named_parameters()} - added)
        model.zero_grad()
    assert stn.progress.batches == 1
    with pytest.raises(optx.OptxError, match=r"learn is 'general'; it must be 'all', or with.*delta=True"):
        tuned(mlp()).train_batch(x, learn="general").__enter__()


def test_the_linearised_prediction() -> None:
    """Against the finite difference along the perturbation; and it is exact where the model is linear."""
    model = mlp(0.0).double()
    model[1].eval()
    stn = tuned(model, delta=True, dropout=None)
    with torch.no_grad():
        for p in stn.parameters():
            p.normal_(std=0.3)
    x = batch(0)[0].double()
    with stn.train_batch(x):
        flat = stn.linearised(x)
        shift: Any = stn.hparams.draw.shift  # type: ignore[union-attr]
        full = model(x)
        shift.mul_(1e-6)
        near = model(x)
        shift.zero_()
        at = model(x)
    torch.testing.assert_close(flat, at + (near - at) * 1e6, rtol=1e-4, atol=1e-4)
    assert (flat - full).abs().max() > 1e-3
    flat.sum().backward()
    assert all(p.grad is not None for p in stn.parameters())
    with pytest.raises(optx.OptxError, match=r"linearised: it is for stn\.train_batch"):
        stn.linearised(x)


# ---- the schedule ---------------------------------------------------------------------------------------


def test_the_alternating_schedule() -> None:
    model = mlp()
    stn = tuned(model, warmup=3, train_steps=2, valid_steps=2)
    opt, turns = sgd(model), []
    for step in range(7):
        train_step(model, stn, opt, step)
        turns.append(stn.due)
        while stn.due:
            valid_step(model, stn, step)
    assert turns == [0, 0, 0, 0, 2, 0, 2]
    assert stn.history["batches"] == [0, 5, 5, 7, 7]
    assert stn.history["drop"][0] == pytest.approx(0.2)
    assert stn.history["drop"][-1] == pytest.approx(stn.hparams.values()["drop"])
    assert stn.history["sigma noise"][0] == pytest.approx(0.5)
    assert str(stn.report()).count("(hyperparameters)") == 1


def test_what_would_go_unnoticed_is_an_error() -> None:
    model = mlp()
    stn = tuned(model)
    x, y = batch(0)
    with pytest.raises(optx.OptxError, match="no training batch has been within"):
        stn.step_hparams()
    noise = stn.hparams["noise"]
    outside = noise.value
    with stn.train_batch(x):
        F.cross_entropy(model(x + outside), y).backward()
        with pytest.raises(optx.OptxError, match="it is within another batch"), stn.valid_batch(x):
            pass
        with pytest.raises(optx.OptxError, match="step_hparams: it is within a training batch"):
            stn.step_hparams()
    with pytest.raises(optx.OptxError, match="nothing has asked for 'noise' in a training batch yet"):
        stn.step_hparams()
    with stn.train_batch(x):
        assert noise.value.shape == (8,)
    with pytest.raises(optx.OptxError, match="no gradient has reached the hyperparameters"):
        stn.step_hparams()
    raw = frozen(stn)[0]
    with stn.valid_batch(x):
        (model(x).sum() * float("nan")).backward()
    with pytest.raises(optx.OptxError, match="the gradient of 'drop' is not finite"):
        stn.step_hparams()
    with pytest.raises(optx.OptxError, match="the gradient of 'drop' is not finite"):
        stn.step_hparams(torch.amp.GradScaler("cpu", enabled=False))
    assert torch.equal(raw, stn.hparams.raw)
    stn.load_state_dict(stn.state_dict())
    assert stn.hparams.raw.grad is None
    assert stn.hparams.raw_sigma.grad is None
    stn.remove()
    with pytest.raises(optx.OptxError, match="has been removed"), stn.train_batch(x):
        pass


@pytest.mark.parametrize("late", [False, True])
def test_an_optimizer_that_does_not_know_the_responses_is_told(late: bool) -> None:
    model = mlp()
    opt = sgd(model)
    stn = tuned(model, warmup=40)
    opt = opt if late else sgd(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(40):
            train_step(model, stn, opt, step)
        valid_step(model, stn, 0)
        valid_step(model, stn, 1)
    words = ("no optimizer has what was attached to it", "nothing has changed how weights respond")
    assert [str(one.message).find(said) > 0 for said, one in zip(words, told, strict=late)] == [
        True,
        True,
    ] * late


def test_batches_say_how_many_examples_they_have() -> None:
    stn = tuned(mlp())
    for given in (
        5,
        torch.ones(5, 2),
        {"a": torch.ones(5), "b": [torch.ones(5, 3)]},
        (torch.ones(5, 2), "names"),
    ):
        with stn.train_batch(given):
            assert stn.hparams["drop"].value.shape == (5,)
    for given in (None, 0, True, (torch.ones(3), torch.ones(5)), torch.ones(0, 2), "abc"):
        with (
            pytest.raises(optx.OptxError, match="the batch has to say how many examples"),
            stn.train_batch(given),
        ):
            pass


def test_a_dropout_that_is_never_called_is_told() -> None:
    class ReadsItsP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.out = nn.Dropout(0.1), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.out(x), self.drop.p, self.training)

    model = ReadsItsP()
    stn = tuned(model)
    train_step(model, stn, sgd(model), 0)
    with pytest.warns(UserWarning, match="dropout 'drop' was not called in any training batch"):
        valid_step(model, stn, 0)


# ---- exactly off ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [False, True])
def test_held_hyperparameters_change_nothing_and_draw_nothing(delta: bool) -> None:
    """With every sigma 0 the trajectory is that of the plain model, bit for bit, dropout's masks included."""
    plain, model = mlp(0.2), mlp(0.7)
    hparams = optx.HParams(drop=optx.hp(0.2, (0, 0.9), sigma=0))
    stn = optx.attach(model, optx.STN(hparams, delta=delta, dropout="drop"))
    opts = sgd(plain), sgd(model)
    states: list[Tensor] = []
    for one, opt in zip((plain, model), opts, strict=True):
        torch.manual_seed(7)
        for step in range(4):
            x, y = batch(step)
            with stn.train_batch(x):
                F.cross_entropy(one(x), y).backward()
            opt.step()
            opt.zero_grad()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in plain.named_parameters())
    with pytest.raises(optx.OptxError, match=r"every hyperparameter has sigma=0 and is held"):
        stn.step_hparams()


def test_one_that_is_held_stays_where_it_is() -> None:
    model = mlp()
    hparams = optx.HParams(drop=optx.hp(0.2, (0, 0.9), sigma=0), noise=optx.hp(0.1, (0, None)))
    stn = optx.attach(model, optx.STN(hparams, dropout="drop"))
    opt = sgd(model)
    for step in range(3):
        train_step(model, stn, opt, step)
        valid_step(model, stn, step)
    assert hparams.values()["drop"] == pytest.approx(0.2, abs=1e-7)
    assert hparams.values()["noise"] != pytest.approx(0.1, abs=1e-4)
    assert hparams["drop"].sigma == 0


def test_perturbations_leave_torchs_random_numbers_alone() -> None:
    stn = tuned(mlp())
    before = torch.get_rng_state()
    with stn.train_batch(8):
        first = stn.hparams["drop"].value
    with stn.valid_batch(8):
        pass
    assert torch.equal(torch.get_rng_state(), before)
    with stn.train_batch(8):
        assert not torch.equal(stn.hparams["drop"].value, first)
    other = tuned(mlp(), seed=1)
    with other.train_batch(8):
        assert not torch.equal(other.hparams["drop"].value, first)
    again = tuned(mlp())
    with again.train_batch(8):
        assert torch.equal(again.hparams["drop"].value, first)


def test_one_that_is_shared_has_one_value_a_batch() -> None:
    hparams = optx.HParams(wd=optx.hp(1e-2, (0, None), shared=True), noise=optx.hp(0.1, (0, None)))
    stn = optx.attach(mlp(), optx.STN(hparams))
    with stn.train_batch(8):
        assert hparams["wd"].value.shape == ()
        assert hparams["noise"].value.shape == (8,)
        assert stn.hparams.gate(False)[:, 0].unique().numel() == 1  # type: ignore[index]
        assert stn.hparams.gate(False)[:, 1].unique().numel() == 8  # type: ignore[index]


# ---- weight decay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_weight_decay_is_of_the_weights_that_each_example_has(shared: bool, scale: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    hparams = optx.HParams(wd=optx.hp(0.1, (0, None)))
    stn = optx.attach(model, optx.STN(hparams, shared=shared, scale=scale))
    with torch.no_grad():
        for p in stn.parameters():
            p.normal_(std=0.4)
    with stn.train_batch(3):
        raw = (stn.hparams.raw + stn.hparams.draw.shift).expand(3, -1).detach()  # type: ignore[union-attr]
        got, rate = stn.weight_decay("wd"), F.softplus(raw[:, 0])
    want = torch.zeros(3, dtype=torch.float64)
    for module in (model[0], model[2]):
        part: Any = module.optx.stn  # type: ignore[union-attr]
        for b in range(3):
            s = (part.V @ raw[b])[: part.out].view(-1, *(1,) * (module.weight.ndim - 1))  # type: ignore
            c = 1 if part.c is None else part.c
            want[b] += (c * module.weight + s * part.W_h).square().sum().detach()  # type: ignore[operator]
    torch.testing.assert_close(got.detach(), 0.5 * (rate * want).mean())
    got.backward()
    with stn.valid_batch(3):
        assert stn.weight_decay("wd").item() == 0


def test_weight_decay_is_torchs() -> None:
    """Held, it is what SGD's own weight_decay does, on everything that is served."""
    one, other = nn.Sequential(nn.Linear(4, 3, bias=False)), nn.Sequential(nn.Linear(4, 3, bias=False))
    other.load_state_dict(one.state_dict())
    hparams = optx.HParams(wd=optx.hp(0.3, (0, None), sigma=0))
    stn = optx.attach(one, optx.STN(hparams))
    torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.3).zero_grad()
    opts = (
        torch.optim.SGD(one.parameters(), lr=0.1),
        torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.3),
    )
    x = torch.randn(5, 4)
    with stn.train_batch(x):
        (one(x).square().mean() + stn.weight_decay("wd")).backward()
    other(x).square().mean().backward()
    for opt in opts:
        opt.step()
    torch.testing.assert_close(one[0].weight, other[0].weight)
