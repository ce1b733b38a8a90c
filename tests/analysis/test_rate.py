"""Bits per parameter, against codes written out bit by bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import optx
from optx.delta import _golomb


def exp_golomb(n: int) -> str:
    """A signed whole number's code."""
    v = 2 * n - 1 if n > 0 else -2 * n
    x = f"{v + 1:b}"
    return "0" * (len(x) - 1) + x


def test_the_codes() -> None:
    codes = {0: "1", 1: "010", -1: "011", 2: "00100", -3: "00111", 7: "0001110", -8: "000010001"}
    assert {n: exp_golomb(n) for n in codes} == codes
    for n, code in codes.items():
        assert optx.rate({"w": torch.tensor([float(n)])}, step=1.0) == len(code)
    eight = torch.tensor([0.0, 0, 1, -1, 0, 2, -3, 0])
    assert optx.rate({"w": eight}, step=1.0) == 2.5
    assert optx.rate({"a": eight[:3] / 8, "b": eight[3:] / 8}, step=0.125) == 2.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=50), st.integers(-20, 20))
def test_any_numbers(numbers: list[int], power: int) -> None:
    step = 2.0**power
    w = torch.tensor(numbers, dtype=torch.float64) * step
    assert optx.rate({"w": w}, step=step) == sum(len(exp_golomb(n)) for n in numbers) / len(numbers)
    shares = [numbers.count(n) / len(numbers) for n in numbers]
    entropy = sum(-math.log2(share) for share in shares) / len(numbers)
    assert optx.rate({"w": w}, step=step, coder="entropy") == pytest.approx(entropy, abs=1e-12)


def test_golomb_is_compefts_file_and_sizes() -> None:
    """Of -1, 0 and 1 its file's payload, plus a bit for each size; block by block, over several pieces."""
    w = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.4).round()
    w = torch.cat([w, torch.zeros(1000)])
    delta = optx.Delta.between({"w": torch.zeros_like(w)}, {"w": w.sign()})
    signs = optx.compress(delta, optx.ComPEFT(density=float((w != 0).double().mean())))
    kept = int((w != 0).sum())
    payload = len(_golomb.encode(signs.masks["w"], len(w)))
    sizes = sum(
        int(n) * (2 * int(math.log2(size)) + 1)
        for size, n in zip(*w[w != 0].abs().unique(return_counts=True), strict=True)
    )
    assert kept > 5e4
    assert optx.rate({"w": w}, step=1.0, coder="golomb") == (8 * payload + sizes) / len(w)
    entropy = optx.rate({"w": w}, step=1.0, coder="entropy")
    assert entropy < optx.rate({"w": w}, step=1.0, coder="golomb") < optx.rate({"w": w}, step=1.0)


def test_half_goes_to_even() -> None:
    assert optx.rate({"w": torch.tensor([0.5, -0.5])}, step=1.0) == 1  # 0
    assert optx.rate({"w": torch.tensor([1.5])}, step=1.0) == len(exp_golomb(2))


def test_what_is_counted(tmp_path: Path) -> None:
    """A module's parameters, each once, without its buffers; all floating tensors of a file."""
    model = nn.Sequential(
        nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8, bias=False)
    )
    model[2].weight = model[0].weight
    w = model[0].weight
    alone = optx.rate({"w": w}, step=2**-6)
    assert optx.rate(model, step=2**-6) == alone
    with_buffers = (64 * alone + 8 * 1 + 8 * len(exp_golomb(64))) / 80  # running means 0, variances 1
    assert optx.rate(model.state_dict(), step=2**-6) == pytest.approx(with_buffers, abs=1e-12)
    save_file({"w": w.detach(), "ids": torch.arange(5)}, tmp_path / "model.safetensors")
    assert optx.rate(tmp_path, step=2**-6) == optx.rate(tmp_path / "model.safetensors", step=2**-6) == alone
    low = w.detach().bfloat16()
    assert optx.rate({"w": low}, step=2**-6) == optx.rate({"w": low.double()}, step=2**-6)


def test_weights_that_were_replaced_are_not_counted() -> None:
    """Those that rest beside a shared array; RF8's are the model's own, whatever form it computes with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    own = optx.rate(model)
    with optx.attach(model, optx.RF8Linear(), "0|1"):
        assert optx.rate(model) == own
    handle = optx.attach(model, optx.StableRPS(compression=0.25), "0|1")
    shared = optx.rate({"psi": handle.psi})
    assert optx.rate(model) == shared != own
    handle.remove()
    assert optx.rate(model) == own
    handle = optx.attach(model, optx.PSDFactor(), "0")
    assert optx.rate(model) == optx.rate({"U": handle.parameters()[0], "1": model[1].weight})
    handle.remove()
    optx.attach(model, optx.EWA(), "0")  # the mean, which does not learn, is what computes in the end
    assert optx.rate(model) == optx.rate(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ({}, {}, "no floating-point numbers"),
        ({"ids": torch.arange(3)}, {}, "no floating-point numbers"),
        ({"w": torch.tensor([1.0, math.nan])}, {}, "'w' has a number that is infinite, nan"),
        ({"w": torch.tensor([1e30])}, {}, "more than 2.52 steps"),
        ({"w": torch.ones(1)}, {"step": 0.0}, "step is 0.0"),
        ({"w": torch.ones(1)}, {"coder": "zip"}, "coder is 'zip'; it must be one of 'exp-golomb'"),
        (nn.Linear(2, 2, device="meta"), {}, "'weight' is on the meta device"),
        (3, {}, "rate: model is a int; it must be a module, a state dict"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals(model: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(optx.OptxError, match=says):
        optx.rate(model, **options)
