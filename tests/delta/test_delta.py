"""`optx.Delta` over modules and dicts: between, arithmetic, apply, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_models import bert, llama
from delta_cases import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx import Delta, OptxError, ShapeError

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def state(seed: int, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    return {
        "weight": normal(6, 5, seed=seed).to(dtype),
        "bias": normal(6, seed=seed + 1).to(dtype),
        "steps": torch.tensor(seed),
        "mask": torch.tensor([seed % 2 == 0, True]),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }


def equal(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b
    )


def tuned_of(model: nn.Module, seed: int = 3, by: float = 0.05) -> nn.Module:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for number, p in enumerate(tuned.parameters()):
            p.add_(by * normal(*p.shape, seed=seed + number).to(p.dtype))
    return tuned


# ---- between and apply -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_between_and_back(dtype: torch.dtype) -> None:
    base, tuned = state(0, dtype), state(7, dtype)
    before = copy.deepcopy((base, tuned))
    delta = Delta.between(base, tuned)
    assert delta["weight"].dtype == (F64 if dtype == F64 else F32)
    torch.testing.assert_close(
        delta["weight"].double(), tuned["weight"].double() - base["weight"].double(), rtol=1e-6, atol=1e-6
    )
    assert delta["steps"] == 7
    assert delta.entries["steps"].dtype == torch.int64
    assert equal(delta.apply(base), tuned)
    assert all(equal(now, then) for now, then in zip((base, tuned), before, strict=True))


@given(
    base=st.lists(st.floats(allow_nan=False, width=32), min_size=8, max_size=8),
    tuned=st.lists(st.floats(allow_nan=False, width=32), min_size=8, max_size=8),
    dtype=st.sampled_from([F32, BF16, F16, F64]),
)
@settings(max_examples=60)
def test_apply_gives_tuned_whatever_the_numbers(
    base: list[float], tuned: list[float], dtype: torch.dtype
) -> None:
    old, new = {"w": torch.tensor(base, dtype=F64).to(dtype)}, {"w": torch.tensor(tuned, dtype=F64).to(dtype)}
    assert torch.equal(Delta.between(old, new).apply(old)["w"], new["w"])


def test_apply_copies() -> None:
    base, tuned = state(0), state(1)
    made = Delta.between(base, tuned, include="bias").apply(base)
    for tensor in made.values():
        tensor.zero_() if tensor.dtype != torch.bool else tensor.fill_(False)
    assert equal(base, state(0))
    assert equal(tuned, state(1))


def test_modules_and_dicts_are_the_same() -> None:
    base = bert()
    tuned = tuned_of(base)
    one, two = Delta.between(base, tuned), Delta.between(base.state_dict(), tuned.state_dict())
    assert equal(dict(one.items()), dict(two.items()))
    assert equal(one.apply(base), tuned.state_dict())
    base.load_state_dict(one.apply(base))


def test_tied_weights_are_one() -> None:
    base = llama(tie_word_embeddings=True)
    tuned = tuned_of(base)
    delta = Delta.between(base, tuned)
    assert len(delta) == len(base.state_dict()) - 1
    made = delta.dare(0.5, exclude=None).apply(base)
    assert made["lm_head.weight"] is made["model.embed_tokens.weight"]
    loose = llama(tie_word_embeddings=True)
    loose.load_state_dict(made)
    assert loose.lm_head.weight is loose.model.embed_tokens.weight


@pytest.mark.parametrize("base_dtype", [F32, BF16, F16])
def test_mixed_dtypes(base_dtype: torch.dtype) -> None:
    base, tuned = {"w": normal(40).to(base_dtype)}, {"w": normal(40, seed=1)}
    delta = Delta.between(base, tuned)
    torch.testing.assert_close(delta["w"], tuned["w"] - base["w"].float(), rtol=0, atol=0)
    made = delta.apply(base)["w"]
    assert made.dtype == base_dtype
    assert torch.equal(made, tuned["w"].to(base_dtype))


def test_noncontiguous_tensors() -> None:
    base, tuned = {"w": normal(6, 4).t()}, {"w": normal(6, 4, seed=1).t()}
    delta = Delta.between(base, tuned)
    assert equal(delta.apply(base), tuned)
    torch.testing.assert_close(delta.dare(0.0)["w"], tuned["w"] - base["w"])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scaled_apply_is_one_rounding(dtype: torch.dtype) -> None:
    base, tuned = state(0, dtype), state(7, dtype)
    made = Delta.between(base, tuned).apply(base, scale=0.5)
    exact = (base["weight"].double() + tuned["weight"].double()) / 2
    torch.testing.assert_close(made["weight"], exact.to(dtype), rtol=2e-7 if dtype == F32 else 0, atol=1e-7)


# ---- arithmetic ------------------------------------------------------------------------------------------


def test_arithmetic() -> None:
    base, a, b = state(0), state(1), state(2)
    one, two = Delta.between(base, a), Delta.between(base, b)
    for made, expected in (
        (one + two, one["weight"] + two["weight"]),
        (one - two, one["weight"] - two["weight"]),
        (0.3 * one, one["weight"] * 0.3),
        (one / 4, one["weight"] / 4),
        (-one, -one["weight"]),
        ((one + two) * 0.5 - one, (one["weight"] + two["weight"]) * 0.5 - one["weight"]),
    ):
        torch.testing.assert_close(made["weight"], expected)
        assert made["steps"] == 1
        result = made.apply(base)
        torch.testing.assert_close(result["weight"], base["weight"] + expected)
    assert equal(dict(Delta.between(base, a).items()), dict(one.items()))


def test_forgetting_undoes_learning() -> None:
    base, tuned = state(0), state(1)
    delta = Delta.between(base, tuned)
    back = (-delta).unbound().apply(tuned)
    torch.testing.assert_close(back["weight"], base["weight"])


def test_subsets_join() -> None:
    base, tuned = state(0), state(1)
    delta = Delta.between(base, tuned)
    weight, rest = delta.subset("weight"), delta.subset(exclude="weight")
    assert list(weight) == ["weight"]
    assert "weight" not in rest.entries
    joined = (weight + rest).apply(base)
    assert all(torch.equal(joined[name], tuned[name]) for name in ("steps", "mask"))
    torch.testing.assert_close(joined["weight"], tuned["weight"], rtol=0, atol=1e-6)
    assert torch.equal(weight.apply(base)["bias"], base["bias"])
    assert weight.apply(base)["steps"] == base["steps"]
    assert equal(weight.apply(base), Delta.between(base, tuned, include="weight").apply(base))


def test_looking_at_it() -> None:
    delta = Delta.between(state(0), state(1))
    assert repr(delta) == "<Delta of 5 tensors, 39 numbers>"
    assert len(delta) == 5
    assert delta.floating == ["weight", "bias", "empty"]
    with pytest.raises(KeyError, match="Near: 'weight'"):
        delta["wieght"]


# ---- what it refuses -------------------------------------------------------------------------------------


def other(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {**state(1), **changes}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "shape": (other(weight=normal(6, 4)), {}, r"'weight' has shape \(6, 4\) in tuned and \(6, 5\) in base"),
    "more": (other(wieght=normal(2)), {}, "tuned has 'wieght', which base lacks. Near: 'weight'"),
    "fewer": (other(bias=None), {}, "base has 'bias', which tuned lacks"),
    "kind": (other(bias=torch.arange(6)), {}, "'bias' is torch.int64 in tuned and torch.float32 in base"),
    "no tensor": (other(bias=3.0), {}, "'bias' is a float, not a tensor"),
    "nothing": (other(), {"include": "x.*"}, "include='x.\\*' and exclude=None leave nothing"),
    "regex": (other(), {"exclude": "["}, r"exclude='\[' is not a regular expression"),
    "regex of whole": (other(), {"whole": "["}, r"whole='\[' is not a regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_between_refuses(case: str) -> None:
    tuned, options, message = REFUSED[case]
    with pytest.raises(OptxError, match=message) as caught:
        Delta.between(state(0), tuned, **options)
    assert isinstance(caught.value, ShapeError) == (case == "shape")


def test_between_refuses_other_types() -> None:
    with pytest.raises(OptxError, match="tuned is a int; it must be a module"):
        Delta.between(state(0), 3)  # type: ignore[arg-type]
    with pytest.raises(optx.FileError, match="base: there is no file or folder"):
        Delta.between("/nowhere/at/all", state(0))
    with pytest.raises(optx.FileError, match="is a pickle, which can run code"):
        Delta.between("/nowhere/model.pth", state(0))


def test_apply_refuses_another_base() -> None:
    base, tuned = state(0), state(1)
    delta = Delta.between(base, tuned)
    wrong = {**base, "bias": base["bias"] + 1e-3}
    with pytest.raises(OptxError, match="not the base that the delta was taken from: 'bias' differs"):
        delta.apply(wrong)
    made = delta.unbound().apply(wrong)
    torch.testing.assert_close(made["bias"], tuned["bias"] + 1e-3)
    with pytest.raises(OptxError, match="base has no 'bias'"):
        delta.apply({name: t for name, t in base.items() if name != "bias"})
    with pytest.raises(
        ShapeError, match=r"'weight' has shape \(6, 5\) in the delta and \(5, 6\) in the base"
    ):
        delta.apply({**base, "weight": base["weight"].t()})


def test_sums_of_deltas_of_different_bases_are_refused() -> None:
    one, two = Delta.between(state(0), state(1)), Delta.between(state(5), state(1))
    with pytest.raises(OptxError, match="different bases; they differ at 'weight'"):
        one + two
    with pytest.raises(ShapeError, match="'bias' has shape"):
        one + Delta.between({"bias": torch.zeros(2)}, {"bias": torch.ones(2)})
