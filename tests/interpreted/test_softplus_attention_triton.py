"""Softplus attention's Triton kernels in the interpreter, beside the CPU's blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optx.kernels.attention import softplus_blocks as blocks
from optx.kernels.attention import softplus_triton as device
from optx.kernels.attention.softplus_rows import Options

CASES: list[tuple[float, bool, Any]] = [
    (0.0, True, None),
    (0.0, False, "full"),
    (15.0, True, "padding"),
    (3.0, False, "full"),
    (1.0, True, "equal keys"),
]


@pytest.mark.parametrize(("power", "causal", "kind"), CASES)
def test_both_ways_are_those_of_the_blocks(
    power: float, causal: bool, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "TILES", dict.fromkeys(device.TILES, (16, 16)))
    g = torch.Generator().manual_seed(0)
    keys = 21 if causal else 19
    q, grad = torch.randn(1, 2, 21, 8, generator=g), torch.randn(1, 2, 21, 5, generator=g)
    k, v = torch.randn(1, 1, keys, 8, generator=g), torch.randn(1, 1, keys, 5, generator=g)
    if kind == "equal keys":
        k = k[:, :, :1].expand_as(k)
    masks = {
        "full": torch.rand(1, 1, 21, keys, generator=g) > 0.4,
        "padding": torch.arange(keys).view(1, 1, 1, -1) > 2,
    }
    mask, options = masks.get(kind), Options(power, causal)
    found, stats = device.forward(q, k, v, mask, options, None)
    wanted, own = blocks.forward(q, k, v, mask, options, None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    grads = device.backward(grad, q, k, v, mask, stats, found, options, None)
    wanted_grads = blocks.backward(grad, q, k, v, mask, own, wanted, options, None)
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_dropout_is_the_same_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of values, which is linear, tells what was kept."""
    monkeypatch.setattr(device, "TILES", dict.fromkeys(device.TILES, (16, 16)))
    q, k, v = torch.randn(3, 1, 1, 20, 8, generator=torch.Generator().manual_seed(1))
    seed, options = torch.tensor(5), Options(3.0, True, 0.5)
    out, stats = device.forward(q, k, v, None, options, seed)
    assert not torch.allclose(out, device.forward(q, k, v, None, Options(3.0, True), None)[0])
    grad = torch.ones_like(out)
    found = device.backward(grad, q, k, v, None, stats, out, options, seed)[2]
    torch.testing.assert_close((found * v).sum(), out.sum(), rtol=1e-4, atol=1e-4)
