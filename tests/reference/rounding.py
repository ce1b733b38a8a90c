"""The spacing of floating point numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
_LOWEST = {torch.float64: -1022, torch.float32: -126, torch.float16: -14, torch.bfloat16: -126}


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of ``dtype`` around each (float64) ``x``: one ulp."""
    exponent = torch.frexp(x.double().abs()).exponent - 1
    exponent = torch.where(x == 0, _LOWEST[dtype], exponent.clamp(min=_LOWEST[dtype]))
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - _BITS[dtype])
