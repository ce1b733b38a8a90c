"""The unified view's choices, and what every part that follows them starts from: forms and first values.

Source: Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 3, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Form = Literal["relu", "gelu", "silu", "tanh", "linear", "softmax"]
"""f in Δ = f(x W_down) W_up."""

Modifies = Literal["ffn", "attention", "both", "projections", "heads"]
"""Which hidden vector h is changed: the output of a sub-layer, of both, of a projection, or of each head."""

Insertion = Literal["parallel", "sequential"]
"""What x is: the input of what computes h, or h itself."""

Compose = Literal["add", "scaled", "gated"]
"""h + Δ, h + s Δ, or (1 - λ) h + λ Δ."""

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "softmax": lambda x: torch.softmax(x, dim=-1),
}


@dataclass(frozen=True)
class HiddenDeltaOptions:
    """The options of `optx.HiddenDelta`, which says what each means; its parts read them from here."""

    form: Form = "relu"
    modifies: Modifies = "ffn"
    insertion: Insertion = "parallel"
    compose: Compose = "add"
    rank: int = 16
    scale: float | Literal["learned"] = 1.0
    bias: bool = True
    norm: Literal["none", "in", "out"] = "none"
    dropout: float = 0.0
    init: Literal["lora", "bert"] = "lora"
    std: float = 0.02
    mlp: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    method: str = "HiddenDelta"


def draw(down: Tensor, up: Tensor, options: HiddenDeltaOptions) -> None:
    """Starting values: ``"lora"`` is the identity, ``"bert"`` is not."""
    with torch.no_grad():
        if options.init == "lora":
            bound = math.sqrt(1 / down.shape[-1])  # kaiming_uniform_ with a = sqrt(5), also for three axes
            down.uniform_(-bound, bound)
            up.zero_()
        else:
            down.normal_(std=options.std)
            up.normal_(std=options.std)
