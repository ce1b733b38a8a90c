"""MaxMin, GroupSort and Householder: what they compute, orthogonal Jacobians also at ties, dtypes,
compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx._errors import OptxError, ShapeError


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(module, x)


def householder(channels: int, group_size: int = 2, dim: int = -1, seed: int = 0) -> optx.Householder:
    module = optx.Householder(channels, group_size, dim).double()
    with torch.no_grad():
        module.weight.copy_(numbers(*module.weight.shape, seed=seed))
    return module


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """One vector, group by group, as the papers write it."""
    module = module.requires_grad_(False)
    g = 2 if isinstance(module, optx.MaxMin) else module.group_size or len(x)
    out = list[Tensor]()
    for number, group in enumerate(x.split(g)):
        if isinstance(module, optx.MaxMin):
            out += [group.max(), group.min()]
        elif isinstance(module, optx.GroupSort):
            out += sorted(group)
        else:
            v = module.weight[number] / module.weight[number].norm()
            reflected = (torch.eye(g, dtype=x.dtype) - 2 * torch.outer(v, v)) @ group
            out += list(group if float(v @ group) > 0 else reflected)
    return torch.stack(out)


@given(
    groups=st.integers(1, 4),
    size=st.integers(2, 5),
    kind=st.sampled_from(["maxmin", "sort", "full", "householder"]),
    others=st.sampled_from([(), (3,), (2, 3)]),
    where=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_every_form_is_the_papers(
    groups: int, size: int, kind: str, others: tuple[int, ...], where: int, dtype: torch.dtype, seed: int
) -> None:
    size = 2 if kind == "maxmin" else size
    n, dim = groups * size, min(where, len(others))
    module = (
        {
            "maxmin": lambda: optx.MaxMin(dim),
            "sort": lambda: optx.GroupSort(size, dim),
            "full": lambda: optx.GroupSort(None, dim),
            "householder": lambda: householder(n, size, dim, seed).to(dtype),
        }[kind]()
        if n > 1
        else None
    )
    x = numbers(*others[:dim], n, *others[dim:], seed=seed, dtype=torch.float64).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    rows, got = (one.double().movedim(dim, -1).reshape(-1, n) for one in (x, y))
    wanted = torch.stack([plain(module.double(), row) for row in rows])
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.norm(dim=1), rows.norm(dim=1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "module", [optx.MaxMin(), optx.GroupSort(2), optx.GroupSort(4), optx.GroupSort(None), householder(8, 4)]
)
@pytest.mark.parametrize(
    "x", [numbers(8), torch.zeros(8).double(), torch.ones(8).double(), numbers(4).repeat(2)]
)
def test_the_jacobian_is_orthogonal_also_at_ties(module: nn.Module, x: Tensor) -> None:
    J = jacobian(module, x)
    torch.testing.assert_close(J @ J.T, torch.eye(8).double())


def test_at_ties_nothing_moves() -> None:
    x = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(jacobian(optx.MaxMin(), x), torch.eye(6).double())
    torch.testing.assert_close(jacobian(optx.GroupSort(3), x), torch.eye(6).double())
    torch.testing.assert_close(jacobian(optx.Householder(6).double(), x), torch.eye(6).double())


def test_householder_begins_as_maxmin() -> None:
    x = numbers(50, 6)
    torch.testing.assert_close(optx.Householder(6).double()(x), optx.MaxMin()(x))


def test_householders_hyperplanes_learn() -> None:
    module = householder(6)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(module, {"weight": w}, numbers(5, 6)), module.weight
    )
    other = optx.Householder(6).double()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(numbers(5, 6)), module(numbers(5, 6)))


@pytest.mark.parametrize("module", [optx.MaxMin(1), optx.GroupSort(3, 1), optx.Householder(6, dim=1)])
def test_compiled_without_a_break(module: nn.Module) -> None:
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = numbers(2, 6, 4, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), module(x))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="MaxMin: dimension -1 of x is 5; it must be a multiple"):
        optx.MaxMin()(torch.ones(2, 5))
    with pytest.raises(ShapeError, match="GroupSort: dim is 3; x has 2 dimensions"):
        optx.GroupSort(2, dim=3)(torch.ones(2, 4))
    with pytest.raises(ShapeError, match="Householder: dimension -1 of x is 4; channels is 6"):
        optx.Householder(6)(torch.ones(2, 4))
    with pytest.raises(ShapeError, match="Householder: channels is 5"):
        optx.Householder(5)
    with pytest.raises(OptxError, match="group_size is 1"):
        optx.GroupSort(1)
