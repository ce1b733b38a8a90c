"""S4D for drawn shapes, dtypes and options: against a naive recurrence, and its two ways to compute."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx.inject._s4d_kernel import DISCS
from optx.inject._s4d_layer import OUTPUTS
from optx.inject._s4d_start import INITS


def recurrence(layer: optx.S4DLayer, u: Tensor) -> tuple[Tensor, Tensor]:
    """y = 2 Re(C x) + D u and the last x, token by token in complex128, from the parameters as they are."""
    A = -layer.log_A_real.double().exp() + 1j * layer.A_imag.double()
    dt = layer.log_dt.double().exp()[:, None]
    B, C = (torch.view_as_complex(t.double().contiguous()) for t in (layer.B, layer.C))
    if layer.disc == "zoh":
        A, B = (dt * A).exp(), ((dt * A).exp() - 1) / A * B
    else:
        A, B = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2) * B
    x, outputs = torch.zeros(len(u), *A.shape, dtype=A.dtype), list[Tensor]()
    for now in u.double().unbind(1):
        x = A * x + B * now.unsqueeze(-1)
        outputs.append(2 * (C * x).sum(-1).real + layer.D.double() * now)
    return torch.stack(outputs, 1), x


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 5)),
    d_state=st.integers(1, 16).map(lambda modes: 2 * modes),
    options=st.fixed_dictionaries(
        {
            "init": st.sampled_from(INITS),
            "disc": st.sampled_from(DISCS),
            "train_B": st.booleans(),
            "output": st.sampled_from(OUTPUTS),
        }
    ),
    steps=st.tuples(st.floats(1e-5, 1), st.floats(1, 100)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    cut=st.floats(0, 1),
    padding=st.integers(0, 5),
)
def test_convolution_step_and_recurrence_are_one(
    seed: int,
    sizes: tuple[int, int, int],
    d_state: int,
    options: dict[str, Any],
    steps: tuple[float, float],
    dtype: torch.dtype,
    cut: float,
    padding: int,
) -> None:
    batch, length, width = sizes
    torch.manual_seed(seed)
    low, ratio = steps
    layer = optx.S4DLayer(width, d_state, dt_min=low, dt_max=low * ratio, **options).to(dtype)
    u = torch.randn(batch, length, width).to(dtype)
    close = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    with torch.no_grad():
        plain, last = recurrence(layer, u)
        found, state = layer(u, return_state=True)
        near(found, layer._leave(plain.to(dtype)), close)
        near(state, last, min(close, 2e-5))

        ys, x = list[Tensor](), layer.initial_state(batch)
        for now in u.unbind(1):
            y, x = layer.step(now, x)
            ys.append(y)
        near(torch.stack(ys, 1), found, close)
        near(x, state, min(close, 2e-5))

        at = min(max(1, round(cut * length)), length)
        if at < length:  # in two parts
            first, carried = layer(u[:, :at], return_state=True)
            second, x = layer(u[:, at:], state=carried, return_state=True)
            near(torch.cat([first, second], 1), found, close)
            near(x, state, min(close, 2e-5))

        real = torch.ones(batch, length + padding, dtype=torch.bool)
        real[:, length:] = False
        longer = torch.cat([u, torch.full((batch, padding, width), torch.nan, dtype=dtype)], 1)
        padded, x = layer(longer, mask=real, return_state=True)
        near(padded[:, :length], found, close)
        near(x, state, min(close, 2e-5))


def near(found: Tensor, wanted: Tensor, close: float) -> None:
    """Their largest difference is small beside the largest number, or beside 1."""
    assert found.shape == wanted.shape
    if found.numel():
        scale = max(1.0, float(wanted.abs().max()))
        assert float((found - wanted).abs().max()) <= close * scale
