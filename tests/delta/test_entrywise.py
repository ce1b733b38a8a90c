"""The compiled pass of merging gives what torch's operations give, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import optx
from optx.delta import _entrywise

BF16, MERGEKIT = torch.bfloat16, {"convention": "mergekit"}
METHODS = [
    optx.TaskArithmetic(weights=(0.3, -1.0, 2.0), normalize=True, lam=0.7),
    optx.TIES(density=(0.1, 0.5, 1.0), weights=(1.0, 0.5, -2.0), **MERGEKIT),
    optx.TIES(density=0.9, weights=-1.0, normalize=False, lam=1.1),
    optx.TaskArithmetic(weights=-0.5),
    optx.DARELinear(p=0.9, normalize=True),
    optx.DARELinear(p=(0.5, 0.0, 0.9), seed=3, **MERGEKIT),
    optx.DARETIES(p=0.5, weights=(1.0, -1.0, 1.0), **MERGEKIT),
]


def tensors(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(70, 1001, generator=g), "v": torch.randn(513, generator=g)}
    base = {n: (t * (torch.rand(t.shape, generator=g) > 0.1)).to(dtype) for n, t in base.items()}
    base["w"][0, 0] = -0.0
    # Coarse changes: many are 0, are equal, or cancel out.
    steps = [{n: torch.randint(-3, 4, t.shape, generator=g) / 64 for n, t in base.items()} for _ in range(3)]
    return base, [{n: (t + step[n]).to(dtype) for n, t in base.items()} for step in steps]


def both(monkeypatch: Any, base: Any, models: Any, method: Any, dtype: Any = None) -> list[dict[str, Tensor]]:
    """The compiled pass's result, which must be one, and torch's."""
    made: list[dict[str, Tensor]] = []
    for few in (1, 1 << 40):
        monkeypatch.setattr(_entrywise, "FEW", few)
        made.append(optx.merge(base, models, method, dtype=dtype))  # type: ignore[arg-type]
    return made


def ran(monkeypatch: Any) -> list[bool]:
    """Grows by whether all was finite, with every run of the compiled loops."""
    found: list[bool] = []
    inner = _entrywise._run
    monkeypatch.setattr(_entrywise, "_run", lambda *args: found.append(inner(*args)) or found[-1])
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_as_torch(method: optx.MergeMethod, monkeypatch: Any) -> None:
    runs = ran(monkeypatch)
    for own, out in ((torch.float32, None), (BF16, None), (torch.float16, BF16), (BF16, torch.float32)):
        compiled, plain = both(monkeypatch, *tensors(own), method, out)
        assert all(same(t, plain[n]) for n, t in compiled.items())
    assert len(runs) >= 8
    assert all(runs)


def test_threads_do_not_show(monkeypatch: Any) -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn((1 << 20) + 17, generator=g).bfloat16()}
    models = [{"w": (base["w"] + 0.1 * torch.randn(base["w"].shape, generator=g)).bfloat16()}] * 2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        compiled, plain = both(monkeypatch, base, models, optx.DARETIES(p=0.5, **MERGEKIT))
    finally:
        torch.set_num_threads(threads)
    assert same(compiled["w"], plain["w"])


def test_what_is_not_finite_is_torchs_matter(monkeypatch: Any) -> None:
    """Equal infinities cancel; a sum without room in its dtype is refused, as by torch's operations."""
    runs = ran(monkeypatch)
    base, models = tensors(torch.float32)
    for one in (base, *models):
        one["w"][3, 3] = -torch.inf
    compiled, plain = both(monkeypatch, base, models, optx.TaskArithmetic(lam=0.5))
    assert float(compiled["w"][3, 3]) == -torch.inf
    assert torch.equal(compiled["w"], plain["w"])
    assert not all(runs)
    base["w"][3, 3] = 0.0
    for one in models:
        one["w"][3, 3] = 3e38
    with pytest.raises(optx.OptxError, match="beyond the largest"):
        both(monkeypatch, base, models, optx.TaskArithmetic(lam=2.0))
