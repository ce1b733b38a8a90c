"""First values of S4D's diagonal: where its modes lie, which is what the method's quality rests on.

Source: On the Parameterization and Initialization of Diagonal State Space Models, arXiv 2206.11893, section
4; state-spaces/s4 for LegS's input weights and for the random spectrum.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Init = Literal["legs", "inv", "inv2", "lin", "real", "random"]
INITS = ("legs", "inv", "inv2", "lin", "real", "random")

_LARGEST_INPUT = 2.0
"""LegS's first modes have input weights that grow with N; the authors' code bounds them."""


class Spectrum(NamedTuple):
    """Half of the modes, one of each conjugate pair, all in float64.

    Attributes:
        decay: -Re A, (modes,).
        frequency: Im A, (modes,), or (width, modes) where it is drawn.
        weight: B, (modes,), real.
    """

    decay: Tensor
    frequency: Tensor
    weight: Tensor


def spectrum(init: Init, d_state: int, width: int = 1) -> Spectrum:
    """The modes of an initialisation for a real state of size N = ``d_state``."""
    modes = d_state // 2
    n = torch.arange(modes, dtype=torch.float64)
    decay, weight = torch.full_like(n, 0.5), torch.ones_like(n)
    if init == "legs":
        frequency, weight = _legs(d_state)
    elif init == "inv":
        frequency = d_state / math.pi * (d_state / (2 * n + 1) - 1)
    elif init == "inv2":
        frequency = d_state / math.pi * (d_state / (n + 1) - 1)
    elif init == "lin":
        frequency = math.pi * n
    elif init == "real":
        decay, frequency = n + 1, torch.zeros_like(n)
    else:
        frequency = torch.randn(width, modes).double().exp()
    return Spectrum(decay, frequency, weight)


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: A (N, N) and P (N,), for which A + P P' + I / 2 is skew-symmetric, in float64."""
    n = torch.arange(d_state, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    matrix = -torch.outer(root, root).tril(-1) - torch.diag(n + 1)
    return matrix, (n + 0.5).sqrt()


def _legs(d_state: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the normal part of HiPPO-LegS, largest first, and its input in their basis.

    An eigenvector's phase is arbitrary; it is taken such that the input weight is real and positive, as C,
    which has the same start in all phases, takes up the rest.
    """
    matrix, low = hippo_legs(d_state)
    skew = matrix + torch.outer(low, low) + 0.5 * torch.eye(d_state, dtype=torch.float64)
    linalg: Any = torch.linalg  # which has no types
    values, vectors = linalg.eigh(-1j * skew)
    half = values.argsort(descending=True)[: d_state // 2]
    root = (2 * torch.arange(d_state, dtype=torch.float64) + 1).sqrt()
    weight = (vectors.mH[half] @ root.to(vectors.dtype)).abs()
    return values[half], weight.clamp_max(_LARGEST_INPUT)
