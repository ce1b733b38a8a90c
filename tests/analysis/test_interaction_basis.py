"""The interaction basis: its defining properties, its invariances, numbers by hand, and estimates."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from low_rank import low_rank
from torch import Tensor, nn

import optx
from optx.analysis import interaction_basis

EXACT = 1e-10


class Given(nn.Module):
    """A layer whose output is what it is given, so that tests choose the activations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def chosen(J: Tensor) -> nn.Module:
    """Activations as they are, and then the linear map J."""
    model = nn.Sequential(Given(), nn.Linear(J.shape[1], J.shape[0], bias=False)).double()
    model[1].weight.data = J.double()
    return model


def mlp(widths: tuple[int, ...] = (8, 6, 5, 3), act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    pairs = pairwise(widths)
    return nn.Sequential(*[part for i, o in pairs for part in (nn.Linear(i, o), act())][:-1]).double()


def data(n: int = 200, d: int = 8, batch: int = 64) -> list[Tensor]:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1)).double()
    return list((x + 0.3).split(batch))


def activations(model: nn.Module, path: str, batches: list[Tensor]) -> Tensor:
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _m, _a, output: found.append(output))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(found)


def jacobians(tail: nn.Module, f: Tensor) -> Tensor:
    """One sample's after the other's, by torch.func: (n, out, d)."""
    return torch.func.vmap(torch.func.jacrev(tail))(f)


# ---- 1: what makes it the basis -------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_gram_is_lambda_and_jacobian_is_one(kind: str, centre: bool) -> None:
    model, batches = mlp(), data()
    ib = interaction_basis(model, batches, ["1", "3"], kind, centre=centre, eps=1e-12)  # type: ignore[arg-type]
    for path, later in (("1", "3"), ("3", None)):
        one, f = ib[path], activations(model, path, batches)
        fhat = one.features(f)
        n = len(f)
        assert one.rows == n
        torch.testing.assert_close(fhat.T @ fhat / n, one.Lambda.diag(), rtol=0, atol=EXACT)
        start = int(path) + 1
        if kind == "local" and later:
            tail: nn.Module = model[start : int(later) + 1]
            J = torch.einsum("oc,nod->ncd", ib[later].C, jacobians(tail, f))
        else:
            J = jacobians(model[start:], f)
        Jhat = J @ one.C_pinv.T
        moment = torch.einsum("nci,ncj->ij", Jhat, Jhat) / n
        torch.testing.assert_close(moment, torch.eye(one.dim).double(), rtol=0, atol=EXACT)
        assert bool((one.Lambda.diff() <= 0).all())
        assert bool((one.C.gather(0, one.C.abs().argmax(0, keepdim=True)) > 0).all())
        assert bool(one.mean.any()) == centre


def test_at_the_output_it_is_principal_components() -> None:
    model, batches = mlp(), data()
    here = interaction_basis(model, batches, ["3", "4"], eps=1e-12)["4"]
    f = activations(model, "4", batches)
    f = f - f.mean(0)
    torch.testing.assert_close(here.C.T @ here.C, torch.eye(3).double(), rtol=0, atol=EXACT)
    values, U = torch.linalg.eigh(f.T @ f / len(f))
    torch.testing.assert_close(here.Lambda, values.flip(0), rtol=EXACT, atol=0)
    torch.testing.assert_close(here.C.abs(), U.flip(1).abs(), rtol=0, atol=1e-8)


def test_pca_is_principal_components_of_any_layer() -> None:
    model, batches = mlp(), data()
    here = interaction_basis(model, batches, ["1"], "pca")["1"]
    assert (here.rank_gram, here.rank_jacobian, here.dim) == (6, 6, 6)
    torch.testing.assert_close(here.C.T @ here.C, torch.eye(6).double(), rtol=0, atol=EXACT)
    torch.testing.assert_close(here.C_pinv, here.C.T, rtol=0, atol=EXACT)


# ---- 2, 3, 4: what it does not depend on ----------------------------------------------------------------


class Mixed(nn.Module):
    """Activations times Q, whose inverse the next map has taken in."""

    def __init__(self, Q: Tensor) -> None:
        super().__init__()
        self.Q = Q

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.Q


@pytest.mark.parametrize("kind", ["local", "global"])
def test_another_parametrisation_has_the_same_features(kind: str) -> None:
    model, batches = mlp(), data()
    Q = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)).double()
    bias = model[2].bias
    unmixed = nn.Linear(6, 5).double()
    unmixed.weight.data, unmixed.bias.data = model[2].weight.detach() @ torch.linalg.inv(Q).T, bias.detach()
    other = nn.Sequential(model[0], model[1], Mixed(Q), unmixed, model[3], model[4])
    torch.testing.assert_close(other(batches[0]), model(batches[0]))
    ours = interaction_basis(model, batches, ["1", "3"], kind, eps=1e-9)["1"]  # type: ignore[arg-type]
    theirs = interaction_basis(other, batches, ["2", "4"], kind, eps=1e-9)["2"]  # type: ignore[arg-type]
    torch.testing.assert_close(theirs.Lambda, ours.Lambda, rtol=1e-10, atol=1e-12)
    f, g = activations(model, "1", batches), activations(other, "2", batches)
    ours_hat, theirs_hat = ours.features(f), theirs.features(g)
    signs = (ours_hat * theirs_hat).sum(0).sign()
    torch.testing.assert_close(theirs_hat * signs, ours_hat, rtol=0, atol=1e-8)


def widened(model: nn.Sequential, how: str) -> nn.Sequential:
    """A hidden unit more: a copy of the first, whose outgoing weights both share, or one without any."""
    a, b = model[0], model[2]
    wider, reader = nn.Linear(8, 7).double(), nn.Linear(7, 5).double()
    with torch.no_grad():
        wider.weight[:6], wider.bias[:6] = a.weight, a.bias
        reader.weight[:, :6], reader.bias[:] = b.weight, b.bias
        if how == "copy":
            wider.weight[6], wider.bias[6] = a.weight[0], a.bias[0]
            reader.weight[:, 0] = 0.3 * b.weight[:, 0]
            reader.weight[:, 6] = 0.7 * b.weight[:, 0]
        else:
            reader.weight[:, 6] = 0
    return nn.Sequential(wider, model[1], reader, *model[3:])


@pytest.mark.parametrize("how", ["copy", "unread"])
def test_units_that_add_nothing_change_nothing(how: str) -> None:
    model, batches = mlp(), data()
    other = widened(model, how)
    torch.testing.assert_close(other(batches[0]), model(batches[0]))
    ours = interaction_basis(model, batches, ["1", "3"], eps=1e-9)["1"]
    theirs = interaction_basis(other, batches, ["1", "3"], eps=1e-9)["1"]
    assert theirs.dim == ours.dim == 5
    assert theirs.rank_gram == (6 if how == "copy" else 7)
    torch.testing.assert_close(theirs.Lambda, ours.Lambda, rtol=1e-9, atol=1e-12)


def test_six_relus_before_three_tanh_outputs_have_three_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh()).double()
    one = interaction_basis(model, data(), ["1"])["1"]
    assert (one.rank_gram, one.rank_jacobian, one.dim) == (6, 3, 3)


@pytest.mark.filterwarnings("ignore:interaction_basis. '0' has:UserWarning")
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 7),
    o=st.integers(1, 7),
    r_G=st.integers(0, 7),
    r_K=st.integers(0, 7),
    centre=st.booleans(),
    batch=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_any_linear_map(
    n: int, d: int, o: int, r_G: int, r_K: int, centre: bool, batch: int, dtype: torch.dtype, seed: int
) -> None:
    """dim is at most both ranks; what is kept is diagonal and orthonormal; nothing depends on the batches."""
    draws = torch.Generator().manual_seed(seed)
    F, J = low_rank(n, d, r_G, draws).to(dtype), low_rank(o, d, r_K, draws).to(dtype)
    model = chosen(J).to(dtype)
    one = interaction_basis(model, list(F.split(batch)), ["0"], centre=centre)["0"]
    rows = F.double() - (F.double().mean(0) if centre else 0)
    tol = EXACT if dtype == torch.float64 else 1e-5
    # Ranks of what float32 holds are those of the numbers that were drawn, up to its rounding.
    assert one.rank_jacobian == min(r_K, o, d)
    assert one.rank_gram <= min(r_G, n, d)
    assert one.dim <= min(one.rank_gram, one.rank_jacobian)
    fhat = rows @ one.C
    torch.testing.assert_close(fhat.T @ fhat / n, one.Lambda.diag(), rtol=0, atol=tol)
    torch.testing.assert_close(one.C_pinv @ one.C, torch.eye(one.dim).double(), rtol=0, atol=1e-6)
    # The outputs vary by as much in the basis as outside of it.
    whole = (rows @ J.double().T).square().sum() / n
    torch.testing.assert_close(one.Lambda.sum(), whole, rtol=1e-3, atol=1e-6)


# ---- 5, 6: by hand --------------------------------------------------------------------------------------


def test_four_samples_by_hand() -> None:
    F = torch.tensor([[2.0, 0], [0, 1], [2, 0], [0, 1]]).double()
    one = interaction_basis(chosen(torch.tensor([[1.0, 0], [0, 3]])), [F], ["0"], centre=False)["0"]
    torch.testing.assert_close(one.Lambda, torch.tensor([4.5, 2.0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(one.C, torch.tensor([[0.0, 1], [3, 0]]).double(), rtol=0, atol=1e-12)


def test_one_direction_by_hand() -> None:
    F = torch.tensor([[1.0, 1], [1, -1], [2, 0], [0, 2]]).double()
    one = interaction_basis(chosen(torch.tensor([[1.0, 1]])), [F], ["0"], centre=False)["0"]
    torch.testing.assert_close(one.Lambda, torch.tensor([3.0]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(one.C, torch.tensor([[1.0], [1]]).double(), rtol=0, atol=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    F = data(300, 4)
    small = interaction_basis(chosen(torch.randn(3, 4)), F, ["0"])["0"]
    model = chosen(torch.randn(3, 4, generator=torch.Generator().manual_seed(3)))
    small, large = (interaction_basis(model, [x + s for x in F], ["0"])["0"] for s in (0.0, 1e6))
    torch.testing.assert_close(large.Lambda, small.Lambda, rtol=1e-8, atol=0)


# ---- 8: nothing is lost, and estimates --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_all_features_give_the_outputs(act: type[nn.Module], dtype: torch.dtype) -> None:
    model, batches = mlp((8, 12, 5, 3), act), data()
    model, batches = model.to(dtype), [x.to(dtype) for x in batches]
    eps = 1e-5 if dtype == torch.bfloat16 else 1e-11  # derivatives in bfloat16 have noise of rank 12
    ib = interaction_basis(model, batches, ["1"], eps=eps)
    assert ib["1"].dim <= 5
    before = torch.cat([model(x) for x in batches]).detach()
    with optx.attach(model, ib.project("1")):
        after = torch.cat([model(x) for x in batches]).detach()
    share = float((after - before).abs().max() / before.abs().max())
    assert share < {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.equal(torch.cat([model(x) for x in batches]), before)


def test_sources_err_by_one_over_the_root() -> None:
    model, batches = mlp((8, 6, 20, 10)), data(40)
    exact = interaction_basis(model, batches, ["1"], eps=1e-12)["1"].Lambda

    def spread(sources: int) -> float:
        found = [
            interaction_basis(model, batches, ["1"], eps=1e-12, sources=sources, seed=seed)["1"].Lambda
            for seed in range(24)
        ]
        each = torch.stack([one.sum() for one in found])
        assert abs(float(each.mean() - exact.sum())) < 4 * float(each.std()) / 24**0.5  # unbiased
        return float((each - exact.sum()).square().mean().sqrt())

    ratio = spread(4) / spread(64)
    assert 2.4 < ratio < 6.5  # 4, up to the chance of 24 seeds


def test_sources_repeat_with_their_seed() -> None:
    model, batches = mlp(), data(20)
    a, b, c = (
        interaction_basis(model, batches, ["1"], sources=2, seed=seed)["1"].Lambda for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_layer_prints_as_one_line() -> None:
    found = interaction_basis(mlp(), data(), ["1"])["1"]
    ranks = f"rank_gram={found.rank_gram}, rank_jacobian={found.rank_jacobian}"
    assert repr(found) == f"LayerBasis({found.dim} features of 6, {ranks}, rows=200)"
