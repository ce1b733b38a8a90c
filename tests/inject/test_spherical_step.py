"""The factored step: dense SGD's to the last digits, the source's numbers, and factors that stay in shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.inject._spherical_factors import Factors, Pending, Sums

D64 = torch.float64


def head(D: int, d: int, seed: int = 0, bias: bool = False, dtype: torch.dtype = D64) -> nn.Sequential:
    """A model that is a head alone, so that its gradient is the input's."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, D, bias=bias, dtype=dtype))


def plain_factors(W: Tensor) -> Factors:
    d = W.shape[1]
    eye, zero = torch.eye(d, dtype=D64), torch.zeros(d, dtype=D64)
    made = Factors(W.clone(), eye, eye.clone(), zero, torch.zeros(d, d, dtype=D64), zero.clone())
    made.recompute()
    return made


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max())


def check_factors(handle: Any, W: Tensor, tolerance: float = 1e-12) -> None:
    """W, W^T W, W^T 1 and the inverse, against a dense W."""
    factors = handle._part.factors
    size = float(W.abs().max())
    assert off(torch.cat(list(factors.pieces())), W) < tolerance * max(1, size)
    assert off(factors.Q, W.T @ W) < tolerance * max(1.0, float((W.T @ W).abs().max()))
    assert off(factors.columns, W.sum(0)) < tolerance * max(1.0, float(W.sum(0).abs().max()))
    assert off(factors.U @ factors.inverse, torch.eye(len(factors.U), dtype=D64)) < tolerance


@pytest.mark.parametrize(
    ("loss", "lr", "batch", "bias", "decay"),
    [
        (optx.ZLoss(0.5, 3.0, reduction="sum"), 0.1, 4, False, 0.0),  # the issue's
        (optx.ZLoss(1.0, 0.0), 0.3, 9, True, 0.1),  # more examples than dimensions
        (optx.ZLoss(form="mse"), 0.05, 4, True, 0.0),
        (optx.ZLoss(form="spherical", reduction="sum"), 0.05, 3, False, 0.2),
        (optx.ZLoss(form="taylor"), 0.1, 11, True, 0.0),
    ],
)
def test_a_hundred_steps_are_dense_sgds(
    loss: optx.ZLoss, lr: float, batch: int, bias: bool, decay: float
) -> None:
    dense, model = head(50, 6, bias=bias), head(50, 6, bias=bias)
    injection = optx.SphericalHead(loss, lr=lr, weight_decay=decay, stabilize_every=7)
    handle = optx.attach(model, injection, targets="0")
    sgd = torch.optim.SGD(dense.parameters(), lr=lr, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        x = torch.randn(batch, 6, dtype=D64, generator=generator)
        y = torch.randint(12, (batch,), generator=generator)  # some twice in a batch
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted = loss(dense(other), y)
        found = handle.loss(model(own), y)
        assert off(found, wanted) < 1e-12 * max(1.0, wanted.item())
        sgd.zero_grad()
        wanted.backward()
        found.backward()
        assert own.grad is not None
        assert other.grad is not None
        assert off(own.grad, other.grad) < 1e-12 * max(1.0, float(other.grad.abs().max()))
        sgd.step()
        handle.step()
    module: Any = dense[0]
    W = module.weight.detach()
    check_factors(handle, torch.cat([W, module.bias.detach()[:, None]], 1) if bias else W)
    handle.remove()
    for name, p in model.state_dict().items():
        assert off(p, dense.state_dict()[name]) < 1e-12


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["z", "mse", "spherical", "taylor"]),
    st.integers(1, 8),
    st.integers(1, 12),
    st.floats(1e-4, 2.0),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_step_is_dense_sgds(form: Any, d: int, m: int, lr: float, decayed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(20, d, dtype=D64, generator=generator)
    X = torch.randn(m, d, dtype=D64, generator=generator)
    y = torch.randint(20, (m,), generator=generator)
    grads = Sums(*torch.randn(3, m, dtype=D64, generator=generator))  # of any loss of the family
    factors, decay = plain_factors(W), 0.1 * decayed
    batch, _ = factors.forward(X, y)
    factors.step(Pending(batch, grads), lr, decay)
    O = 2 * (X @ W.T) * grads.squares[:, None] + grads.total[:, None]
    O[torch.arange(m), y] += grads.target
    right = (1 - lr * decay) * W - lr * O.T @ X
    size = float(right.abs().max())
    assert off(torch.cat(list(factors.pieces())), right) < 1e-9 * size
    assert off(factors.Q, right.T @ right) < 1e-9 * size**2 * 20
    assert off(factors.columns, right.sum(0)) < 1e-9 * size * 20


def test_the_numbers_of_the_source() -> None:
    W = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=D64)
    factors, x, y = plain_factors(W), torch.tensor([[1.0, 2.0]], dtype=D64), torch.tensor([1])
    assert factors.Q.tolist() == [[2, 1], [1, 2]]
    batch, sums = factors.forward(x, y)
    assert float(sums.squares - 2 * sums.target + 1) == 11
    one = torch.ones(1, dtype=D64)
    grads = Sums(0 * one, one, -2 * one)
    assert factors.input_grad(batch, grads).tolist() == [[8, 8]]
    factors.step(Pending(batch, grads), 0.01, 0.0)
    wanted = {
        "U": [[0.98, -0.04], [-0.04, 0.92]],
        "V": [[1, 0], [0.0222222, 1.0444444], [1, 1]],
        "Q": [[1.8444, 0.7688], [0.7688, 1.6976]],
    }
    for name, numbers in wanted.items():
        assert off(getattr(factors, name), torch.tensor(numbers, dtype=D64)) < 1e-7, name
    after = torch.tensor([[0.98, -0.04], [-0.02, 0.96], [0.94, 0.88]], dtype=D64)
    assert off(torch.cat(list(factors.pieces())), after) < 1e-12


def test_a_step_that_would_be_singular_is_taken_on_the_weight_itself() -> None:
    W = torch.randn(7, 2, dtype=D64, generator=torch.Generator().manual_seed(0))
    factors, x = plain_factors(W), torch.tensor([[1.0, 2.0]], dtype=D64)
    batch, _ = factors.forward(x, torch.tensor([3]))
    grads = Sums(*torch.tensor([[0.3], [1.0], [-2.0]], dtype=D64))
    lr = 0.1 / 1.01  # with the decay 2 lr g |x|^2 is 1
    factors.step(Pending(batch, grads), lr, 0.1)
    O = 2 * (x @ W.T) + 0.3
    O[0, 3] -= 2
    right = (1 - 0.1 * lr) * W - lr * O.T @ x
    assert off(torch.cat(list(factors.pieces())), right) < 1e-12
    assert off(factors.Q, right.T @ right) < 1e-12
    assert torch.equal(factors.U, torch.eye(2, dtype=D64))


@pytest.mark.parametrize("far", [1, 6])
def test_stabilising_changes_no_weight(far: int) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = plain_factors(torch.randn(40, 8, dtype=D64, generator=generator))
    left, _, right = torch.linalg.svd(torch.randn(8, 8, dtype=D64, generator=generator))
    values = torch.ones(8, dtype=D64)
    values[:far] = torch.tensor([0.01, 30, 5, 0.2, 0.4, 9], dtype=D64)[:far]
    factors.U.copy_(left @ torch.diag(values) @ right)
    factors.omega.copy_(torch.randn(8, dtype=D64, generator=generator))
    factors.recompute()
    W, Q = torch.cat(list(factors.pieces())), factors.Q.clone()
    assert factors.stabilise() == far
    assert off(torch.cat(list(factors.pieces())), W) < 1e-10
    assert torch.linalg.cond(factors.U) <= 4
    assert off(factors.U @ factors.inverse, torch.eye(8, dtype=D64)) < 1e-12
    assert off(factors.Q, Q) < 1e-9
    assert (factors.omega.any() == 0) == (far == 6)  # more than a third: factored anew
    assert off(factors.Q, W.T @ W) < 1e-9


def test_in_float32_the_sums_stay_those_of_the_weight() -> None:
    model = head(300, 8, dtype=torch.float32)
    options = {"lr": 5.0, "stabilize_every": 20, "recompute_every": 150}
    handle = optx.attach(model, optx.SphericalHead(optx.ZLoss(0.2, 5.0), **options), targets="0")
    generator, exact = torch.Generator().manual_seed(0), []
    for i in range(150):
        x = torch.randn(16, 8, generator=generator)
        handle.loss(model(x), torch.randint(300, (16,), generator=generator)).backward()
        handle.step()
        if i in (148, 149):
            W = torch.cat(list(handle._part.factors.pieces()))
            exact.append(off(handle._part.factors.Q, W.T @ W) / float((W.T @ W).abs().max()))
    assert handle._part.V.dtype == torch.float32
    assert exact[0] < 1e-6
    assert exact[1] < 1e-12  # computed anew at the 150th


def test_the_factors_are_brought_back_before_they_drift_far() -> None:
    model = head(30, 3)
    options: dict[str, Any] = {"lr": 0.05, "stabilize_every": 10**6}
    handle = optx.attach(model, optx.SphericalHead(optx.ZLoss(form="mse"), **options), targets="0")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = 2 * torch.randn(5, 3, dtype=D64, generator=generator)
        handle.loss(model(x), torch.randint(30, (5,), generator=generator)).backward()
        handle.step()
        assert torch.linalg.cond(handle._part.U) < 40
