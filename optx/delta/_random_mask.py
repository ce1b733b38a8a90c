"""Random masks that depend on a seed, a tensor's name and an element's index, and on nothing else.

Element i of a tensor is kept if SplitMix64's output number i of the tensor's own stream is below the share to
keep. So any piece can be made at any time, by any thread, on any device, with the same result.

Source of the generator: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from optx._buffers import empty
from optx.delta._float32_sums import difference, narrow, wide
from optx.kernels.available import why_unavailable

_SPAN = 1 << 63
_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _loops() -> ModuleType | None:
    """The compiled loops; None where torch's operations have to give the same."""
    return _compiled() if why_unavailable("numba") is None else None


@functools.cache
def _compiled() -> ModuleType:
    from optx.kernels.generated import load_module, source

    return load_module("delta_mask", source("optx.delta", "_random_mask_loops.py"))


@dataclass(frozen=True)
class Dropout:
    """Drops a share of one tensor's elements and divides the others by q.

    Attributes:
        key: of the tensor's stream; see `key_of`.
        p: share DROPPED.
        q: what the kept ones are divided by.
    """

    key: int
    p: float
    q: float

    @property
    def threshold(self) -> int:
        """The share kept, in units of 2**-63."""
        return round((1.0 - self.p) * _SPAN)

    def keep(self, begin: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Which of ``count`` elements from ``begin`` on are kept; bool, flat."""
        if torch.device(device).type != "cpu" or (loops := _loops()) is None:
            return keep_torch(self.key, self.threshold, begin, count, device)
        out = torch.empty(count, dtype=torch.bool)
        loops.keep(out.numpy(), *self._numbers(begin))
        return out

    def scale(self, change: Tensor, begin: int = 0) -> Tensor:
        """A copy with the kept ones over q, the others 0. The first element of ``change`` is ``begin``."""
        change = change.clone(memory_format=torch.contiguous_format)
        flat = change.view(-1)
        loops = _loops() if flat.device.type == "cpu" else None
        if loops is not None and flat.dtype in (torch.float32, torch.float64):
            numbers = flat.numpy()
            loops.scale(numbers, *self._numbers(begin), numbers.dtype.type(self.q))
        else:
            kept = self.keep(begin, flat.numel(), flat.device)
            flat.div_(self.q).masked_fill_(~kept, 0)
        return change

    def onto(self, base: Tensor, old: Tensor, new: Tensor, begin: int) -> Tensor:
        """base + kept (new - old) / q in the dtype of the base, for flat pieces that begin at ``begin``.

        With q = 1 the kept elements are those of ``new`` bit for bit, wherever ``base`` equals ``old``.
        """
        together = {(t.dtype, t.device.type) for t in (base, old, new)}
        loops = _loops()
        if loops is not None and together == {(torch.float32, "cpu")}:
            out = empty(base.numel(), base.dtype)
            arrays = (t.numpy() for t in (base, old, new, out))
            loops.onto_f32(*arrays, *self._numbers(begin), np.float32(self.q))
            return out
        if loops is not None and together == {(torch.bfloat16, "cpu")}:
            out = empty(base.numel(), base.dtype)
            arrays = (t.view(torch.uint16).numpy() for t in (base, old, new, out))
            loops.onto_bf16(*arrays, *self._numbers(begin), np.float32(self.q))
            return out
        return self._onto_torch(base, old.to(base.device), new.to(base.device), begin)

    def _onto_torch(self, base: Tensor, old: Tensor, new: Tensor, begin: int) -> Tensor:
        kept = self.keep(begin, base.numel(), base.device)
        change = difference(old, new).div_(self.q)
        sum_dtype = wide(base.dtype, change.dtype)
        moved = narrow(base.to(sum_dtype) + change, base.dtype)
        if self.q == 1.0:
            same = base.to(sum_dtype) == old.to(sum_dtype)
            moved = torch.where(same, narrow(new.to(sum_dtype), base.dtype), moved)
        return torch.where(kept, moved, base)

    def _numbers(self, begin: int) -> tuple[np.uint64, np.uint64, np.uint64]:
        return np.uint64(begin), np.uint64(self.key), np.uint64(self.threshold)


NOTHING = Dropout(0, 0.0, 1.0)
"""Keeps everything as it is."""


def key_of(seed: int, name: str) -> int:
    """64 bits that begin a tensor's stream."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def keep_torch(key: int, threshold: int, begin: int, count: int, device: torch.device | str) -> Tensor:
    """What the compiled loop gives, by torch's operations: for tensors on other devices."""
    if threshold >= _SPAN:
        return torch.ones(count, dtype=torch.bool, device=device)
    index = torch.arange(begin, begin + count, dtype=torch.int64, device=device)
    z = index * _signed(_STEP) + _signed(key)  # int64 wraps as uint64 does
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _shifted(z, shift)) * _signed(multiplier)
    return _shifted(z ^ _shifted(z, 31), 1) < threshold


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= _SPAN else bits


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def ranks(seed: int, name: str, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """A random order of 0 .. count-1, from the tensor's own stream."""
    index = np.arange(count, dtype=np.uint64)
    z = np.uint64(key_of(seed, name)) + index * np.uint64(_STEP)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
