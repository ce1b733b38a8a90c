"""Top singular values against torch.linalg.svdvals, over shapes, modules, dtypes and odd matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.scaling import sublayer_gain

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny matrices


def holder(**weights: Tensor) -> nn.Module:
    model = nn.Module()
    for name, w in weights.items():
        model.register_parameter(name, nn.Parameter(w))
    return model


def top(w: Tensor, **options: Any) -> Any:
    return sublayer_gain(holder(w=w), **options).top["w"]


def truth(w: Tensor) -> float:
    return float(torch.linalg.svdvals(w.double())[0])


def with_values(rows: int, columns: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix that has these singular values, and zeros besides."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=g, dtype=torch.float64))[0][:, : len(values)]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=g, dtype=torch.float64))[0][:, : len(values)]
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 6),
    st.integers(0, 10_000),
)
def test_it_is_the_largest_singular_value(rows, columns, dtype, vectors, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = top(w, vectors=vectors, iterations=3000, tol=1e-4)
    wanted = truth(w)
    assert found.converged
    assert found.value == pytest.approx(wanted, rel=2e-4)
    assert found.value <= wanted * (1 + 1e-5)  # from below
    assert found.shape == (rows, columns)


@given(st.integers(-25, 25), st.integers(0, 100))
def test_scale_is_not_seen(exponent, seed):
    """Squares of 1e25 overflow in float32, those of 1e-25 vanish."""
    w = torch.randn(9, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = top((w * 10.0**exponent).float(), iterations=2000, tol=1e-4)
    assert found.value == pytest.approx(truth((w * 10.0**exponent).float()), rel=2e-4)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 20))
def test_what_the_residual_says_is_so(rows, columns, iterations):
    """A singular value lies within it, converged or not."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(iterations), dtype=torch.float64)
    found = top(w, vectors=1, iterations=iterations, tol=0.0)
    values = torch.linalg.svdvals(w)
    low = found.value * math.sqrt(max(0.0, 1 - found.residual)) - 1e-9
    high = found.value * math.sqrt(1 + found.residual) + 1e-9
    assert bool(((values >= low) & (values <= high)).any()) or found.residual >= 1
    assert found.iterations == iterations or found.residual == 0.0


def test_odd_matrices():
    assert top(torch.zeros(4, 3)).value == 0.0
    assert top(torch.zeros(4, 3)).residual == 0.0
    assert top(torch.zeros(4, 3)).converged
    rank_one = with_values(6, 9, [3.0])
    assert top(rank_one).value == pytest.approx(3.0, rel=1e-6)
    assert top(rank_one.float()).iterations <= 3
    equal = with_values(8, 8, [2.0] * 8)  # every vector is a singular vector
    assert top(equal).value == pytest.approx(2.0, rel=1e-6)
    many = with_values(30, 20, [2.0] * 7 + [1.0] * 13)  # more equal ones than the block has vectors
    assert top(many).value == pytest.approx(2.0, rel=1e-6)
    one = top(torch.tensor([[-7.0]]))
    assert (one.value, one.shape) == (7.0, (1, 1))


def test_a_slow_matrix_says_that_it_has_not_converged():
    close = with_values(40, 40, [1 - i / 400 for i in range(40)])
    few = sublayer_gain(holder(w=close), iterations=2)
    assert not few.top["w"].converged
    assert not few.converged
    assert few.top["w"].residual > 1e-3
    assert few.top["w"].value < 1.0
    assert "not converged" in str(few)
    assert sublayer_gain(holder(w=close), iterations=5000).top["w"].value == pytest.approx(1.0, rel=1e-3)


def test_going_on_from_an_earlier_result_takes_few_iterations():
    torch.manual_seed(0)
    model = nn.Linear(60, 50)
    cold = sublayer_gain(model, tol=1e-4, iterations=3000)
    with torch.no_grad():
        model.weight.add_(torch.randn_like(model.weight), alpha=1e-4)
    warm = sublayer_gain(model, tol=1e-3, start=cold)
    assert warm.top["weight"].iterations <= 5 < cold.top["weight"].iterations
    assert warm.top["weight"].value == pytest.approx(truth(model.weight.detach()), rel=1e-4)
    with pytest.raises(optx.OptxError, match=r"start has a block of shape \(1, 60, 4\) for 'weight'"):
        sublayer_gain(model, vectors=3, start=cold)
    with pytest.raises(optx.OptxError, match="start has nothing for 'w'"):
        sublayer_gain(holder(w=torch.ones(2, 2)), start=cold)


# ---- a model's matrices -----------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.conv = nn.Conv2d(6, 4, 3)
        self.grouped = nn.Conv1d(6, 9, 2, groups=3)
        self.turned = nn.ConvTranspose2d(4, 6, 2)
        self.gpt2 = Conv1D(5, 6)
        self.experts = Experts()
        self.norm = nn.LayerNorm(6)
        self.position = nn.Parameter(torch.randn(1, 7, 6))
        self.empty = nn.Parameter(torch.zeros(0, 6))
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)


def test_kinds_of_matrices():
    torch.manual_seed(1)
    model = Everything()
    found = sublayer_gain(model, iterations=5000, tol=1e-5, embeddings=True)
    wanted = {
        "position": None,
        "empty": None,
        "table.weight": truth(model.table.weight.detach()),
        "conv.weight": truth(model.conv.weight.detach().reshape(4, 54)),
        "turned.weight": truth(model.turned.weight.detach().reshape(4, 24)),
        "gpt2.weight": truth(model.gpt2.weight.detach()),
        "one.weight": truth(model.one.weight.detach()),
        "two.weight": truth(model.two.weight.detach()),
        "grouped.weight": max(truth(w) for w in model.grouped.weight.detach().reshape(3, 3, 4)),
        **{f"experts.up[{i}]": truth(model.experts.up.detach()[i]) for i in range(3)},
    }
    assert set(found.left_out) == {"position", "empty"}
    assert found.top.keys() == {name for name, value in wanted.items() if value is not None}
    for name, one in found.top.items():
        assert one.value == pytest.approx(wanted[name], rel=1e-4), name
    plain = sublayer_gain(model)
    assert found.top.keys() - plain.top.keys() == {"table.weight"}
    assert plain.left_out["table.weight"] == "an embedding"
    assert "Left out: 3 parameters" in str(plain)


def test_a_groups_of_a_convolution_are_blocks_of_one_matrix():
    """Its norm is the largest of theirs: of the dense convolution that it is."""
    torch.manual_seed(0)
    grouped, dense = nn.Conv1d(6, 6, 3, groups=2), nn.Conv1d(6, 6, 3)
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[:3, :3], dense.weight[3:, 3:] = grouped.weight[:3], grouped.weight[3:]
    found = sublayer_gain(grouped, iterations=3000, tol=1e-5).top["weight"].value
    assert found == pytest.approx(truth(dense.weight.detach().reshape(6, 18)), rel=1e-4)


def test_many_small_matrices_are_multiplied_at_once(monkeypatch):
    calls: list[tuple[int, ...]] = []
    from optx.scaling import _singular

    iterate = _singular.iterate
    monkeypatch.setattr(_singular, "iterate", lambda w, v: calls.append(tuple(w.shape)) or iterate(w, v))
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)], nn.Linear(8, 3))
    sublayer_gain(model, iterations=1)
    assert sorted(calls) == [(1, 3, 8), (10, 8, 8)]
    calls.clear()
    monkeypatch.setattr(_singular, "_TOGETHER", 64 * 4)
    sublayer_gain(model, iterations=1)
    assert sorted(calls) == [(1, 3, 8), (2, 8, 8), (4, 8, 8), (4, 8, 8)]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_are_named(bad):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.data[2, 3] = bad
    with pytest.raises(optx.OptxError, match=r"'1.weight' holds inf or nan"):
        sublayer_gain(model)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: nn.LayerNorm(3), {}, "no matrix"),
        (lambda: nn.Embedding(3, 3), {}, "embeddings=True"),
        (lambda: nn.Linear(2, 2), {"vectors": 0}, "vectors is 0"),
        (lambda: nn.Linear(2, 2), {"iterations": 1.5}, "iterations is 1.5"),
        (lambda: nn.Linear(2, 2), {"tol": -1.0}, "tol is -1.0"),
        (lambda: nn.Linear(2, 2, device="meta"), {}, "no matrix"),
        (lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn), {}, "no matrix"),
        (lambda: [nn.Linear(2, 2)], {}, "model is a list"),
    ],
)
def test_what_cannot_be_is_said(make, options, words):
    with pytest.raises(optx.OptxError, match=words):
        sublayer_gain(make(), **options)


@pytest.mark.usefixtures("group_of_one")
def test_a_sharded_weight_is_the_whole_one():
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    w = torch.randn(8, 6)
    sharded = distribute_tensor(w, DeviceMesh("cpu", [0]), [Shard(0)])
    assert top(sharded, iterations=2000).value == pytest.approx(truth(w), rel=1e-3)


# ---- gains on a batch, and no trace -----------------------------------------------------------------------


def test_gains_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Identity())
    model[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    gain = sublayer_gain(model, x).gain
    assert gain["0"] == pytest.approx(math.sqrt((9 + 16) / 2))
    assert gain["1"] == pytest.approx(math.sqrt((9 + 9 + 16) / 4 / 12.5))
    assert gain["2"] == 1.0
    assert gain[""] == pytest.approx(gain["0"] * gain["1"])


def test_gains_of_a_transformer_and_of_a_module_called_twice():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    gain = sublayer_gain(model, {"input_ids": torch.arange(6)[None]}).gain
    assert {"model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.0.mlp.down_proj"} <= gain.keys()
    assert "model.embed_tokens" not in gain  # class numbers have no size
    assert all(value > 0 for value in gain.values())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(10 * x) + self.layer(x)

    twice = Twice()
    x = torch.randn(5, 3)
    with torch.no_grad():
        each = [(z.square().mean(), twice.layer(z).square().mean()) for z in (10 * x, x)]
    wanted = math.sqrt(sum(y for _, y in each) / sum(z for z, _ in each))
    assert sublayer_gain(twice, x).gain["layer"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_no_trace(fails):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    model[1].train()
    model[2].train()
    x, wrong = torch.randn(6, 4), torch.randn(6, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    sublayer_gain(model)
    assert torch.equal(torch.get_rng_state(), random)
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            sublayer_gain(model, wrong)
    else:
        assert sublayer_gain(model, x).gain
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_models_are_compared():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight.data = one.weight.data * 2
    assert sublayer_gain(one).compare(sublayer_gain(two)) == {"weight": pytest.approx(2.0, rel=1e-3)}
    with pytest.raises(optx.OptxError, match=r"'0.weight' is in one of the two only"):
        sublayer_gain(one).compare(sublayer_gain(nn.Sequential(two)))
