"""SaRA's nuclear norm: its gradient, which matrix a step pulls, and by how much singular values shrink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.transforms._nuclear_norm import choice, nuclear_gradient


def test_the_gradient_of_a_diagonal_is_the_identity_on_its_support() -> None:
    matrix = torch.zeros(4, 3)
    matrix[0, 0], matrix[1, 1] = 3.0, 4.0
    assert torch.linalg.matrix_norm(matrix, "nuc").item() == pytest.approx(7.0)
    wanted = (matrix != 0).float()
    assert torch.allclose(nuclear_gradient(matrix), wanted, atol=1e-6)
    assert torch.equal(nuclear_gradient(torch.zeros(3, 2)), torch.zeros(3, 2))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_gradient_is_autograds_where_that_is_stable(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    m = torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)
    torch.linalg.matrix_norm(m, "nuc").backward()
    assert torch.allclose(nuclear_gradient(m.detach()), m.grad, atol=1e-8)  # type: ignore[arg-type]


def zero_gradient(opt: Any, *weights: Tensor) -> None:
    """A step whose loss has none."""
    for w in weights:
        w.grad = torch.zeros_like(w)
    opt.step()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_alone_it_shrinks_singular_values_by_lr_times_weight_every_step(
    compact: bool, maximize: bool
) -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(80, 70))
    small = nn.Parameter(torch.randn(64, 80))  # one side is not above 64
    opt = optx.wrap(
        torch.optim.SGD([w, small], lr=0.1, maximize=maximize),
        optx.SaRA(float("inf"), rank_weight=0.5, compact=compact),
        fused=False,
    )
    before, still = torch.linalg.svdvals(w.detach()), small.detach().clone()
    for _ in range(3):
        zero_gradient(opt, w, small)
    now = torch.linalg.svdvals(w.detach())
    large = before > 0.2
    assert torch.allclose(now[large], before[large] - 0.15, atol=1e-4)
    assert torch.equal(small, still)
    assert not w.grad.any()  # the person's gradient is as it was


@pytest.mark.parametrize("compact", [False, True])
def test_only_selected_entries_are_pulled_and_every_so_many_steps(compact: bool) -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(70, 70))
    opt = optx.wrap(
        torch.optim.SGD([w], lr=0.1),
        optx.SaRA(fraction=0.3, rank_weight=0.5, rank_every=3, compact=compact),
        fused=False,
    )
    mask, start = opt.sara._mask(w), w.detach().clone()
    matrix = torch.where(mask, start, 0.0)
    zero_gradient(opt, w)
    wanted = start - 0.1 * 0.5 * 3 * torch.where(mask, nuclear_gradient(matrix), 0.0)
    assert torch.allclose(w, wanted, atol=1e-5)
    assert torch.equal(w[~mask], start[~mask])
    at = w.detach().clone()
    zero_gradient(opt, w)
    zero_gradient(opt, w)
    assert torch.equal(w, at)
    zero_gradient(opt, w)
    assert not torch.equal(w, at)


def test_the_choice_depends_on_seed_and_step_alone_and_reaches_all() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    drawn = [choice(7, step, "abc") for step in range(60)]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn == [choice(7, step, "abc") for step in range(60)]
    assert drawn != [choice(8, step, "abc") for step in range(60)]
    assert min(drawn.count(letter) for letter in "abc") > 10


def test_a_group_may_have_its_own_weight_and_few_entries_are_left_alone() -> None:
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(70, 70)), nn.Parameter(torch.randn(70, 70))
    sgd = torch.optim.SGD([{"params": [a], "sara_rank_weight": 0.0}, {"params": [b]}], lr=0.1)
    opt = optx.wrap(sgd, optx.SaRA(fraction=0.5, rank_weight=1.0), fused=False)
    start = a.detach().clone(), b.detach().clone()
    for _ in range(4):
        zero_gradient(opt, a, b)
    assert torch.equal(a, start[0])
    assert not torch.equal(b, start[1])
    c = nn.Parameter(torch.randn(70, 70))
    opt = optx.wrap(
        torch.optim.SGD([c], lr=0.1), optx.SaRA(fraction=100 / 4900, rank_weight=1.0), fused=False
    )
    assert opt.sara.density().selected == 100
    kept = c.detach().clone()
    zero_gradient(opt, c)
    assert torch.equal(c, kept)
    with torch.no_grad():
        b[0, 0] = torch.nan
    sgd = torch.optim.SGD([("b", b)], lr=0.1)
    opt = optx.wrap(sgd, optx.SaRA(2.0, rank_weight=1.0), fused=False)
    with torch.no_grad():
        b[0, 0] = 0.0
    opt.sara.reselect()
    with torch.no_grad():
        b[0, :9] = torch.nan
    with pytest.raises(optx.OptxError, match="the weight 'b' has inf or nan"):
        zero_gradient(opt, b)


def test_closures_that_ask_several_times_get_it_each_time() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(70, 70))
    target = w.detach().clone()
    opt = optx.wrap(
        torch.optim.LBFGS([w], lr=0.5, max_iter=4), optx.SaRA(float("inf"), rank_weight=1.0), fused=False
    )
    asked: list[float] = []

    def closure() -> Tensor:
        opt.zero_grad()
        found = (w - target).square().sum() / 2
        found.backward()
        asked.append(found.item())
        return found

    opt.step(closure)
    assert len(asked) > 2
    # w - target + U V^T = 0: every singular value is less by 1.
    before, now = torch.linalg.svdvals(target), torch.linalg.svdvals(w.detach())
    assert torch.allclose(now[before > 2], before[before > 2] - 1.0, atol=0.2)
    assert torch.allclose(w.grad, w.detach() - target, atol=0.2)  # type: ignore[arg-type]


def test_pytorch_optimizers_sara_pulls_alike_where_there_is_one_matrix() -> None:
    """Its choice is of Python's global generator, a matrix a group; and under maximize its norm grows."""
    from pytorch_optimizer import SaRA

    torch.manual_seed(0)
    start = torch.randn(80, 70)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    base = torch.optim.AdamW([a], lr=1e-2, weight_decay=0.1)
    opt = optx.wrap(base, optx.SaRA(0.5, rank_weight=0.1), fused=False)
    peer = SaRA([b], lr=1e-2, weight_decay=0.1, threshold=0.5, lambda_rank=0.1)
    for _ in range(5):
        g = torch.randn(80, 70)
        for w, optimizer in ((a, opt), (b, peer)):
            w.grad = g.clone()
            optimizer.step()
    assert torch.allclose(a, b, atol=1e-6)
    assert not torch.equal(a, start)
