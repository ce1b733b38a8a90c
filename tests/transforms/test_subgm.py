"""`optx.SubGM`: step sizes against the formula, and what the sub-gradient method recovers."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import subgm as reference
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
F64 = torch.float64


def problem(
    d: int = 6, rank: int = 2, m: int = 120, outliers: float = 0.0, size: float = 10.0, seed: int = 0
):
    """Measurements of a projector, its matrix, and y with gross errors."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(m, d, d, generator=generator, dtype=F64)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=F64))[0]
    truth = basis @ basis.t()
    wrong = torch.rand(m, generator=generator) < outliers
    y = A.flatten(1) @ truth.flatten() + wrong * size * torch.randn(m, generator=generator, dtype=F64)
    return A, y, truth


def start(d: int, rank: int, alpha: float = 1e-2, dtype: torch.dtype = F64) -> nn.Parameter:
    U = torch.empty(d, rank, dtype=dtype)
    return nn.Parameter(optx.scaling.small_init_(U, alpha, generator=torch.Generator().manual_seed(1)))


def descend(U: nn.Parameter, loss: optx.RobustRecoveryLoss, opt: Any, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss(U).backward()
        opt.step()


@both
def test_one_step_by_hand(fused: bool) -> None:
    """Property 1: residual 0.75, Q = I, eta = 0.1 / sqrt 2."""
    U = nn.Parameter(torch.tensor([[1.0], [0.0]], dtype=F64))
    loss = optx.RobustRecoveryLoss(torch.eye(2, dtype=F64)[None], torch.tensor([0.25], dtype=F64))
    opt = optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(0.1, 1.0, loss=loss), fused=fused)
    loss(U).backward()
    assert torch.equal(U.grad, torch.tensor([[2.0], [0.0]], dtype=F64))
    opt.step()
    assert U.flatten().tolist() == pytest.approx([0.85857864, 0.0], abs=1e-8)
    assert opt.metrics()["subgm/step_size"] == pytest.approx(0.1 / math.sqrt(2))


@pytest.mark.parametrize("mode", ["geometric", "polyak"])
def test_steps_are_the_formulas(mode: Any) -> None:
    A, y, _ = problem(outliers=0.2)
    U = start(6, 3, alpha=0.5)
    expected = reference.run(A, y, U.detach().clone(), 0.1, 0.9, 12, mode)
    loss = optx.RobustRecoveryLoss(A, y)
    descend(U, loss, optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(0.1, 0.9, mode, loss=loss)), 12)
    assert torch.allclose(U, expected, rtol=1e-10, atol=1e-12)


@given(
    shapes=st.lists(st.sampled_from([(3,), (2, 5), (), (1,), (0,)]), min_size=1, max_size=4),
    eta0=st.floats(1e-3, 10.0),
    rho=st.floats(0.1, 1.0),
    lr=st.floats(0.01, 2.0),
    seed=st.integers(0, 99),
)
def test_without_a_loss_every_step_has_its_length(shapes: Any, eta0: float, rho: float, lr: float, seed: int):
    """The variant: the norm of all gradients divides, so a step is lr eta0 rho^t long, whatever they are."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in shapes]
    opt = optx.wrap(torch.optim.SGD(params, lr=lr), optx.SubGM(eta0, rho), fused=False)
    for t in range(3):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, dtype=F64) * 100
        moves = sum(p.numel() for p in params) > 0
        opt.step()
        length = math.sqrt(
            sum(float((p - b).detach().square().sum()) for p, b in zip(params, before, strict=True))
        )
        assert length == pytest.approx(lr * eta0 * rho**t * moves, rel=1e-9, abs=1e-12)


def test_the_normalised_step_does_not_know_the_scale_of_the_data() -> None:
    """Property 5: half of A and y, the same signs, the same step; and no step is longer than 2 eta |U|."""
    A, y, _ = problem(outliers=0.3)
    found = []
    for scale in (1.0, 0.5):
        U = start(6, 6, 0.3)
        loss = optx.RobustRecoveryLoss(A * scale, y * scale)
        before = U.detach().clone()
        descend(U, loss, optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(0.2, loss=loss)), 1)
        assert float((U - before).detach().norm()) <= 0.4 * float(torch.linalg.matrix_norm(before, 2))
        found.append(U.detach())
    assert torch.allclose(*found, rtol=1e-12)


def test_rotations_of_the_factor_change_nothing_and_zero_stays() -> None:
    """Properties 3 and 4."""
    A, y, _ = problem()
    R = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=F64))[0]
    found = []
    for turn in (torch.eye(3, dtype=F64), R):
        U = nn.Parameter(start(6, 3, 0.3).detach() @ turn)
        loss = optx.RobustRecoveryLoss(A, y)
        descend(U, loss, optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(loss=loss)), 20)
        found.append((U @ U.t()).detach())
    assert torch.allclose(*found, rtol=1e-8, atol=1e-10)
    U = nn.Parameter(torch.cat([start(6, 1, 0.3).detach(), torch.zeros(6, 2, dtype=F64)], 1))
    loss = optx.RobustRecoveryLoss(A, y)
    descend(U, loss, optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(loss=loss)), 20)
    assert not U[:, 1:].any()
    assert U[:, 0].any()


def errors(outlier: float, base: str, steps: int = 400) -> float:
    """What is left of a recovery from 30 % outliers."""
    A, y, truth = problem(10, 2, 1000, outliers=0.3, size=outlier)
    U = start(10, 10, 1e-3)
    if base == "subgm":
        loss: Any = optx.RobustRecoveryLoss(A, y)
        opt: Any = optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(0.25, 0.98, loss=loss), fused=False)
    else:
        loss, opt = (
            lambda U: (A.flatten(1) @ (U @ U.t()).flatten() - y).square().mean(),
            torch.optim.SGD([U], 0.02),
        )
    descend(U, loss, opt, steps)
    return float((U @ U.t() - truth).detach().norm() / truth.norm())


def test_outliers_of_any_size_are_survived_and_least_squares_does_not() -> None:
    """Property 7."""
    small, large = errors(10.0, "subgm"), errors(1000.0, "subgm")
    assert small < 1e-3
    assert large < 2 * small
    assert errors(10.0, "l2") > 0.5


def make(loss: Any, U: nn.Parameter) -> optx.Wrapped:
    return optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(0.25, 0.9, loss=loss))


def test_resume_and_copies_go_on_bit_for_bit() -> None:
    A, y, _ = problem(outliers=0.2)
    loss = optx.RobustRecoveryLoss(A, y)
    U = start(6, 3)
    opt = make(loss, U)
    descend(U, loss, opt, 5)
    file = io.BytesIO()
    torch.save({"U": U.detach(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_loss = nn.Parameter(saved["U"]), optx.RobustRecoveryLoss(A, y)
    again = make(other_loss, other)
    again.load_state_dict(saved["opt"])
    third, third_opt = copy.deepcopy((U, opt))
    third_loss = third_opt.subgm.loss
    assert third_loss is not loss
    for one, its, its_opt in ((U, loss, opt), (other, other_loss, again), (third, third_loss, third_opt)):
        descend(one, its, its_opt, 4)
    assert torch.equal(U, other)
    assert torch.equal(U, third)
    assert opt.param_groups[0]["optx.subgm.t"] == 9


def test_the_loss_of_a_closure_or_one_given_by_hand() -> None:
    A, y, _ = problem()
    found = []
    for way in ("loss", "closure", "hand"):
        loss, U = optx.RobustRecoveryLoss(A, y), start(6, 3, 0.3)
        opt = optx.wrap(
            torch.optim.SGD([U], lr=1.0),
            optx.SubGM(0.3, mode="polyak", loss=loss if way == "loss" else None),
            fused=False,
        )
        for _ in range(3):

            def closure(loss: Any = loss, U: Any = U, opt: Any = opt) -> Tensor:
                opt.zero_grad()
                value = loss(U)
                value.backward()
                return value

            if way == "closure":
                opt.step(closure)
            else:
                value = closure()
                if way == "hand":
                    opt.subgm.loss = float(value.detach())
                opt.step()
        found.append(U.detach())
    assert torch.allclose(found[0], found[1], rtol=1e-12)
    assert torch.allclose(found[0], found[2], rtol=1e-12)


def test_a_step_that_cannot_move_does_not_count() -> None:
    """torch.distributed.checkpoint steps so."""
    U = start(4, 2)
    opt = optx.wrap(torch.optim.SGD([U], lr=0.0), optx.SubGM(0.1, 0.5), fused=False)
    before = U.detach().clone()
    U.grad = torch.zeros_like(U)
    opt.step()
    assert torch.equal(U, before)
    opt.param_groups[0]["lr"] = 1.0
    opt.step()  # no gradient: nothing to scale
    assert torch.equal(U, before)
    U.grad = torch.ones_like(U)
    opt.step()
    assert float((U - before).detach().norm()) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eta0": 0.0}, "eta0 is 0.0; it must be above 0"),
        ({"eta0": float("nan")}, "eta0 is nan; it must be a number"),
        ({"rho": 1.5}, "rho is 1.5; it must be between 0 and 1"),
        ({"rho": 0.0}, "rho is 0.0; it must be above 0"),
        ({"mode": "constant"}, "mode is 'constant'; it must be 'geometric' or 'polyak'"),
        ({"loss": 3.0}, "in geometric mode it must be None or have q_norm and value"),
        ({"mode": "polyak", "loss": -1.0}, "must be a number, 0 or more"),
    ],
)
def test_bad_options(options: Any, said: str) -> None:
    with pytest.raises(optx.OptxError, match=said):
        optx.SubGM(**options)


def test_silence_is_told() -> None:
    A, y, _ = problem()
    U, loss = start(6, 3), optx.RobustRecoveryLoss(A, y)
    opt = optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(loss=loss), fused=False)
    descend(U, loss, opt, 1)
    before = U.detach().clone()
    with pytest.raises(optx.OptxError, match="not evaluated since the last step"):
        opt.step()
    assert torch.equal(U, before)
    opt = optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(mode="polyak"), fused=False)
    with pytest.raises(optx.OptxError, match="needs the loss of this step"):
        opt.step()
    with pytest.warns(UserWarning, match="AdamW divides gradients by their own size"):
        optx.wrap(torch.optim.AdamW([U]), optx.SubGM())


@both
@pytest.mark.parametrize("size", [0.0, 1e-36])
def test_gradients_of_0_move_nothing(fused: bool, size: float) -> None:
    """U = 0 is a fixed point; a scale beyond float32 would make nan of it."""
    U = nn.Parameter(torch.ones(3, 2))
    opt = optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(), fused=fused)
    U.grad = torch.full_like(U, size)
    opt.step()
    assert torch.equal(U.detach(), torch.ones(3, 2))
