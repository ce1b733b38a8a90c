"""What a batch of self-tuning networks takes: perturbations, of a stream of their own, and weights at rest.

Source: STN, arXiv 1903.03088, algorithm 1: epsilon ~ N(0, I), a row for each example.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optx._errors import OptxError, as_whole
from optx.inject._nested import tensors_in

_MIX = 0x9E3779B97F4A7C15
"""An odd number that keeps the streams of two seeds apart, the golden ratio's in 64 bits."""


def key_of(seed: int, number: int) -> int:
    """What starts the stream of a seed's so many-th draw."""
    return (seed * _MIX + number) % 2**63


def noise(seed: int, number: int, rows: int | None, common: Sequence[bool]) -> Tensor:
    """Standard normal perturbations of one batch, (rows, H), or (1, H) if its examples share them.

    They depend on the seed and the batch's number alone, so that no other stream is touched and the number is
    all of the state. Of several processes each has rows of its own, of the batch that they have together.

    Args:
        seed: of the run.
        number: of the batch.
        rows: in this process; None: one for all examples of all processes.
        common: which columns have one number for all examples.
    """
    ranks, rank = world()
    generator = torch.Generator().manual_seed(key_of(seed, number))
    every = torch.randn((ranks * rows if rows else 1), len(common), generator=generator)
    every = torch.where(torch.tensor(common), every[:1], every)
    return every[rank * rows : (rank + 1) * rows] if rows else every


def world() -> tuple[int, int]:
    """How many processes there are, and which this is."""
    if not dist.is_available() or not dist.is_initialized():
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


def averaged(t: Tensor) -> Tensor:
    """Over all processes, in one collective."""
    ranks, _ = world()
    if ranks == 1:
        return t
    t = t.contiguous()
    dist.all_reduce(t)
    return t / ranks


@contextmanager
def resting(parameters: Sequence[nn.Parameter]) -> Generator[None]:
    """Without a gradient for that time."""
    learning = [p for p in parameters if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def rows_of(batch: Any, axis: int | None, doing: str) -> int:
    """How many examples a batch has.

    Raises:
        OptxError: it doesn't say, or says two numbers; or ``axis`` is not the first, and no number is given.
    """
    if (number := as_whole(batch)) is not None and number > 0:
        return number
    if axis:  # the first axis of some tensors is time, and of others (labels) examples
        raise OptxError(
            f"{doing}: with batch_axis={axis} pass the number of examples; a batch does not say which of its "
            "tensors have time first."
        )
    found = {t.shape[0] for t in tensors_in(batch) if t.ndim}
    if len(found) != 1 or 0 in found:
        raise OptxError(
            f"{doing}: the batch has to say how many examples it has, by the first axis of its tensors; "
            f"found {sorted(found) or 'none'}. Pass the number, or use optx.STN(..., shared=True)."
        )
    return found.pop()
