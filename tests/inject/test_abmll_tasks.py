"""ABMLL's tasks: the meta-gradient, what a task leaves as it was, its random numbers, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from abmll_models import data, equal, grads, meta, mlp, nll
from hypothesis import given, settings
from hypothesis import strategies as st
from peak import Peak
from reference import abmll as reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import optx
from optx.inject._abmll_part import Shared

COUNT = "0.optx.abmll.tasks_begun"  # all that a task changes of a model's state


def layers_of(model: Any) -> list[reference.Layer]:
    return [
        reference.Layer(m.weight.detach(), m.bias.detach(), float(m.optx.abmll.c))
        for m in (model[0], model[2])
    ]


def theta_of(ab: optx.ABMLLHandle) -> list[dict[str, Tensor]]:
    return [part.theta()._asdict() for part in ab.normal_parts()]


def by_reference(model: Any, ab: optx.ABMLLHandle, numbers: Any, steps: int, lr: float) -> dict[str, Tensor]:
    tasks = []
    for number in numbers:
        (x, y), (z, w) = data(number)
        of = [lambda out, y=y: F.cross_entropy(out, y), x, lambda out, w=w: F.cross_entropy(out, w), z]
        tasks.append(tuple(of))
    own = ab.injection
    options = reference.Options(own.beta, own.gamma_or_beta, own.sigma_param, own.a0, own.b0)
    found = reference.meta_gradient(layers_of(model), theta_of(ab), tasks, steps, lr, options)
    names = [name for name, _ in ab.named_parameters()]
    return {name: found[int(name[0]) // 2][name.split(".")[-1]] for name in names}


@settings(max_examples=12)
@given(
    st.integers(0, 3),
    st.sampled_from([0.0, 1e-3, 1e-1]),
    st.sampled_from([None, 0.0, 1e-2]),
    st.sampled_from(["softplus", "abs"]),
    st.integers(1, 3),
)
def test_the_meta_gradient_is_that_of_whole_matrices(
    steps: int, beta: float, gamma: float | None, kind: str, tasks: int
):
    """Properties 3 and 4 are among these: no inner steps; and no divergence, no prior, first-order MAML."""
    model, ab = mlp(beta=beta, gamma=gamma, sigma_param=kind, a0=2.0)
    meta(model, ab, range(tasks), inner_steps=steps, sample=False)
    found, wanted = grads(ab), by_reference(model, ab, range(tasks), steps, 0.5)
    assert any(t.any() for t in wanted.values())
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, msg=name)


def test_without_steps_the_means_have_the_gradient_of_a_lora():
    """Property 3, by optx's own LoRA; with noise whose deviation tends to 0, too."""
    model, ab = mlp(beta=1.0, gamma=0.0, c=1e-12)
    plain = copy.deepcopy(model)
    meta(model, ab, inner_steps=0)
    found = grads(ab)
    for module in (plain[0], plain[2]):
        module.optx.abmll.enabled = False
    lora = optx.attach(plain, optx.LoRA(rank=2, alpha=2), nn.Linear)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            p.copy_(ab.state_dict()[name.replace("optx.lora.", "abmll.") + "_mean"])
    nll(plain, data(0)[1]).backward()
    for name, p in lora.named_parameters():
        ours = found[name.replace("lora", "abmll") + "_mean"]
        torch.testing.assert_close(ours, p.grad, rtol=1e-6, atol=1e-9)


def test_no_rate_and_a_strong_divergence_keep_phi_at_theta():
    """Property 4."""
    model, ab = mlp(beta=0.0)
    support, query = data(0)
    start = ab.predict(lambda: model(query[0]), 0)
    for beta, lr, moves in ((0.0, 0.5, True), (0.0, 0.0, False), (1e3, 1e-7, False)):
        model, ab = mlp(beta=beta)
        with ab.task(inner_steps=4, inner_lr=lr, sample=False) as t:
            t.adapt(lambda model=model: nll(model, support))
            away = float((ab.predict(lambda model=model: model(query[0]), 0) - start).abs().max())
        assert (away > 1e-2) if moves else (away < 1e-5)


def test_a_stronger_divergence_keeps_phi_nearer():
    support, found = data(0)[0], []
    for beta in (0.0, 1e-4, 1e-3):
        model, ab = mlp(beta=beta)
        before = model(support[0]).detach()
        with ab.task(inner_steps=20, inner_lr=0.1, sample=False) as t:
            losses = t.adapt(lambda model=model: nll(model, support))
            found.append(float((model(support[0]) - before).detach().norm()))
        assert losses[-1] < losses[0]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("sample", [True, False])
def test_a_task_leaves_theta_the_weights_and_other_tasks_alone(sample: bool):
    """Property 6; the second task's gradient is what it is without the first."""
    model, ab = mlp()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    alone, own = mlp()
    own.tasks_begun = 1
    meta(alone, own, [1], sample=sample)
    with ab.task(inner_lr=0.5, sample=sample) as t:
        t.adapt(lambda: nll(model, data(0)[0]))
    assert equal(before | {COUNT: torch.tensor(1)}, model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    meta(model, ab, [1], sample=sample)
    assert equal(grads(ab), grads(own))
    assert equal(before | {COUNT: torch.tensor(2)}, model.state_dict())


def test_an_exception_in_a_task_leaves_theta_and_the_next_task_as_they_were():
    model, ab = mlp()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    calls: list[int] = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("a batch")
        return nll(model, data(0)[0])

    with pytest.raises(KeyError), ab.task() as t:
        t.adapt(failing)
    with ab.task() as t:
        calls.clear()
        with pytest.raises(KeyError):
            t.adapt(failing)
        with pytest.raises(optx.OptxError, match="has not adapted"):  # half of it is none
            t.outer(nll(model, data(0)[1]))
    assert equal(before | {COUNT: torch.tensor(2)}, model.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(model(data(0)[0][0]), ab.draws(lambda: model(data(0)[0][0]), 0)[0])
    meta(model, ab)


def test_memory_is_of_one_task_whatever_their_number():
    model, ab = mlp(torch.float32)
    meta(model, ab, range(16), inner_steps=1)  # .grad is there from now on, and all data
    found = []
    for tasks in (1, 4, 16):
        with Peak() as peak:
            meta(model, ab, range(tasks), inner_steps=1)
        found.append(peak.most)
    assert found[0] > sum(p.numel() for p in ab.parameters()) * 4  # a copy, at least
    assert found[0] == found[1] == found[2]


# ---- draws ------------------------------------------------------------------------------------------


def test_noise_at_the_start_is_of_deviation_c_times_the_input_s_norm():
    """Property 1, on an input of a million draws in all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    x = torch.randn(1, 4)
    frozen = model(x)
    ab = optx.attach(model, optx.ABMLL(rank=2, c=0.02), nn.Linear)
    assert torch.equal(model(x), frozen)
    with ab.task(sample=False):
        assert torch.equal(model(x), frozen)
    with ab.task():
        away = (model(x.expand(200_000, 4)) - frozen).detach()
    torch.testing.assert_close(away.var(0), (0.02 * x.norm()).square().expand(5), rtol=0.02, atol=0.0)
    assert float(away.mean(0).abs().max()) < 2e-4
    assert abs(float(torch.corrcoef(away.T)[0, 1])) < 0.01  # independent


def test_random_numbers_are_of_seed_and_task_and_torch_s_own_go_on():
    def run(seed: int, skip: int, own: int) -> Tensor:
        model, ab = mlp(seed=seed)
        ab.tasks_begun = skip
        torch.manual_seed(own)
        with ab.task() as t:
            losses = t.adapt(lambda: nll(model, data(0)[0]))
        return torch.tensor(losses)

    assert torch.equal(run(0, 0, 1), run(0, 0, 2))
    assert not torch.equal(run(0, 0, 1), run(1, 0, 1))
    assert not torch.equal(run(0, 0, 1), run(0, 1, 1))
    model, ab = mlp()
    torch.manual_seed(5)
    meta(model, ab, range(3))
    ab.predict(lambda: model(data(0)[0][0]))
    after = torch.randn(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.randn(3))


def test_predictions_are_the_mean_of_softmaxes_of_the_posterior_of_now():
    model, ab = mlp(c=0.5)
    x = data(0)[1][0]
    mode = model.train().training
    ran, state = ab.tasks_begun, torch.get_rng_state()
    outside = ab.predict(lambda: model(x), 4)
    drawn = ab.draws(lambda: model(x), 4)
    torch.testing.assert_close(outside, drawn.softmax(-1).mean(0))
    assert drawn.shape == (4, 6, 3)
    assert len({float(one[0, 0]) for one in drawn}) == 4
    assert not drawn.requires_grad
    assert torch.equal(outside, ab.predict(lambda: model(x), 4))
    assert not torch.equal(outside, ab.predict(lambda: model(x), 4, seed=1))
    assert torch.equal(ab.predict(lambda: model(x), 0), model(x).softmax(-1).detach())
    assert (ab.tasks_begun, model.training) == (ran, mode)
    assert torch.equal(state, torch.get_rng_state())
    with ab.task(inner_lr=1.0) as t:
        assert torch.equal(ab.predict(lambda: model(x), 4), outside)  # phi is theta
        t.adapt(lambda: nll(model, data(0)[0]))
        within = ab.predict(lambda: model(x), 4)
        means = ab.predict(lambda: model(x), 0)
        t.outer(nll(model, data(0)[1])).backward()  # after predictions, as without them
    found = grads(ab)
    assert not torch.equal(within, outside)
    assert not torch.equal(within, means)
    assert torch.equal(ab.predict(lambda: model(x), 4), outside)
    ab.tasks_begun -= 1
    with ab.task(inner_lr=1.0) as t:
        t.adapt(lambda: nll(model, data(0)[0]))
        t.outer(nll(model, data(0)[1])).backward()
    assert equal(found, grads(ab))


def test_predictions_average_out_to_the_mean_of_many():
    model, ab = mlp(c=0.5)
    x = data(0)[1][0]
    few, many = (ab.predict(lambda: model(x), n) for n in (8, 100))
    assert torch.allclose(few.sum(-1), torch.ones(6, dtype=few.dtype))
    assert 1e-3 < float((few - many).abs().max()) < 0.3


class Checkpointed(nn.Module):
    """A model whose layers are computed again in backward, each called twice."""

    def __init__(self, model: nn.Module, on: bool) -> None:
        super().__init__()
        self.model, self.on = model, on

    def forward(self, x: Tensor) -> Tensor:
        def twice(x: Tensor) -> Tensor:
            return self.model(x) + self.model(2 * x)

        return checkpoint(twice, x, use_reentrant=False) if self.on else twice(x)


def test_activation_checkpointing_draws_the_same_again():
    found = []
    for on in (True, False):
        model, ab = mlp()
        meta(Checkpointed(model, on), ab, range(2))
        found.append(grads(ab))
    assert equal(*found)


def test_a_checkpoint_s_backward_pass_after_the_task_is_refused():
    model, ab = mlp()
    whole = Checkpointed(model, True)
    with ab.task(inner_steps=0) as t:
        loss = t.outer(nll(whole, data(0)[1]))
    with pytest.raises(optx.OptxError, match="outside of the task that it was computed in"):
        loss.backward()


# ---- refusals ---------------------------------------------------------------------------------------


def test_tasks_out_of_turn_are_refused():
    model, ab = mlp()
    support, query = data(0)
    with pytest.raises(optx.OptxError, match="adapt: it is not within its task"):
        ab.task().adapt(lambda: nll(model, support))
    with ab.task() as t:
        with pytest.raises(optx.OptxError, match="loss is a Tensor; it must be a function"):
            t.adapt(nll(model, support))
        with pytest.raises(optx.OptxError, match="within another task of this handle"), ab.task():
            pass
        with pytest.raises(optx.OptxError, match="outer: the task has not adapted"):
            t.outer(nll(model, query))
        early = nll(model, query)
        t.adapt(lambda: nll(model, support))
        with pytest.raises(optx.OptxError, match="query loss was not computed with"):
            t.outer(early)
        t.outer(nll(model, query)).backward()
        with pytest.raises(optx.OptxError, match="outer: it has been called"):
            t.outer(nll(model, query))
        with pytest.raises(optx.OptxError, match=r"adapt: outer\(\) has been called"):
            t.adapt(lambda: nll(model, support))
        with pytest.raises(optx.OptxError, match="load_state_dict: it is within a task"):
            ab.load_state_dict(ab.state_dict())
    with pytest.raises(optx.OptxError, match="entered before"), t:
        pass
    with pytest.raises(optx.OptxError, match="outer: it is not within its task"):
        t.outer(nll(model, query))
    with ab.task():
        pass


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model: model(data(0)[0][0]).sum(1), "inner step 0 is of shape"),
        (lambda model: 0.5, "inner step 0 is 0.5; it must be a tensor"),
        (lambda model: torch.zeros((), requires_grad=True), "inner step 0 was not computed with"),
        (lambda model: model(data(0)[0][0]).sum() * torch.inf, "inner step 0 is -?(inf|nan)"),
        (lambda model: model(data(0)[0][0]).sum().detach(), "inner step 0 was not computed with"),
    ],
)
def test_losses_that_teach_nothing_are_refused(loss: Any, words: str):
    model, ab = mlp()
    with ab.task() as t, pytest.raises(optx.OptxError, match=words):
        t.adapt(lambda: loss(model))


def test_numbers_out_of_range_are_refused():
    model, ab = mlp()
    for option, value in (("inner_steps", -1), ("inner_steps", 1.5), ("inner_lr", -1.0), ("tasks", 0)):
        with pytest.raises(optx.OptxError, match=f"task: {option} is {value}"):
            ab.task(**{option: value})
    with pytest.raises(optx.OptxError, match="task: inner_lr is inf"):
        ab.task(inner_lr=float("inf"))
    with pytest.raises(optx.OptxError, match="predict: samples is -1"):
        ab.predict(lambda: model(data(0)[0][0]), samples=-1)
    with pytest.raises(optx.OptxError, match="predict: call gives a str"):
        ab.predict(lambda: "logits")


def test_training_on_and_on_outside_of_tasks_is_told_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Shared, "MANY", 6)
    model, ab = mlp()
    x = data(0)[0][0]
    with pytest.warns(UserWarning, match="6 times in training mode outside of any task") as told:
        _ = [model(x) for _ in range(9)]
    assert len(told) == 1
    model, ab = mlp()
    for _ in range(5):
        meta(model, ab, inner_steps=0)
        model(x)  # a look between tasks
