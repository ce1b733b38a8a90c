"""`lipschitz` on what is known: the spec's numbers, exact constants, the paper's own inequality,
invariances."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from lipschitz_nets import householder, random_net, random_weights, weights
from torch import Tensor, nn

import optx

W1, W2 = [[1.0, 2.0], [-1.0, 1.0]], [[1.0, 1.0]]


def bound(model: nn.Module, shape: Any = None, **options: Any) -> float:
    """Of which also what has to hold everywhere is tested."""
    found = optx.analysis.lipschitz(model, shape, samples=options.pop("samples", 0), **options)
    assert found.certified
    assert found.bound <= found.product_bound * (1 + 1e-12)
    return found.bound


# ---- the spec's numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [optx.MaxMin(), optx.GroupSort(2), optx.GroupSort(3), optx.GroupSort(None), householder(6, 3)]
)
def test_what_keeps_norms_alone_has_1(module: nn.Module) -> None:
    assert bound(module, 6) == pytest.approx(1, abs=1e-6)
    eye = torch.eye(6).double()
    assert bound(weights(eye, eye, activation=lambda: module)) == pytest.approx(1, abs=1e-6)


def test_a_linear_layer_has_its_norm() -> None:
    (W,) = random_weights(0, (5, 3))
    assert bound(weights(W)) == pytest.approx(float(torch.linalg.matrix_norm(W, 2)), rel=1e-9)
    assert bound(weights(W), norm="linf") == pytest.approx(float(W.abs().sum(1).max()), rel=1e-6)
    row = float(W[0].abs().sum())
    assert bound(weights(W[:1]), norm="linf") == pytest.approx(row, rel=1e-6)


@pytest.mark.parametrize(
    ("activation", "norm", "wanted", "product"),
    [
        (nn.ReLU, "l2", 3.0, 3.2566),
        (nn.ReLU, "linf", 3.3371, 6.0),
        (optx.MaxMin, "l2", 3.0, 3.2566),
        (optx.MaxMin, "linf", 3.0, 6.0),
    ],
)
@pytest.mark.parametrize("solver", ["CLARABEL", "SCS", "first-order"])
def test_two_units(activation: Any, norm: Any, wanted: float, product: float, solver: str) -> None:
    found = optx.analysis.lipschitz(
        weights(W1, W2, activation=activation), norm=norm, solver=solver, samples=16
    )
    assert found.bound == pytest.approx(wanted, abs=6e-5)
    assert found.product_bound == pytest.approx(product, abs=5e-5)
    assert found.lower_bound == pytest.approx(3.0, abs=1e-6)  # the maximum over patterns
    assert found.solver == solver


@pytest.mark.parametrize(
    ("seed", "relu", "maxmin", "product", "of_output_0"),
    [
        (0, 1.9234, 2.1307, 3.3613, 2.0069),
        (1, 1.2341, 1.2940, 2.8386, 1.1305),
        (2, 1.8245, 2.8699, 5.0646, 2.0435),
    ],
)
def test_random_nets(seed: int, relu: float, maxmin: float, product: float, of_output_0: float) -> None:
    net = random_net(seed)
    assert bound(net) == pytest.approx(relu, abs=1e-4)
    assert bound(random_net(seed, optx.MaxMin)) == pytest.approx(maxmin, abs=1e-4)
    assert bound(net, method="product") == pytest.approx(product, abs=1e-4)
    *first, last = random_weights(seed)
    assert bound(weights(*first, last[:1]), norm="linf") == pytest.approx(of_output_0, abs=1e-4)


# ---- the paper's inequality, written out ----------------------------------------------------------------


def paper_bound(Ws: list[Tensor], K: Tensor, *, full: bool) -> float:
    """Equation 5 with T, P, S as they stand (of T alone: without P and S), for groups along which the rows
    of K (each of norm 1) are
    kept."""
    import cvxpy as cp

    sizes = [W.shape[1] for W in Ws]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    N, g = sum(sizes), K.shape[-1]
    rho, total = cp.Variable(), 0
    kept = (K.mT @ K).numpy()
    for k in range(1, len(sizes)):
        V, E = torch.zeros(sizes[k], N).double(), torch.zeros(sizes[k], N).double()
        V[:, starts[k - 1] : starts[k - 1] + sizes[k - 1]] = Ws[k - 1]
        E[:, starts[k] : starts[k] + sizes[k]] = torch.eye(sizes[k])
        groups = sizes[k] // g
        for j in range(groups):
            v, e = (one[j * g : (j + 1) * g].numpy() for one in (V, E))
            lam = cp.Variable(nonneg=True)
            gam, nu, tau = cp.Variable(), *(cp.Variable() if full else 0 for _ in range(2))
            T, P, S = lam * torch.eye(g).numpy() + gam * kept, nu * kept, tau * kept
            total += v.T @ (T - 2 * S) @ v + 2 * v.T @ (P + S) @ e - e.T @ (T + 2 * P) @ e
    O, E0 = torch.zeros(len(Ws[-1]), N).double(), torch.zeros(sizes[0], N).double()
    O[:, starts[-1] :], E0[:, : sizes[0]] = Ws[-1], torch.eye(sizes[0])
    M = total + (O.T @ O).numpy() - rho * (E0.T @ E0).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multipliers grow without end, and solvers call that inaccurate
        cp.Problem(cp.Minimize(rho), [(M + M.T) / 2 << 0]).solve(solver="CLARABEL")
    return float(rho.value) ** 0.5


@pytest.mark.parametrize(
    ("seed", "t_only", "whole"), [(0, 2.299, 2.131), (1, 1.698, 1.294), (2, 3.140, 2.870)]
)
def test_what_is_eliminated_is_the_papers_with_all_multipliers(
    seed: int, t_only: float, whole: float
) -> None:
    Ws = random_weights(seed)
    sums = torch.ones(1, 2).double() / 2**0.5
    assert paper_bound(Ws, sums, full=False) == pytest.approx(t_only, abs=6e-4)
    assert paper_bound(Ws, sums, full=True) == pytest.approx(whole, abs=1e-3)
    assert bound(weights(*Ws, activation=optx.MaxMin)) == pytest.approx(whole, abs=6e-4)


def test_groups_of_four_and_reflections_too() -> None:
    Ws = random_weights(3)
    sums = torch.ones(1, 4).double() / 2
    sort = bound(weights(*Ws, activation=lambda: optx.GroupSort(4)))
    assert sort == pytest.approx(paper_bound(Ws, sums, full=True), rel=1e-3)
    one = householder(4, 4)
    v = one.normals().detach()

    def reflect() -> nn.Module:
        module = householder(8, 4)
        module.weight.data.copy_(one.weight.expand(2, 4))
        return module

    orthogonal = torch.linalg.svd(v).Vh[1:]
    assert bound(weights(*Ws, activation=reflect)) == pytest.approx(
        paper_bound(Ws, orthogonal, full=True), rel=1e-3
    )


def patterns(Ws: list[Tensor], choices: list[Tensor]) -> float:
    """The largest norm of a product with any choice of matrices between the weights."""
    found = 0.0
    for chosen in itertools.product(choices, repeat=len(Ws) - 1):
        J = Ws[0]
        for D, W in zip(chosen, Ws[1:], strict=True):
            J = W @ D @ J
        found = max(found, float(torch.linalg.matrix_norm(J, 2)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_nearly_exact_for_maxmin(seed: int) -> None:
    """The constant over all 256 patterns, which the bound must not undercut."""
    swap, stay = torch.tensor([[0.0, 1], [1, 0]]).double(), torch.eye(2).double()
    choices = [torch.block_diag(*one) for one in itertools.product([swap, stay], repeat=4)]
    exact = patterns(random_weights(seed), choices)
    found = bound(random_net(seed, optx.MaxMin))
    assert exact <= found * (1 + 1e-9)
    assert found == pytest.approx(exact, rel={0: 0.15, 1: 1e-3, 2: 1e-3}[seed])


# ---- what must not matter -------------------------------------------------------------------------------


def test_reflections_at_the_diagonal_are_maxmin() -> None:
    for norm in ("l2", "linf"):
        plain = bound(random_net(0, optx.MaxMin), norm=norm)
        assert bound(random_net(0, lambda: optx.Householder(8).double()), norm=norm) == pytest.approx(
            plain, abs=1e-5
        )


@pytest.mark.parametrize("activation", [nn.ReLU, optx.MaxMin])
def test_scales_and_orders(activation: Any) -> None:
    A, B, C = random_weights(1)
    plain = bound(weights(A, B, C, activation=activation))
    assert bound(weights(100 * A, B, C / 100, activation=activation)) == pytest.approx(plain, rel=1e-5)
    assert bound(weights(A, B, -1e3 * C, activation=activation)) == pytest.approx(1e3 * plain, rel=1e-5)
    order = torch.tensor([6, 7, 2, 3, 0, 1, 4, 5])
    assert bound(weights(A[order], B[:, order], C, activation=activation)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, optx.MaxMin, lambda: optx.GroupSort(4)])
def test_more_multipliers_are_tighter(activation: Any) -> None:
    net = random_net(4, activation)
    neuron, layer, product = (bound(net, method=one) for one in ("neuron", "layer", "product"))
    assert neuron <= layer * (1 + 1e-6)
    assert layer <= product * (1 + 1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU, optx.MaxMin])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_solvers_agree(activation: Any, norm: Any) -> None:
    *first, last = random_weights(5)
    net = weights(*first, last[:1], activation=activation)
    one, other = (bound(net, norm=norm, solver=solver) for solver in ("CLARABEL", "SCS"))
    assert one == pytest.approx(other, rel=1e-3)


def test_parts_of_a_deep_net_multiply() -> None:
    net = random_net(0, optx.MaxMin, (4, 8, 8, 8, 8, 3))
    whole = optx.analysis.lipschitz(net, samples=0)
    cut = optx.analysis.lipschitz(net, samples=0, split=2)
    assert len(cut.parts) == 2
    assert cut.bound == pytest.approx(cut.parts[0] * cut.parts[1])
    assert whole.bound <= cut.bound <= cut.product_bound
    first, second = net[:4], net[4:]
    assert cut.parts == pytest.approx((bound(first), bound(second, 8)), rel=1e-6)
