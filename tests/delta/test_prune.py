"""DARE, DAREx-q and their peers (arXiv 2410.09344): the numbered properties of the specification first."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import gpt2
from delta_cases import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import Holder, pair
from torch import nn

from optx import Delta, OptxError, ShapeError
from optx.delta import prune
from optx.delta._input_stats import InputStats, input_stats
from optx.delta._random_mask import Dropout, keep_torch, key_of
from optx.delta.search_q import analytic_q, mse_q, phi

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16]


def change(values: Any) -> Delta:
    """A delta that is these numbers."""
    tuned = torch.as_tensor(values, dtype=F32)
    return Delta.between({"w": torch.zeros_like(tuned)}, {"w": tuned})


# ---- 1 to 8: the specification's properties ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_dropped_is_tuned_and_everything_is_base(dtype: torch.dtype) -> None:
    base, tuned = pair(dtype)
    # numbers of very different sizes, where base + (tuned - base) is not tuned
    base["a.weight"][0], tuned["a.weight"][0] = 1000.0, 1e-3
    before = copy.deepcopy(base)
    delta = Delta.between(base, tuned)
    for whole in (delta, delta.dare(0.0)):
        made = whole.apply(base)
        assert all(torch.equal(made[name], tuned[name]) for name in tuned)
    made = delta.dare(1.0, q=1.0).apply(base)
    assert all(torch.equal(made[name], base[name]) for name in base)
    assert all(torch.equal(base[name], before[name]) for name in base)


@given(
    p=st.floats(0.01, 0.99), grow=st.floats(1.0, 3.0), n=st.integers(1, 3000), dtype=st.sampled_from(DTYPES)
)
@settings(max_examples=30)
def test_survivors_are_the_change_over_q(p: float, grow: float, n: int, dtype: torch.dtype) -> None:
    q = min(1.0, (1 - p) * grow)
    base, tuned = {"w": normal(n, dtype=dtype)}, {"w": normal(n, seed=1, dtype=dtype)}
    delta = Delta.between(base, tuned)
    whole, pruned = delta["w"], delta.dare(p, q=q)["w"]
    kept = pruned != 0
    assert torch.equal(pruned[kept], (whole / q)[kept])
    spread = 4 * math.sqrt(n * p * (1 - p)) + 1
    assert abs(int(kept.sum()) - int(whole.count_nonzero()) * (1 - p)) <= spread


@pytest.mark.parametrize(("q", "ratio"), [(0.1, 1.0), (0.2, 0.5)])
def test_mean_over_seeds(q: float, ratio: float) -> None:
    delta = normal(64)
    total = sum(Dropout(key_of(seed, "w"), 0.9, q).scale(delta).double() for seed in range(4000))
    error = ((total / 4000 - ratio * delta) / delta).square().mean().sqrt()
    assert error < 0.05


def test_phi_and_the_bound() -> None:
    assert [phi(0.5), phi(0.0), phi(1.0)] == [0.5, 0.0, 0.0]
    assert phi(0.9) == pytest.approx(0.36409569, abs=1e-8)
    assert phi(0.1) == pytest.approx(phi(0.9), rel=1e-12)
    assert phi(0.99) == pytest.approx(0.21326974, abs=1e-8)
    for p, factor in ((0.9, 11.589241), (0.99, 88.697596)):
        assert math.sqrt(phi(p) * math.log(40)) / (1 - p) == pytest.approx(factor, abs=1e-5)


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(("p", "q"), [(0.9, 0.1), (0.9, 0.2), (0.5, 0.6), (0.99, 0.02)])
def test_the_bound_holds(p: float, q: float) -> None:
    c = normal(64).double()
    kept = keep_torch(key_of(3, "bound"), round((1 - p) * 2**63), 0, 64 * 100_000, "cpu").view(-1, 64)
    h = (c.sum() - (kept.double() @ c) / q).abs()
    limit = c.sum().abs() * abs(1 - (1 - p) / q) + math.sqrt(phi(p) * c.square().sum() * math.log(40)) / q
    assert (h > limit).double().mean() < 0.05
    assert (h > limit / 3).any()  # it is not so loose that it says nothing


def test_analytic_and_mse() -> None:
    total, squares = torch.tensor([-60.0, 60.0]), torch.tensor([180.0, 180.0])
    assert [float(analytic_q(total[i : i + 1], squares[i : i + 1], 0.9, 0.5)) for i in (0, 1)] == [
        0.456,
        0.998,
    ]
    assert mse_q(total.double(), squares.double(), 0.9).tolist() == pytest.approx([0.145, 0.145])
    # sums that half precision cannot hold
    assert 0.1 <= float(analytic_q(total[:1] * 1e4, squares[:1] * 1e8, 0.9)) <= 0.998


def test_mse_is_the_best_q() -> None:
    p, c = 0.8, normal(30).double() + 0.4
    best = float(mse_q(c.sum()[None], c.square().sum()[None], p))

    def error(q: float) -> float:
        mean = float(c.sum()) * (1 - (1 - p) / q)
        return mean**2 + float(c.square().sum()) * p * (1 - p) / q**2

    assert 1 - p < best < 1
    assert error(best) < min(error(best * 1.01), error(best / 1.01))


def test_magnitude_of_the_specification() -> None:
    values = [0.5, -0.1, 0.3, -0.7, 0.2, 0.05, -0.4, 0.6, -0.2, 0.9]
    kept = change(values).magnitude(0.7)["w"]
    torch.testing.assert_close(kept, torch.tensor([0, 0, 0, -0.7, 0, 0, 0, 0.6, 0, 0.9]), rtol=0, atol=0)


def test_wanda_of_the_specification() -> None:
    inputs = torch.tensor([[1.0, 4.0, 0.5], [2.0, 3.0, 0.5]])
    model = nn.Sequential(nn.Linear(3, 2))
    stats = {"w": input_stats(model, [inputs])["0.weight"]}
    delta = change([[0.5, -0.1, 0.3], [0.2, 0.4, -0.6]])
    scores = delta["w"].abs() * stats["w"].norm
    expected = torch.tensor([[1.118034, 0.5, 0.212132], [0.447214, 2.0, 0.424264]])
    torch.testing.assert_close(scores, expected)
    pruned = delta.wanda(2 / 3, stats)["w"]
    assert pruned.tolist() == torch.tensor([[0.5, 0, 0], [0, 0.4, 0]]).tolist()
    assert delta.magnitude(2 / 3)["w"].tolist() == torch.tensor([[0.5, 0, 0], [0, 0, -0.6]]).tolist()


def test_masks_differ_by_name_and_seed() -> None:
    a, b, c = (
        Dropout(key_of(seed, name), 0.5, 0.5).keep(0, 4000) for seed, name in ((0, "a"), (0, "b"), (1, "a"))
    )
    for one, other in ((a, b), (a, c), (b, c)):
        assert abs(float((one == other).double().mean()) - 0.5) < 0.04


# ---- masks depend on nothing else ----------------------------------------------------------------------


@given(
    p=st.sampled_from([0.0, 1e-9, 0.3, 0.9, 0.999, 1.0]),
    begin=st.integers(0, 2**40),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
)
def test_a_piece_is_a_piece_of_the_whole(p: float, begin: int, sizes: list[int]) -> None:
    drop = Dropout(key_of(7, "layer"), p, 1.0)
    whole, at = drop.keep(begin, sum(sizes)), 0
    assert torch.equal(whole, keep_torch(drop.key, drop.threshold, begin, sum(sizes), "cpu"))
    for size in sizes:
        assert torch.equal(drop.keep(begin + at, size), whole[at : at + size])
        at += size


@pytest.mark.parametrize("q", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_compiled_loop_is_torch_bit_for_bit(dtype: torch.dtype, q: float) -> None:
    base, tuned = normal(5003, dtype=dtype), normal(5003, seed=1, dtype=dtype)
    tuned[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    old = torch.where(torch.arange(5003) % 3 == 0, base, base * 1.5)
    drop = Dropout(key_of(0, "w"), 0.3, q)
    for other in (base, old):
        loop, plain = drop.onto(base, other, tuned, 11), drop._onto_torch(base, other, tuned, 11)
        bits = torch.int32 if dtype == F32 else torch.int16
        same = (loop.view(bits) == plain.view(bits)) | (loop.isnan() & plain.isnan())
        assert same.all()
    assert Dropout(0, 0.0, 1.0).onto(base, base, tuned, 0).isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_equals_the_change_added(dtype: torch.dtype) -> None:
    base, tuned = pair(dtype)
    delta = Delta.between(base, tuned).dare(0.8)
    fused, added = delta.apply(base), (delta * 1.0).apply(base)
    assert all(torch.equal(fused[name], added[name]) for name in base)


def test_order_and_company_do_not_matter() -> None:
    base, tuned = pair()
    forward = Delta.between(base, tuned).dare(0.7, seed=5)
    turned = Delta.between(base, dict(reversed(tuned.items()))).dare(0.7, seed=5)
    alone = Delta.between(base, tuned, include="a.bias").dare(0.7, seed=5)
    assert torch.equal(forward["a.bias"], turned["a.bias"])
    assert torch.equal(forward["a.bias"], alone["a.bias"])
    assert torch.equal(forward["a.bias"], forward["a.bias"])
    assert not torch.equal(forward["a.bias"], Delta.between(base, tuned).dare(0.7, seed=6)["a.bias"])


def test_dropped_infinities_are_zero() -> None:
    values = torch.full((1000,), math.inf)
    pruned = change(values).dare(0.9)["w"]
    assert set(pruned.unique().tolist()) == {0.0, math.inf}


# ---- options ---------------------------------------------------------------------------------------------


def test_heads_are_left_whole_by_default() -> None:
    base = {name: torch.zeros(500) for name in ("a.weight", "classifier.weight", "lm_head.weight")}
    delta = Delta.between(base, {name: t + 1 for name, t in base.items()})
    share = {name: float((t != 0).double().mean()) for name, t in delta.dare(0.9).items()}
    assert share["classifier.weight"] == share["lm_head.weight"] == 1.0
    assert share["a.weight"] < 0.2
    some = delta.dare(0.9, include="lm.*", exclude=None)
    assert [int((t == 1).sum()) for _, t in some.items()][:2] == [500, 500]
    assert float((some["lm_head.weight"] != 0).double().mean()) < 0.2
    made = delta.dare(0.9).apply(base)
    assert torch.equal(made["lm_head.weight"], base["lm_head.weight"] + 1)


def test_q_by_name() -> None:
    base = {name: torch.zeros(400) for name in ("a.weight", "a.bias", "b.weight", "norm.weight")}
    delta = Delta.between(base, {name: t + 1 for name, t in base.items()})
    pruned = delta.dare(0.9, q={"a.weight": 0.2, "b.weight": 0.8})
    largest = {name: float(t.max()) for name, t in pruned.items()}
    assert largest == {"a.weight": 5.0, "a.bias": 5.0, "b.weight": 1.25, "norm.weight": 2.0}


@given(n=st.integers(1, 200), p=st.floats(0, 0.999), levels=st.integers(1, 5), dtype=st.sampled_from(DTYPES))
def test_magnitude_drops_exactly_so_many(n: int, p: float, levels: int, dtype: torch.dtype) -> None:
    x = (torch.arange(n) % levels + 1).to(dtype) * (-1.0) ** torch.arange(n)
    pruned = prune.magnitude(x, p)
    assert int((pruned == 0).sum()) == int(n * p)
    kept = pruned != 0
    assert torch.equal(pruned[kept], x[kept])
    if kept.any() and not kept.all():
        assert x[kept].abs().min() >= x[~kept].abs().max()


def test_wanda_serves_conv1d_and_prunes_the_rest_by_size() -> None:
    base, tuned = gpt2(), gpt2()
    with torch.no_grad():
        for number, p in enumerate(tuned.parameters()):
            p.add_(normal(*p.shape, seed=number))
    stats = input_stats(tuned, [{"input_ids": torch.arange(24).view(2, 12)}])
    name = "transformer.h.0.attn.c_attn.weight"
    assert stats[name].axis == 0
    pruned = Delta.between(base, tuned, exclude="lm_head.*").wanda(
        0.75, {n: s for n, s in stats.items() if "lm_head" not in n}
    )
    assert ((pruned[name] == 0).sum(0) == 12).all()  # of the 16 inputs, for each output
    bias = pruned["transformer.h.0.attn.c_attn.bias"]
    assert int((bias == 0).sum()) == int(0.75 * bias.numel())


@pytest.mark.parametrize(("p", "kept"), [(0.9, 5), (0.99, 1), (0.0, 50)])
def test_structural_keeps_columns(p: float, kept: int) -> None:
    base, tuned = pair()
    delta = Delta.between(base, tuned)
    pruned = delta.structural(p, seed=2)
    used = (pruned["a.weight"] != 0).any(0)
    assert int(used.sum()) == kept
    torch.testing.assert_close(pruned["a.weight"][:, used], delta["a.weight"][:, used] * (50 / kept))
    assert torch.equal(pruned["a.bias"], delta["a.bias"])
    halves = delta.structural(p, q=1.0, seed=2)
    assert torch.equal(halves["a.weight"][:, used], delta["a.weight"][:, used])
    if kept == 5:
        other = (delta.structural(p, seed=3)["a.weight"] != 0).any(0)
        assert not torch.equal(used, other)


def test_structural_follows_conv1d() -> None:
    """GPT-2's inputs run along the rows, which only the model tells: some of its weights are square."""
    base, tuned = gpt2(), gpt2()
    with torch.no_grad():
        for number, p in enumerate(tuned.parameters()):
            p.add_(normal(*p.shape, seed=number))
    delta = Delta.between(base, tuned, exclude="lm_head.*")
    name, square = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_proj.weight"
    pruned = delta.structural(0.75, model=tuned)
    for which in (name, square):
        rows = (pruned[which] != 0).any(1)
        assert int(rows.sum()) == 4  # of 16 inputs
        torch.testing.assert_close(pruned[which][rows], delta[which][rows] * 4)
        assert int((delta.structural(0.75)[which] != 0).any(0).sum()) == delta[which].shape[1] // 4
    embedding = pruned["transformer.wte.weight"]
    assert int((embedding != 0).any(0).sum()) == 4
    with pytest.raises(OptxError, match="no linear layer that the delta has a change of"):
        delta.structural(0.5, model=nn.ReLU())


WRONG: dict[str, tuple[Any, str]] = {
    "p below": (
        lambda d: d.dare(-0.1),
        "p is -0.1; the share that is dropped must be at least 0 and below 1",
    ),
    "p one": (lambda d: d.dare(1.0), "p is 1.0"),
    "p nan": (lambda d: d.dare(math.nan), "p is nan"),
    "p text": (lambda d: d.dare("half"), "p is 'half'"),
    "magnitude": (lambda d: d.magnitude(1.0), "Delta.magnitude: p is 1.0"),
    "wanda": (lambda d: d.wanda(2.0, {}), "Delta.wanda: p is 2.0"),
    "structural": (lambda d: d.structural(1.5), "Delta.structural: p is 1.5"),
    "q small": (lambda d: d.dare(0.5, q=0.4), "q is 0.4; it must be between 0.499"),
    "q large": (lambda d: d.dare(0.5, q=1.5), "q is 1.5"),
    "q of none": (lambda d: d.dare(0.5, q={"a.weigth": 0.6}), "q has 'a.weigth'.*Near: 'a.weight'"),
    "q empty": (lambda d: d.dare(0.5, q={}), "q is empty"),
    "nothing": (lambda d: d.dare(0.5, include="b.*"), "leave nothing to prune"),
    "regex": (lambda d: d.dare(0.5, include="("), "is not a regular expression"),
    "no stats": (lambda d: d.wanda(0.5, {}), "stats is empty"),
    "stats": (lambda d: d.wanda(0.5, {"x": InputStats(torch.ones(2), torch.ones(2), 1)}), "stats has 'x'"),
    "strategy": (
        lambda d: d.find_q(nn.Linear(2, 2), [], 0.5, "best"),
        "must be one of output, val, analytic, learned, mse",
    ),
    "score": (lambda d: d.find_q(nn.Linear(2, 2), [], 0.5, "val"), "'val' needs score="),
    "batches": (lambda d: d.find_q(Holder(), [], 0.5), "batches is empty"),
    "no linear": (lambda d: d.find_q(nn.ReLU(), [torch.ones(2)], 0.5, "mse"), "was called"),
    "model": (lambda d: d.find_q(nn.Linear(2, 2), [torch.ones(2)], 0.5), "the model has no 'a.weight'"),
    "step": (
        lambda d: d.find_q(Holder(), [torch.ones(50)], 0.5, step=0.0),
        "step is 0.0; it must be above 0",
    ),
    "seeds": (lambda d: d.find_q(Holder(), [torch.ones(50)], 0.5, seeds=()), "seeds is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    what, message = WRONG[case]
    with pytest.raises(OptxError, match=message):
        what(Delta.between(*pair()))


def test_statistics_of_other_sizes() -> None:
    stats = {"a.weight": InputStats(torch.ones(3), torch.ones(3), 1)}
    with pytest.raises(
        ShapeError, match=r"'a.weight' has shape .40, 50. in the delta, and the statistics are of 3"
    ):
        Delta.between(*pair()).wanda(0.5, stats)


def test_files_have_the_same_bytes_again(tmp_path: Path) -> None:
    base, tuned = pair()
    for number in (1, 2):
        Delta.between(base, dict(tuned)).dare(0.9).save(tmp_path / f"{number}.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
