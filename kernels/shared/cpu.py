"""Shared weights on CPU: gathered in one pass over memory, gradients added up, without an index or a sign.

A fold is a row of rotated copies: its slots are consecutive, so both directions move contiguous memory.
Gathers are split over threads by weights. Sums of a fold are split by slots, each slot's terms in the order
of the segments; those of other mappings are taken in the order of the weights, by one thread. So neither
shows how many threads there were.
"""
# Numba's functions have no types that a checker could follow.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import ctypes
import functools
import struct
from enum import IntEnum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from optx.kernels import cpu
from optx.kernels.generated import load_loops, source
from optx.kernels.shared.mapping import Place

CHUNK = 1 << 15  # weights that a thread gathers at a time
SPAN = 1 << 12  # slots that it adds up at a time: they stay in the nearest cache
_PACKAGE = "optx.kernels.shared"


class Args(IntEnum):
    """Positions in the argument block, in units of 8 bytes."""

    NEXT = 0  # atomic counter
    NUMEL = 1
    OFFSET = 2
    SLOTS = 3
    SLOTS_KEY = 4
    SIGNS_KEY = 5
    SCALE = 6  # float64
    SHORT = 7  # address: of the array, or of its sums
    LONG = 8  # address: of the weights, or of their gradients
    SIGNED = 9
    COLS = 10
    TALL = 11
    WIDE = 12


def gather(psi: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """scale * sign * psi[slot], (numel,), rounded once.

    Args:
        psi: (m,), contiguous, float32 or float64, on the CPU.
        place: the module's.
        dtype: any float.
    """
    made = torch.empty(place.numel, dtype=dtype)
    _run("gather", psi, made, place, True)
    return made


def scatter(values: Tensor, place: Place, dtype: torch.dtype, signed: bool = True) -> Tensor:
    """Per slot the sum of scale * sign * value, (m,).

    Args:
        values: (numel,), contiguous, any float dtype, on the CPU.
        place: the module's.
        dtype: of the sums; float32 or float64.
        signed: False leaves signs out.
    """
    made = torch.empty(place.slots, dtype=dtype)
    _run("scatter", made, values, place, signed)
    return made


def _run(name: str, short: Tensor, long: Tensor, place: Place, signed: bool) -> None:
    kernel, template = _prepared(name, short.dtype, long.dtype, place, signed)
    block = _Block.from_buffer_copy(template)
    block[Args.SHORT], block[Args.LONG] = short.data_ptr(), long.data_ptr()
    cpu.run(kernel, ctypes.addressof(block), parallel=place.numel > 2 * CHUNK)


_Block: Any = ctypes.c_int64 * len(Args)


@functools.lru_cache(4096)
def _prepared(
    name: str, short: torch.dtype, long: torch.dtype, place: Place, signed: bool
) -> tuple[int, bytes]:
    """A kernel's address, and its argument block without the arrays': a small layer's call is as short."""
    block = _Block(
        *(0, place.numel, place.offset, place.slots, place.slots_key, place.signs_key),
        struct.unpack("q", struct.pack("d", place.scale))[0],
        *(0, 0, int(signed), place.cols, place.tall, place.wide),
    )
    return vars(_compiled(place.mapping, _name(short), _name(long)))[name].address, bytes(block)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _compiled(mapping: str, short: str, long: str) -> ModuleType:
    """The loops for a mapping and two dtypes, compiled, from the disk cache where they were before."""
    imported = cpu.digest() + "".join(source(_PACKAGE, file) for file in ("cpu.py", "lanes.py"))
    file = f"{mapping}_loops.py"
    return load_loops(f"shared_{mapping}", _PACKAGE, file, imported, SHORT=short, LONG=long)
