"""Self-tuning networks learn the best response, and hyperparameters follow it to their optimum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx


def test_the_best_response_of_a_linear_problem_is_exact() -> None:
    """Targets y + h u: the best weights are X^+ (y + h u), linear in h as the layer's are."""
    torch.manual_seed(0)
    X, y, u = torch.randn(12, 4).double(), torch.randn(12).double(), torch.randn(12).double()
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    stn = optx.attach(model, optx.STN(optx.HParams(h=optx.hp(0.7)), delta=True, shared=True, warmup=100_000))
    opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(2000):
        with stn.train_batch():
            (model(X).squeeze(1) - y - stn.hparams["h"].value * u).square().mean().backward()
        opt.step()
        opt.zero_grad()
    best, slope = (torch.linalg.lstsq(X, t[:, None]).solution[:, 0] for t in (y + 0.7 * u, u))
    part: Any = model[0].optx.stn  # type: ignore[union-attr]
    torch.testing.assert_close(model[0].weight[0], best, rtol=0, atol=1e-9)
    torch.testing.assert_close((part.V * part.W_h)[0], slope, rtol=0, atol=1e-9)


@pytest.mark.long
def test_the_papers_ridge_problem() -> None:
    """Property 7: w*_i = sigmoid(log d_i^2 - l) (1, 3)_i, at X = diag(2, 1), y = (2, 3); value and slope."""
    X, y = torch.diag(torch.tensor([2.0, 1])).double(), torch.tensor([2.0, 3]).double()
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    torch.manual_seed(0)
    hparams = optx.HParams(log_l2=optx.hp(0.0, sigma=0.05))
    stn = optx.attach(model, optx.STN(hparams, delta=True, shared=True, warmup=100_000))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    eye = torch.eye(2).double()
    for _ in range(8000):
        with stn.train_batch():
            w = model(eye).squeeze(1)
            ((y - X @ w).square().sum() + hparams["log_l2"].value.exp() * w.square().sum()).backward()
        opt.step()
        opt.zero_grad()
    best = torch.sigmoid(torch.tensor([4.0, 1]).log()) * torch.tensor([1.0, 3])
    torch.testing.assert_close(best, torch.tensor([0.8, 1.5]))
    torch.testing.assert_close(model[0].weight[0].float(), best, rtol=0, atol=0.01)
    part: Any = model[0].optx.stn  # type: ignore[union-attr]
    share = torch.sigmoid(torch.tensor([4.0, 1]).log())
    slope = -share * (1 - share) * torch.tensor([1.0, 3])
    torch.testing.assert_close((part.V * part.W_h)[0].float(), slope, rtol=0.1, atol=0.02)


@pytest.mark.long
@pytest.mark.parametrize("start", [-4.0, 1.5])
def test_ridge_regression_finds_its_penalty_from_both_sides(start: float) -> None:
    """The specification's toy: 30 training and 200 validation points, 20 weights, penalty e^l |w|^2."""
    draws = torch.Generator().manual_seed(0)
    true = torch.randn(20, generator=draws)
    X, Xv = torch.randn(30, 20, generator=draws), torch.randn(200, 20, generator=draws)
    y, yv = (A @ true + 2 * torch.randn(len(A), generator=draws) for A in (X, Xv))

    def validation(log_l2: Tensor) -> float:
        w = torch.linalg.solve(X.t() @ X / 30 + log_l2.exp() * torch.eye(20), X.t() @ y / 30)
        return float((yv - Xv @ w).square().mean())

    grid = torch.linspace(-6, 3, 91)
    curve = [validation(one) for one in grid]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 1, bias=False))
    hparams = optx.HParams(log_l2=optx.hp(start))
    stn = optx.attach(model, optx.STN(hparams, delta=True, shared=True, lr=0.02, sigma_lr=0, warmup=600))
    opt, eye = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), torch.eye(20)
    for _ in range(2500):
        with stn.train_batch():
            w = model(eye).squeeze(1)
            ((y - X @ w).square().mean() + hparams["log_l2"].value.exp() * w.square().sum()).backward()
        opt.step()
        opt.zero_grad()
        if stn.due:
            with stn.valid_batch():
                (yv - model(Xv).squeeze(1)).square().mean().backward()
            stn.step_hparams()
    found = hparams.values()["log_l2"]
    assert found == pytest.approx(float(grid[curve.index(min(curve))]), abs=0.2)
    with torch.no_grad():
        assert (
            (yv - model(Xv).squeeze(1)).square().mean()
            < 1.01 * min(curve)
            < 0.9 * validation(torch.tensor(start))
        )
