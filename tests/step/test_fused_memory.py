"""Fused steps on tensors as they lie in memory: layouts, addresses, lifetimes, allocations, versions."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import BF16, F32, F64, draw
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import optx

SHAPE = (4, 6, 5, 3)
CL = torch.channels_last
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=CL),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "slice": lambda t: torch.cat([t, t], 1)[:, :6],  # gaps; only for gradients
    "expanded": lambda t: t[:1].expand(4, -1, -1, -1),
}


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, **options)


def wrapped(params: Any, **options: Any) -> optx.Wrapped:
    normalize = options.get("rounding") != "kahan"  # a kernel that other tests compile too
    chain = optx.PerpGrad(), optx.AdamR(weight=0.05, normalize=normalize)
    return optx.wrap(adamw(params), *chain, fused=options.pop("fused", True), **options)


def three_steps(w: Tensor, grad_layout: Callable[[Tensor], Tensor], **options: Any) -> tuple[Tensor, Any]:
    p = nn.Parameter(w)
    opt = wrapped([p], **options)
    for seed in range(3):
        p.grad = grad_layout(draw([SHAPE], seed, F32)[0])
        opt.step()
    return p.detach(), opt


@pytest.mark.parametrize("grad", LAYOUTS)
@pytest.mark.parametrize("weight", [k for k in LAYOUTS if k not in ("slice", "expanded")])
def test_layouts_do_not_show(weight: str, grad: str) -> None:
    """Whatever order a weight and its gradient lie in, every element meets its own."""
    start = draw([SHAPE], 9, F32)[0]
    lay_out = LAYOUTS[grad]
    got, opt = three_steps(LAYOUTS[weight](start.clone()), lay_out)
    plain, _ = three_steps(start.clone(), lambda g: lay_out(g).contiguous())
    assert opt.plan()[0].path == "fused cpu"
    assert got.stride() == LAYOUTS[weight](start).stride()
    # Sums run in memory order; the rest is bit for bit.
    torch.testing.assert_close(got, plain, rtol=0, atol=5e-7)
    state = next(iter(opt.state.values()))
    assert {state[k].stride() for k in ("exp_avg", "exp_avg_sq", "optx.adamr.anchor")} == {got.stride()}


def test_a_parameter_with_gaps() -> None:
    """It takes the foreach path, says why, and the numbers between its elements are untouched."""
    whole = torch.arange(24.0).view(4, 6)
    p = nn.Parameter(whole[:, ::2])
    reason = r"a parameter of shape \(4, 3\) has gaps in memory \(strides \(6, 2\)\)"
    with pytest.raises(optx.FusedError, match=reason):
        wrapped([p])
    opt = wrapped([p], fused="auto")
    assert opt.plan()[0].path == "foreach"
    assert reason.replace("\\", "") in str(opt.plan())
    before = whole.clone()
    p.grad = torch.ones(4, 3)
    opt.step()
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    assert not (whole[:, ::2] == before[:, ::2]).any()


def test_gaps_that_come_later_are_refused_before_anything_is_written() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    opt = optx.wrap(torch.optim.SGD([p], lr=1.0), fused=True)
    p.grad = torch.ones(4, 4)
    opt.step()
    whole = torch.zeros(4, 8)
    p.data = whole[:, ::2]
    with pytest.raises(optx.FusedError, match=r"a parameter of shape \(4, 4\) has gaps in memory"):
        opt.step()
    assert not whole.any()


@pytest.mark.parametrize("fused", [True, False])
def test_memory_format_may_change_after_the_first_steps(fused: bool) -> None:
    """``model.to(memory_format=torch.channels_last)`` keeps the parameter object and moves its numbers."""
    results = []
    for change in (False, True):
        p = nn.Parameter(draw([SHAPE], 9, F32)[0])
        opt = wrapped([p], fused=fused)
        for seed in range(4):
            if seed == 2 and change:
                p.data = p.data.contiguous(memory_format=CL)
            p.grad = draw([SHAPE], seed, F32)[0]
            if seed == 3 and change:
                p.grad = p.grad.contiguous(memory_format=CL)
            opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=5e-7)


def test_copies_of_gradients_live_until_they_are_used() -> None:
    """Two dtypes are two kernels: laying out the second's gradients must not free the first's."""
    a, b = (nn.Parameter(torch.zeros(300, 400, dtype=d)) for d in (F32, F64))
    opt = optx.wrap(torch.optim.SGD([a, b], lr=1.0), fused=True)
    a.grad = torch.randn(400, 300).t()
    b.grad = torch.randn(400, 300, dtype=F64).t()
    opt.step()
    assert torch.equal(a.detach(), -a.grad)
    assert torch.equal(b.detach(), -b.grad)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_die_with_zero_grad(fused: bool) -> None:
    """Nothing keeps an old gradient alive during the next backward pass."""
    for layout in ("contiguous", "transposed"):
        p = nn.Parameter(draw([SHAPE], 0, F32)[0])
        opt = wrapped([p], fused=fused)
        p.grad = LAYOUTS[layout](torch.ones(SHAPE))
        opt.step()
        old = weakref.ref(p.grad)
        opt.zero_grad()
        gc.collect()
        assert old() is None


@pytest.mark.parametrize("fused", [True, False])
def test_tied_parameters_take_one_step(fused: bool) -> None:
    """One tensor under two names is one parameter."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    net["head"].weight = net["embed"].weight
    start = net["head"].weight.detach().clone()
    opt = optx.wrap(torch.optim.SGD(net.parameters(), lr=0.5), fused=fused)
    net["head"](net["embed"](torch.tensor([1, 2]))).sum().backward()
    opt.step()
    assert opt.plan()[0].tensors == 1
    torch.testing.assert_close(net["head"].weight.detach(), start - 0.5 * net["embed"].weight.grad)


@pytest.mark.parametrize("fused", [True, False])
def test_missing_gradients_touch_nothing(fused: bool) -> None:
    params = [nn.Parameter(w) for w in draw([(5,), (7,), (3,)], 0, F32)]
    start = [p.detach().clone() for p in params]
    opt = wrapped(params, fused=fused)
    with pytest.warns(UserWarning, match="found no gradient on any parameter"):
        opt.step()  # none at all
    opt.step()  # it is said once
    assert all(torch.equal(p, w) for p, w in zip(params, start, strict=True))
    params[1].grad = torch.ones(7)
    opt.step()
    assert [torch.equal(p, w) for p, w in zip(params, start, strict=True)] == [True, False, True]
    assert [p in opt.state for p in params] == [False, True, False]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert [float(opt.state[p]["step"]) for p in params] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("fused", [True, False])
def test_autograd_sees_the_change(fused: bool) -> None:
    """A graph that saved a weight refuses to run after the step, as after torch's own."""
    p = nn.Parameter(torch.ones(3))
    opt = wrapped([p], fused=fused)
    p.grad = torch.arange(3.0)
    loss = (p * p).sum()
    version = p._version
    opt.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def allocations(opt: optx.Wrapped, steps: int) -> tuple[int, int]:
    """Bytes that torch allocates in some steps, and the peak of Python's and numpy's."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(steps):
            opt.step()
    torch_bytes = sum(
        max(event.cpu_memory_usage, 0) for event in profiler.events() if event.name != "[memory]"
    )
    torch_bytes += sum(
        event.cpu_memory_usage
        for event in profiler.events()
        if event.name == "[memory]" and event.cpu_memory_usage > 0
    )
    tracemalloc.start()
    opt.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return torch_bytes, peak


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(F32, "nearest"), (BF16, "stochastic"), (BF16, "kahan")], ids=str
)
def test_a_step_allocates_nothing_per_parameter(dtype: torch.dtype, rounding: str) -> None:
    """0 bytes from torch; from Python what a table of three tensors takes, whatever their size."""
    peaks = []
    for n in (1_000, 200_000):
        params = [nn.Parameter(w) for w in draw([(n,), (n, 2), ()], 0, dtype)]
        opt = wrapped(params, rounding=rounding)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        torch_bytes, peak = allocations(opt, 2)
        assert torch_bytes == 0
        peaks.append(peak)
    assert max(peaks) < 20_000
    assert abs(peaks[1] - peaks[0]) < 2_000


def test_the_measure_of_allocations_sees_the_foreach_path() -> None:
    p = nn.Parameter(torch.ones(50_000))
    opt = wrapped([p], fused=False)
    p.grad = torch.ones(50_000)
    opt.step()
    assert allocations(opt, 1)[0] >= 4 * 50_000


def test_addresses_may_change_between_steps() -> None:
    """New gradients, weights moved with ``.data``, state replaced by a load: the tables follow."""
    p, twin = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(1000))
    opt, plain = optx.wrap(adamw([p]), fused=True), adamw([twin])
    old: list[Tensor] = []
    for number in range(4):
        p.grad = torch.full((1000,), number - 1.5)
        twin.grad = p.grad.clone()
        if number == 2:
            old += [p.data, p.data.clone()]
            p.data = p.data.clone()
        if number == 3:
            state = opt.state[p]
            old += [state["exp_avg"], state["exp_avg"].clone()]
            state["exp_avg"] = state["exp_avg"].clone()
        opt.step()
        plain.step()
    torch.testing.assert_close(p, twin, rtol=0, atol=5e-7)
    assert torch.equal(old[0], old[1])  # the old weights and the old state were left alone
    assert torch.equal(old[2], old[3])
