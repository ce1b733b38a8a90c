"""The compiled pass of the trajectory loss gives what torch's operations give, and records the same bits."""

from __future__ import annotations

import warnings
from typing import Any

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx.kernels.loss import trajectory_cpu, trajectory_rows
from optx.signal import _trajectory

pytestmark = pytest.mark.usefixtures("one_thread")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PAIRS = [*((dtype, torch.float32) for dtype in FLOATS), (torch.float32, torch.float16)]


def odd(z: Tensor, g: torch.Generator) -> Tensor:
    """Some classes masked by -inf, a NaN, and a row with +inf."""
    z = z.masked_fill(torch.rand(z.shape, generator=g) < 0.1, -torch.inf)
    z[0, 0], z[-1, -1] = torch.nan, torch.inf
    return z


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_is_the_reference(data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    rows, classes = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    dtype, other = data.draw(st.sampled_from(PAIRS))
    tau, scale = data.draw(st.sampled_from([0.5, 5.0])), data.draw(st.sampled_from([0.1, 4.0, 60.0]))
    z, past = (scale * torch.randn(rows, classes, generator=g) for _ in range(2))
    if data.draw(st.booleans()):
        z, past = odd(z, g), odd(past, g)
    z, past = z.to(dtype), past.to(other)
    where = torch.rand(rows, generator=g) < 0.7 if data.draw(st.booleans()) else None
    made = trajectory_cpu.divergence(z, past, tau, where)
    total, gradient = trajectory_rows.sums(z, past, tau, where)
    assert made.gradient is not None
    assert made.total == pytest.approx(float(total), rel=2e-5, abs=2e-6 * rows)
    slack = {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 2e-6)
    torch.testing.assert_close(made.gradient.double(), gradient.double(), rtol=slack, atol=1e-6)


def course(options: dict[str, Any], given: Any) -> tuple[list[Tensor], dict[str, Any], dict[str, float]]:
    """Six epochs of calls, one of them of a part of the samples; losses, gradients, state, report."""
    g, saf, found = torch.Generator().manual_seed(4), optx.SAF(12, start_epoch=2, **options), []
    for epoch in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # epoch 2 has but some of the samples
            saf.set_epoch(epoch)
        order = torch.randperm(12, generator=g)[: 8 if epoch == 2 else 12]
        for index in order.split(5):
            z = given(4 * torch.randn(len(index), 7, generator=g)).requires_grad_()
            where = None if epoch % 2 else torch.rand(len(index), generator=g) < 0.8
            loss = saf(z, index, where)
            found.append(loss.detach())
            if loss.requires_grad:
                found += torch.autograd.grad(loss, z)
    return found, saf.state_dict()["record"], saf.report()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [Tensor.clone, lambda z: z.repeat(1, 2)[:, :7]])
def test_a_training_without_numba_is_the_same(
    dtype: torch.dtype, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _trajectory.few(torch.zeros(2, 3)) is trajectory_cpu
    found, record, report = course({"dtype": dtype}, given)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert _trajectory.few(torch.zeros(2, 3)) is None
    wanted, reference, told = course({"dtype": dtype}, given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for name in ("values", "tags"):
        assert torch.equal(record[name], reference[name])
    assert torch.equal(record["audit"]["rows"].nan_to_num(99), reference["audit"]["rows"].nan_to_num(99))
    assert report == pytest.approx(told, rel=1e-3, abs=1e-5)


def test_whom_it_serves() -> None:
    few = _trajectory.few
    assert few(torch.zeros(trajectory_cpu.LARGEST // 8, 8)) is trajectory_cpu
    assert few(torch.zeros(trajectory_cpu.LARGEST // 8 + 1, 8)) is None
    assert few(torch.zeros(3, 8).t()) is None
    assert few(torch.zeros(3, 8), torch.zeros(8, 3).t()) is None
    assert few(torch.zeros(2, 3, device="meta")) is None

    class Other(Tensor):
        pass

    assert few(torch.zeros(2, 3).as_subclass(Other)) is None
