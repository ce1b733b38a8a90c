"""Merging as mergekit 0.1.5 does it: its numbers, and itself where it is installed."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx._safetensors import Entry
from optx.delta._combine import elected
from optx.delta._kept import Kept
from optx.delta._merge_method import Changes
from optx.delta.dare import rescaled

BASE = torch.ones(4)
A, B = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([-1.0, -1.0, 4.0, -2.0])
MERGEKIT: Any = {"convention": "mergekit"}


def merged(method: optx.MergeMethod, *deltas: Tensor) -> Tensor:
    models = [{"w": BASE + delta} for delta in deltas or (A, B)]
    result = optx.merge({"w": BASE}, models, method)
    assert isinstance(result, dict)
    return result["w"]


def trimmed(
    values: list[float], density: float, convention: Literal["paper", "mergekit"] = "mergekit"
) -> Tensor:
    """One tensor as TIES trims it: what a merge of one model changes."""
    change = torch.tensor(values)
    made = optx.merge({"w": change * 0}, [{"w": change}], optx.TIES(density=density, convention=convention))
    assert isinstance(made, dict)
    return made["w"]


# ---- 1 to 9: the specification's numbers, produced by mergekit -----------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (optx.TaskArithmetic(), [1, -2, 8, -0.5]),  # 1
        (optx.TaskArithmetic(weights=(0.5, 0.25)), [1.25, -0.25, 3.5, 0.75]),
        (optx.TaskArithmetic(lam=0.3), [1, 0.1, 3.1, 0.55]),
        (optx.TaskArithmetic(normalize=True), [1, -0.5, 4.5, 0.25]),  # 2
        (optx.TIES(density=1.0, **MERGEKIT), [2, -0.5, 4.5, -1]),  # 3
        (optx.TIES(density=0.5, **MERGEKIT), [1, -1, 4.5, -1]),  # 4
    ],
    ids=lambda value: repr(value),
)
def test_spec_1_to_4(method: optx.MergeMethod, expected: list[float]) -> None:
    torch.testing.assert_close(merged(method), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_spec_5_magnitude() -> None:
    values = [0.1, -0.4, 0.3, 0.2, -0.5]
    change, kept = torch.tensor(values), trimmed(values, 0.5)
    assert kept.tolist() == pytest.approx([0, -0.4, 0, 0, -0.5])
    changes = Changes({"w": Entry((5,), change.dtype)}, 1, lambda _: lambda begin, end: [change[begin:end]])
    [scaled] = rescaled(changes, [Kept(lambda _, piece: kept[: len(piece)] != 0)], [0.5], "l1")
    assert scaled.of(change, 0).tolist() == pytest.approx([0, -0.666667, 0, 0, -0.833333], abs=1e-6)


def test_spec_6_the_mask_of_the_election() -> None:
    deltas = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0])]
    # Where the first takes part alone, the sum is its own; where nobody does, it is 0.
    assert elected(deltas, [1.0, 1.0], False, 1.0).tolist() == [1.0, -2.0, 0.0]
    assert elected(deltas, [1.0, 1.0], True, 1.0).tolist() == [1.0, -2.0, 0.0]
    assert elected(deltas, [1.0, 1.0], False, 1.0, on_zero=-1).tolist() == [-1.0, -2.0, 0.0]


def test_spec_7_masks_of_the_global_generator() -> None:
    x, density = torch.randn(500, generator=torch.Generator().manual_seed(0)), 0.3
    torch.manual_seed(11)
    mask = torch.bernoulli(torch.full_like(x, density))
    torch.manual_seed(11)
    made = optx.merge({"w": torch.zeros(500)}, [{"w": x}], optx.DARELinear(1 - density, seed=-1, **MERGEKIT))
    assert isinstance(made, dict)
    assert torch.equal(made["w"] != 0, mask.bool())
    torch.testing.assert_close(made["w"].abs().sum(), x.abs().sum(), rtol=1e-5, atol=0)


EXACT = [
    optx.TaskArithmetic(),
    optx.TaskArithmetic(normalize=True),
    optx.TIES(density=1.0),
    optx.TIES(density=1.0, **MERGEKIT),
    optx.TIES(density=1.0, scope="tensor"),
    optx.DARELinear(p=0.0),
    optx.DARETIES(p=0.0),
    optx.DARETIES(p=0.0, normalize=True, **MERGEKIT),
]


@pytest.mark.parametrize("method", EXACT, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_spec_8_one_model_comes_back(method: optx.MergeMethod, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(7, 5, dtype=dtype), "b": torch.randn(3, dtype=dtype)}
    tuned = {name: t + 0.1 * torch.randn_like(t) for name, t in base.items()}
    made = optx.merge(base, [tuned], method)
    assert isinstance(made, dict)
    for name, tensor in tuned.items():
        ulp = torch.finfo(dtype).eps * torch.maximum(tensor.abs(), base[name].abs())
        assert ((made[name] - tensor).abs() <= ulp).all()


@pytest.mark.long
def test_spec_9_dare_of_the_paper_is_unbiased_and_l1_is_not() -> None:
    x = torch.tensor([4.0, 0.5, -1.0, 0.25])
    base = {"w": torch.zeros(4)}

    def mean(**options: Any) -> tuple[Tensor, Tensor]:
        runs = [
            optx.merge(base, [{"w": x}], optx.DARELinear(p=0.5, seed=seed, **options)) for seed in range(2000)
        ]
        stacked = torch.stack([run["w"] for run in runs])  # type: ignore[index]
        return stacked.mean(0), stacked.std(0) / 2000**0.5

    unbiased, error = mean(rescale="paper")
    assert ((unbiased - x).abs() <= 3 * error).all()
    biased, error = mean(rescale="l1")
    assert ((biased - x).abs() > 3 * error).any()


def test_kept_counts_of_both_conventions() -> None:
    values = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0]
    assert int((trimmed(values, 0.3) != 0).sum()) == 3
    assert int((trimmed(values, 0.3, "paper") != 0).sum()) == 4  # the authors' code: one more
    assert int((trimmed(values, 0.01) != 0).sum()) == 1
    assert int((trimmed([0.5] * 6, 0.5) != 0).sum()) == 3  # of equal ones the first
    assert trimmed([0.5] * 6, 0.5).tolist() == [0.5] * 3 + [0] * 3
    assert int((trimmed([0.5] * 6, 0.5, "paper") != 0).sum()) == 6  # all that equal the threshold
    assert int((trimmed(values, 0.0) != 0).sum()) == 0


def test_where_models_cancel_out_the_paper_takes_the_usual_sign() -> None:
    a, b = torch.tensor([1.0, -2.0, -3.0, -1.0]), torch.tensor([-1.0, -1.0, -4.0, -2.0])
    assert merged(optx.TIES(density=1.0), a, b)[0] == 0.0  # most are negative, so b counts
    assert merged(optx.TIES(density=1.0, **MERGEKIT), a, b)[0] == 2.0


# ---- mergekit itself -----------------------------------------------------------------------------------


def checkpoints(seed: int, models: int, coarse: bool = False) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (17, 9), "a.bias": (17,), "norm": (1,), "b.weight": (3, 4, 5), "s": ()}
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tuned = [{n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(models)]
    if coarse:  # models cancel out
        base["b.weight"] = torch.ones(3, 4, 5)
        for model in tuned:
            model["b.weight"] = 1 + torch.randint(-2, 3, (3, 4, 5), generator=g) / 8
    return [base, *tuned]


def same(ours: Any, theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40)
@given(
    method=st.sampled_from(["task_arithmetic", "ties"]),
    models=st.integers(1, 4),
    seed=st.integers(0, 1000),
    density=st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]),
    lam=st.sampled_from([1.0, 0.3]),
    normalize=st.booleans(),
    equal=st.booleans(),
)
def test_as_mergekit(
    method: str, models: int, seed: int, density: float, lam: float, normalize: bool, equal: bool
) -> None:
    peer = pytest.importorskip("mergekit.merge_methods")
    # Of equal magnitudes mergekit keeps those that torch's unstable sort puts first, which no other order
    # can follow: there are none here unless all are kept.
    base, *tuned = checkpoints(seed, models, coarse=density == 1.0)
    weights = [1.0] * models if equal else [0.3 + 0.4 * i for i in range(models)]
    parameters = {"weight": weights, "lambda": lam, "normalize": normalize}
    if method == "ties":
        parameters["density"] = density
        ours: optx.MergeMethod = optx.TIES(density, lam, weights, normalize=normalize, convention="mergekit")
    else:
        ours = optx.TaskArithmetic(lam, weights, normalize)
    theirs = peer.merge_state_dicts([base, *tuned], method, base=0, parameters=parameters)
    same(optx.merge(base, tuned, ours), theirs)


@settings(max_examples=20)
@given(
    elects=st.booleans(),
    models=st.integers(1, 3),
    seed=st.integers(0, 1000),
    density=st.sampled_from([0.1, 0.5, 1.0]),
    rescale=st.booleans(),
    normalize=st.booleans(),
)
def test_dare_as_mergekit(
    elects: bool, models: int, seed: int, density: float, rescale: bool, normalize: bool
) -> None:
    peer = pytest.importorskip("mergekit.merge_methods")
    base, *tuned = checkpoints(seed, models)
    weights = [0.5 + 0.25 * i for i in range(models)]
    kind = optx.DARETIES if elects else optx.DARELinear
    ours = kind(1 - density, 0.7, weights, -1, "l1" if rescale else "none", normalize, convention="mergekit")
    theirs: dict[str, Tensor] = {}
    torch.manual_seed(seed)
    for name in base:  # one call per tensor: mergekit packs several into a batch, and draws once for all
        theirs[name] = peer.merge_state_dicts(
            [{name: sd[name]} for sd in (base, *tuned)],
            "dare_ties" if elects else "dare_linear",
            base=0,
            parameters={
                "weight": weights,
                "lambda": 0.7,
                "density": density,
                "rescale": rescale,
                "normalize": normalize,
            },
        )[name]
    torch.manual_seed(seed)
    same(optx.merge(base, tuned, ours), theirs)


def test_bench_merge_times_both_libraries() -> None:
    pytest.importorskip("mergekit.merge_methods")
    from optx.recipes import _bench_merge

    found = _bench_merge.measure(*_bench_merge.models(tensors=1, rows=4), rounds=1)
    assert [name for name, library in found if library == "optx"] == list(_bench_merge.METHODS)
    assert len(found) == len(_bench_merge.METHODS) + 4
    assert all(seconds > 0 for seconds in found.values())
