"""Numbers of a tensor at the entries of a mask, and back, by rows whatever the order in memory.

torch's own indexing by a mask makes a list of 64-bit places first: on a CPU it takes five times as long as
NumPy's, and for a fifth of the entries as much memory again as the tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from optx.step.memory import why_not_plain


def gathered(t: Tensor, mask: Tensor) -> Tensor:
    """The numbers where ``mask`` (bool, of its shape) holds; one dimension, a copy."""
    if _in_numpy(t):
        return torch.from_numpy(_array(t)[mask.numpy()]).view(t.dtype)
    return t.detach()[mask]


def put(t: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Write as many numbers there, in place; the tensor itself."""
    if not values.numel():
        return t
    if _in_numpy(t) and _in_numpy(values):
        np.place(_array(t), mask.numpy(), _array(values))
        torch.autograd.graph.increment_version(t)
        return t
    return t.masked_scatter_(mask, values)


def _in_numpy(t: Tensor) -> bool:
    return t.device.type == "cpu" and why_not_plain(t) is None


def _array(t: Tensor) -> Any:
    """The same memory; numbers of 16 bits, of which NumPy has no bfloat16, as integers."""
    t = t.detach()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()
