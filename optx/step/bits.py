"""Packed slots: one bit an element, in the form that the memory of its weight allows.

- *bits*: uint8 of (rows, bytes of a row), as in `optx._mask_bits`. In a weight whose rows are multiples of 8
  long and lie one after another, element ``i`` in memory is bit ``i % 8`` of byte ``i // 8``. The bits are
  sharded as the weight is, over its first dimension.
- *bytes*: bool of the weight's shape, for every other weight: odd rows, another memory order, shards over
  another dimension. A byte an element: 8 times the memory, and to an AdamW step in float32, of 28 bytes, it
  adds one where bits add an eighth.
- *all*: one number, where every bit is 1. It is not read at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from optx._errors import ShapeError
from optx._mask_bits import layout, pack, packed_shape, unpack
from optx._names import is_dtensor, placed_like, whole

Form = Literal["bits", "bool", "ones"]  # as kernels call them


def packs(p: Tensor) -> bool:
    """Whether a weight's bits are kept packed."""
    if not p.numel() or not p.ndim or layout(p.shape)[1] % 8 or not p.is_contiguous():
        return False
    if not is_dtensor(p):
        return True
    return all(type(one).__name__ == "Replicate" or _by_rows(one) for one in p.placements)  # type: ignore[attr-defined]


def _by_rows(placement: object) -> bool:
    # By its name: one of a subclass (strided) has its rows in another order.
    return type(placement).__name__ == "Shard" and getattr(placement, "dim", None) == 0


def every_bit(p: Tensor) -> Tensor:
    """The slot of a weight whose bits are all 1."""
    return torch.ones((), dtype=torch.uint8, device=p.device)


def form(t: Tensor, p: Tensor) -> Form:
    """The form of a settled slot."""
    return "ones" if t.ndim == 0 and p.ndim else "bool" if t.dtype == torch.bool else "bits"


def fits(shape: torch.Size, p: Tensor) -> bool:
    """Whether a tensor of this shape may be the slot of a weight."""
    return not shape or shape in (p.shape, torch.Size(packed_shape(p.shape)))


def settled(t: Tensor, p: Tensor) -> Tensor:
    """A slot in the form that its weight asks for; itself where it has that already.

    Args:
        t: in any form, also in another dtype (a checkpoint that went through an optimizer without us).
        p: the weight.

    Raises:
        ShapeError: it has the shape of no form.
    """
    if not fits(t.shape, p):
        raise ShapeError(
            f"a mask of shape {tuple(t.shape)}; it must have the weight's {tuple(p.shape)}, or, packed, "
            f"{packed_shape(p.shape)}."
        )
    wanted = packs(p)
    if t.shape == p.shape:
        mask = _placed(t if t.dtype == torch.bool else t != 0, p)
        return _locally(mask, p, pack, packed_shape(p.shape)) if wanted else mask
    if t.ndim == 0:
        return t if t.dtype == torch.uint8 else t.to(torch.uint8)
    bits = t if t.dtype == torch.uint8 else t.to(torch.uint8)
    if wanted:
        return _placed(bits, p)
    if is_dtensor(bits):
        bits = bits.full_tensor()  # type: ignore[attr-defined]  # p was sharded otherwise since
    return _placed(unpack(bits, p.shape), p)


def mask_of(t: Tensor, p: Tensor) -> Tensor:
    """The bool tensor of the weight's shape, laid out over its mesh, that a settled slot stands for."""
    match form(t, p):
        case "bool":
            return t
        case "ones":
            return torch.ones_like(p, dtype=torch.bool, requires_grad=False)
        case _:
            local = p.to_local().shape if is_dtensor(p) else p.shape  # type: ignore[attr-defined]
            return _locally(t, p, lambda bits: unpack(bits, local), p.shape)


def share_of_ones(slots: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Which share of elements has a 1, in all slots (of the weights beside them) together; None of none.

    Of shards it is completed over their mesh, so all ranks must ask.
    """
    pairs = list(slots)
    counts = [float(whole(mask_of(t, p).sum())) for t, p in pairs]
    total = sum(p.numel() for _, p in pairs)
    return sum(counts) / total if total else None


def piece(t: Tensor, start: int, count: int) -> Tensor:
    """Some elements of packed bits, from a multiple of 8 on, in memory order: flat, bool."""
    return unpack(t.view(1, -1)[:, start // 8 : -(-(start + count) // 8)], (1, count)).view(-1)


def _placed(t: Tensor, p: Tensor) -> Tensor:
    """On its weight's mesh and device: of whole tensors each process takes its rows."""
    if not is_dtensor(p):
        return (t.full_tensor() if is_dtensor(t) else t).to(p.device)  # type: ignore[attr-defined]
    if is_dtensor(t):
        return t if t.placements == p.placements else t.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    if t.shape == p.shape:
        return placed_like(t, p)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)  # type: ignore[attr-defined]


def _locally(t: Tensor, p: Tensor, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """What ``change`` makes of a tensor, or of each process's part of one that is sharded as its weight."""
    if not is_dtensor(t):
        return change(t)
    from torch.distributed.tensor import DTensor

    spread: Any = p
    whole = torch.Size(shape)
    made = change(t.to_local())  # type: ignore[attr-defined]
    stride = torch.empty(whole, device="meta").stride()
    mesh, placements = spread.device_mesh, spread.placements
    return DTensor.from_local(made, mesh, placements, run_check=False, shape=whole, stride=stride)


class Packed:
    """A settled slot with its weight, as torch's operations read it: unpacked a piece at a time.

    It has what `GroupRun` asks of a tensor whose elements it reads.
    """

    dtype = torch.bool

    def __init__(self, t: Tensor, p: Tensor) -> None:
        self._t, self._p = t, p
        self._form = form(t, p)

    def numel(self) -> int:
        """How many elements the weight has."""
        return self._p.numel()

    def is_contiguous(self) -> bool:
        """Whether pieces in memory order are pieces of a contiguous weight."""
        return self._form != "bool" or self._t.is_contiguous()

    def to(self, dtype: torch.dtype) -> Tensor:
        """All elements, in the weight's shape."""
        if self._form == "ones" and not is_dtensor(self._p):
            return torch.ones((), dtype=dtype, device=self._p.device).expand(self._p.shape)
        return mask_of(self._t, self._p).to(dtype)

    def split(self, size: int) -> list[Tensor | _Piece]:
        """Flat pieces, which are unpacked when they are read."""
        if self._form == "bool":
            return list(self._t.view(-1).split(size))
        starts = range(0, self.numel(), size)
        return [_Piece(self, start, min(size, self.numel() - start)) for start in starts]

    def elements(self, start: int, count: int) -> Tensor:
        """Some of packed ones."""
        if self._form == "ones":
            return torch.ones((), dtype=torch.bool, device=self._p.device).expand(count)
        return piece(self._t, start, count)


class _Piece:
    """Elements of packed bits that nobody has read yet."""

    dtype = torch.bool

    def __init__(self, of: Packed, start: int, count: int) -> None:
        self._of, self._start, self._count = of, start, count

    def to(self, dtype: torch.dtype) -> Tensor:
        """They."""
        return self._of.elements(self._start, self._count).to(dtype)
