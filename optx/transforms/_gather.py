"""Numbers of a tensor at the entries of a mask, and back, by rows whatever the order in memory.

torch's own indexing by a mask makes a list of 64-bit places first: on a CPU it takes five times as long as
NumPy's, and for a fifth of the entries as much memory again as the tensor. NumPy's takes 14 times as long as
the kernel, which reads packed bits as they are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from optx._errors import ShapeError
from optx._mask_bits import ones, unpack
from optx.kernels.available import why_unavailable
from optx.step.memory import DTYPES, why_not_plain

SMALLEST = 1 << 12
"""Entries of a tensor for the kernel; below, NumPy is as fast, and Numba takes a second to load."""


class Selection:
    """Some of the entries of tensors of one shape.

    It has the mask as it is kept, and not the weight: a gradient has one, and would keep its weight alive
    where Python can't see it.

    Args:
        kept: a settled slot (`optx.step.bits`), or a bool tensor of the shape.
        shape: of the weight.
    """

    __slots__ = ("kept", "shape")

    def __init__(self, kept: Tensor, shape: torch.Size) -> None:
        self.kept, self.shape = kept, shape

    def mask(self) -> Tensor:
        """A bool tensor of the shape."""
        if self.kept.dtype == torch.bool and self.kept.shape == self.shape:
            return self.kept
        if not self.kept.ndim:
            return torch.ones(self.shape, dtype=torch.bool, device=self.kept.device)
        return unpack(self.kept, self.shape)

    def count(self) -> int:
        """How many entries."""
        return ones(self.kept) if self._is_bits() else int(self.mask().sum())

    def gathered(self, t: Tensor) -> Tensor:
        """The numbers there; one dimension, a copy."""
        if self._in_kernel(t):
            return _kernel().gather(t.detach(), self.kept)
        if _in_numpy(t):
            return torch.from_numpy(_array(t)[self.mask().numpy()]).view(t.dtype)
        return t.detach()[self.mask()]

    def put(self, t: Tensor, values: Tensor) -> Tensor:
        """Write as many numbers there, in place; the tensor itself."""
        if not values.numel():
            return t
        if self._in_kernel(t) and values.dtype == t.dtype and _in_numpy(values):
            _kernel().scatter(t.detach(), self.kept, values.detach().contiguous())
        else:
            mask = self.mask()
            if values.numel() != int(mask.sum()):  # NumPy would repeat them, or drop some
                raise ShapeError(f"{values.numel()} numbers for the {int(mask.sum())} entries of a mask.")
            if not (_in_numpy(t) and _in_numpy(values)):
                return t.masked_scatter_(mask, values)
            np.place(_array(t), mask.numpy(), _array(values))
        torch.autograd.graph.increment_version(t)
        return t

    def _is_bits(self) -> bool:
        return self.kept.ndim > 0 and self.kept.dtype == torch.uint8

    def _in_kernel(self, t: Tensor) -> bool:
        """Whether the kernel reads these tensors: elements and mask one after another, in the same order."""
        return (
            t.numel() >= SMALLEST
            and t.dtype in DTYPES
            and _in_numpy(t)
            and _in_numpy(self.kept)
            and t.is_contiguous()
            and self.kept.is_contiguous()
            and (self._is_bits() or self.kept.shape == t.shape)
            and why_unavailable("numba") is None
        )


def _kernel() -> Any:
    from optx.kernels.entries import cpu

    return cpu


def _in_numpy(t: Tensor) -> bool:
    return t.device.type == "cpu" and why_not_plain(t) is None


def _array(t: Tensor) -> Any:
    """The same memory; numbers of 16 bits, of which NumPy has no bfloat16, as integers."""
    t = t.detach()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()
