"""Counts of free directions, against the rank of all parameters' Jacobian and against numbers by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from injections import assert_same, snapshot
from low_rank import low_rank
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx.analysis import degeneracy


def parameter_rank(model: nn.Module, x: Tensor) -> int:
    """Of the outputs' Jacobian with respect to all parameters: what the network can be changed by."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(w: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, w, (x,)).flatten()

    J = torch.cat([j.flatten(1) for j in torch.func.jacrev(outputs)(weights).values()], 1)
    return int(torch.linalg.matrix_rank(J, rtol=1e-10))


def relus(seed: int = 0) -> nn.Sequential:
    """y = a relu(W x), 5-3-4: 27 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3, bias=False), nn.ReLU(), nn.Linear(3, 4, bias=False)).double()


def test_generic_relus_are_free_by_their_scales_alone() -> None:
    model, x = relus(), torch.randn(400, 5, generator=torch.Generator().manual_seed(1)).double()
    assert parameter_rank(model, x) == 24
    found = degeneracy(model, [x])
    assert (found["0"].blocks, found["0"].dead, found["0"].synchronised) == ((), 0, 0)
    assert 27 - (3 + found["0"].synchronised) == 24  # one scale a unit
    assert (found["0"].rank_gram, found["0"].rank_jacobian, found["0"].free) == (5, 3, 0)
    assert (found["2"].rank_gram, found["2"].rank_jacobian, found["2"].free) == (3, 4, 0)


def test_synchronised_relus_are_free_by_the_square() -> None:
    """Inputs on which all three fire, or none: 9 free directions, not 3."""
    model = relus()
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1)).double()
    on = model[0](x) > 0
    together = x[on.all(1) | (~on).all(1)]
    assert parameter_rank(model, together) == 18
    found = degeneracy(model, list(together.split(100)))
    assert (found["0"].blocks, found["0"].synchronised) == ((3,), 6)
    assert 27 - (3 + found["0"].synchronised) == 18


def test_a_few_samples_may_differ() -> None:
    model = relus()
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1)).double()
    on = model[0](x) > 0
    together, apart = x[on.all(1) | (~on).all(1)][:99], x[on.any(1) & ~on.all(1)][:1]
    mixed = [torch.cat([together, apart])]
    assert degeneracy(model, mixed)["0"].blocks != (3,)
    assert degeneracy(model, mixed, delta=0.01)["0"].blocks == (3,)


def test_dead_units_are_no_block() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias[:2] = -1e3
    found = degeneracy(model, [torch.randn(100, 5)])
    assert (found["0"].dead, found["0"].blocks) == (2, ())
    assert found["0"].rank_jacobian == 2
    assert found["0"].free == 4 * 6 - 6 * 2
    assert found["2"].rank_gram == 3  # two units and the constant


@pytest.mark.filterwarnings("ignore:degeneracy. \\d layers have more inputs:UserWarning")
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 6),
    o=st.integers(1, 6),
    r_G=st.integers(1, 6),
    r_K=st.integers(0, 6),
    bias=st.booleans(),
    batch=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_ranks_of_any_linear_layer(
    n: int, d: int, o: int, r_G: int, r_K: int, bias: bool, batch: int, seed: int
) -> None:
    """Against the rank of its own weights' Jacobian, where the later map is linear: that is r_G r_K."""
    draws = torch.Generator().manual_seed(seed)
    x = low_rank(n, d, r_G, draws)
    model = nn.Sequential(nn.Linear(d, o, bias=bias), nn.Linear(o, 3, bias=False)).double()
    model[1].weight.data = low_rank(3, o, r_K, draws)
    model[1].requires_grad_(False)
    one = degeneracy(model, list(x.split(batch)), eps=1e-12)["0"]
    assert (one.outputs, one.inputs) == (o, d + bias)
    given = torch.cat([x, torch.ones(n, 1).double()], 1) if bias else x
    assert one.rank_gram == int(torch.linalg.matrix_rank(given, rtol=1e-7))
    assert one.rank_jacobian == min(r_K, o, 3)
    weights = {k: p.detach() for k, p in model.named_parameters() if k.startswith("0")}

    def outputs(w: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, w, (x,)).flatten()

    J = torch.cat([j.flatten(1) for j in torch.func.jacrev(outputs)(weights).values()], 1)
    assert J.shape[1] - int(torch.linalg.matrix_rank(J, rtol=1e-7)) == one.free


class Functional(nn.Module):
    """Relu as a function, in place; one layer used twice, one never, one that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.never, self.lost, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.a(x))
        self.lost(x)
        x = self.twice(self.twice(self.b(x).relu()).tanh())
        return self.out(x)


def test_relu_in_any_form_and_what_is_left_out() -> None:
    model, x = Functional(), torch.randn(50, 4)
    found = degeneracy(model, [x])
    assert list(found) == ["a", "b", "lost", "out"]
    assert [one.relu for one in found.values()] == [True, True, False, False]
    assert found.left_out == {"twice": "called 2 times", "never": "not called"}
    assert (found["lost"].rank_jacobian, found["lost"].free) == (0, 20)
    plain = nn.Sequential(model.a, nn.ReLU(), nn.Linear(4, 2))
    assert degeneracy(plain, [x])["0"].dead == found["a"].dead
    text = str(found)
    assert "Left out: twice (called 2 times)." in text
    assert "4 x 5" in text
    assert "-  " in text


def test_it_leaves_no_trace_also_after_an_error() -> None:
    model = Functional().train()
    model.b.eval()
    model.a.weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    degeneracy(model, [torch.randn(9, 4)], sources=3)
    torch.set_rng_state(state)
    degeneracy(model, [torch.zeros(9, 4)], sources=3)
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(optx.OptxError, match="inf or nan"):
        degeneracy(model, [torch.full((9, 4), torch.inf)])
    assert_same(model, before)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        degeneracy(model, [torch.zeros(9, 3)])
    assert_same(model, before)


def test_few_samples_and_other_matrices_are_told() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(20, 5), nn.LayerNorm(5), nn.Linear(5, 2)
    )
    with pytest.warns(UserWarning, match=r"1 layers have more inputs .* as '2' with 21 for 9, and look free"):
        found = degeneracy(model, [torch.randn(9, 3, 6)])
    assert found.left_out == {"0": "a Conv1d is no linear module"}
    assert found["2"].rank_gram == 9


def test_layers_that_are_summed_apart_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short the loader is read again, and only then."""
    model, x = Functional(), torch.randn(50, 4)
    reads = list[int]()

    class Loader(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            reads.append(1)
            return super().__iter__()

    together = degeneracy(model, Loader([x]))
    assert len(reads) == 1 + 1  # the look, and one pass for all
    monkeypatch.setattr("optx.analysis.interaction.degeneracy._BYTES", 1)
    assert degeneracy(model, Loader([x])).layers == together.layers
    assert len(reads) == 2 + 1 + 4


def test_sources_find_the_rank() -> None:
    model, x = relus(), torch.randn(400, 5, generator=torch.Generator().manual_seed(1)).double()
    found = degeneracy(model, [x], sources=2)
    assert [one.rank_jacobian for one in found.values()] == [3, 4]


def test_what_makes_no_sense_is_said() -> None:
    x = [torch.randn(9, 5)]
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    for layers, said in (
        (["1"], "'1' is a ReLU"),
        (["9"], "no module is called '9'"),
        ("0", "layers is '0'"),
    ):
        with pytest.raises(optx.OptxError, match=said):
            degeneracy(model, x, layers)  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="delta is 2"):
        degeneracy(model, x, delta=2)
    with pytest.raises(optx.OptxError, match="eps is -1"):
        degeneracy(model, x, eps=-1)
    with pytest.raises(optx.OptxError, match="sources is 0"):
        degeneracy(model, x, sources=0)
    with pytest.raises(optx.OptxError, match="calls no linear module once"):
        degeneracy(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(KeyError, match="nothing of '7'"):
        degeneracy(model, x)["7"]
