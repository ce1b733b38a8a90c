"""Room for what functions of whole matrices are given and make: those of one shape in one stack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx._errors import ShapeError
from optx.kernels.step.program import Fill
from optx.kernels.step.tiles import matrix

MOST = 1 << 26  # elements that a function is given at once: what it makes on the way is a multiple of it


class Stacks:
    """Those of the tensors of one bucket, by function.

    Args:
        shapes: of the tensors.
        device: where they are.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], device: torch.device) -> None:
        self._device = device
        self._alike: dict[tuple[int, int], list[int]] = {}
        for i, shape in enumerate(shapes):
            rows, columns = matrix(shape)
            if rows * columns:
                self._alike.setdefault((rows, columns), []).append(i)
        self._rooms: dict[str, list[Tensor]] = {}

    def open(self, fill: Fill) -> Iterator[tuple[list[int], npt.NDArray[np.int64]]]:
        """For each shape: which tensors have it, and where a kernel is to store what they give."""
        rooms = self._rooms.get(fill.result.name)
        if rooms is None:
            dtype = getattr(torch, fill.dtype)
            shapes = [(len(members), *shape) for shape, members in self._alike.items()]
            rooms = [torch.empty(shape, dtype=dtype, device=self._device) for shape in shapes]
            self._rooms[fill.result.name] = rooms
        for members, room in zip(self._alike.values(), rooms, strict=True):
            stride = room[0].numel() * room.element_size()
            yield members, room.data_ptr() + np.arange(len(members), dtype=np.int64) * stride

    def apply(self, fill: Fill) -> None:
        """Put what the function makes in the place of what was stored.

        Raises:
            ShapeError: it makes something of another shape.
        """
        for room in self._rooms[fill.result.name]:
            whole: Any = room
            parts: Sequence[Tensor] = whole.split(max(1, MOST // room[0].numel()))
            for part in parts:
                made = fill.function(part)
                if made is not part:
                    part.copy_(_checked(fill, made, part))

    def let_go(self) -> None:
        """The step is over. On a GPU the room stays: a captured CUDA graph goes on to use it."""
        if self._device.type == "cpu":
            self._rooms.clear()


def _checked(fill: Fill, made: object, given: Tensor) -> Tensor:
    shape = tuple(made.shape) if isinstance(made, Tensor) else made
    if not isinstance(made, Tensor) or made.shape != given.shape:
        raise ShapeError(
            f"optx: {getattr(fill.function, '__name__', fill.function)} returned {shape} for matrices "
            f"{tuple(given.shape)}; it must return a tensor of their shape."
        )
    return made
