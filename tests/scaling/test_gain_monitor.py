"""Top singular values during training; the law that they are fitted to; AdamW's steady state."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.scaling import GainMonitor, GainRun, fit_gains, sublayer_gain

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny matrices


def truth(w: Tensor) -> float:
    return float(torch.linalg.svdvals(w.detach().double())[0])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=g)
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


# ---- the monitor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_keeps_up_with_training(wrapped):
    model = net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if wrapped:
        optimizer = optx.wrap(optimizer, optx.PerpGrad())
    with GainMonitor(model, optimizer, every=2) as monitor:
        train(model, optimizer, 60)
    assert [record.step for record in monitor.records] == list(range(2, 61, 2))
    start = monitor.records[0].value
    last = monitor.records[-1]
    for name in ("0.weight", "2.weight", "4.weight"):
        assert last.value[name] == pytest.approx(truth(model.get_parameter(name)), rel=5e-3)
        assert last.residual[name] < 0.1
    assert start != last.value
    assert monitor.seconds > 0
    gains = monitor.gains()
    assert gains.compare(sublayer_gain(model, iterations=3000)) == pytest.approx(
        dict.fromkeys(last.value, 1.0), rel=5e-3
    )
    assert sublayer_gain(model, start=gains, tol=1e-2).top["0.weight"].iterations < 20


def test_training_is_the_same_bit_for_bit_and_the_hook_goes():
    runs: list[tuple[list[Tensor], Tensor]] = []
    for watched in (False, True):
        model = net()
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        monitor = GainMonitor(model, optimizer, every=1) if watched else None
        train(model, optimizer, 5)
        if monitor is not None:
            monitor.remove()
            train(model, optimizer, 0)
            assert len(monitor.records) == 5
            optimizer.step()
            assert len(monitor.records) == 5
            assert not optimizer._optimizer_step_post_hooks
        else:
            optimizer.step()
        runs.append(([p.detach().clone() for p in model.parameters()], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_hook_goes_after_an_error_too():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), GainMonitor(model, optimizer):
        raise KeyError
    assert not optimizer._optimizer_step_post_hooks


def test_a_matrix_that_breaks_is_named_once_and_the_others_go_on():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GainMonitor(model, optimizer, every=1) as monitor:
        train(model, optimizer, 1)
        model[2].weight.data[0, 0] = math.nan
        with pytest.warns(UserWarning, match="'2.weight' holds inf or nan after step 2"):
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        model[2].weight.data[0, 0] = 0.0
        optimizer.step()
    assert [math.isnan(record.value["2.weight"]) for record in monitor.records] == [False, True, True, False]
    assert monitor.records[-1].value["0.weight"] > 0
    assert monitor.records[-1].value["2.weight"] == pytest.approx(truth(model[2].weight), rel=0.02)


def test_what_cannot_be_watched_is_said():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(optx.OptxError, match="every is 0"):
        GainMonitor(model, optimizer, every=0)
    with pytest.raises(optx.OptxError, match="optimizer is a Sequential"):
        GainMonitor(model, model)  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="no matrix"):
        GainMonitor(nn.LayerNorm(3), optimizer)
    assert not optimizer._optimizer_step_post_hooks


# ---- the law ----------------------------------------------------------------------------------------------


@given(
    st.floats(-1.0, 1.5),
    st.floats(-0.5, 1.0),
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4),
    st.lists(st.sampled_from([32, 64, 128, 256]), min_size=2, max_size=5, unique=True),
)
def test_the_fit_finds_the_law_that_made_the_values(exponent, ratio, constants, widths):
    runs = [
        GainRun(d, lr, wd, {f"w{i}": c * (lr / wd) ** ratio * d**exponent for i, c in enumerate(constants)})
        for d in widths
        for lr, wd in ((1e-3, 0.1), (4e-3, 0.3))
    ]
    fit = fit_gains(runs, fit_ratio=True)
    assert fit.exponent == pytest.approx(exponent, abs=1e-6)
    assert fit.ratio_exponent == pytest.approx(ratio, abs=1e-6)
    assert fit.residual < 1e-6
    assert fit.constants == pytest.approx({f"w{i}": c for i, c in enumerate(constants)}, rel=1e-4)
    assert fit.predict("w0", 999, 1e-2, 0.2) == pytest.approx(
        constants[0] * 0.05**ratio * 999**exponent, rel=1e-4
    )


def test_what_the_law_misses_is_the_residual():
    noise = [0.1, -0.1, -0.1, 0.1]
    runs = [
        GainRun(d, 1e-3, 0.1, {"w": d**0.75 * math.exp(e)}) for d, e in zip((1, 2, 4, 8), noise, strict=True)
    ]
    fit = fit_gains(runs)
    assert fit.exponent == pytest.approx(0.75)  # the noise has no slope
    assert fit.residual == pytest.approx(0.1)
    assert fit.residuals["w"] == pytest.approx(noise)
    # s / sqrt(sum of squares of log width about its mean), s^2 = 4 * 0.1^2 / (4 - 2)
    assert fit.exponent_error == pytest.approx(math.sqrt(0.02 / (5 * math.log(2) ** 2)))
    assert (fit.ratio_exponent, fit.ratio_error) == (0.5, 0.0)
    assert math.isnan(fit_gains(runs[:2]).exponent_error)


@pytest.mark.parametrize(
    ("runs", "options", "words"),
    [
        ([], {}, "runs is empty"),
        ([GainRun(8, 1, 1, {"w": 1.0})] * 2, {}, "two widths"),
        ([GainRun(d, 1e-3 * d, 1, {"w": 1.0}) for d in (1, 2, 4)], {"fit_ratio": True}, "otherwise than"),
        ([GainRun(8, 1, 1, {"w": 1.0}), GainRun(9, 1, 1, {"v": 1.0})], {}, r"'v' is in one of runs\[0\]"),
        ([GainRun(8, 1, 1, {"w": 1.0}), GainRun(9, 1, 0, {"w": 1.0})], {}, r"runs\[1\].weight_decay is 0"),
        ([GainRun(8, 1, 1, {"w": 0.0}), GainRun(9, 1, 1, {"w": 1.0})], {}, r"runs\[0\] has 0.0 for 'w'"),
        ([GainRun(8, 1, 1, {"w": "1"})], {}, r"runs\[0\] has '1' for 'w'"),
        ([GainRun(8, 1, 1, {})], {}, r"runs\[0\].gains is empty"),
        ([GainRun(8, 1, 1, None)], {}, r"runs\[0\].gains is a NoneType"),
        ([GainRun("8", 1, 1, {"w": 1.0})], {}, r"runs\[0\].width is '8'"),
        ([(8, 1, 1, {"w": 1.0})], {}, r"runs\[0\] is a tuple"),
    ],
)
def test_runs_that_cannot_be_fitted_are_refused(runs, options, words):
    with pytest.raises(optx.OptxError, match=words):
        fit_gains(runs, **options)
    with pytest.raises(optx.OptxError, match="was not in the fit"):
        fit_gains([GainRun(d, 1, 1, {"w": 1.0}) for d in (1, 2)]).predict("v", 1, 1, 1)


# ---- the steady state -------------------------------------------------------------------------------------


def steady(width: int, lr: float, decay: float, steps: int) -> tuple[nn.Linear, GainMonitor]:
    """A square matrix under AdamW whose gradients are noise, and its monitor."""
    g = torch.Generator().manual_seed(width)
    model = nn.Linear(width, width, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, foreach=False)
    with GainMonitor(model, optimizer, every=steps // 100, warmup=0) as monitor:
        for _ in range(steps):
            model.weight.grad = torch.randn(width, width, generator=g)
            optimizer.step()
    return model, monitor


def test_adamw_on_noise_comes_to_the_size_that_lr_and_decay_say():
    """sqrt(lr / (2 decay)); of noise, the top singular value is 2 sqrt(d) times that."""
    model, monitor = steady(64, 2e-3, 1.0, 2500)
    size = math.sqrt(2e-3 / 2)
    assert model.weight.detach().square().mean().sqrt().item() == pytest.approx(size, rel=0.03)
    assert truth(model.weight) == pytest.approx(2 * 8 * size, rel=0.1)
    settled = [record.value["weight"] for record in monitor.records[-20:]]
    assert sum(settled) / 20 == pytest.approx(2 * 8 * size, rel=0.12)


def test_the_fit_finds_noises_own_law():
    """Noise has sqrt(lr / decay) * width^0.5: what the fit must say of it, not the paper's 0.75."""
    runs: list[GainRun] = []
    for width in (16, 32, 64):
        for lr, decay in ((1e-2, 0.5), (1e-2, 2.0)):
            model, monitor = steady(width, lr, decay, int(4 / (lr * decay)))
            runs.append(GainRun(width, lr, decay, sublayer_gain(model, start=monitor.gains())))
    fit = fit_gains(runs, fit_ratio=True)
    assert fit.exponent == pytest.approx(0.5, abs=0.08)
    assert fit.ratio_exponent == pytest.approx(0.5, abs=0.08)
    assert fit.residual < 0.05
    assert fit.constants["weight"] == pytest.approx(2 / math.sqrt(2), rel=0.3)


def test_a_law_of_nothing_is_refused():
    fit = fit_gains([GainRun(d, 1, 1, {"w": 1.0}) for d in (1, 2)])
    with pytest.raises(optx.OptxError, match="weight_decay is 0"):
        fit.predict("w", 1, 1, 0)


def test_accelerates_optimizer_is_followed():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(6, 2)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with GainMonitor(model, optimizer, every=2) as monitor:
        train(model, optimizer, 4)
    assert [record.step for record in monitor.records] == [2, 4]
    train(model, optimizer, 2)
    assert len(monitor.records) == 2


def test_weights_that_were_replaced_are_followed():
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GainMonitor(model, optimizer, every=1) as monitor:
        wide = {name: 10 * value.double() for name, value in model.state_dict().items()}
        model.load_state_dict(wide, assign=True)  # other tensors, of another dtype
        optimizer.step()
        assert monitor.records[-1].value["weight"] == pytest.approx(truth(model.weight), rel=1e-5)
        model.weight = nn.Parameter(torch.ones(3, 6))
        with pytest.raises(optx.OptxError, match=r"'weight' has shape \(3, 6\) now"):
            optimizer.step()
        del model.weight
        with pytest.raises(optx.OptxError, match="'weight' is gone"):
            monitor.gains()


def test_an_optimizer_of_another_model_is_told():
    with pytest.warns(UserWarning, match="none of the optimizer's parameters"):
        GainMonitor(nn.Linear(6, 2), torch.optim.SGD(nn.Linear(6, 2).parameters())).remove()
