"""What a merging method is, what it is given (what several models changed, read by pieces), what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from optx._buffers import PIECE
from optx._safetensors import Entry

Progress = Callable[[Iterable[str]], Iterable[str]]
Read = Callable[[int, int], Sequence[Tensor]]
"""Each model's change of one tensor, from one place to another, flat."""
Combine = Callable[[str, Sequence[Tensor]], Tensor]
Raw = Callable[[int, int], tuple[Tensor, list[Tensor]]]
"""The numbers of the base's tensor and of each model's, from one place to another, flat."""
OfPiece = Callable[[Sequence[Tensor], int], Tensor]
"""Merges flat pieces, one per model, that begin at a place. Two threads may call it at once."""


class Changes:
    """What each model changed, by name: one tensor per model, float32 (float64 for such weights).

    Iterating over it is one pass over all the models' numbers, a tensor at a time; `pieces` is one in which
    a few megabytes are in memory.

    Attributes:
        entries: shape by name.
        models: how many there are.
        numel: numbers of one model.
        raw: by name, what reads the numbers that the changes are of; None where they are taken otherwise.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        models: int,
        reader: Callable[[str], Read],
        progress: Progress = lambda names: names,
        raw: Callable[[str], Raw | None] = lambda _name: None,
        in_memory: bool = False,
    ) -> None:
        self.entries, self.models, self.raw, self._in_memory = dict(entries), models, raw, in_memory
        self.numel = sum(entry.numel for entry in self.entries.values())
        self._reader, self._progress = reader, progress

    def __iter__(self) -> Iterator[tuple[str, Sequence[Tensor]]]:
        for name in self._progress(list(self.entries)):
            entry = self.entries[name]
            yield name, [t.view(entry.shape) for t in self._reader(name)(0, entry.numel)]

    def pieces(self) -> Iterator[tuple[str, int, Sequence[Tensor]]]:
        """Name, place of the first number, and each model's flat piece: `PIECE` numbers, or what is left."""
        for name in self._progress(list(self.entries)):
            read, numel = self._reader(name), self.entries[name].numel
            for begin in range(0, numel, PIECE):
                yield name, begin, read(begin, min(begin + PIECE, numel))

    def only(self, name: str) -> Changes:
        """Those of one tensor, as if it were the whole model."""
        mine = {name: self.entries[name]}
        return Changes(mine, self.models, self._reader, raw=self.raw, in_memory=self._in_memory)

    @property
    def step(self) -> int:
        """How many of a tensor's numbers are read at once by `raw`: all, where they are in memory already."""
        return max(PIECE, self.numel) if self._in_memory else PIECE


@dataclass(frozen=True)
class ByPieces:
    """A `Combine` that `optx.merge` may hand flat pieces, because it works entry by entry.

    Attributes:
        of: by name, what merges a tensor's pieces. It is asked once per tensor, before the first piece, and
            can look at all of the tensor's changes then.
    """

    of: Callable[[str], OfPiece]

    def __call__(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """A whole tensor."""
        return self.of(name)([tensor.reshape(-1) for tensor in tensors], 0).view(tensors[0].shape)


class MergeMethod(ABC):
    """How several changes of a model become one.

    A method of your own is a class with `prepare`. Make it a dataclass: its ``repr`` names the computation,
    by which an interrupted merge knows what it was doing.

    Attributes:
        passes: how often `prepare` goes over all tensors at most, for progress bars.

    Example:
        >>> import torch, optx
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Largest(optx.MergeMethod):
        ...     def prepare(self, changes):
        ...         return lambda name, tensors: max(tensors, key=lambda t: float(t.norm()))
        >>> base = {"w": torch.zeros(2)}
        >>> optx.merge(base, [{"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}], Largest())["w"]
        tensor([3., 3.])
    """

    passes: int = 0

    @abstractmethod
    def prepare(self, changes: Changes) -> Combine:
        """Look at all changes, where the method needs that, and give what merges one tensor.

        Args:
            changes: of the whole model; iterating is a pass over every tensor of every model.

        Returns:
            A function of a tensor's name and its changes, one per model, not to be written to. It gives the
            merged change, in memory of its own. Whole tensors are in memory then; a method that works entry
            by entry saves that by giving an `optx.delta.merge.ByPieces`.
        """

    def mark(self) -> str:
        """All that the result depends on beside the models; an interrupted merge goes on under the same."""
        return repr(self)
