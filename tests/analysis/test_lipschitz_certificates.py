"""No pair of inputs is further apart afterwards than a certified bound says: random ones, and ones that are
sought.

Over all kinds of networks, in both norms, by every method and solver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lipschitz_nets import householder, implicit, random_net, residual, with_biases
from torch import Tensor, nn

import optx
from optx.analysis.bounds._inequality import Inequality, inequality
from optx.analysis.bounds._reading import read

SMALL, DEEP = (4, 8, 8, 3), (4, 8, 8, 8, 8, 2)


def chain(
    activation: Callable[[], nn.Module], sizes: tuple[int, ...] = SMALL, seed: int = 0
) -> nn.Sequential:
    return with_biases(random_net(seed, activation, sizes))


def images() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3, padding=1), optx.MaxMin(1), nn.AvgPool2d(2), nn.Conv2d(4, 2, 2), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(2, 2)).double()


def normed() -> nn.Sequential:
    net = nn.Sequential(*chain(nn.ReLU)[:2], nn.BatchNorm1d(8), nn.Dropout(), *chain(nn.ReLU)[2:]).double()
    net[2].running_var = torch.rand(8, generator=torch.Generator().manual_seed(0)).double() + 0.1
    return net.eval()


NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "relu": (lambda: chain(nn.ReLU), 4),
    "relu_deep": (lambda: chain(nn.ReLU, DEEP), 4),
    "leaky": (lambda: chain(lambda: nn.LeakyReLU(0.2)), 4),
    "prelu": (lambda: chain(lambda: nn.PReLU(8, 0.4).double()), 4),
    "tanh": (lambda: chain(nn.Tanh), 4),
    "sigmoid": (lambda: chain(nn.Sigmoid), 4),
    "softplus": (lambda: chain(nn.Softplus), 4),
    "elu": (lambda: chain(lambda: nn.ELU(1.5)), 4),
    "silu": (lambda: chain(nn.SiLU), 4),
    "gelu": (lambda: chain(nn.GELU), 4),
    "mish": (lambda: chain(nn.Mish), 4),
    "hardswish": (lambda: chain(nn.Hardswish), 4),
    "hardtanh": (lambda: chain(nn.Hardtanh), 4),
    "maxmin": (lambda: chain(optx.MaxMin), 4),
    "maxmin_deep": (lambda: chain(optx.MaxMin, DEEP), 4),
    "groupsort": (lambda: chain(lambda: optx.GroupSort(4)), 4),
    "fullsort": (lambda: chain(lambda: optx.GroupSort(None)), 4),
    "householder": (lambda: chain(lambda: householder(8)), 4),
    "householder_4": (lambda: chain(lambda: householder(8, 4)), 4),
    "wide_input": (lambda: chain(nn.ReLU, (40, 6, 6, 2)), 40),
    "images": (images, (1, 4, 4)),
    "batch_norm": (normed, 4),
    "residual": (lambda: residual(0), 4),
    "residual_maxmin": (lambda: residual(1, activation=optx.MaxMin()), 4),
    "implicit": (lambda: implicit(0), 4),
    "implicit_tanh": (lambda: implicit(1, nn.Tanh()), 4),
}


def size(x: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), 2 if norm == "l2" else torch.inf, dim=1)


@torch.no_grad()
def random_pairs(net: nn.Module, shape: tuple[int, ...], norm: str, pairs: int) -> float:
    """The largest change between normal points of all scales, as far apart and near, the largest 1e4
    times."""
    generator = torch.Generator().manual_seed(0)
    most = 0.0
    for spread, gap in [(1.0, 1.0), (1.0, 1e-2), (5.0, 1.0), (0.1, 1e-3), (20.0, 5.0)]:
        x, d = torch.randn(2, pairs // 5, *shape, generator=generator, dtype=torch.float64)
        d = d.sign() if norm == "linf" else d
        there = x * spread + d * gap
        change = size(net(there) - net(x * spread), norm) / size(there - x * spread, norm)
        most = max(most, float(change.max()))
    return most


def sought_pairs(net: nn.Module, shape: tuple[int, ...], norm: str) -> float:
    """Projected gradient ascent on both ends at once."""
    generator = torch.Generator().manual_seed(1)
    x, d = torch.randn(2, 100, *shape, generator=generator, dtype=torch.float64)
    most = 0.0
    for step in range(60):
        x, d = x.detach().requires_grad_(), d.detach().requires_grad_()
        change = size(net(x + d) - net(x - d), norm) / size(2 * d, norm)
        most = max(most, float(change.detach().max()))
        up = torch.autograd.grad(change.sum(), (x, d))
        pace = 0.3 * 0.96**step
        x, d = (
            one + pace * g / g.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, *[1] * len(shape))
            for one, g in zip((x, d), up, strict=True)
        )
    return most


def check(name: str, norm: Any, **options: Any) -> None:
    made, given = NETS[name]
    net = made()
    shape = (given,) if isinstance(given, int) else given
    found = optx.analysis.lipschitz(net, given, norm=norm, **options)
    assert found.certified
    assert 0 < found.lower_bound <= found.bound <= found.product_bound
    pairs = 10_000 if "implicit" in name else 100_000
    assert random_pairs(net, shape, norm, pairs) <= found.bound
    assert sought_pairs(net, shape, norm) <= found.bound * (1 + 1e-12)


@pytest.mark.parametrize("name", NETS)
def test_no_pair_is_above_the_bound(name: str) -> None:
    check(name, "l2")


@pytest.mark.parametrize("name", ["relu", "gelu", "maxmin", "householder_4", "residual", "implicit_tanh"])
def test_no_pair_is_above_the_bound_of_largest_entries(name: str) -> None:
    check(name, "linf")


@pytest.mark.long
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "options", [{"solver": "SCS"}, {"solver": "first-order"}, {"method": "layer"}, {"split": 1}]
)
@pytest.mark.parametrize("name", NETS)
def test_nor_above_any_other_bound(name: str, options: dict[str, Any], norm: str) -> None:
    check(name, norm, **options)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    depth=st.integers(1, 4),
    width=st.sampled_from([2, 4, 6]),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 3),
    name=st.sampled_from(["relu", "gelu", "maxmin", "householder", "sort", "leaky"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    options=st.sampled_from(
        [{}, {"method": "layer"}, {"split": 2}, {"norm": "linf"}, {"solver": "first-order"}]
    ),
)
def test_on_networks_of_all_sizes(
    seed: int, depth: int, width: int, inputs: int, outputs: int, name: str, dtype: torch.dtype, options: Any
) -> None:
    activation = {
        **{"relu": nn.ReLU, "gelu": nn.GELU, "maxmin": optx.MaxMin, "leaky": lambda: nn.LeakyReLU(-0.3)},
        **{"householder": lambda: householder(width), "sort": lambda: optx.GroupSort(None)},
    }[name]
    net = random_net(seed, activation, (inputs, *[width] * depth, outputs)).to(dtype)
    found = optx.analysis.lipschitz(net, samples=8, **options)
    assert found.lower_bound <= found.bound <= found.product_bound
    exact = net.double()
    assert random_pairs(exact, (inputs,), found.norm, 2000) <= found.bound


# ---- the check after the solver -------------------------------------------------------------------------


def problem(name: str = "relu") -> Inequality:
    return inequality(read(NETS[name][0](), (4,), "l2", None, {}).systems[0], layers=False)


@pytest.mark.parametrize("name", ["relu", "maxmin", "residual", "implicit"])
def test_the_check_refuses_what_is_a_little_less(name: str) -> None:
    """Of the least rho, a part in 10^9 more is seen to hold, and a part in 10^9 less is not."""
    one = problem(name)
    t = one.inside()
    assert t is not None
    rho = one.least_rho(t)
    assert one.holds(t, rho * (1 + 1e-9))
    assert not one.holds(t, rho * (1 - 1e-9))


def test_what_holds_is_so_by_eigenvalues() -> None:
    one = problem()
    t = one.inside()
    assert t is not None
    rho = one.least_rho(t)
    G = one.matrix(t) - one.O.T @ one.O
    G.diagonal()[: one.inputs] += rho
    assert float(torch.linalg.eigvalsh(G)[0]) == pytest.approx(0, abs=1e-12)


def test_multipliers_outside_prove_nothing() -> None:
    one = problem()
    assert one.least_rho(torch.zeros(one.multipliers).double()) == float("inf")
    assert not one.holds(torch.zeros(one.multipliers).double(), 1e6)
