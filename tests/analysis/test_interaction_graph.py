"""Edges between features, their modularity, and ablation by projection."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from injections import assert_same, snapshot
from networkx.algorithms import community
from torch import Tensor, nn

import optx
from optx.analysis import interaction_basis
from optx.analysis.interaction._modularity import modularity_of


def net(act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3)).double()


def batches(n: int = 60, size: int = 25) -> list[Tensor]:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1)).double()
    return list((x + 0.3).split(size))


# ---- edges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_a_linear_map_has_edges_in_closed_form(nodes: int, centre: bool) -> None:
    """E_ij = Jhat_ij^2 Lambda_j, whatever the rule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    ib = interaction_basis(model, batches(), ["1", "2", "3"], centre=centre)
    E = ib.edges(nodes=nodes)["1", "2"]
    Jhat = ib["2"].C.T @ model[2].weight.detach() @ ib["1"].C_pinv.T
    torch.testing.assert_close(E, Jhat.square() * ib["1"].Lambda, rtol=1e-10, atol=1e-14)
    part = ib.edges(nodes=nodes, keep=2)["1", "2"]
    torch.testing.assert_close(part, E[:2, :2], rtol=1e-10, atol=1e-14)


def features_of_next(model: nn.Sequential, ib: Any, fhat: Tensor) -> Tensor:
    """The map from one layer's features to the next one's."""
    f = ib["1"].mean + fhat @ ib["1"].C_pinv
    return (model[2:4](f) - ib["3"].mean) @ ib["3"].C


@pytest.mark.parametrize("centre", [True, False])
def test_edges_are_integrated_gradients(centre: bool) -> None:
    """Against torch.func's Jacobians and a fine midpoint rule."""
    model, x = net(), batches()
    ib = interaction_basis(model, x, ["1", "3"], centre=centre)
    fhat = ib["1"].features(model[:2](torch.cat(x)).detach())
    steps = 200
    J = torch.zeros(len(fhat), ib["3"].dim, ib["1"].dim).double()
    for k in range(steps):
        one = torch.func.jacrev(lambda z: features_of_next(model, ib, z))
        J += torch.func.vmap(one)((k + 0.5) / steps * fhat).detach() / steps
    expected = (J * fhat[:, None]).square().mean(0)
    torch.testing.assert_close(ib.edges(nodes=8)["1", "3"], expected, rtol=1e-4, atol=1e-7)
    # By the fundamental theorem, what all features add is what has changed from no activation at all.
    added = (J * fhat[:, None]).sum(2)
    change = features_of_next(model, ib, fhat) - features_of_next(model, ib, 0 * fhat)
    torch.testing.assert_close(added, change.detach(), rtol=1e-3, atol=1e-4)
    at_end = torch.func.vmap(torch.func.jacrev(lambda z: features_of_next(model, ib, z)))(fhat).detach()
    expected = (at_end * fhat[:, None]).square().mean(0)
    torch.testing.assert_close(ib.edges()["1", "3"], expected, rtol=1e-10, atol=1e-14)


class OverPositions(nn.Module):
    """Features at 4 positions, and a map of all positions to 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x).tanh().mT).mT.tanh())


def test_edges_over_positions() -> None:
    """Summed over the earlier positions before the square, and over the later after it."""
    torch.manual_seed(0)
    model = OverPositions().double()
    x = torch.randn(30, 4, 3).double()
    ib = interaction_basis(model, [x[:20], x[20:]], ["first", "last"])
    f = model.first(x).detach()
    fhat = ib["first"].features(f)

    def tail(z: Tensor) -> Tensor:
        g = model.last(model.mix((ib["first"].mean + z @ ib["first"].C_pinv).tanh().mT).mT.tanh())
        return (g - ib["last"].mean) @ ib["last"].C

    J = torch.func.vmap(torch.func.jacrev(tail))(fhat).detach()  # (n, 2, i, 4, j)
    expected = torch.einsum("ntisj,nsj->ntij", J, fhat).square().sum((0, 1)) / (30 * 4)
    torch.testing.assert_close(ib.edges()["first", "last"], expected, rtol=1e-9, atol=1e-14)
    # And what makes it the basis, with a sum over both.
    moment = torch.einsum("ntisj,ntisk->jk", J, J) / (30 * 4)
    torch.testing.assert_close(moment, torch.eye(len(moment)).double(), rtol=0, atol=1e-10)


def test_edges_in_other_dtypes() -> None:
    exact = interaction_basis(net(), batches(), ["1", "3"]).edges(nodes=2)["1", "3"]
    for dtype, share in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model, x = net().to(dtype), [b.to(dtype) for b in batches()]
        found = interaction_basis(model, x, ["1", "3"]).edges(nodes=2)["1", "3"]
        assert found.dtype == torch.float64
        assert float((found[:2, :2] - exact[:2, :2]).abs().max()) < share * float(exact.max())


def test_edges_need_two_layers_and_sensible_options() -> None:
    ib = interaction_basis(net(), batches(), ["1"])
    with pytest.raises(optx.OptxError, match="one layer"):
        ib.edges()
    two = interaction_basis(net(), batches(), ["1", "3"])
    with pytest.raises(optx.OptxError, match="nodes is -1"):
        two.edges(nodes=-1)
    with pytest.raises(optx.OptxError, match="keep is 0"):
        two.edges(keep=0)


# ---- modularity -----------------------------------------------------------------------------------------


def blocks(strong: float = 1.0, weak: float = 0.0) -> dict[tuple[str, str], Tensor]:
    """Two groups of three layers."""
    same = torch.tensor([0, 0, 0, 1, 1])[:, None] == torch.tensor([0, 0, 1, 1])
    E = torch.where(same, strong, weak).double()
    return {("a", "b"): E, ("b", "c"): E.T.contiguous()[:, :5]}


@pytest.mark.parametrize("clusters", [None, 2])
def test_blocks_are_found(clusters: int | None) -> None:
    found = modularity_of(blocks(weak=1e-6), None, clusters, 0)
    assert found.number == 2
    groups = torch.cat([found.clusters[layer] for layer in "abc"])
    truth = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1])
    assert torch.equal(groups, truth) or torch.equal(groups, 1 - truth)
    # Equal weights in two blocks of 12 and 8 edges: 1 less the chance of both ends in one block.
    assert pytest.approx(1 - (12**2 + 8**2) / 20**2) == found.Q
    assert found.e0 == pytest.approx(1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_modularity_is_networkx_s(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    edges = {
        ("a", "b"): torch.randn(6, 5, generator=draws).double().exp().pow(3),
        ("b", "c"): torch.randn(4, 6, generator=draws).double().exp().pow(3),
    }
    e0 = float(edges["a", "b"].median())
    found = modularity_of(edges, e0, None, seed)
    graph = networkx.Graph()
    for (a, b), E in edges.items():
        for i in range(E.shape[0]):
            for j in range(E.shape[1]):
                if E[i, j] > e0:
                    graph.add_edge((a, j), (b, i), weight=float((E[i, j] / e0).log10()))
    groups: dict[int, set[Any]] = {}
    for layer, owners in found.clusters.items():
        for j, owner in enumerate(owners.tolist()):
            assert (owner == -1) == ((layer, j) not in graph)
            groups.setdefault(owner, set()).add((layer, j))
    groups.pop(-1, None)
    assert found.number == len(groups)
    assert pytest.approx(community.modularity(graph, groups.values(), weight="weight"), abs=1e-12) == found.Q
    assert sorted(groups, key=lambda owner: -len(groups[owner])) == sorted(groups)


def test_only_the_logarithm_counts() -> None:
    """Edges of a million and of a hundred differ by a factor of three, as weights."""
    found = modularity_of(blocks(strong=1e6, weak=1e2), 1.0, 2, 0)
    inside, across = 20 * 6, 20 * 2
    assert inside / (inside + across) - 0.4 > found.Q


def test_features_without_an_edge_are_in_no_group() -> None:
    edges = blocks()
    edges["a", "b"][:, 3] = 0
    found = modularity_of(edges, None, None, 0)
    assert found.clusters["a"].tolist()[3] == -1
    assert (torch.cat([*found.clusters.values()]) == -1).sum() == 1


def test_a_basis_s_own_edges() -> None:
    ib = interaction_basis(net(), batches(), ["1", "3", "4"])
    found, again = ib.modularity(), ib.modularity(ib.edges(), seed=0)
    assert found.Q == again.Q
    assert list(found.clusters) == ["1", "3", "4"]
    assert [len(found.clusters[layer]) for layer in ib] == [one.dim for one in ib.values()]
    one = ib["1"]
    f = torch.randn(3, 6)
    torch.testing.assert_close(one.features(f), (f.double() - one.mean) @ one.C)


def test_more_groups_than_features_are_as_many_as_there_are() -> None:
    assert modularity_of(blocks(), None, 99, 0).number == 13


def test_no_edge_counts() -> None:
    with pytest.raises(optx.OptxError, match=r"no edge is above e0 \(10\).*largest is 1"):
        modularity_of(blocks(), 10.0, None, 0)
    with pytest.raises(optx.OptxError, match="e0 is 0"):
        modularity_of(blocks(), 0.0, None, 0)


# ---- projection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("keep", [0, 2, 5, None])
def test_projection_keeps_the_first_features(keep: int | None, centre: bool) -> None:
    model, x = net(), torch.cat(batches())
    ib = interaction_basis(model, batches(), ["1", "3"], centre=centre)
    one = ib["1"]
    k = one.dim if keep is None else keep
    before, was = model(x), snapshot(model)
    f = model[:2](x)
    expected = model[2:](one.mean + (f - one.mean) @ one.C[:, :k] @ one.C_pinv[:k])
    handle = optx.attach(model, ib.project("1", keep))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert f"{k} of 6 directions" in str(handle.report())
    with handle.disable():
        assert torch.equal(model(x), before)
    handle.remove()
    assert torch.equal(model(x), before)
    assert_same(model, was)


def test_projections_of_two_layers_and_in_any_order() -> None:
    model, x = net(), torch.cat(batches())
    ib = interaction_basis(model, batches(), ["1", "3"])
    before = model(x)
    first, second = optx.attach(model, ib.project("1", 1)), optx.attach(model, ib.project("3", 1))
    both = model(x)
    first.remove()
    assert not torch.equal(model(x), both)
    second.remove()
    assert torch.equal(model(x), before)


def test_a_basis_of_a_model_that_is_projected_is_of_what_is_left() -> None:
    model = net()
    ib = interaction_basis(model, batches(), ["1", "3"])
    with optx.attach(model, ib.project("1", 2)):
        assert interaction_basis(model, batches(), ["1", "3"])["1"].rank_gram == 2


def test_projection_on_half_precision_and_copies() -> None:
    model = net().to(torch.bfloat16)
    x = [b.to(torch.bfloat16) for b in batches()]
    ib = interaction_basis(model, x, ["1"])
    handle = optx.attach(model, ib.project("1", 2))
    assert model(x[0]).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(model)(x[0]), model(x[0]))
    handle.remove()


def test_a_projection_is_not_saved_without_its_basis(tmp_path: Path) -> None:
    model = net()
    handle = optx.attach(model, interaction_basis(model, batches(), ["1"]).project("1", 2))
    with pytest.raises(optx.OptxError, match="make it again by ib"):
        handle.save(tmp_path / "out")
    handle.remove()


def test_a_projection_has_matrices_of_its_own() -> None:
    model = net()
    ib = interaction_basis(model, batches(), ["1"])
    one, kept = ib["1"], [t.clone() for t in (ib["1"].C, ib["1"].C_pinv, ib["1"].mean)]
    handle = optx.attach(model, ib.project("1"))
    handle.load_state_dict({name: torch.zeros_like(t) for name, t in handle.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip((one.C, one.C_pinv, one.mean), kept, strict=True))
    handle.remove()


def test_what_cannot_be_projected() -> None:
    model = net()
    ib = interaction_basis(model, batches(), ["1"])
    for wrong, said in (("2", "no basis of '2'"), ("3", "no basis of '3'")):
        with pytest.raises(optx.OptxError, match=said):
            ib.project(wrong)
    with pytest.raises(optx.OptxError, match=r"keep is 9; '1' has \d features"):
        ib.project("1", 9)
    with pytest.raises(optx.OptxError, match="keep is -1"):
        ib.project("1", -1)
    with pytest.raises(optx.OptxError, match="no such module"):
        optx.attach(nn.Sequential(nn.Linear(2, 2)), ib.project("1"))
    optx.attach(model, ib.project("1"), targets="3")
    with pytest.raises(optx.OptxError, match="gives 5 features, and the basis is of 6"):
        model(batches()[0])
