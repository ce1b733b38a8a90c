"""S4D's arithmetic: discretise, powers of a diagonal, the convolution's kernel, states that go on.

Source: arXiv 2206.11893, sections 3.1 to 3.3.

A power is looked at as l = r S + s with S near the root of L. So the powers take memory of (modes, root of L)
in the place of (modes, L), and one matrix product does the rest. Angles grow with L: they are float64 until
sine and cosine are taken, whatever the dtype of the parameters, so that float32 rounds once, behind them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from optx._errors import OptxError

Disc = Literal["zoh", "bilinear"]
DISCS = ("zoh", "bilinear")

_ANGLE_ERROR = 1e-6
_ALWAYS_EXACT = 2**20
"""Up to this length float64 is exact enough for 5 000 radians a step, and nothing has to be looked at."""


class Discrete(NamedTuple):
    """x_t = A x_{t-1} + B u_t, y_t = 2 Re(C x_t): each (..., width, modes), complex128.

    Attributes:
        log_A: of which A is the exponential.
        B: the input's weights.
    """

    log_A: Tensor
    B: Tensor

    @property
    def A(self) -> Tensor:
        """What a state is multiplied with from step to step."""
        return self.log_A.exp()


def discretise(
    log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, B: Tensor, disc: Disc, rate: float = 1.0
) -> Discrete:
    """A = -exp(log_A_real) + i A_imag and B at steps of exp(log_dt) times ``rate``.

    Args:
        log_dt: (width,).
        log_A_real: (width, modes).
        A_imag: the same shape.
        B: complex, or real pairs behind the modes, (..., modes, 2).
        disc: ``"zoh"`` (zero-order hold) or ``"bilinear"``.
        rate: of the samples, compared with those that dt is for.
    """
    dt = log_dt.double().exp().unsqueeze(-1) * rate
    A = torch.complex(-log_A_real.double().exp(), A_imag.double())
    weight = as_complex(B)
    step = dt * A
    if disc == "zoh":
        return Discrete(step, _expm1(step) / A * weight)
    below = 1 - step / 2
    return Discrete(((1 + step / 2) / below).log(), dt / below * weight)


def as_complex(pairs: Tensor) -> Tensor:
    """Real pairs (..., 2) as complex128; what is complex stays."""
    if pairs.is_complex():
        return pairs.to(torch.complex128)
    return torch.view_as_complex(pairs.double().contiguous())


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 without cancellation near 0, which torch has for real numbers only."""
    decay, half = z.real, z.imag / 2
    real = torch.expm1(decay) - 2 * half.sin().square() * decay.exp()
    return torch.complex(real, z.imag.sin() * decay.exp())


def kernel(discrete: Discrete, weight: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """2 Re sum_n weight_n A_n^l for l = 0 ... length - 1.

    Args:
        discrete: the system; its A alone is used.
        weight: complex128, (..., width, modes): C B for the kernel, C A x for what is left of a state x.
        length: L.
        dtype: of the result and of the last product.

    Returns:
        (..., width, length).
    """
    check_length(discrete, length)
    fine, coarse = _powers(discrete.log_A, length)
    left = (2 * weight).unsqueeze(-1) * coarse
    left = torch.cat([left.real, -left.imag], dim=-2).to(dtype)
    right = torch.cat([fine.real, fine.imag], dim=-2).to(dtype)
    return (left.mT @ right).flatten(-2)[..., :length]


def last_state(discrete: Discrete, u: Tensor, before: Tensor | None) -> Tensor:
    """The state behind the inputs: A^L x + sum_j A^(L - 1 - j) B u_j.

    Args:
        discrete: the system.
        u: (..., width, L), float32 or float64.
        before: x, complex, (..., width, modes); None: zero.
    """
    length = u.shape[-1]
    check_length(discrete, length)
    fine, coarse = _powers(discrete.log_A, length)
    steps, rows = fine.shape[-1], coarse.shape[-1]
    late_first = F.pad(u.flip(-1), (0, steps * rows - length)).view(*u.shape[:-1], rows, steps)
    pairs = torch.cat([fine.real, fine.imag], dim=-2).to(u.dtype)
    real, imag = (late_first @ pairs.mT).chunk(2, dim=-1)  # (..., width, rows, modes)
    kind = torch.complex64 if u.dtype == torch.float32 else torch.complex128
    weights = (coarse * discrete.B.unsqueeze(-1)).mT.to(kind)
    state = (torch.complex(real, imag) * weights).sum(-2)
    return state if before is None else state + (discrete.log_A * length).exp().to(kind) * before.to(kind)


def _powers(log_A: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A^s for s < S, and A^(r S) for r S < length: each (..., modes, about the root of length)."""
    steps = 1 << math.ceil(math.log2(max(length, 1)) / 2)
    rows = -(-length // steps)
    s = torch.arange(steps, dtype=torch.float64, device=log_A.device)
    r = torch.arange(rows, dtype=torch.float64, device=log_A.device) * steps
    log_A = log_A.unsqueeze(-1)
    return (log_A * s).exp(), (log_A * r).exp()


def check_length(discrete: Discrete, length: int) -> None:
    """Raise if the last angle has lost its digits, in float64.

    Raises:
        OptxError: names the length, the angle of a step, and up to which length it would do.
    """
    if length <= _ALWAYS_EXACT or discrete.log_A.is_meta or torch.compiler.is_compiling():
        return
    angle = float(discrete.log_A.detach().imag.abs().max())
    if length * angle * 2.0**-53 > _ANGLE_ERROR:
        most = int(_ANGLE_ERROR / (angle * 2.0**-53))
        raise OptxError(
            f"S4D: L={length} is longer than the kernel's angle precision: with {angle:.3g} radians a step, "
            f"the last angle's error is below {_ANGLE_ERROR} up to L={most}. Cut the sequence and carry the "
            "state over (return_state=True), or take smaller steps (dt_max)."
        )


def convolve(u: Tensor, forward: Tensor, backward: Tensor | None = None) -> Tensor:
    """y_t = sum_{j <= t} forward_{t - j} u_j + sum_{j > t} backward_{j - t - 1} u_j.

    Args:
        u: (..., width, L), float32 or float64.
        forward: (width, L), of the same dtype.
        backward: the same shape; None: nothing of what comes later is seen.
    """
    length = u.shape[-1]
    size = _fast_size(2 * length - 1)
    around = F.pad(forward, (0, size - length))
    if backward is not None and length > 1:
        around = around + F.pad(backward[..., : length - 1].flip(-1), (size - length + 1, 0))
    if not u.numel():
        return u * around[..., :length]  # no sequence, which FFTs refuse; gradients are zeros, and there
    fft: Any = torch.fft  # which has no types
    return fft.irfft(fft.rfft(u, size) * fft.rfft(around, size), size)[..., :length]


def _fast_size(least: int) -> int:
    """The smallest 2^a, 3 2^a or 5 2^a, which FFTs are fast at."""
    return min(odd << max(0, math.ceil(math.log2(least / odd))) for odd in (1, 3, 5))
