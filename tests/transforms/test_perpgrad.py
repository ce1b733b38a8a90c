"""perpGrad's laws (the paper's definition 7 and the official code), on both paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_cases import F16, F32, F64, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])


def effective(w: Tensor, g: Tensor, fused: Any, rescale: bool = True, **group: Any) -> Tensor:
    """The gradient that the base sees: SGD from ``w`` with lr 1 on (w - g') shows it, in float64.

    The weight is moved by an lr of a power of two far above its size, so that its own rounding is small.
    """
    p = nn.Parameter(w.clone())
    opt = optx.wrap(torch.optim.SGD([{"params": [p], **group}], lr=1.0), optx.PerpGrad(rescale), fused=fused)
    lr = 2.0**20 * float(w.double().abs().max() / (g.double().abs().max() + 1e-300) + 1e-300)
    opt.param_groups[0]["lr"] = lr = 2.0 ** round(math.log2(lr)) if 1e-200 < lr < 1e200 else 1.0
    p.grad = g.clone()
    opt.step()
    return (w.double() - p.detach().double()) / lr


def norm(x: Tensor) -> float:
    return float(x.double().norm())


@both
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_worked_example(fused: bool, dtype: torch.dtype) -> None:
    w, g = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([3.0, 1.0], dtype=dtype)
    tolerance = 3e-6 if dtype == F32 else 1e-9  # 2^-20 of a weight's rounding, see `effective`
    wanted = torch.tensor([2.0, -1.0], dtype=F64)
    torch.testing.assert_close(effective(w, g, fused, False), wanted, rtol=0, atol=tolerance)
    wanted = torch.tensor([2.82842712, -1.41421356], dtype=F64)
    torch.testing.assert_close(effective(w, g, fused, True), wanted, rtol=0, atol=max(tolerance, 5e-9))


@st.composite
def pairs(draw_: Any) -> tuple[Tensor, Tensor]:
    """A weight and a gradient of any size, scale and angle down to 1e-3 from parallel."""
    n = draw_(st.sampled_from([2, 3, 17, 512, 4097, 40_000, 65_537]))
    seed = draw_(st.integers(0, 1000))
    w, noise = draw([(n,), (n,)], seed, F32)
    alike = draw_(st.sampled_from([0.0, 0.5, -3.0, 100.0]))
    scale = 10.0 ** draw_(st.integers(-18, 12))
    size = 10.0 ** draw_(st.integers(-6, 6))
    return w * size, (noise + alike * w) * scale


@both
@settings(max_examples=40)
@given(pair=pairs(), rescale=st.booleans())
def test_orthogonal_to_the_weight_and_as_long_as_before(
    fused: bool, pair: tuple[Tensor, Tensor], rescale: bool
) -> None:
    """|<w, g'>| <= 1e-6 |w||g| times the rescaling, which lengthens what is left and its rounding alike."""
    w, g = pair
    got = effective(w, g, fused, rescale)
    left = g.double() - (w.double() @ g.double()) / (w.double() @ w.double()) * w.double()
    stretched = norm(g) / norm(left) if rescale else 1.0
    assert abs(float(w.double() @ got)) <= 1e-6 * max(1.0, stretched) * norm(w) * norm(g)
    wanted = norm(g) if rescale else norm(left)
    # What cancels in g - c w leaves 2^-24 of |g| per element: 1e-5 where a hundredth of g is left. The factor
    # is of |g|^2 less c <w, g>, which are known to 1e-8 (optx.kernels.step.emit_cpu).
    ratio = norm(g) / norm(left)
    assert norm(got) == pytest.approx(wanted, rel=1e-5 + 2e-7 * ratio + 1e-8 * ratio**2)


@both
def test_one_sgd_step_is_pythagoras(fused: bool) -> None:
    """|w_new|^2 = |w|^2 + lr^2 |g'|^2: the norm can only grow."""
    w, g = draw([(50, 40), (50, 40)], 0, F64)
    for rescale in (True, False):
        p = nn.Parameter(w.clone())
        opt = optx.wrap(torch.optim.SGD([p], lr=0.3), optx.PerpGrad(rescale), fused=fused)
        p.grad = g + 0.5 * w
        opt.step()
        moved = norm(p.detach() - w)
        assert moved > 0.3
        assert norm(p.detach()) ** 2 == pytest.approx(norm(w) ** 2 + moved**2, rel=1e-13)


class _Invariant(nn.Module):
    """f(c w) = f(w) for the weight of the linear layer, which has no bias and a norm right after it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8, bias=False)
        self.norm = nn.BatchNorm1d(8, eps=1e-10) if kind == "batch" else nn.LayerNorm(8, eps=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.linear(x))))


@both
@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_nothing_changes_before_a_norm_layer(fused: bool, kind: str) -> None:
    torch.manual_seed(0)
    net = _Invariant(kind)
    x = torch.randn(64, 12)
    nn.functional.cross_entropy(net(x), torch.arange(64) % 3).backward()
    g = net.linear.weight.grad
    assert norm(g) > 1e-3
    got = effective(net.linear.weight.detach(), g, fused)
    assert norm(got - g) <= 1e-5 * norm(g)
    head = effective(net.head.weight.detach(), net.head.weight.grad, fused)
    assert norm(head - net.head.weight.grad) > 1e-3 * norm(net.head.weight.grad)  # where it does change


@both
def test_scaling_the_weight_and_the_gradient(fused: bool) -> None:
    w, g = draw([(300,), (300,)], 1, F32)
    for rescale in (True, False):
        got = effective(w, g, fused, rescale)
        for c in (-4.0, 0.01, 1000.0):
            near = {"rtol": 0, "atol": 3e-6 * float(g.abs().max())}
            torch.testing.assert_close(effective(c * w, g, fused, rescale), got, **near)
            torch.testing.assert_close(effective(w, c * g, fused, rescale) / c, got, **near)


@both
def test_parallel_gradients_vanish(fused: bool) -> None:
    """g = a w leaves rounding error, which must not be blown up to the old norm either."""
    w = draw([(1000,)], 2, F32)[0]
    for a in (1.0, -0.3, 1e-6, 3e5):
        g = (a * w.double()).float()  # each element with a rounding error of its own
        for rescale in (True, False):
            assert norm(effective(w, g, fused, rescale)) <= 1e-6 * norm(g)


@both
def test_edges(fused: bool) -> None:
    zero, g = torch.zeros(5), torch.arange(1.0, 6.0)
    assert torch.equal(effective(zero, g, fused), g.double())  # fresh biases, LoRA's B
    assert torch.equal(effective(g, zero, fused), zero.double())
    assert torch.equal(effective(zero, zero, fused), zero.double())
    for one in (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[[2.0]]])):  # no orthogonal direction
        assert torch.equal(
            effective(one, torch.full_like(one, 3.0), fused), torch.full_like(one, 3.0).double()
        )
    empty = nn.Parameter(torch.zeros(0))
    opt = optx.wrap(torch.optim.SGD([empty, nn.Parameter(zero)], lr=1.0), optx.PerpGrad(), fused=fused)
    empty.grad = torch.zeros(0)
    opt.step()
    assert empty.numel() == 0


@both
def test_projection_is_over_the_whole_tensor(fused: bool) -> None:
    """Not per row: here every row of g is parallel to its row of w, and something is left."""
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    g = torch.tensor([[1.0, 2.0], [-3.0, -4.0]])
    got = effective(w, g, fused, False)
    assert norm(got) > 1.0
    assert abs(float((got * w).sum())) < 1e-5


@both
def test_groups_may_opt_out_and_override(fused: bool) -> None:
    w, g = draw([(9,), (9,)], 3, F64)
    params = [nn.Parameter(w.clone()) for _ in range(3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "perp_grad": False},
        {"params": params[2:], "perp_grad_rescale": False},
    ]
    opt = optx.wrap(torch.optim.SGD(groups, lr=1.0), optx.PerpGrad(), fused=fused)
    for p in params:
        p.grad = g.clone()
    opt.step()
    moved = [w - p.detach() for p in params]
    assert norm(moved[0]) == pytest.approx(norm(g), rel=1e-12)
    assert abs(float(w @ moved[0])) < 1e-12
    torch.testing.assert_close(moved[1], g, rtol=0, atol=1e-15)
    assert norm(moved[2]) < 0.999 * norm(g)
    torch.testing.assert_close(moved[2] / norm(moved[2]), moved[0] / norm(moved[0]), rtol=1e-10, atol=1e-12)


@both
def test_moments_are_of_the_projected_gradient_and_the_persons_gradient_stays(fused: bool) -> None:
    w, g = draw([(40,), (40,)], 5, F32)
    p = nn.Parameter(w.clone())
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.01), optx.PerpGrad(), fused=fused)
    p.grad = g.clone()
    opt.step()
    m = opt.state[p]["exp_avg"] / 0.1
    assert abs(float(w @ m)) < 1e-6 * norm(w) * norm(g)
    assert torch.equal(p.grad, g)


@both
def test_coupled_decay_is_added_after_the_projection(fused: bool) -> None:
    """As in the official code: the radial part comes back as L2."""
    w, g = draw([(40,), (40,)], 6, F64)
    p = nn.Parameter(w.clone())
    opt = optx.wrap(torch.optim.SGD([p], lr=0.01, weight_decay=0.3), optx.PerpGrad(), fused=fused)
    reference = Reference([w], "sgd", {"lr": 0.01, "weight_decay": 0.3}, perp=True)
    p.grad = g
    opt.step()
    reference.step([g])
    torch.testing.assert_close(p.detach(), reference.weights[0], rtol=0, atol=1e-13)


@both
def test_pytorch_optimizers_orthograd_is_the_same(fused: bool) -> None:
    """An independent implementation, whose semantics are equal for tensors of more than one element."""
    from pytorch_optimizer import OrthoGrad

    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    theirs = OrthoGrad(torch.optim.AdamW(nets[0].parameters(), lr=0.01), foreach=False)
    ours = optx.wrap(torch.optim.AdamW(nets[1].parameters(), lr=0.01), optx.PerpGrad(), fused=fused)
    for step in range(10):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(step))
        for net, opt in zip(nets, (theirs, ours), strict=True):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@both
def test_grad_scaler_commutes(fused: bool) -> None:
    """Projection is linear in g; an overflow reaches nothing."""
    w, g = draw([(64,), (64,)], 8, F32)
    results = []
    for scaled in (False, True):
        p = nn.Parameter(w.clone())
        opt = optx.wrap(torch.optim.SGD([p], lr=0.1), optx.PerpGrad(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(4):
            opt.zero_grad()
            scaler.scale((p * g * (step + 1)).sum()).backward()
            if step == 2 and scaled:
                before, keep = p.detach().clone(), p.grad.clone()
                p.grad[3] = float("inf")
                scaler.step(opt)
                scaler.update(1024.0)
                assert torch.equal(p.detach(), before)
                p.grad = keep
                scaler.step(opt)
            else:
                scaler.step(opt)
            scaler.update(1024.0 if scaled else None)
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@both
def test_low_precision_reduces_in_float32(fused: bool) -> None:
    """1e-30 is 0 in float16, and sums of 10,000 squares overflow it."""
    dtype = F16
    w, g = (x.to(dtype) for x in draw([(10_000,), (10_000,)], 9, F32))
    w = w * 100
    p = nn.Parameter(w.clone())
    p.grad = g + w / 50
    opt = optx.wrap(torch.optim.SGD([p], lr=2.0**8), optx.PerpGrad(), fused=fused)
    wanted = Reference([w], "sgd", {"lr": 2.0**8}, perp=True)
    grad = p.grad.clone()
    opt.step()
    wanted.step([grad])
    torch.testing.assert_close(p.detach(), wanted.weights[0].to(dtype), rtol=2**-7, atol=0.5)
