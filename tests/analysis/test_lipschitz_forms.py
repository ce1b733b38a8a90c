"""`lipschitz` on other forms than chains of Linears: residual, implicit, convolutions, functions,
parametrizations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lipschitz_nets import Residual, implicit, random_net, random_weights, residual, weights
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import optx


def bound(model: nn.Module, shape: Any = None, **options: Any) -> float:
    """With a search, which is an error where the model does anything else than what was read."""
    return optx.analysis.lipschitz(model, shape, samples=options.pop("samples", 16), **options).bound


def same(model: nn.Module, other: nn.Module, shape: Any, **options: Any) -> None:
    assert bound(model, shape, **options) == pytest.approx(bound(other, shape, **options), rel=1e-6)


# ---- residual and implicit ------------------------------------------------------------------------------


def test_a_residual_net_without_its_branch_has_1() -> None:
    W, G = torch.eye(4), torch.zeros(4, 4)
    assert bound(nn.Sequential(Residual(W, G), Residual(W, G)), 4) == pytest.approx(1, abs=1e-9)


def residual_by_hand(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The paper's inequality of x + G phi(W x), twice, with the maps written out."""
    import cvxpy as cp
    import numpy as np

    n = len(pairs[0][0])
    E = [np.eye(3 * n)[k * n : (k + 1) * n] for k in range(3)]
    X, total, rho = E[0], 0, cp.Variable()
    for k, (W, G) in enumerate(pairs, 1):
        V, T = W.numpy() @ X, cp.diag(cp.Variable(n, nonneg=True))
        total += V.T @ T @ E[k] + E[k].T @ T @ V - 2 * E[k].T @ T @ E[k]
        X = X + G.numpy() @ E[k]
    M = total + X.T @ X - rho * E[0].T @ E[0]
    cp.Problem(cp.Minimize(rho), [(M + M.T) / 2 << 0]).solve(solver="CLARABEL")
    return float(rho.value) ** 0.5


@pytest.mark.parametrize("seed", range(2))
def test_a_residual_net_is_the_papers_inequality(seed: int) -> None:
    net = residual(seed)
    pairs = [(one.inner.weight.detach(), one.outer.weight.detach()) for one in net]
    found = optx.analysis.lipschitz(net, 4)
    assert found.bound == pytest.approx(residual_by_hand(pairs), rel=1e-5)
    norms = [1 + float(torch.linalg.matrix_norm(W, 2) * torch.linalg.matrix_norm(G, 2)) for W, G in pairs]
    assert found.product_bound == pytest.approx(norms[0] * norms[1])
    assert found.lower_bound <= found.bound < 0.8 * found.product_bound


def implicit_by_hand(net: optx.Implicit) -> float:
    import cvxpy as cp
    import numpy as np

    W, U, C = (one.detach().numpy() for one in (net.W, net.U, net.C))
    n, d = U.shape
    E0, E1 = np.eye(d + n)[:d], np.eye(d + n)[d:]
    V, T, rho = U @ E0 + W @ E1, cp.diag(cp.Variable(n, nonneg=True)), cp.Variable()
    M = V.T @ T @ E1 + E1.T @ T @ V - 2 * E1.T @ T @ E1 + (C @ E1).T @ (C @ E1) - rho * E0.T @ E0
    cp.Problem(cp.Minimize(rho), [(M + M.T) / 2 << 0]).solve(solver="CLARABEL")
    return float(rho.value) ** 0.5


@pytest.mark.parametrize("solver", ["CLARABEL", "first-order"])
def test_an_implicit_net_is_the_papers_inequality(solver: str) -> None:
    net = implicit(0)
    found = optx.analysis.lipschitz(net, 4, solver=solver)
    assert found.bound == pytest.approx(implicit_by_hand(net), rel=1e-5)
    W, U, C = (float(torch.linalg.matrix_norm(one.detach(), 2)) for one in (net.W, net.U, net.C))
    assert found.product_bound == pytest.approx(C * U / (1 - W))
    assert found.lower_bound <= found.bound <= found.product_bound


def test_an_implicit_net_without_feedback_is_feed_forward() -> None:
    net = implicit(1)
    net.W.data.zero_()
    same(net, weights(net.U.detach(), net.C.detach()), 4)


def test_an_implicit_net_of_ones_own() -> None:
    class Own(nn.Module):
        """Iterates, which torch.fx cannot read."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = implicit(0, nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            z, p = x.new_zeros(len(x), 6), self.parts
            while (new := torch.tanh(z @ p.W.T + x @ p.U.T + p.b)).detach().sub(z).abs().max() > 1e-12:
                z = new
            return new @ p.C.T

        def lipschitz_form(self) -> nn.Module:
            return self.parts

    same(Own(), implicit(0, nn.Tanh()), 4)


# ---- layers ---------------------------------------------------------------------------------------------


def test_a_convolution_is_its_matrix() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular").double()
    net = nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2).double())
    units = torch.eye(32).double().reshape(32, 2, 4, 4)
    with torch.no_grad():
        W = (conv(units) - conv(torch.zeros_like(units))).flatten(1).T
        pool = nn.AvgPool2d(2)(torch.eye(12).double().reshape(12, 3, 2, 2)).flatten(1).T
    plain = weights(W, net[4].weight.detach() @ pool)
    for norm in ("l2", "linf"):
        assert bound(net, (2, 4, 4), norm=norm) == pytest.approx(bound(plain, norm=norm), rel=1e-6)


def test_channels_of_images_in_groups() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 2), optx.MaxMin(dim=1), nn.Flatten(), nn.Linear(16, 2)).double()
    flipped = copy.deepcopy(net)
    order = [2, 3, 1, 0]
    flipped[0].weight.data, flipped[0].bias.data = net[0].weight.data[order], net[0].bias.data[order]
    flipped[3].weight.data = net[3].weight.data.reshape(2, 4, 4)[:, order].flatten(1)
    same(net, flipped, (1, 3, 3))


def test_batch_norm_is_folded_and_dropout_passed_over() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8).double()
    norm.running_var = torch.rand(8).double() + 0.5
    norm.weight.data = torch.randn(8).double()
    A, B = random_weights(0, (4, 8, 3))
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    net = nn.Sequential(weights(A)[0], norm, nn.Dropout(0.5), nn.ReLU(), weights(B)[0]).eval()
    same(net, weights(scale[:, None] * A, B), 4)


def test_nested_chains_and_functions_are_the_chain() -> None:
    A, B, C = random_weights(2)

    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.B = weights(A)[0], nn.Parameter(B.clone())

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x.view(x.shape[0], -1)))
            x = torch.relu(x @ self.B.T)
            return F.linear(x, C) / 2 * 2.0 - 1

    nested = nn.Sequential(nn.Sequential(weights(A)[0], nn.ReLU()), nn.Sequential(*weights(B, C)))
    for other in (Functions(), nested):
        same(other, random_net(2), 4)


def test_branches_are_joined() -> None:
    A, B, C = random_weights(3)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = nn.ModuleList([weights(A[:4])[0], weights(A[4:])[0]])
            self.rest = weights(B, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(torch.relu(torch.cat([half(x) for half in self.halves], 1)))

    same(Both(), weights(A, B, C), 4)


def test_an_activation_that_is_linear_is_no_block() -> None:
    A, B, C = random_weights(0)
    W = float(torch.linalg.matrix_norm(C @ B @ A, 2))
    assert bound(weights(A, B, C, activation=lambda: nn.LeakyReLU(1.0))) == pytest.approx(W, rel=1e-9)
    assert bound(weights(A, B, C, activation=nn.Identity)) == pytest.approx(W, rel=1e-9)


def test_parametrized_weights_are_read_as_they_compute() -> None:
    torch.manual_seed(0)
    net = random_net(0)
    parametrizations.orthogonal(net[2])
    parametrizations.spectral_norm(net[0])
    plain = weights(*(net[k].weight.detach() for k in (0, 2, 4)))
    net.train()
    before = {name: one.clone() for name, one in net.state_dict().items()}
    same(net, plain, 4)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_declared_slopes() -> None:
    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, 0.2 * x)

    found = optx.analysis.lipschitz(random_net(0, Bent), slopes={Bent: (0.2, 1)})
    assert not found.certified
    assert "if the declared slopes are right" in repr(found)
    same_as = optx.analysis.lipschitz(random_net(0, lambda: nn.LeakyReLU(0.2)))
    assert found.bound == pytest.approx(same_as.bound, rel=1e-9)


def test_a_chain_that_is_bounded_by_construction() -> None:
    """LDLT's constant is LipSDP's with all multipliers 1: the least over multipliers is not above it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    handle = optx.attach(net, optx.LDLT(L=2.0), targets=["0", "2", "4"])
    found = optx.analysis.lipschitz(handle.merge_and_unload())
    assert found.bound <= 2.0 * (1 + 1e-5)
    assert found.product_bound > 2.0
