"""T-Rex's Stability: its numbered properties, its bound, and what it leaves of a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from counterfactual_models import examples, linear, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.analysis import stability, stability_bound
from optx.analysis.counterfactual._classifier import Classifier
from optx.analysis.counterfactual._noise import drawn
from optx.analysis.counterfactual.stability import relaxed, relaxed_gradient


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(
    model: nn.Module, x: Tensor, target: int, k: int, sigma: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Rhat and the mean of m(x_i), sample by sample, of up to 1024 samples."""
    noise = sigma * torch.randn(k, *x.shape[1:], generator=generator(seed))
    with torch.no_grad():
        centre = model(x).softmax(1)[:, target]
        m = torch.stack([model(x + n).softmax(1)[:, target] for n in noise], 1)
    return (m - (centre[:, None] - m).abs()).mean(1), m.mean(1)


# ---- the measure ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 5),
    st.integers(2, 4),
    st.integers(1, 40),
    st.sampled_from([1, 3, 16, 8192]),
    st.sampled_from([0.01, 0.1, 1.0]),
)
def test_it_is_that_of_a_plain_loop(seed: int, rows: int, classes: int, k: int, chunk: int, sigma: float):
    model, x = network(3, classes, seed), examples(3, rows, seed)
    target = seed % classes
    wanted, mean = by_hand(model, x, target, k, sigma, seed)
    with_logits = stability(model, x, target, k=k, sigma=sigma, generator=generator(seed), chunk=chunk)
    torch.testing.assert_close(with_logits, wanted, atol=1e-5, rtol=0)
    probabilities = nn.Sequential(model, nn.Softmax(1))
    again = stability(probabilities, x, target, k=k, sigma=sigma, generator=seed, chunk=chunk)
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=0)
    centre = model(x).softmax(1)[:, target]
    assert bool((wanted <= torch.minimum(centre, mean) + 1e-6).all())


@pytest.mark.parametrize("sigma", [0.01, 1.0])
@pytest.mark.parametrize("k", [1, 1000])
def test_a_constant_model_has_its_constant(sigma: float, k: int):
    found = stability(lambda x: x[:, 0] * 0 + 0.3, examples(), k=k, sigma=sigma, output="probabilities")
    torch.testing.assert_close(found, torch.full((200,), 0.3))


def test_without_noise_it_is_the_probability():
    model, x = network(), examples(rows=7)
    found = stability(model, x, 1, sigma=1e-6)
    torch.testing.assert_close(found, model(x).softmax(1)[:, 1].detach(), atol=1e-5, rtol=0)


def test_a_linear_model_has_its_mean():
    """sigma ||w|| sqrt(2/pi) below m(x); with the exact gamma, by ||w|| sigma sqrt2 Gamma(3/2)/Gamma(1)."""
    model, x = linear(torch.tensor([0.6, 0.8]), 0.0), torch.tensor([[0.4, 0.325]])  # m(x) = 0.5
    options: dict[str, Any] = {"k": 1_000_000, "sigma": 0.1, "output": "logits"}
    # Samples beyond 0 and 1 are the linear function's too, so the model is asked by a class that says so.
    found = stability(Unbounded(model), x, 1, **options)
    assert float(found) == pytest.approx(0.5 - 0.079788, abs=3e-4)
    lipschitz = stability(Unbounded(model), x, 1, measure="lipschitz", gamma=1.0, **options)
    assert float(lipschitz) == pytest.approx(0.5 - 0.1253314, abs=3e-4)


class Unbounded:
    """Logits of which the sigmoid is another function's value."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x).clamp(1e-6, 1 - 1e-6).logit()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(1, 60))
def test_the_order_of_the_measures(seed: int, k: int):
    """R with a valid gamma <= Rhat <= the mean of m(x_i), with the same noise; sampled gamma included."""
    w = torch.randn(3, generator=generator(seed))
    model, x = (lambda x: (x @ w).sigmoid()), examples(3, 6, seed)
    options: dict[str, Any] = {"k": k, "generator": seed, "output": "probabilities"}
    hat = stability(model, x, **options)
    sampled = stability(model, x, measure="lipschitz", gamma="sampled", **options)
    exact = stability(model, x, measure="lipschitz", gamma=float(w.norm() / 4), **options)
    noise = next(drawn(generator(seed), k, 0.1, x))
    mean = torch.stack([model(x + n) for n in noise]).mean(0)
    assert bool((exact <= sampled + 1e-6).all())
    assert bool((sampled <= hat + 1e-6).all())
    assert bool((hat <= mean + 1e-6).all())


def test_a_gamma_of_each_row_and_sampled_by_hand():
    model, x = network(3), examples(3, 4)
    gamma = torch.tensor([0.0, 0.5, 1.0, 2.0])
    mine = stability(model, x, measure="lipschitz", gamma=gamma, k=50)
    one = [stability(model, x, measure="lipschitz", gamma=float(g), k=50)[i] for i, g in enumerate(gamma)]
    torch.testing.assert_close(mine, torch.stack(one))
    noise = 0.1 * torch.randn(50, 3, generator=generator(0))
    points = torch.cat([x[:1], x[:1] + noise]).double()
    m = model.double()(points).softmax(1)[:, 1].detach()
    steep = max(
        float((m[i] - m[j]).abs() / (points[i] - points[j]).norm()) for i in range(51) for j in range(i)
    )
    wanted = m[1:].mean() - steep * noise.norm(dim=1).mean()
    found = stability(model.float(), x[:1], measure="lipschitz", gamma="sampled", k=50)
    assert float(found) == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("measure", ["relaxed", "lipschitz"])
def test_a_seed_gives_the_same_and_a_batch_is_its_rows(measure: Any):
    model, x = network(), examples(rows=5)
    gamma = None if measure == "relaxed" else "sampled"
    options: dict[str, Any] = {"measure": measure, "gamma": gamma, "k": 1500 if gamma is None else 200}
    found = stability(model, x, 1, generator=generator(3), **options)
    assert torch.equal(found, stability(model, x, 1, generator=3, **options))
    assert not torch.equal(found, stability(model, x, 1, generator=4, **options))
    alone = torch.cat([stability(model, row[None], 1, generator=3, **options) for row in x])
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
    pieces = stability(model, x, 1, generator=3, chunk=7, **options)
    torch.testing.assert_close(found, pieces, atol=1e-6, rtol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.sampled_from([5, 64, 8192]))
def test_the_gradient_is_that_of_finite_differences(seed: int, chunk: int):
    model, x = network(3, 3, seed).double(), examples(3, 4, seed).double()
    classifier = Classifier("test", model, 1, "logits", chunk, x)
    with classifier.in_use():
        noise = list(drawn(generator(seed), 30, 0.1, x))
        slope = relaxed_gradient(classifier, x, noise)
        for i in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[i] = 1e-6
            up, down = relaxed(classifier, x + step, noise), relaxed(classifier, x - step, noise)
            torch.testing.assert_close((up - down) / 2e-6, slope[:, i], atol=1e-3, rtol=1e-3)


# ---- the bound ------------------------------------------------------------------------------------------


def test_the_bound_is_kept_by_linear_models_and_nearly_reached():
    """M - m = v x with a mean of 0 about x: M(x) - R + gamma E|n| is N(0, |v|^2 sigma^2 / k) there."""
    k, sigma, trials = 20, 0.1, 20_000
    w, v = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])  # M = m + v (x - x0): slopes 1 and |w + v| = 1
    noise = sigma * torch.randn(trials, k, 2, generator=generator(0))
    # Of the certificate only what was used: M(x) >= mean(M(x_i)) - gamma |n|, so M(x) - R >= the mean of v n.
    slack = (noise @ v).mean(1)
    for epsilon in (0.03, 0.06, 0.09):
        held = float((slack >= -epsilon).double().mean())
        sure = stability_bound(epsilon, 1.0, k=k, sigma=sigma)
        weaker = 1 - math.exp(-k * epsilon**2 / (8 * 4 * sigma**2))
        assert weaker <= sure <= held + 0.01
    # No constant below 2: far out, log P is k eps^2 / (2 (2 sigma)^2) and a little more.
    far = 0.2
    tail = 0.5 * math.erfc(far * math.sqrt(k) / (2 * sigma) / math.sqrt(2))
    rate = -math.log(tail) / (k * far**2 / (4 * sigma**2))
    assert 1 / rate == pytest.approx(2, abs=0.4)
    assert float((w + v).norm()) == 1.0


def test_a_change_of_all_by_one_number_is_outside_of_the_bound():
    """m = 0.6 and M = 0.6 -+ 0.2, each with probability 1/2: E[M(x)] = m(x), slopes are 0, and R = 0.6."""
    x = torch.zeros(1, 2)
    r = float(
        stability(lambda x: x[:, 0] * 0 + 0.6, x, measure="lipschitz", gamma=0.0, output="probabilities")
    )
    assert stability_bound(0.1, 0.0) == 1.0
    assert sum(m >= r - 0.1 for m in (0.4, 0.8)) == 1


def test_the_bound_at_its_ends():
    assert stability_bound(0.0, 1.0) == 0.0
    assert stability_bound(0.1, 0.5, 1.5) == stability_bound(0.1, 1.0)
    assert stability_bound(0.01, 1.0) == pytest.approx(1 - math.exp(-1000 * 1e-4 / (2 * 4 * 0.01)))
    for wrong in ({"epsilon": -1.0}, {"gamma": -1.0}, {"gamma_new": -1.0}, {"k": 0}, {"sigma": 0.0}):
        with pytest.raises(optx.OptxError, match=f"{next(iter(wrong))} is"):
            stability_bound(**{"epsilon": 0.1, "gamma": 1.0, **wrong})


# ---- models ---------------------------------------------------------------------------------------------


def test_an_estimator_is_the_same_model_in_torch():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_breast_cancer()
    names = data.target_names[data.target]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(data.data, names)
    scaler, regression = pipeline[0], pipeline[1]
    w = torch.tensor(regression.coef_[0] / scaler.scale_)
    b = float(regression.intercept_[0] - (regression.coef_[0] * scaler.mean_ / scaler.scale_).sum())
    x = data.data[:9]
    mine = stability(linear(w, b), torch.tensor(x), 1, output="logits", sigma=0.5, k=300)
    theirs = stability(pipeline, torch.tensor(x), "malignant", sigma=0.5, k=300)
    torch.testing.assert_close(mine, theirs.to(mine.dtype), atol=1e-6, rtol=0)
    assert stability(pipeline, x.astype("float32"), "benign", k=10).shape == (9,)
    with pytest.raises(optx.OptxError, match="target is 1; it must be one of the estimator's classes"):
        stability(pipeline, x, 1)
    with pytest.raises(optx.OptxError, match="predict_proba of Pipeline gives none"):
        stability(pipeline, x, "benign", output="logits")


def test_one_column_is_the_second_of_two_classes():
    model, x = network(4, 1), examples(rows=6)
    second = stability(model, x, 1, output="logits")
    both = stability(lambda x: torch.cat([model(x) * 0, model(x)], 1), x, 1, output="logits")
    torch.testing.assert_close(second, both)
    of_first = stability(lambda x: -model(x)[:, 0], x, 0, output="logits")
    flipped = stability(lambda x: model(x)[:, 0].sigmoid(), x, 1, output="probabilities")
    torch.testing.assert_close(of_first, flipped)
    assert torch.equal(
        stability(lambda x: 40 * model(x), x, 1), stability(lambda x: 40 * model(x), x, output="logits")
    )


class Dropped(nn.Module):
    """Has a mode, running statistics, frozen weights and a head like transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
        self.norm.eval()
        self.out.bias.requires_grad_(False)
        self.fails = False

    def forward(self, x: Tensor) -> Any:
        if self.fails and len(x) > 5:
            raise RuntimeError("failed")
        return type("Out", (), {"logits": self.out(self.drop(self.norm(x)))})


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_as_it_was(fails: bool):
    torch.manual_seed(0)
    model, x = Dropped().train(), examples(rows=5)
    model.norm.eval()
    model.fails = fails
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="failed"):
            optx.analysis.robust_counterfactual(model, x, 1, base=x, k=20)
    else:
        first = optx.analysis.robust_counterfactual(model, x, 1, base=x, k=20)
        assert torch.equal(first.stability, stability(model, first.x, 1, k=20))
    assert [m.training for m in model.modules()] == modes == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_rows_with_axes_other_dtypes_and_inference_mode():
    body = network(12)
    model, x = nn.Sequential(nn.Flatten(), body), examples(12, 5).view(5, 3, 2, 2)
    found = stability(model, x, 1, k=100)
    torch.testing.assert_close(found, stability(body, x.flatten(1), 1, k=100))
    torch.testing.assert_close(found, stability(model, x.numpy(), 1, k=100))
    wide = stability(model.double(), x.double(), 1, k=100)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(found, wide.float(), atol=1e-6, rtol=0)
    half = stability(model.bfloat16(), x.bfloat16(), 1, k=100)
    assert half.dtype == torch.float32
    torch.testing.assert_close(found, half, atol=0.03, rtol=0)
    with torch.inference_mode():
        inside = stability(model.float(), x + 0, 1, k=100)
    torch.testing.assert_close(found, inside, atol=0.03, rtol=0)


# ---- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"target": 2}, "target is 2; it must be a class from 0 to 1"),
        ({"target": "a"}, "target is 'a'; it must be a class"),
        ({"k": 0}, "k is 0"),
        ({"sigma": 0.0}, r"sigma is 0\.0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"generator": "seed"}, "generator is 'seed'"),
        ({"output": "logit"}, "output is 'logit'; it must be one of 'auto'"),
        ({"output": "probabilities"}, "taken for probabilities, but the model gives numbers from"),
        ({"measure": "exact"}, "measure is 'exact'"),
        ({"gamma": 1.0}, "gamma has no use in measure='relaxed'"),
        ({"measure": "lipschitz"}, "gamma is None; for measure='lipschitz' it must be"),
        ({"measure": "lipschitz", "gamma": -1.0}, r"gamma is -1\.0"),
        ({"measure": "lipschitz", "gamma": torch.ones(3)}, "one of each of the 5 rows"),
        ({"x": torch.ones(4)}, r"x has shape \(4,\).*pass x\[None\]"),
        ({"x": torch.ones(0, 4)}, r"x has shape \(0, 4\)"),
        ({"x": torch.full((2, 4), torch.nan)}, "x has numbers that are not finite"),
        ({"x": torch.ones(2, 4, dtype=torch.long)}, "x has dtype torch.int64"),
        ({"x": "rows"}, "x is a str"),
        ({"model": 3}, "model is a int; it must be a module"),
        ({"model": lambda x: x[:, 0].sigmoid()}, "here all from 0 to 1.*Pass output='logits' or"),
        ({"model": lambda x: x[:, :2] / 0}, "the model gives numbers that are not finite"),
        ({"model": lambda x: x[:2]}, r"of 5 rows the model gives shape \(2, 4\)"),
        ({"model": lambda x: "yes"}, "the model gives str"),
    ],
)
def test_what_has_no_stability_is_refused(changed: dict[str, Any], words: str):
    given = {"model": network(), "x": examples(rows=5), **changed}
    with pytest.raises(optx.OptxError, match=f"stability: .*{words}"):
        stability(**given)


def test_outputs_that_are_no_probabilities_farther_away_are_refused():
    """At x they are; around it, they leave [0, 1]."""
    with pytest.raises(optx.OptxError, match="taken for probabilities, but the model gives numbers from"):
        stability(lambda x: x[:, 0], torch.tensor([[0.99]]), output="probabilities")
