"""One tensor of a merge's result: what it is made of, read by pieces or whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optx._buffers import PIECE
from optx._errors import OptxError
from optx._safetensors import Entry
from optx.delta._merge_method import Changes
from optx.delta._merge_settings import Table

Read = Callable[[int, int], Tensor]
"""The numbers of one tensor from one place to another, flat; not to be written to."""
Made = Tensor | Read
"""A tensor, or what gives its pieces; two threads may ask for pieces at once."""


@dataclass(frozen=True)
class Group:
    """The tensors that one tensor of the result is made of, in one dtype.

    Attributes:
        name: of the result's tensor.
        shape: of each.
        dtype: that they are read in, and computed in where the method has no other.
        labels: the models, for messages.
        readers: what reads each.
        base: place of the base among them; None: there is none.
        shared: the method's parameters.
        each: those that each model has of its own.
        seed: of random masks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    labels: Sequence[str]
    readers: Sequence[Read]
    base: int | None
    shared: Table
    each: Sequence[Table]
    seed: int = 0

    @property
    def entry(self) -> Entry:
        """Shape and dtype."""
        return Entry(self.shape, self.dtype)

    @property
    def others(self) -> list[int]:
        """The places of all but the base."""
        return [i for i in range(len(self.readers)) if i != self.base]

    def piece(self, i: int, begin: int, end: int) -> Tensor:
        """Some numbers of one model's tensor, flat."""
        return self.readers[i](begin, end).to(self.dtype)

    def whole(self, i: int) -> Tensor:
        """One model's tensor."""
        return self.piece(i, 0, self.entry.numel).view(self.shape)

    def of_base(self, begin: int, end: int) -> Tensor:
        """Some numbers of the base's tensor."""
        assert self.base is not None, self.name
        return self.piece(self.base, begin, end)

    def values(self, key: str) -> list[float]:
        """A parameter of all models but the base."""
        return [self.each[i][key] for i in self.others]

    def changes(
        self, begin: int, end: int, base: Tensor | None = None, only: int | None = None
    ) -> list[Tensor]:
        """What each model but the base changed, or only one of them, rounded to the group's dtype, flat.

        Raises:
            OptxError: one is not finite. (Where model and base are both the same infinity, it is 0.)
        """
        before = self.of_base(begin, end) if base is None else base
        found = list[Tensor]()
        for i in self.others if only is None else [self.others[only]]:
            after = self.piece(i, begin, end)
            change = after - before
            if not is_finite(change):
                change = change.masked_fill(after == before, 0)
                if not is_finite(change):
                    raise OptxError(
                        f"merge: the change of {self.name!r} in {self.labels[i]!r} is not finite in "
                        f"{str(self.dtype).removeprefix('torch.')}. Mend that model, or give another dtype."
                    )
            found.append(change)
        return found

    def as_changes(self) -> Changes:
        """The same for methods that want to look at all of them."""
        entry = Entry(self.shape, torch.float32)
        return Changes({self.name: entry}, len(self.others), lambda _: self.changes)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are."""
    if tensor.dtype.itemsize == 1:  # torch does nothing with floats of 8 bits but convert them
        tensor = tensor.float()
    # The sum of finite numbers is nearly always finite, and costs no memory.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def finished(group: Group, made: Made, dtype: torch.dtype) -> Made:
    """The same in the result's dtype; it is finite, or says where not.

    Where all models have one and the same infinity, as in a mask, the result has it too.
    """
    if isinstance(made, Tensor):
        whole = made.reshape(-1)
        return _checked(group, whole, dtype, 0, whole.numel()).view(group.shape)
    read = made
    return lambda begin, end: _checked(group, read(begin, end), dtype, begin, end)


def _checked(group: Group, made: Tensor, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    result = made.to(dtype)
    if is_finite(result):
        return result
    wide = torch.promote_types(group.dtype, torch.float32) if group.dtype.itemsize > 1 else torch.float32
    first, *rest = (group.piece(i, begin, end).to(wide) for i in range(len(group.readers)))
    result = result.to(wide)
    same = torch.ones_like(first, dtype=torch.bool)
    for other in rest:
        same &= other == first
    endless = first.isinf()
    # An infinite norm makes the other numbers nan: where all models have one number, that is the result.
    mended = same & (endless | (result.isnan() & endless.any()))
    result = torch.where(mended, first, result)
    if not bool((result.isfinite() | mended).all()):
        why = "is too large for" if is_finite(made) else "is not finite in"
        raise OptxError(
            f"merge: the result of {group.name!r} {why} {str(dtype).removeprefix('torch.')}. Look at the "
            "models' numbers and weights, or give a wider dtype and out_dtype."
        )
    return result.to(dtype)


def pieces_of(numel: int) -> list[tuple[int, int]]:
    """Where the pieces of a tensor begin and end."""
    return [(begin, min(begin + PIECE, numel)) for begin in range(0, numel, PIECE)]
