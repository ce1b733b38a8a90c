"""The infinitely wide linear network that can be trained, wide ones that approach it, and ReLU kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optx._errors import OptxError, ShapeError
from optx.scaling import infinite_width_linear, relu_kernel, relu_network_kernel, step_kernel

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny networks
X = torch.tensor([[1.0, 0.5, -0.3], [-0.4, 0.8, 1.0]])
Y = torch.tensor([[0.7], [-1.1]])


def train(model, steps, lr=0.1, x=X, y=Y, clip=None, **options):
    """Outputs before each step and after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        seen.append(output.detach())
        (0.5 * (output - y).square().sum()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    with torch.no_grad():
        return torch.stack([*seen, model(x)])


# ---- the limit ------------------------------------------------------------------------------------------


@given(d=st.integers(1, 9), o=st.integers(1, 9), sigma1=st.floats(0, 3), sigma2=st.floats(0, 3))
def test_it_starts_at_exactly_zero(d, o, sigma1, sigma2):
    net = infinite_width_linear(d, o, sigma1, sigma2, alpha=2.0)
    assert torch.equal(net(torch.randn(4, d)), torch.zeros(4, o))
    assert net.A.shape == (d + o, d)
    assert net.B.shape == (o, d + o)
    assert torch.equal(net.A.T @ net.A, sigma1**2 * torch.eye(d)) or sigma1 not in (0.0, 1.0, 2.0)


def test_the_outputs_of_the_paper_case():
    one = torch.ones(1, 1)
    found = train(infinite_width_linear(1, 1), 3, x=one, y=one).flatten()
    assert found.tolist() == pytest.approx([0, 0.2, 0.36288, 0.49795249], abs=1e-7)


def gaps(width, seeds, **options):
    """Largest difference to the limit, at the start and at the end, geometric means over seeds."""
    start = infinite_width_linear(3, 1)
    nets = [start.sample(width, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    limit = train(start, 5, **options)
    apart = torch.stack([(train(net, 5, **options) - limit).abs().amax((1, 2)) for net in nets])
    return apart.log().mean(0).exp()[[0, -1]].tolist()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"clip": 0.4}], ids=str)
def test_wide_networks_approach_it_by_the_root_of_their_width(options):
    narrow, wide = gaps(1024, 24, **options), gaps(16384, 24, **options)
    for before, after in zip(narrow, wide, strict=True):
        assert after < 0.03
        assert math.log(after / before) / math.log(16) == pytest.approx(-0.5, abs=0.12)


@given(
    d=st.integers(1, 4),
    o=st.integers(1, 4),
    sigma1=st.floats(0.2, 2),
    sigma2=st.floats(0.2, 2),
    alpha=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
def test_a_sample_whose_random_vectors_were_orthonormal_would_be_it(d, o, sigma1, sigma2, alpha, seed):
    """omega' omega / n is then the identity and a network of any width is trained as the limit, exactly."""
    net = infinite_width_linear(d, o, sigma1, sigma2, alpha).double()
    draws = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(3, size, generator=draws, dtype=torch.float64) for size in (d, o))
    omega = torch.linalg.qr(torch.randn(20, d + o, generator=draws, dtype=torch.float64))[0]
    finite = net.sample(20, draws)
    with torch.no_grad():
        finite.U.weight.copy_(omega @ net.A)
        finite.V.weight.copy_(net.B @ omega.T)
    assert torch.allclose(train(finite, 4, 0.02, x, y), train(net, 4, 0.02, x, y), atol=1e-10)


def test_what_is_sampled():
    net = infinite_width_linear(3, 2, sigma1=0.5, sigma2=2.0, alpha=0.25)
    finite = net.sample(50_000, torch.Generator().manual_seed(0))
    assert float(finite.U.weight.detach().std()) * math.sqrt(50_000) == pytest.approx(0.5, rel=0.02)
    assert float(finite.V.weight.detach().std()) * math.sqrt(50_000) == pytest.approx(2.0, rel=0.02)
    assert [name for name, _ in finite.named_parameters()] == ["U.weight", "V.weight"]
    assert torch.allclose(finite(X), 0.25 * X @ finite.U.weight.T @ finite.V.weight.T)
    again = net.sample(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(finite.U.weight, again.U.weight)
    assert all(p.requires_grad and p.is_leaf for p in finite.parameters())


def test_a_trained_limit_is_sampled_as_it_is_now():
    net = infinite_width_linear(3, 1)
    outputs = train(net, 8)
    finite = net.sample(40_000, torch.Generator().manual_seed(1))
    assert torch.allclose(finite(X), outputs[-1], atol=0.03)
    assert float(outputs[-1].abs().max()) > 0.3


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"d": 0}, "d is 0"),
        ({"o": 1.5}, "o is 1.5"),
        ({"sigma1": -1.0}, "sigma1 is -1.0"),
        ({"sigma2": math.nan}, "sigma2 is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
    ],
)
def test_bad_sizes_are_refused(given_, told):
    with pytest.raises(OptxError, match=f"infinite_width_linear: {told}"):
        infinite_width_linear(**{"d": 2, "o": 1, **given_})
    with pytest.raises(OptxError, match="width is 0"):
        infinite_width_linear(2, 1).sample(0)


# ---- kernels --------------------------------------------------------------------------------------------


def test_kernels_at_the_ends_and_the_middle():
    c = torch.tensor([1.0, 0.0, -1.0])
    assert relu_kernel(c).tolist() == pytest.approx([0.5, 0.15915494, 0.0], abs=1e-8)
    assert step_kernel(c).tolist() == pytest.approx([0.5, 0.25, 0.0], abs=1e-8)


@given(st.floats(-0.999, 0.999))
def test_kernels_are_expectations(c):
    """By quadrature over the angle: a pair of normals is (r cos t, r cos(t - acos c))."""
    t = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)[:-1]
    u, v = torch.cos(t), torch.cos(t - math.acos(c))
    found = torch.tensor([c], dtype=torch.float64)
    # E r^2 = 2
    assert float(relu_kernel(found)) == pytest.approx(float((2 * u.relu() * v.relu()).mean()), abs=1e-6)
    assert float(step_kernel(found)) == pytest.approx(float(((u > 0) & (v > 0)).double().mean()), abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_of_the_one_is_the_other_up_to_the_ends(dtype):
    c = torch.tensor([-1.0, -0.9, -0.2, 0.0, 0.3, 0.99, 1.0], dtype=dtype, requires_grad=True)
    relu_kernel(c).sum().backward()
    assert torch.allclose(c.grad, step_kernel(c.detach()), atol=1e-6)
    c.grad = None
    step_kernel(c).sum().backward()
    assert torch.isfinite(c.grad).all()


def test_rounding_beyond_the_ends_is_the_end_and_more_is_refused():
    assert float(relu_kernel(torch.tensor(1.0000002))) == pytest.approx(0.5, abs=1e-6)
    assert float(step_kernel(torch.tensor(-1.0000002))) == 0.0
    for kernel in (relu_kernel, step_kernel):
        with pytest.raises(OptxError, match=r"a correlation is 1\.5"):
            kernel(torch.tensor([0.1, -1.5]))
        with pytest.raises(OptxError, match="must be a floating tensor"):
            kernel(torch.tensor([1, 0]))


@pytest.mark.parametrize("sigma", [1.0, 1.7])
def test_kernels_of_wide_networks(sigma):
    """The covariance of outputs and the tangent kernel of one network of 60,000 neurons, by autograd."""
    n, draws = 60_000, torch.Generator().manual_seed(0)
    w = torch.randn(n, 3, generator=draws).requires_grad_()
    v = torch.randn(n, generator=draws).requires_grad_()
    rows = []
    for x in X:
        output = v @ torch.relu(sigma * (w @ x)) / math.sqrt(n)
        rows.append(torch.autograd.grad(output, (v, w)))
    readout = torch.stack([r[0] for r in rows])
    every = torch.stack([torch.cat([r[0], r[1].flatten()]) for r in rows])
    assert torch.allclose(relu_network_kernel(X, kind="gp", sigma=sigma), readout @ readout.T, rtol=0.03)
    assert torch.allclose(relu_network_kernel(X, sigma=sigma), every @ every.T, rtol=0.03)
    assert torch.allclose(relu_network_kernel(X[:1], X[1:]), relu_network_kernel(X)[:1, 1:], rtol=1e-6)


def test_a_zero_input_and_bad_shapes():
    x = torch.stack([torch.zeros(3), X[0]])
    assert relu_network_kernel(x)[0].tolist() == [0.0, 0.0]
    with pytest.raises(ShapeError, match=r"shapes \(2, 3\) and \(2, 4\)"):
        relu_network_kernel(X, torch.zeros(2, 4))
    with pytest.raises(OptxError, match="kind is 'mup'"):
        relu_network_kernel(X, kind="mup")


def test_nan_stays_nan_and_what_is_no_floating_tensor_is_told():
    nan = torch.tensor([math.nan, 1.0])
    for kernel in (relu_kernel, step_kernel):
        assert kernel(nan).isnan().tolist() == [True, False]
    for bad, told in (([[1.0]], "x is a list"), (torch.ones(2, 2, dtype=torch.long), "x is torch.int64")):
        with pytest.raises(OptxError, match=told):
            relu_network_kernel(bad)
    with pytest.raises(OptxError, match=r"x is torch\.float32 and y torch\.float64"):
        relu_network_kernel(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64))
