"""`optx.RobustRecoveryLoss` and `optx.scaling.small_init_` against the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from processes import on_processes
from reference import subgm as reference
from torch import Tensor, nn

import optx

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@given(m=st.integers(1, 9), d=st.integers(1, 6), rank=st.integers(1, 7), seed=st.integers(0, 99))
def test_value_gradient_and_norm_are_the_formulas(m: int, d: int, rank: int, seed: int) -> None:
    """Property 2, of A that are not symmetric."""
    A, y, U = draw(m, d, d, seed=seed), draw(m, seed=seed + 1), draw(d, rank, seed=seed + 2).requires_grad_()
    loss = optx.RobustRecoveryLoss(A, y)
    value = loss(U)
    value.backward()
    Q, D = reference.subgradient(A, y, U.detach())
    assert float(value.detach()) == pytest.approx(reference.loss(A, y, U.detach()), rel=1e-12)
    assert torch.allclose(U.grad, D, rtol=1e-12, atol=1e-12)
    assert float(loss.q_norm) == pytest.approx(float(Q.norm()), rel=1e-12)


def test_two_factors_are_what_autograd_makes_of_the_residuals() -> None:
    A, y = draw(7, 4, 3), draw(7, seed=1)
    U, V = draw(4, 2, seed=2).requires_grad_(), draw(3, 2, seed=3).requires_grad_()
    plain = ((A * (U @ V.t())).sum((1, 2)) - y).abs().mean()
    wanted = torch.autograd.grad(plain, (U, V))
    value = optx.RobustRecoveryLoss(A, y)(U, V)
    assert torch.allclose(value, plain, rtol=1e-12)
    for got, want in zip(torch.autograd.grad(value * 3, (U, V)), wanted, strict=True):
        assert torch.allclose(got, 3 * want, rtol=1e-12)


def test_an_exact_fit_has_no_sign() -> None:
    U = torch.ones(2, 1, requires_grad=True)
    loss = optx.RobustRecoveryLoss(torch.eye(2)[None], torch.tensor([2.0]))
    loss(U).backward()
    assert not U.grad.any()
    assert float(loss.q_norm) == 0.0


@pytest.mark.parametrize(
    ("share", "size", "noise", "phi"),
    [
        (0.0, 0.0, 0.0, math.sqrt(2 / math.pi)),
        (0.0, 0.0, 1.0, 0.564190),
        (0.3, 10.0, 0.0, 0.558519),
        (0.3, 1.0, 0.0, 0.703702),
    ],
)
def test_the_sign_is_along_the_error(share: float, size: float, noise: float, phi: float) -> None:
    """Property 6: E[sign(<A, X> - s) A] = phi X / |X|, of scalars: A is 1 x 1 and X = 1."""
    generator, m = torch.Generator().manual_seed(0), 1_000_000
    A = torch.randn(m, generator=generator)
    outliers = (
        (torch.rand(m, generator=generator) < share) * size * torch.randn(m, generator=generator).sign()
    )
    y = outliers + noise * torch.randn(m, generator=generator)
    loss = optx.RobustRecoveryLoss(A[:, None, None], y)
    loss(torch.ones(1, 1, requires_grad=True))
    assert float(loss.q_norm) == pytest.approx(phi, abs=3e-3)


def test_measurements_of_ones_own_are_the_dense_ones() -> None:
    i, j = torch.tensor([0, 1, 3, 3]), torch.tensor([2, 1, 0, 3])

    class Entries:
        def measure(self, X: Tensor) -> Tensor:
            return X[i, j]

        def adjoint(self, weights: Tensor) -> Tensor:
            return weights.new_zeros(4, 4).index_put_((i, j), weights, accumulate=True)

    A = torch.zeros(4, 4, 4, dtype=F64)
    A[range(4), i, j] = 1.0
    y, U = draw(4, seed=1), draw(4, 2)
    found = []
    for measured in (A, Entries()):
        loss, one = optx.RobustRecoveryLoss(measured, y), nn.Parameter(U.clone())
        loss(one).backward()
        found.append((one.grad, loss.q_norm, loss.spectral(2)))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


def test_the_spectral_start_points_at_the_matrix() -> None:
    A, basis = draw(4000, 8, 8), torch.linalg.qr(draw(8, 2, seed=1))[0]
    loss = optx.RobustRecoveryLoss(A, A.flatten(1) @ (basis @ basis.t()).flatten())
    U = optx.scaling.small_init_(torch.empty(8, 2, dtype=F64), 1e-3, loss.spectral(2))
    assert float(torch.linalg.matrix_norm(U, 2)) == pytest.approx(1e-3)
    found = U @ U.t() / 1e-6
    assert float((found - basis @ basis.t()).norm()) < 0.2
    assert loss.forwards == 0


def test_small_random_starts() -> None:
    U = torch.empty(400, 50)
    optx.scaling.small_init_(U, 1e-2, generator=torch.Generator().manual_seed(0))
    assert float(U.std()) == pytest.approx(1e-2 / 20, rel=0.03)
    again = optx.scaling.small_init_(torch.empty(400, 50), 1e-2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(U, again)


def test_evaluation_is_no_step_of_training() -> None:
    loss, U = optx.RobustRecoveryLoss(draw(3, 2, 2), draw(3)), draw(2, 1).requires_grad_()
    loss(U)
    norm = loss.q_norm
    with torch.no_grad():
        loss(U * 5)
    assert loss.forwards == 1
    assert loss.q_norm is norm
    assert not loss.state_dict()


ones = torch.ones


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: optx.RobustRecoveryLoss(ones(3, 2), ones(3)), r"A has shape \(3, 2\)"),
        (lambda: optx.RobustRecoveryLoss(ones(3, 2, 2), ones(4)), r"y \(4,\)"),
        (lambda: optx.RobustRecoveryLoss(ones(3, 2, 2), ones(3, dtype=F64)), "give them one dtype"),
        (lambda: optx.RobustRecoveryLoss(ones(3, 2, 2).half(), ones(3).half()), "float32 or float64; it is"),
        (lambda: optx.RobustRecoveryLoss(ones(3, 2, 2), ones(3) / 0), "with inf or nan"),
        (lambda: optx.RobustRecoveryLoss(object(), ones(3)), r"have measure\(X\) and adjoint"),
        (lambda: optx.RobustRecoveryLoss(ones(3, 2, 2), ones(3))(ones(3, 1)), "U and V have 3 and 3 rows"),
        (lambda: optx.RobustRecoveryLoss(ones(3, 2, 2), ones(3))(ones(2, 1).half()), r"U is torch\.float16"),
        (lambda: optx.RobustRecoveryLoss(ones(3, 2, 4), ones(3)).spectral(), "have no eigenvectors"),
        (
            lambda: optx.RobustRecoveryLoss(ones(3, 2, 2), ones(3)).spectral(3),
            "rank is 3; it must be in 1 to 2",
        ),
        (lambda: optx.RobustRecoveryLoss(-torch.eye(2)[None], ones(1)).spectral(), "no positive eigenvalue"),
        (lambda: optx.scaling.small_init_(ones(3)), "must be a matrix"),
        (lambda: optx.scaling.small_init_(ones(3, 1).bfloat16()), "must be float32 or float64"),
        (lambda: optx.scaling.small_init_(ones(3, 1), 0.0), "alpha is 0"),
        (lambda: optx.scaling.small_init_(ones(3, 1), 1.0, ones(3, 2)), r"direction has shape \(3, 2\)"),
        (lambda: optx.scaling.small_init_(ones(3, 1), 1.0, 0 * ones(3, 1)), "has norm 0.0"),
    ],
)
def test_what_it_refuses(make: Any, said: str) -> None:
    with pytest.raises(optx.OptxError, match=said):
        make()


def recovered(world: int, rank: int) -> tuple[Tensor, Tensor]:
    """A few steps, with every world-th measurement; gradients averaged as DDP does."""
    loss = optx.RobustRecoveryLoss(draw(40, 5, 5)[rank::world], draw(40, seed=1)[rank::world])
    if world == 1:
        loss._of_all = lambda value, Q: (value, Q.norm())  # alone, though torch.distributed is there
    U = nn.Parameter(draw(5, 3, seed=2))
    opt = optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(0.2, 0.9, loss=loss), fused=False)
    for _ in range(4):
        opt.zero_grad()
        loss(U).backward()
        if world > 1:
            dist.all_reduce(U.grad)
            U.grad /= world
        opt.step()
    return U.detach(), loss.value


def two_are_one(rank: int) -> None:
    (U, value), (V, other) = recovered(2, rank), recovered(1, 0)
    assert torch.allclose(U, V, rtol=1e-10)
    assert torch.allclose(value, other, rtol=1e-10)


test_processes = on_processes(2, two_are_one)
