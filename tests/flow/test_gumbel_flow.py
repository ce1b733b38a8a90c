"""GumbelFlow: the spec's numbers, torch.distributions, losses, sampling, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from flow_models import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

import optx
from optx._errors import OptxError, ShapeError

F64 = torch.float64
G = torch.tensor([[[0.5, -1.0, 2.0, 0.0]]], dtype=F64)
FLOW = optx.GumbelFlow(4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(t: float) -> Tensor:
    return torch.tensor([t], dtype=F64)


def close(found: Tensor, wanted: Any, tolerance: float = 6e-8) -> None:
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=F64), atol=tolerance, rtol=0)


# ---- the spec's numbers ---------------------------------------------------------------------------------


def test_temperature() -> None:
    close(FLOW.temperature(torch.tensor([0.0, 0.5, 1.0], dtype=F64)), [10, 2.2313016, 0.4978707])


def test_points_of_the_path() -> None:
    k = torch.zeros(1, 1, dtype=torch.long)
    close(FLOW.log_point(k, at(0.5), G).exp(), [0.3422857, 0.1562333, 0.3060056, 0.1954754])
    close(FLOW.log_point(k, at(1.0), G).exp(), [0.5826841, 0.0173341, 0.3526608, 0.0473210])
    close(FLOW.log_point(k, at(0.5), 0 * G).exp()[..., :2], [0.3428896, 0.2190368])


def test_the_noisy_paths_own_velocity() -> None:
    k = torch.zeros(1, 1, dtype=torch.long)
    after, before = (FLOW.log_point(k, at(0.5 + h), G).exp() for h in (1e-6, -1e-6))
    wanted = [0.2734789, -0.2427722, 0.1416352, -0.1723419]
    close((after - before) / 2e-6, wanted)
    close(FLOW.own_velocity(FLOW.log_point(k, at(0.5), G).exp()), wanted)


def test_marginal_velocity() -> None:
    x = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    u = FLOW.velocity(x, torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=F64), 0.5)
    close(u, [0.0726034, -0.0161341, -0.0242011, -0.0322682])
    assert abs(u.sum().item()) < 1e-15
    vertex = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=F64)
    assert FLOW.velocity(vertex, x, 0.5).abs().max() == 0
    face = torch.tensor([0.2, 0.8, 0.0, 0.0], dtype=F64)
    close(FLOW.velocity(face, torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=F64), 0.5), [0.0] * 4, 1e-16)


def test_marginal_velocity_is_the_mean_of_the_conditional_ones() -> None:
    x, p = (torch.rand(5, 4, generator=seeded(i), dtype=F64).softmax(-1) for i in (1, 2))
    eye = torch.eye(4, dtype=F64)
    by_target = [p[:, k, None] * FLOW.rate(0.3) * x[:, k, None] * (eye[k] - x) for k in range(4)]
    torch.testing.assert_close(FLOW.velocity(x, p, 0.3), sum(by_target), atol=1e-14, rtol=0)


def test_the_fixed_path_is_what_the_conditional_velocity_moves() -> None:
    flow, k = optx.GumbelFlow(4, noise="fixed"), torch.tensor([[2]])
    x, after, before = (flow.log_point(k, at(0.4 + h), G).exp() for h in (0, 1e-6, -1e-6))
    close((after - before) / 2e-6, flow.velocity(x, torch.eye(4, dtype=F64)[2], 0.4).flatten().tolist(), 1e-8)
    torch.testing.assert_close(flow.log_point(k, at(0.0), G), flow.log_base(G))


@pytest.mark.parametrize("noise", ["sharpened", "fixed"])
@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
def test_score_and_likelihood_are_those_of_torchs_density(noise: str, t: float) -> None:
    flow = optx.GumbelFlow(5, noise=noise)
    temperature, b = flow.concrete(t)
    k, p = torch.tensor([3]), torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=F64)
    y = flow.log_point(k[None], at(t), torch.randn(1, 1, 5, generator=seeded(), dtype=F64))[0, 0]
    y = y.requires_grad_()
    law = ExpRelaxedCategorical(
        torch.tensor(temperature, dtype=F64), logits=b * torch.eye(5, dtype=F64), validate_args=False
    )
    by_token = law.log_prob(y.expand(5, 5))
    likelihood = flow.log_likelihood(y.detach(), t)
    torch.testing.assert_close(likelihood - likelihood[0], (by_token - by_token[0]).detach())
    (of_one,) = torch.autograd.grad(by_token[3], y, retain_graph=True)
    certain = torch.eye(5, dtype=F64)[3]
    torch.testing.assert_close(flow.score(y.detach(), certain, t), of_one, atol=1e-10, rtol=1e-10)
    mixture = (by_token + p.log()).logsumexp(0)
    posterior = (by_token + p.log()).softmax(0).detach()
    (of_all,) = torch.autograd.grad(mixture, y)
    found = flow.score(y.detach(), posterior, t)
    torch.testing.assert_close(found, of_all, atol=1e-10, rtol=1e-10)
    assert abs(found.sum().item()) < 1e-10


def test_points_are_draws_of_torchs_relaxed_categorical() -> None:
    """By the mean and the mean square of each coordinate, over 1e5 draws."""
    k = torch.full((100_000, 1), 2)
    x = FLOW.interpolate(k, torch.full((100_000,), 0.5), seeded())[:, 0]
    temperature, b = FLOW.concrete(0.5)
    torch.manual_seed(0)
    other = torch.distributions.RelaxedOneHotCategorical(
        torch.tensor(temperature), logits=b * torch.eye(4)[2]
    ).sample((100_000,))
    torch.testing.assert_close(x.mean(0), other.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(x.square().mean(0), other.square().mean(0), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("vocab", "beta"), [(4, 2.0), (20, 2.0), (20, 5.0)])
def test_how_often_the_path_ends_at_its_token(vocab: int, beta: float) -> None:
    k = torch.full((100_000, 1), 1)
    x = optx.GumbelFlow(vocab, beta=beta).interpolate(k, torch.ones(100_000), seeded())
    wanted = torch.tensor(beta).exp() / (torch.tensor(beta).exp() + vocab - 1)
    assert (x.argmax(-1) == 1).float().mean().item() == pytest.approx(wanted.item(), abs=0.005)


# ---- the losses -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    vocab=st.integers(2, 9),
    noise=st.sampled_from(["sharpened", "fixed"]),
    form=st.sampled_from(["flow", "score"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.sampled_from(["", "rows", "positions"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    invalid=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_losses_by_their_definitions(
    rows: int,
    length: int,
    vocab: int,
    noise: str,
    form: str,
    reduction: Any,
    weighted: str,
    dtype: torch.dtype,
    invalid: bool,
    seed: int,
) -> None:
    invalid = invalid and vocab > 2
    flow = optx.GumbelFlow(vocab, form=form, noise=noise, invalid=(0,) if invalid else ())
    draws = seeded(seed)
    tokens = torch.randint(int(invalid), vocab, (rows, length), generator=draws)
    mask = torch.rand(rows, length, generator=draws) < 0.8
    mask[0, 0] = True
    tokens[0, -1] = tokens[0, -1] if length == 1 else -100
    shape = {"": None, "rows": (rows,), "positions": (rows, length)}[weighted]
    weights = None if shape is None else torch.rand(shape, generator=draws) + 0.1
    seen: dict[str, Any] = {}
    made = torch.randn(rows, length, vocab, generator=draws).to(dtype)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.update(x=x, t=t)
            return made * self.weight

    model = Model()
    generator = seeded(seed)
    found = flow.loss(model, tokens, mask, weights=weights, generator=generator, reduction=reduction)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide
    assert seen["x"].dtype == seen["t"].dtype == dtype
    again = seeded(seed)
    t = torch.rand(rows, generator=again, dtype=wide)
    g = -torch.empty(rows, length, vocab, dtype=wide).exponential_(generator=again).log()
    counts = mask & (tokens != -100)
    total, share, each = torch.zeros((), dtype=wide), torch.zeros((), dtype=wide), torch.zeros(rows, length)
    free = list(range(int(invalid), vocab))
    for i in range(rows):
        temperature, b = flow.concrete(t[i])
        for j in range(length):
            if not counts[i, j]:
                assert seen["x"][i, j].abs().max() == 0
                continue
            onehot = torch.eye(vocab, dtype=wide)[tokens[i, j]][free]
            y = ((b * onehot + g[i, j, free]) / temperature).log_softmax(-1)
            torch.testing.assert_close(seen["x"][i, j, free], y.exp().to(dtype))
            p = made[i, j, free].to(wide).softmax(-1)
            if form == "flow":
                one = -(p * onehot).sum().log()
            else:
                terms = (b * torch.eye(len(free), dtype=wide) - temperature * y).softmax(-1)
                one = (p @ terms - (b * onehot - temperature * y).softmax(-1)).square().sum()
            w = 1.0 if weights is None else weights[i] if weights.ndim == 1 else weights[i, j]
            total, share, each[i, j] = total + w * one, share + w, w * one
    wanted = {"mean": total / share, "sum": total, "none": each}[reduction]
    torch.testing.assert_close(found, wanted.to(wide), atol=3e-5, rtol=3e-4)
    found.sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite()


@pytest.mark.parametrize("form", ["flow", "score"])
def test_a_true_posterior_has_the_least_loss(form: str) -> None:
    """Proper losses: moved logits do worse, and logits learnt from scratch find the law."""
    flow = optx.GumbelFlow(3, form=form)
    law = torch.tensor([0.6, 0.3, 0.1])
    tokens = torch.multinomial(law, 40_000, True, generator=seeded())[:, None]

    def loss(shift: list[float]) -> float:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return flow.log_likelihood(x.log(), t) + law.log() + torch.tensor(shift)

        return flow.loss(model, tokens, generator=seeded(1)).item()

    best = loss([0.0, 0.0, 0.0])
    assert all(best < loss(shift) for shift in ([0.5, 0, 0], [-0.5, 0, 0], [0, 0, 0.7], [0, 0, -0.7]))


# ---- sampling -------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(["flow", "score"]),
    noise=st.sampled_from(["sharpened", "fixed"]),
    solver=st.sampled_from(["euler", "exponential"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    steps=st.integers(7, 12),
    beta=st.floats(0.5, 8.0),
    invalid=st.booleans(),
    ragged=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_points_stay_on_the_simplex(
    form: str,
    noise: str,
    solver: str,
    dtype: torch.dtype,
    steps: int,
    beta: float,
    invalid: bool,
    ragged: bool,
    seed: int,
) -> None:
    flow = optx.GumbelFlow(5, beta=beta, form=form, noise=noise, invalid=(4,) if invalid else ())
    torch.manual_seed(seed)
    model = Tiny(5).to(dtype)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = not ragged
    own = {"solver": solver} if form == "flow" else {}
    ids, path = flow.sample(model, (3, 6), steps, mask=mask, generator=seeded(seed), return_path=True, **own)
    assert path.shape == (steps + 1, 3, 6, 5)
    assert path.dtype == torch.promote_types(dtype, torch.float32)
    assert not path.requires_grad
    assert (path >= 0).all()
    torch.testing.assert_close(path.sum(-1), mask.expand(steps + 1, 3, 6).to(path.dtype))
    assert ((ids >= 0) & (ids < (4 if invalid else 5)))[mask].all()
    assert (ids[~mask] == -100).all()
    if invalid:
        assert path[..., 4].max() == 0


@pytest.mark.parametrize("form", ["flow", "score"])
def test_a_row_of_its_own_generator_is_its_own(form: str) -> None:
    flow, model = optx.GumbelFlow(4, form=form), Tiny(4).double()
    guide = optx.STGuide(lambda x: x[..., 1].mean(-1), gamma=5.0, samples=2)
    options: dict[str, Any] = {"steps": 10, "guide": guide}
    both, path = flow.sample(model, (2, 5), generator=[seeded(3), seeded(4)], return_path=True, **options)
    alone, its = flow.sample(model, (1, 5), generator=[seeded(4)], return_path=True, **options)
    assert torch.equal(both[1:], alone)
    torch.testing.assert_close(path[:, 1:], its)
    one = flow.loss(model, both, generator=[seeded(1), seeded(2)], reduction="none")
    torch.testing.assert_close(one[1:], flow.loss(model, alone, generator=[seeded(2)], reduction="none"))


def test_what_is_given_stays_and_goes_along_its_path() -> None:
    flow, model = optx.GumbelFlow(4), Tiny(4)
    given = torch.randint(4, (3, 6), generator=seeded())
    keep = torch.rand(3, 6, generator=seeded(1)) < 0.5
    ids, path = flow.sample(
        model, (3, 6), 20, given=given.where(keep, -7), keep=keep, generator=seeded(), return_path=True
    )
    assert torch.equal(ids[keep], given[keep])
    z = path.log() * (2 * flow.temperature(torch.linspace(0, 1, 21)))[:, None, None, None]
    z = z - z.mean(-1, keepdim=True)  # of a path at its noise T y is a constant
    assert (z - z[0]).abs()[:, keep].max() < 1e-3
    assert (z - z[0]).abs()[:, ~keep].max() > 0.1


def test_modes_random_numbers_and_weights_are_as_before() -> None:
    flow, model, judge = optx.GumbelFlow(4), Tiny(4, dropout=0.5).train(), nn.Linear(4, 1)
    model.leave.eval()
    modes = [m.training for m in model.modules()]
    seen: list[bool] = []
    model.layer.register_forward_hook(lambda m, *_: seen.append(m.training))
    guide = optx.STGuide(lambda x: judge(x).mean((1, 2)), gamma=1.0)
    state = torch.get_rng_state()
    ids = flow.sample(model, (2, 3), 8, guide=guide, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert seen == [False] * 8
    assert not ids.requires_grad
    assert all(p.grad is None for one in (model, judge) for p in one.parameters())
    with pytest.raises(ShapeError, match=r"the model gave \(2, 3, 4\) for x of shape \(2, 3, 5\)"):
        optx.GumbelFlow(5).sample(lambda x, t: x[..., :4], (2, 3), 8)
    model.leave.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flow.sample(model, (2, 3), 8)
    assert [m.training for m in model.modules()] == modes


def test_free_guidance_is_logits_of_both() -> None:
    flow, model = optx.GumbelFlow(4), Tiny(4, classes=3)
    condition = torch.tensor([0, 1])

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        free, told = model(x, t, torch.tensor([2, 2])), model(x, t, condition)
        return free + 1.7 * (told - free)

    options: dict[str, Any] = {"condition": condition, "null": 2}
    paths = [
        flow.sample(one, (2, 5), 20, generator=seeded(), return_path=True, **more)[1]
        for one, more in ((model, options | {"guidance_scale": 1.7}), (by_hand, {}), (model, options))
    ]
    torch.testing.assert_close(paths[0], paths[1])
    assert (paths[0] - paths[2]).abs().max() > 1e-3


def test_conditions_that_are_dropped() -> None:
    flow, told = optx.GumbelFlow(4), []

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        told.append(condition)
        return x

    tokens, condition = torch.zeros(4000, 2, dtype=torch.long), torch.arange(4000) % 5
    flow.loss(model, tokens, condition=condition, drop_condition=0.25, null=9, generator=seeded())
    gone = told[0] == 9
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(told[0][~gone], condition[~gone])
    flow.loss(model, tokens, condition=condition, drop_condition=1.0, null=9)
    assert (told[1] == 9).all()


@pytest.mark.long
def test_a_compiled_model() -> None:
    flow, model = optx.GumbelFlow(4), Tiny(4)
    tokens = torch.randint(4, (3, 5), generator=seeded())
    compiled = torch.compile(model, backend="eager")
    ids, plain = (flow.sample(one, (3, 5), 10, generator=seeded()) for one in (compiled, model))
    assert torch.equal(ids, plain)
    loss, wanted = (flow.loss(one, tokens, generator=seeded()) for one in (compiled, model))
    assert torch.equal(loss, wanted)


def test_a_model_with_lora() -> None:
    flow, model = optx.GumbelFlow(4), Tiny(4)
    tokens = torch.randint(4, (3, 5), generator=seeded())
    plain = flow.sample(model, (3, 5), 10, generator=seeded())
    handle = optx.attach(copy.deepcopy(model), optx.LoRA(rank=2), targets="enter|leave")
    assert torch.equal(flow.sample(handle.model, (3, 5), 10, generator=seeded()), plain)
    flow.loss(handle.model, tokens, generator=seeded()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.parameters())


def test_autocast_keeps_the_flow_in_float32() -> None:
    flow, model = optx.GumbelFlow(4), Tiny(4)
    tokens = torch.randint(4, (3, 5), generator=seeded())
    wanted = flow.loss(model, tokens, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = flow.loss(model, tokens, generator=seeded())
        _, path = flow.sample(model, (3, 5), 10, generator=seeded(), return_path=True)
    assert found.dtype == path.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0)
    assert found != wanted
    torch.testing.assert_close(path.sum(-1), torch.ones(11, 3, 5))


def test_empty_batches() -> None:
    assert FLOW.sample(Tiny(4), (0, 5), 8).shape == (0, 5)
    assert FLOW.sample(Tiny(4), (2, 0), 8).shape == (2, 0)
    none = FLOW.loss(Tiny(4), torch.zeros(0, 5, dtype=torch.long), reduction="sum")
    assert none == 0


def test_its_config_makes_it_again() -> None:
    flow = optx.GumbelFlow(6, 8.0, 4.0, 3.0, noise="fixed", invalid=(5, 0), form="score")
    assert optx.GumbelFlow(**json.loads(json.dumps(flow.config))) == flow
    assert flow.invalid == (0, 5)


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab": 1}, r"vocab is 1; it must be at least 2"),
        ({"vocab": 4.5}, r"vocab is 4\.5; it must be a whole number"),
        ({"tau_max": 0.0}, r"tau_max is 0\.0; it must be a finite number above 0"),
        ({"beta": -1.0}, r"beta is -1\.0; it must be a finite number above 0"),
        ({"decay": float("nan")}, r"decay is nan"),
        ({"decay": 99.0}, r"decay is 99\.0; from tau_max=10\.0 the temperature"),
        ({"form": "velocity"}, r"form is 'velocity'; it must be one of 'flow', 'score'"),
        ({"noise": "none"}, r"noise is 'none'; it must be one of 'sharpened', 'fixed'"),
        ({"invalid": (4,)}, r"invalid is 4; it must be between 0 and 3"),
        ({"invalid": (0, 1, 2)}, r"of 4 tokens two must be left"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptxError, match=f"GumbelFlow: .*{says}"):
        optx.GumbelFlow(**{"vocab": 4} | options)


TOKENS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": TOKENS + 4}, r"tokens has 4, which is no token of a vocabulary of 4"),
        ({"tokens": TOKENS - 1}, r"tokens has -1"),
        ({"tokens": TOKENS.float()}, r"tokens is of torch\.float32"),
        ({"tokens": TOKENS[0]}, r"tokens has shape \(3,\)"),
        ({"mask": TOKENS}, r"mask is torch\.int64 \(2, 3\); it must be a bool tensor of shape \(2, 3\)"),
        ({"weights": torch.ones(3)}, r"weights has shape \(3,\)"),
        (
            {"condition": torch.ones(3)},
            r"condition has shape \(3,\); it must have an entry for each of the 2",
        ),
        ({"drop_condition": 0.1}, r"drop_condition is 0\.1; it needs condition="),
        ({"drop_condition": 2.0}, r"drop_condition is 2\.0; it must be between 0 and 1"),
        ({"reduction": "avg"}, r"reduction is 'avg'"),
        ({"generator": [seeded()]}, r"generator has 1 entries"),
        ({"model": 3}, r"model is a int"),
    ],
)
def test_batches_that_are_none(options: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"model": lambda x, t, *_: x, "tokens": TOKENS} | options
    with pytest.raises(OptxError, match=f"GumbelFlow.loss: .*{says}"):
        FLOW.loss(**given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 6}, r"steps is 6; .*from 7 steps on\. Give steps=7 or more, or solver='exponential'"),
        ({"steps": 0}, r"steps is 0; it must be at least 1"),
        ({"shape": (2, 3, 4)}, r"shape is \(2, 3, 4\); it must be \(batch, length\)"),
        ({"solver": "heun"}, r"solver is 'heun'"),
        ({"decode": "beam"}, r"decode is 'beam'"),
        ({"langevin": 0.0}, r"langevin is 0\.0"),
        ({"guide": 3}, r"guide is a int; it must be an optx\.STGuide"),
        ({"guidance_scale": 2.0}, r"guidance_scale is 2\.0; it needs condition= and null="),
        ({"given": TOKENS}, r"given= and keep= go together"),
        ({"given": TOKENS[:1], "keep": TOKENS == 0}, r"given has shape \(1, 3\); it must be \(2, 3\)"),
        ({"given": TOKENS + 5, "keep": TOKENS == 0}, r"tokens has 5"),
        (
            {"condition": torch.ones(2, 3), "null": torch.ones(2)},
            r"null is .* fit a condition's row, \(3,\)",
        ),
    ],
)
def test_samples_that_are_none(options: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"model": lambda x, t, *_: x, "shape": (2, 3), "steps": 7} | options
    with pytest.raises(OptxError, match=f"GumbelFlow.sample: .*{says}"):
        FLOW.sample(**given)


def test_times_and_tokens_that_are_none() -> None:
    with pytest.raises(OptxError, match=r"t is 1\.5; it must be between 0 and 1"):
        FLOW.temperature(1.5)
    with pytest.raises(OptxError, match="times are between 0 and 1"):
        FLOW.interpolate(TOKENS, torch.tensor([0.5, -0.1]))
    with pytest.raises(OptxError, match=r"tokens has 3, which invalid= says that no sequence has"):
        optx.GumbelFlow(4, invalid=(3,)).loss(lambda x, t: x, TOKENS + 3)
