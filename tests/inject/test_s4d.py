"""S4D's arithmetic against the paper's numbers, a naive recurrence, scipy, and laws that it must obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import optx
from optx.inject._s4d_kernel import check_length, convolve, discretise, kernel, last_state
from optx.inject._s4d_start import INITS, hippo_legs, spectrum

PI = math.pi


def naive(layer: optx.S4DLayer, length: int) -> Tensor:
    """The kernel, one step after the other in complex128, from the parameters as they are."""
    A = -layer.log_A_real.double().exp() + 1j * layer.A_imag.double()
    dt = layer.log_dt.double().exp()[:, None]
    B = torch.view_as_complex(layer.B.double().contiguous())
    if layer.disc == "zoh":
        power, weight = (dt * A).exp(), ((dt * A).exp() - 1) / A * B
    else:
        power, weight = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2) * B
    C, state, rows = torch.view_as_complex(layer.C.double()), weight, list[Tensor]()
    for _ in range(length):
        rows.append(2 * (C * state).sum(-1).real)
        state = state * power
    return torch.stack(rows, -1)


def small(width: int = 3, **options: object) -> optx.S4DLayer:
    torch.manual_seed(0)
    return optx.S4DLayer(width, **{"d_state": 8, "output": "none", **options})  # type: ignore[arg-type]


# ---- where it begins (properties 1, 2) -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "d_state", "expected"),
    [
        ("inv", 8, [17.8253536, 4.2441318, 1.5278874, 0.3637827]),
        ("inv2", 8, [8 / PI * 7, 8 / PI * 3, 8 / PI * (8 / 3 - 1), 8 / PI]),
        ("lin", 8, [0, PI, 2 * PI, 3 * PI]),
        ("legs", 8, [19.8574104, 5.3542085, 1.9577942, 0.4274887]),
        ("legs", 4, [4.6032930, 0.5565011]),
        ("real", 8, [0, 0, 0, 0]),
    ],
)
def test_frequencies_at_the_start(init: str, d_state: int, expected: list[float]) -> None:
    start = spectrum(init, d_state)  # type: ignore[arg-type]
    assert start.frequency.tolist() == pytest.approx(expected, abs=1e-6)
    assert start.decay.tolist() == ([1, 2, 3, 4] if init == "real" else [0.5] * (d_state // 2))


def test_legs_is_half_the_identity_and_a_skew_matrix_and_inv_its_limit() -> None:
    matrix, low = hippo_legs(64)
    skew = matrix + torch.outer(low, low) + 0.5 * torch.eye(64, dtype=torch.float64)
    assert float((skew + skew.T).abs().max()) < 1e-12
    legs, inv = spectrum("legs", 64), spectrum("inv", 64)
    tops = float(inv.frequency[0]), float(legs.frequency[0])
    assert tops == pytest.approx((1283.4, 1303.3), abs=0.05)
    assert abs(tops[0] / tops[1] - 1) < 0.02
    wider = spectrum("inv", 256).frequency[1] / spectrum("legs", 256).frequency[1]
    assert abs(float(wider) - 1) < abs(float(inv.frequency[1] / legs.frequency[1]) - 1)
    # B of LegS in the basis of its modes: moduli of V* sqrt(2n + 1), bounded by 2.
    assert spectrum("legs", 8).weight.tolist() == pytest.approx([2, 1.84, 1.17, 0.80], abs=6e-3)


def test_random_frequencies_are_each_channels_own_and_the_others_are_not() -> None:
    assert len({tuple(row) for row in small(init="random").A_imag.tolist()}) == 3
    assert len({tuple(row) for row in small(init="inv").A_imag.tolist()}) == 1


# ---- the kernel (properties 3, 6, 7) ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disc", "expected"),
    [
        ("zoh", [0.2985819, 0.2888757, 0.2697867, 0.2431880, 0.2115326, 0.1775621]),
        ("bilinear", [0.2977483, 0.2882859, 0.2696192, 0.2435295, 0.2123713, 0.1787959]),
    ],
)
def test_the_spec_s_kernel(disc: str, expected: list[float]) -> None:
    found = discretise(
        torch.tensor([0.1]).double().log(),
        torch.tensor([[0.5, 0.5]]).double().log(),
        torch.tensor([[0.0, PI]]).double(),
        torch.tensor([1.0 + 0j, 1.0]),
        disc,  # type: ignore[arg-type]
    )
    C = torch.tensor([[1.0, 0.5 - 0.25j]], dtype=torch.complex128)
    assert kernel(found, C * found.B, 6, torch.float64)[0].tolist() == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", INITS)
def test_kernel_equals_a_naive_recurrence(init: str, disc: str) -> None:
    layer = small(init=init, disc=disc, d_state=16)
    for length in (1, 2, 37, 300):
        assert torch.allclose(layer.kernel(length).double(), naive(layer, length), rtol=0, atol=1e-6)


def test_kernel_keeps_its_angles_over_16k_steps() -> None:
    layer = small(init="inv", d_state=64, dt_min=1e-5, dt_max=0.1)  # top angles of 128 rad a step
    with torch.no_grad():
        layer.log_dt[0] = math.log(0.1)
        layer.log_A_real[0] = -8  # that still sounds at the end
        found, exact = layer.kernel(16384), naive(layer, 16384)
    assert float(exact[:, -100:].abs().max()) > 0.1
    assert float((found.double() - exact).abs().max()) < 1e-6 * max(1.0, float(exact.abs().max()))


def test_two_real_parts_are_the_sum_over_conjugate_pairs() -> None:
    layer = small()
    found = layer.discrete()
    C = torch.view_as_complex(layer.C.double())
    powers = (found.log_A.unsqueeze(-1) * torch.arange(50)).exp()
    half = (C * found.B).unsqueeze(-1) * powers
    both = (half + half.conj()).sum(-2)
    assert float(both.imag.detach().abs().max()) < 1e-15
    assert torch.allclose(layer.kernel(50).double(), both.real, atol=1e-6)


def test_sum_of_a_real_mode_is_its_integral() -> None:
    numbers = (torch.tensor(x, dtype=torch.float64) for x in ([-4.0], [[0.3]], [[0.0]]))
    found = discretise(*numbers, torch.ones(1) + 0j, "zoh")
    total = kernel(found, found.B, 4000, torch.float64).sum()
    assert float(total) == pytest.approx(2 / math.exp(0.3), rel=1e-12)


def test_kernel_of_scipy_s_systems() -> None:
    """The same system as real matrices, sampled and run by scipy: no line in common with ours."""
    signal = pytest.importorskip("scipy.signal")
    layer = small(1, init="legs", train_B=True)
    A, B = -np.exp(layer.log_A_real[0].tolist()) + 1j * np.array(layer.A_imag[0].tolist()), layer.B[0]
    C, D = np.array(layer.C[0].tolist()), layer.D.item()
    blocks = np.zeros((8, 8))
    for n, a in enumerate(A):
        blocks[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] = [[a.real, -a.imag], [a.imag, a.real]]
    inputs = B.detach().double().numpy().reshape(8, 1)
    outputs = 2 * np.stack([C[:, 0], -C[:, 1]], -1).reshape(1, 8)
    u = np.random.default_rng(0).standard_normal(200)
    with torch.no_grad():
        for disc in ("zoh", "bilinear"):
            layer.disc = disc  # type: ignore[assignment]
            dt = layer.log_dt.double().exp().item()
            a, b = signal.cont2discrete((blocks, inputs, outputs, [[0.0]]), dt, disc)[:2]
            # scipy's outputs are before the update; the bilinear one has other outputs too, so that its own
            # A and B are what is compared.
            b = b if disc == "zoh" else np.linalg.solve(np.eye(8) - dt / 2 * blocks, dt * inputs)
            _, states = signal.dlsim((a, b, np.eye(8), np.zeros((8, 1)), dt), np.append(u, 0))[:2]
            y = (outputs @ states[1:].T)[0] + D * u
            ours = layer(torch.tensor(u).view(1, -1, 1))[0, :, 0]
            assert np.abs(ours.numpy() - y).max() < 1e-9


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_gradients_are_those_of_the_naive_recurrence(disc: str) -> None:
    layer = small(disc=disc, train_B=True)
    towards = torch.randn(3, 60)
    wanted = torch.autograd.grad((naive(layer, 60) * towards).sum(), [*layer.parameters()][:-1])
    found = torch.autograd.grad((layer.kernel(60) * towards).sum(), [*layer.parameters()][:-1])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


# ---- convolution, steps, states (properties 4, 5) --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_convolution_steps_and_chunks_are_one(dtype: torch.dtype) -> None:
    layer = small(output="glu", init="legs").to(dtype).eval()
    u = torch.randn(2, 1024, 3, dtype=dtype)
    with torch.no_grad():
        whole = layer(u)
        state, steps = layer.initial_state(2), list[Tensor]()
        for t in range(1024):
            y, state = layer.step(u[:, t], state)
            steps.append(y)
        first, carried = layer(u[:, :700], return_state=True)
        second, end = layer(u[:, 700:], state=carried, return_state=True)
    close = 1e-10 if dtype == torch.float64 else 1e-4
    assert float((torch.stack(steps, 1) - whole).abs().max()) < close
    assert float((torch.cat([first, second], 1) - whole).abs().max()) < close
    assert float((end - state).abs().max()) < close
    assert whole.dtype == dtype


def test_nothing_is_seen_before_it_comes_and_the_layer_is_linear_in_u_and_c() -> None:
    layer = small(init="inv", d_state=32)
    u, v = torch.randn(2, 1, 300, 3)
    later = u.clone()
    later[:, 200] += 10
    with torch.no_grad():
        y, changed = layer(u), layer(later)
        assert float((y - changed)[:, :200].abs().max()) < 1e-5
        assert float((y - changed)[:, 200:].abs().max()) > 1
        assert torch.allclose(layer(2 * u - v), 2 * y - layer(v), atol=1e-4)
        layer.D.zero_()
        before = layer(u)
        layer.C.mul_(-3)
        assert torch.allclose(layer(u), -3 * before, atol=1e-4)


def test_a_bidirectional_layer_sees_both_ways() -> None:
    layer = small(bidirectional=True).double()
    u = torch.randn(2, 40, 3).double()
    one_way, back = layer.kernel(40)
    y = torch.zeros_like(u)
    for t in range(40):
        for j in range(40):
            y[:, t] += (one_way[:, t - j] if j <= t else back[:, j - t - 1]) * u[:, j]
    with torch.no_grad():
        assert torch.allclose(layer(u), y + layer.D * u, atol=1e-10)
        assert torch.allclose(layer(u[:, :1]), (one_way[:, 0] + layer.D) * u[:, :1])
    for call in (lambda: layer(u, return_state=True), lambda: layer.step(u[:, 0], layer.initial_state(2))):
        with pytest.raises(optx.OptxError, match="bidirectional"):
            call()


def test_another_rate_is_another_step() -> None:
    layer = small(d_state=4)
    every = layer.kernel(40)
    with torch.no_grad():
        layer.log_dt -= math.log(2)
    assert torch.allclose(layer.kernel(40, rate=2.0), every, atol=1e-6)


def test_lengths_that_the_angles_do_not_bear_are_refused() -> None:
    found = small(init="inv", d_state=64, dt_min=0.1).discrete()
    check_length(found, 2**20)
    with pytest.raises(optx.OptxError, match=r"L=1000000000 is longer than the kernel's angle precision"):
        check_length(found, 10**9)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9, 31, 100])
def test_convolutions_and_states_of_any_length(length: int) -> None:
    layer = small().double()
    u, K = torch.randn(2, 3, length).double(), torch.randn(3, length).double()
    expected = torch.stack(
        [sum(K[:, t - j] * u[..., j] for j in range(t + 1)) for t in range(length)],  # type: ignore[misc]
        -1,
    )
    assert torch.allclose(convolve(u, K), expected, atol=1e-12)
    found, state = layer.discrete(), torch.zeros(2, 3, 4, dtype=torch.complex128)
    for t in range(length):
        state = found.A * state + found.B * u[..., t, None]
    assert torch.allclose(last_state(found, u, None), state, atol=1e-12)
