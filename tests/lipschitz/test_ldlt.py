"""LDLT's weights: the properties of the method, by numbers, and what is wrong in the released code."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ldlt_reference import (
    layers,
    least,
    lmi,
    mlp,
    papers_chain,
    papers_contraction,
    papers_residual,
    released_chain,
    spoil,
    steepest,
)
from torch import Tensor, nn

import optx
from optx.lipschitz import _ldlt_lmi
from optx.lipschitz._ldlt_passes import weights
from optx.lipschitz._ldlt_weights import (
    Link,
    Roots,
    around_identity,
    contraction,
    hidden,
    residual,
    sequential,
    skipped,
)

D = torch.float64
SIZES = [4, 8, 6, 3]


def free(
    sizes: list[int], scale: float, seed: int, dtype: torch.dtype = D
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    V = [torch.randn(o, i, generator=generator, dtype=D) * scale for i, o in itertools.pairwise(sizes)]
    a = [torch.randn(1, generator=generator, dtype=D) for _ in V]
    return [one.to(dtype) for one in V], [one.to(dtype) for one in a]


def links(count: int, low: float = 0.0, high: float = 1.0) -> list[Link]:
    return [Link(str(k), low, high) for k in range(count)]


# ---- 1: the certificate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("form", ["sequential", "residual", "identity"])
def test_the_matrix_is_positive_semidefinite(form: str, scale: float, dtype: torch.dtype) -> None:
    for L, slopes, seed in itertools.product(
        (0.1, 1.0, 10.0), ((0.0, 1.0), (0.1, 1.0), (-0.13, 1.13)), range(3)
    ):
        if form == "identity" and (L < 1.0 or slopes[0]):
            continue
        sizes = [*SIZES] if form != "identity" else [4, 7, 4]
        V, a = free(sizes, scale, seed, dtype)
        A = None
        if form == "sequential":
            *C, B = weights(sequential, V, a, links(3, *slopes), L)
        elif form == "residual":
            V = [*V, torch.randn(3, 4, dtype=dtype) * scale]
            *C, B, A = weights(residual, V, a, links(4, *slopes), L)
            A = A.double()
        else:
            V = V[:1] if L == 1.0 else V
            *C, B = weights(around_identity, V, a[: len(V)], links(2, *slopes), L)
            A = torch.eye(4, dtype=D)
        C, B = [one.double() for one in C], B.double()
        found = least(lmi(C, L, A, B, *slopes))
        assert found >= (-1e-12 if dtype == D else -1e-6) * max(1.0, L**2)
        own = _ldlt_lmi.matrix(C, links(3, *slopes), L, A, B)
        assert torch.allclose(own, lmi(C, L, A, B, *slopes), atol=1e-12)


@pytest.mark.parametrize("L", [0.1, 1.0, 10.0])
def test_the_bound_is_reached(L: float) -> None:
    """A certificate that is far from tight would say little: huge V bring the last pivot to 0."""
    V, a = free(SIZES, 30.0, 1)
    *C, B = weights(sequential, V, a, links(3), L)
    assert least(lmi(C, L * 0.99, None, B)) < 0.0


# ---- 2: what the net does -----------------------------------------------------------------------------

NETS: list[tuple[list[int], Callable[[], nn.Module], float, float]] = [
    (sizes, activation, L, scale)
    for (sizes, activation), (L, scale) in itertools.product(
        [
            ([4, 8, 6, 3], nn.ReLU),
            ([3, 5, 2], nn.Tanh),
            ([6, 4, 4, 4, 5], nn.LeakyReLU),
            ([5, 7, 3], lambda: nn.ELU(1.5)),
            ([4, 9, 2], nn.Sigmoid),
            ([2, 3], nn.ReLU),
            ([8, 16, 16, 4], nn.Softplus),
        ],
        [(0.5, 0.3), (1.0, 3.0), (4.0, 30.0)],
    )
]


@pytest.mark.parametrize(("sizes", "activation", "L", "scale"), NETS)
def test_no_pair_is_taken_further_apart(
    sizes: list[int], activation: Callable[[], nn.Module], L: float, scale: float
) -> None:
    model = mlp(sizes, activation)
    handle = optx.attach(model, optx.LDLT(L), layers(model))
    spoil(handle, scale)
    found = handle.certificate()
    assert found.holds
    assert found.L == L
    bare = handle.merge_and_unload().double()  # pairs cost products alone, and their differences no digits
    assert 0.0 < steepest(bare, sizes[:1], 100_000, 200) <= L * (1 + 1e-5)


def test_no_activation_pattern_of_a_small_net_is_steeper() -> None:
    worst = 0.0
    for seed in range(40):
        V, a = free([2, 2, 2, 2], 3.0, seed)
        C1, C2, C3 = weights(sequential, V, a, links(3), 1.0)
        for bits in itertools.product((0.0, 1.0), repeat=4):
            on, off = torch.diag(torch.tensor(bits[:2], dtype=D)), torch.diag(torch.tensor(bits[2:], dtype=D))
            worst = max(worst, float(torch.linalg.matrix_norm(C3 @ off @ C2 @ on @ C1, 2)))
    assert 0.8 < worst <= 1.0 + 1e-12


def test_no_pair_is_taken_further_apart_by_residual_nets() -> None:
    for seed, skip in itertools.product(range(3), (True, False)):
        model = Skip(skip)
        targets = ["fc1", "fc2", "skip"] if skip else ["fc1", "fc2"]
        handle = optx.attach(model, optx.LDLT(1.5, residual=True), targets)
        spoil(handle, 3.0, seed)
        assert handle.certificate().holds
        bare = handle.merge_and_unload().double()
        assert 0.8 < steepest(bare, [4], 20_000, 200) <= 1.5 * (1 + 1e-5)


class Skip(nn.Module):
    def __init__(self, skip: bool, out: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 7), nn.Linear(7, out)
        self.skip = nn.Linear(4, out) if skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.fc2(torch.relu(self.fc1(x)))


# ---- 3 to 7 -----------------------------------------------------------------------------------------------


def test_L_scales_the_first_weight_and_no_other() -> None:
    V, a = free(SIZES, 2.0, 3)
    at_1, at_3 = (weights(sequential, V, a, links(3), L) for L in (1.0, 3.0))
    assert torch.allclose(at_3[0], 3.0 * at_1[0], rtol=1e-14)
    assert all(torch.equal(one, other) for one, other in zip(at_1[1:], at_3[1:], strict=True))


def test_one_layer_alone() -> None:
    V, a = free([6, 4], 1.0, 0)
    (C,) = weights(sequential, V, a, links(1), 2.5)
    assert torch.linalg.matrix_norm(C, 2) < 2.5
    (C,) = weights(sequential, [1e4 * V[0]], a, links(1), 2.5)
    assert torch.allclose(torch.linalg.svdvals(C), torch.full((4,), 2.5, dtype=D), atol=1e-6)
    thin = V[0] @ torch.diag(
        torch.tensor([1.0, 1.0, 0, 0, 0, 0], dtype=D)
    )  # singular values that are 0 stay 0
    (C,) = weights(sequential, [1e4 * thin], a, links(1), 2.5)
    assert torch.allclose(torch.linalg.svdvals(C), torch.tensor([2.5, 2.5, 0, 0], dtype=D), atol=1e-6)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.2, 1.0), (0.0, 0.25), (-0.13, 1.13)])
def test_pivots(slopes: tuple[float, float]) -> None:
    """2 I - (low + high)^2 C (D + 2 low high C^T C)^{-1} C^T is the next S^T S; at [0, 1] the paper's."""
    V, a = free(SIZES, 1.5, 5)
    low, high = slopes
    C, U, S = hidden(V, [one.exp() for one in a], links(3, *slopes), 2.0, Roots())
    D_before = 4.0 * torch.eye(4, dtype=D)
    for k, one in enumerate(C):
        root = S[k + 1].times(torch.eye(len(one), dtype=D), Link("x"))
        inner = D_before + 2 * low * high * one.T @ one
        pivot = 2 * torch.eye(len(one), dtype=D) - (low + high) ** 2 * one @ torch.linalg.solve(inner, one.T)
        assert (pivot - root.T @ root).abs().max() < 1e-10
        if slopes == (0.0, 1.0):
            alpha, gram = a[k].exp(), V[k] @ V[k].T
            eye = torch.eye(len(one), dtype=D)
            papers = 2.0 * alpha * torch.linalg.inv(gram + alpha * eye)
            P = torch.linalg.cholesky(gram + alpha * eye)
            assert (root.T @ root - 2.0 * alpha * torch.linalg.inv(P.T @ P)).abs().max() < 1e-10
            # The paper's U is another by an orthogonal factor, and its pivot this one turned by it.
            assert (torch.linalg.eigvalsh(papers) - torch.linalg.eigvalsh(root.T @ root)).abs().max() < 1e-10
            turn = torch.linalg.solve_triangular(
                P, torch.linalg.cholesky(gram + alpha * eye) @ P.T, upper=False
            )
            assert torch.allclose(turn, P.T)
            W = papers_contraction(V[k], float(alpha))
            assert torch.allclose(torch.linalg.svdvals(W), torch.linalg.svdvals(U[k]), atol=1e-10)
        D_before = root.T @ root


def test_the_papers_own_form_has_the_pivots_that_it_says() -> None:
    """By the reference: with U = V R^{-1} the pivot is 2 alpha (V V^T + alpha I)^{-1}."""
    V, _ = free(SIZES, 1.5, 5)
    *C, _ = papers_chain(V, [0.7] * 3, 2.0)
    D_before = 4.0 * torch.eye(4, dtype=D)
    for one, v in zip(C, V, strict=False):
        eye = torch.eye(len(one), dtype=D)
        pivot = 2.0 * eye - one @ torch.linalg.solve(D_before, one.T)
        wanted = 1.4 * torch.linalg.inv(v @ v.T + 0.7 * eye)
        assert (pivot - wanted).abs().max() < 1e-10
        D_before = wanted


def test_layers_have_norms_whose_product_is_above_L() -> None:
    products: list[float] = []
    for seed in range(20):
        V, _ = free(SIZES, 1.0, seed)
        made = weights(sequential, V, [torch.zeros(1, dtype=D)] * 3, links(3), 1.0)
        products.append(float(torch.stack([torch.linalg.matrix_norm(one, 2) for one in made]).prod()))
    assert 1.2 < sum(products) / 20 < 3.0


def test_zero_is_zero_and_has_gradients() -> None:
    V = [torch.zeros(o, i, dtype=D, requires_grad=True) for i, o in itertools.pairwise(SIZES)]
    a = [torch.zeros(1, dtype=D, requires_grad=True) for _ in V]
    made = weights(sequential, V, a, links(3), 1.0)
    assert all(not one.any() for one in made)
    torch.stack([one.sum() for one in made]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*V, *a))
    assert V[0].grad is not None
    assert V[0].grad.any()


def test_equal_singular_values_have_gradients() -> None:
    V = [torch.eye(o, i, dtype=D).mul(2).requires_grad_() for i, o in itertools.pairwise(SIZES)]
    a = [torch.zeros(1, dtype=D, requires_grad=True) for _ in V]
    made = weights(sequential, V, a, links(3), 1.0)
    torch.stack([one.square().sum() for one in made]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*V, *a))


# ---- 8 and 9 ----------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=4),
    out=st.integers(1, 5),
    L=st.sampled_from([0.3, 1.0, 4.0]),
    slopes=st.sampled_from([(0.0, 1.0), (0.3, 1.0), (-0.1, 0.9)]),
    seed=st.integers(0, 99),
)
def test_the_residual_form_is_exact(
    sizes: list[int], out: int, L: float, slopes: tuple[float, float], seed: int
) -> None:
    V, a = free([*sizes, out], 1.5, seed)
    V.append(torch.randn(out, sizes[0], dtype=D))
    alpha, every = [one.exp() for one in a], links(len(V), *slopes)
    *C, B, A = residual(V, alpha, every, L, Roots())
    _, U, S = hidden(V[:-2], alpha[:-1], every[:-2], L, Roots())
    gamma, sigma = skipped(U, S, every, Roots())
    both = torch.cat([V[-1], V[-2]], 1)
    cap = contraction(both, alpha[-1], every[-2], Roots())[0]
    eye = torch.eye(sizes[-1], dtype=D)
    root = S[-1].times(eye, Link("x"))
    branch = B + A @ gamma
    left = A @ sigma @ A.T + branch @ torch.linalg.solve(root.T @ root, branch.T)
    if out <= both.shape[1]:
        assert torch.allclose(left, cap @ cap.T, atol=1e-8)
    assert float(torch.linalg.eigvalsh(left)[-1]) < 1.0
    assert least(lmi(C, L, A, B, *slopes)) >= -1e-10 * max(1.0, L**2)


def test_SLL_is_the_limit() -> None:
    """A = I, L = 1, B = -2 W T^{-1}: with multipliers 2 T^{-1} the least eigenvalue is 0."""
    for seed in range(5):
        torch.manual_seed(seed)
        W = torch.randn(5, 7, dtype=D)
        q = torch.rand(7, dtype=D) + 0.5
        T = ((W.T @ W).abs() * q[None] / q[:, None]).sum(1)
        eye = torch.eye(5, dtype=D)
        own = _ldlt_lmi.matrix([W.T], links(1), 1.0, eye, -2.0 * W / T, [2.0 / T])
        assert abs(least(own)) < 1e-10
        V = torch.randn(7, 5, dtype=D)
        C, B = weights(around_identity, [V], [torch.zeros(1, dtype=D)], links(2), 1.0)
        assert torch.allclose(B, -C.T)
        assert abs(least(lmi([C], 1.0, eye, B))) < 1e-10
        # Any W and T with ReLU are such a layer: rows times the roots of the multipliers.
        assert float(torch.linalg.eigvalsh(2.0 * torch.eye(7, dtype=D) - C @ C.T)[0]) > 0


# ---- what was released -------------------------------------------------------------------------------------


def test_the_released_sequential_form_divides_by_L() -> None:
    V, _ = free(SIZES, 3.0, 0)
    *C, B = released_chain(V, [1.0] * 3, 0.5)
    assert least(lmi(C, 0.5, None, B)) < -1.0  # 0.5 was asked for, and it is 2
    own = weights(sequential, V, [torch.zeros(1, dtype=D)] * 3, links(3), 0.5)
    assert least(lmi(own[:-1], 0.5, None, own[-1])) >= -1e-12
    assert all(  # at 1 there is nothing wrong
        torch.equal(one, other)
        for one, other in zip(released_chain(V, [1.0] * 3, 1.0), papers_chain(V, [1.0] * 3, 1.0), strict=True)
    )


@pytest.mark.parametrize(("defect", "L"), [("turned", 1.0), ("squared", 3.0)])
def test_the_released_residual_form_is_not_certified(defect: str, L: float) -> None:
    """Each defect by itself; the second makes Sigma too small where pivots are above 1, as L^2 is here."""
    right: list[float] = []
    wrong: list[float] = []
    for seed in range(60):
        V, _ = free([3, 5, 4], 1.0, seed)
        V_out = torch.randn(2, 3 + 4, dtype=D, generator=torch.Generator().manual_seed(seed))
        for on, found in ((False, right), (True, wrong)):
            C, A, B = papers_residual(V, V_out, 1.0, L, **{defect: on})
            found.append(least(lmi(C, L, A, B)))
    assert min(right) >= -1e-9
    assert min(wrong) < -0.01


# ---- the pass of its own ------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    high=st.sampled_from([1.0, 0.25, 1.5]),
    L=st.sampled_from([0.2, 1.0, 5.0]),
    used=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_its_own_backward_pass_is_autograds(
    sizes: list[int], high: float, L: float, used: int, seed: int
) -> None:
    V, a = free(sizes, 1.0, seed)
    given = [one.requires_grad_() for one in (*V, *a)]
    every = links(len(V), 0.0, high)
    one = weights(sequential, V, a, every, L)
    other = sequential(V, [x.exp() for x in a], every, L, Roots())
    assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(one, other, strict=True))

    def gradients(made: list[Tensor]) -> list[Tensor]:
        kept = made[used % len(made) :]  # some weights may have no gradient
        loss = torch.stack([(w.sin() * torch.arange(w.numel()).view(w.shape)).sum() for w in kept]).sum()
        return list(torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True))

    for x, y in zip(gradients(one), gradients(other), strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9)


def test_it_is_differentiated_twice() -> None:
    V, a = free([2, 3, 2], 1.0, 0)
    given = [one.requires_grad_() for one in (*V, *a)]
    assert torch.autograd.gradgradcheck(
        lambda *g: tuple(weights(sequential, g[:2], g[2:], links(2), 1.0)), given
    )


def test_float32_that_is_not_enough_becomes_float64() -> None:
    V, a = free(SIZES, 300.0, 0, torch.float32)
    made = weights(sequential, V, a, links(3), 1.0)
    exact = weights(sequential, [v.double() for v in V], [x.double() for x in a], links(3), 1.0)
    assert made[0].dtype == torch.float32
    assert all(torch.equal(one, other.float()) for one, other in zip(made, exact, strict=True))


def test_what_has_no_factor_raises_and_projects_nothing() -> None:
    V, a = free(SIZES, 1.0, 0)
    V[1][0, 0] = torch.inf
    with pytest.raises(optx.OptxError, match="no Cholesky factor in float64"):
        weights(sequential, V, a, links(3), 1.0)
    with pytest.raises(optx.OptxError, match="no Cholesky factor in float64"):
        weights(sequential, V, a, links(3, 0.1), 1.0)
