"""Memory for pieces of tensors, used again: fresh pages cost as much as what is done with them."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

PIECE = 1 << 20
"""Numbers of a tensor that are worked on at once, where a computation is element by element."""
SIZE = 1 << 22
"""Bytes of each buffer; what is larger, or so small that it wastes one, gets memory of its own."""
KEPT = 16
"""Buffers that wait for another use, at most."""
_idle: deque[_Bytes] = deque(maxlen=KEPT)  # of one too many the oldest falls out


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of unset numbers; its memory is used again once no tensor or view is left of it."""
    size = count * dtype.itemsize
    if not SIZE // 8 <= size <= SIZE:
        return torch.empty(count, dtype=dtype)
    try:
        buffer = _idle.pop()
    except IndexError:
        buffer = np.empty(SIZE, np.uint8)
    part = buffer[:size]
    # The tensor's memory refers to this very array, and so does that of its views.
    weakref.finalize(part, _idle.append, buffer).atexit = False
    return torch.from_numpy(part).view(dtype)


def release() -> None:
    """Give the system back what waits for another use."""
    _idle.clear()
