"""Whether a base is the one that a delta was taken from, by every number: hashed while it is read anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from optx._errors import OptxError
from optx._safetensors import DTYPES, NAMES, Entry
from optx.delta._checkpoint_source import Files, Memory, Source
from optx.delta._mixed_sum import MASK, mixed_sum


class Contents:
    """Sums of tensors, filled in piece by piece.

    Args:
        entries: of the tensors.
        dtypes: what their numbers are converted to before they are hashed; their own, where it has none.
    """

    def __init__(self, entries: Mapping[str, Entry], dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self._entries, self._dtypes = entries, dict(dtypes or {})
        self._sums: dict[str, dict[int, tuple[int, int]]] = {}  # by name and place: numbers and their sum

    def put(self, name: str, begin: int, flat: Tensor) -> None:
        """Take in a piece; one that is known by its place is not looked at again."""
        known = self._sums.setdefault(name, {})
        if known.get(begin, (-1, 0))[0] != len(flat):
            dtype = self._dtypes.get(name, flat.dtype)
            known[begin] = (len(flat), mixed_sum(flat if flat.dtype == dtype else flat.to(dtype), begin))

    def print_of(self, name: str) -> str | None:
        """A tensor's hash, once all of it was there: the dtype's name and 16 digits."""
        parts = self._sums.get(name, {})
        whole = self._entries[name].numel
        if sum(count for count, _ in parts.values()) != whole:
            # Read as one and by pieces too: either will do.
            parts = {0: parts[0]} if parts.get(0, (-1, 0))[0] == whole else {}
            if not parts and whole:
                return None
        dtype = self._dtypes.get(name, self._entries[name].dtype)
        return f"{NAMES[dtype]}-{sum(part for _, part in parts.values()) & MASK:016x}"


class Watched(Source):
    """A source that hashes what is read of it, while it is asked to."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.entries, self.tied = inner, inner.entries, inner.tied
        self.contents: Contents | None = None

    @property
    def label(self) -> str:
        """The source's."""
        return self.inner.label

    @property
    def state(self) -> tuple[object, ...]:
        """The source's."""
        return self.inner.state

    def read(self, name: str) -> Tensor:
        """The tensor, taken note of."""
        tensor = self.inner.read(name)
        if self.contents is not None:
            self.contents.put(name, 0, tensor.reshape(-1))
        return tensor

    def head(self, name: str, count: int) -> Tensor:
        """The source's."""
        return self.inner.head(name, count)

    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """The piece, taken note of."""
        flat = self.inner.piece(name, begin, end)
        if self.contents is not None:
            self.contents.put(name, begin, flat)
        return flat

    def watch(self) -> None:
        """Hash what is read from now on."""
        self.contents = self.contents or Contents(self.entries)

    def print_of(self, name: str) -> str | None:
        """A tensor's hash, if all of it was read since `watch`."""
        known = self.contents is not None and name in self.entries
        return self.contents.print_of(name) if known and self.contents is not None else None


class Verified(Watched):
    """A base that must be another's tensors by every number; each is compared once all of it was read.

    Args:
        inner: the base.
        wanted: asked for the hash of a name; None where it is not known, or not yet.
        dtypes: what the other's numbers are, by name.
        complaint: the error's message, with the name's place in braces.
    """

    def __init__(
        self,
        inner: Source,
        wanted: Callable[[str], str | None],
        dtypes: Mapping[str, torch.dtype],
        complaint: str,
    ) -> None:
        super().__init__(inner)
        self._wanted, self._complaint, self._names = wanted, complaint, frozenset(dtypes)
        self.contents = Contents(inner.entries, dtypes)

    def read(self, name: str) -> Tensor:
        """The tensor, compared."""
        tensor = super().read(name) if name in self._names else self.inner.read(name)
        self.compare(name)
        return tensor

    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """The piece; the tensor is compared after the last."""
        if name not in self._names:
            return self.inner.piece(name, begin, end)
        flat = super().piece(name, begin, end)
        self.compare(name)
        return flat

    def compare(self, name: str) -> None:
        """Raise if all of a tensor was read, of both, and they differ."""
        if name not in self._names:
            return
        mine, theirs = self.print_of(name), self._wanted(name)
        if mine is not None and theirs is not None and mine != theirs:
            raise OptxError(self._complaint.format(repr(name)))


def same_source(one: Source, other: Source) -> bool:
    """Whether two are the same tensors in the same place, so that nothing has to be compared."""
    one, other = (s.inner if isinstance(s, Watched) else s for s in (one, other))
    if one is other:
        return True
    if isinstance(one, Files) and isinstance(other, Files):
        return one.state == other.state
    return isinstance(one, Memory) and isinstance(other, Memory) and one.places() == other.places()


def dtype_of(print_: str) -> torch.dtype | None:
    """What a hash was made of; None if it is none of these, but of the first 256 numbers."""
    return DTYPES.get(print_.partition("-")[0]) if "-" in print_ else None
