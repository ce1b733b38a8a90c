"""A difference of two checkpoints, read tensor by tensor when it is asked for, and its arithmetic.

Source: task vectors, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optx._errors import OptxError, ShapeError, near
from optx._safetensors import Entry
from optx.delta._checkpoint_source import Source
from optx.delta._content import Watched
from optx.delta._float32_sums import total
from optx.delta._name_filter import chooser
from optx.delta._one_pass import OnePass
from optx.delta._options import finite_number

if TYPE_CHECKING:
    from typing_extensions import Self

Read = Callable[[str], Tensor]
"""A tensor's change by its name."""
Piece = Callable[[str, int, int], Tensor]
"""The same from one place to another, flat."""


class Difference:
    """What `optx.Delta` is, without what is done with it: what works on deltas knows it by this class.

    Attributes:
        entries: shape and dtype by name.
        fingerprints: of the first numbers of the base's tensors, by which most others are told at once.
        contents: hashes of the base's whole tensors, where they are known: see `content`.
        bases: what it is taken from, where that is at hand.
        whole: names of floating tensors that are no change, but are taken from the tuned model as they are.
        recipe: plain values that say what it is.
        tied: names that are another's tensor.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        read: Read,
        *,
        recipe: tuple[Any, ...],
        fingerprints: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        piece: Piece | None = None,
        whole: Collection[str] = (),
        contents: Mapping[str, str] | None = None,
        bases: Sequence[Watched] = (),
    ) -> None:
        self.entries = dict(entries)
        self._read = read
        self.recipe = recipe
        self.fingerprints = dict(fingerprints or {})
        self.tied = dict(tied or {})
        self._piece = piece
        self._one_pass: OnePass | None = None
        self._tuned: Source | None = None
        self.whole = frozenset(whole)
        self.contents = dict(contents or {})
        self.bases = tuple(bases)

    # ---- looking at it ------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """The change of one tensor."""
        if name not in self.entries:
            raise KeyError(f"the delta has no {name!r}. {near(name, self.entries)}")
        return self._read(name)

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """What gives the change of a tensor from one place to another, flat, in little memory if it can."""
        if self._piece is not None:
            return partial(self._piece, name)
        whole = self[name].reshape(-1)
        return lambda begin, end: whole[begin:end]

    @property
    def by_pieces(self) -> bool:
        """Whether `reader` takes the memory of a piece."""
        return self._piece is not None

    @property
    def one_pass(self) -> OnePass | None:
        """What makes base plus change at once, if it can be."""
        return self._one_pass

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and changes, one tensor at a time."""
        for name in self.entries:
            yield name, self._read(name)

    def __repr__(self) -> str:
        numbers = sum(entry.numel for entry in self.entries.values())
        return f"<Delta of {len(self)} tensors, {numbers:,} numbers>"

    @property
    def floating(self) -> list[str]:
        """Names of the tensors that have a difference."""
        return [
            name
            for name, entry in self.entries.items()
            if entry.dtype.is_floating_point and name not in self.whole
        ]

    def content(self, name: str) -> str | None:
        """The hash of a whole tensor of the base; None where that is not known, or not all read yet."""
        found = (base.print_of(name) for base in self.bases)
        return self.contents.get(name) or next(filter(None, found), None)

    # ---- arithmetic ---------------------------------------------------------------------------------

    def map(self, change: Callable[[str, Tensor], Tensor], recipe: tuple[Any, ...]) -> Self:
        """Each floating tensor changed by a function of its name and itself.

        Args:
            change: must give the same shape, and the same result whenever it is called.
            recipe: plain values that say what it does, so that an interrupted `apply` can be gone on with.
        """

        def read(name: str) -> Tensor:
            tensor = self._read(name)
            return change(name, tensor) if tensor.is_floating_point() and name not in whole else tensor

        whole = self.whole
        return self._with(read, (*recipe, self.recipe))

    def _elementwise(self, change: Callable[[str, Tensor, int], Tensor], recipe: tuple[Any, ...]) -> Self:
        """`map` for what can be done by pieces: ``change`` is given where its piece begins."""
        made = self.map(lambda name, tensor: change(name, tensor, 0), recipe)
        if (inner := self._piece) is not None:
            whole = self.whole

            def piece(name: str, begin: int, end: int) -> Tensor:
                flat = inner(name, begin, end)
                return flat if name in whole else change(name, flat, begin)

            made._piece = piece
        return made

    def subset(self, include: str | None = None, exclude: str | None = None) -> Self:
        """Only the tensors whose whole name matches ``include`` and not ``exclude`` (regexes)."""
        keep = chooser(include, exclude)
        entries = {name: entry for name, entry in self.entries.items() if keep(name)}
        if not entries:
            raise OptxError(f"Delta.subset: include={include!r} and exclude={exclude!r} leave nothing.")
        made = self._with(self._read, ("subset", include, exclude, self.recipe), self._piece)
        made.entries, made._one_pass = entries, self._one_pass
        made.whole = self.whole & entries.keys()
        return made

    def __mul__(self, factor: float) -> Self:
        times = finite_number("Delta", "the factor", factor)
        return self._elementwise(lambda _name, tensor, _begin: tensor * times, ("times", times))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        return self * (1 / divisor)

    def __neg__(self) -> Self:
        return self * -1.0

    def __add__(self, other: Self) -> Self:
        """Both changes; a tensor that one lacks is unchanged there."""
        for name in (name for name in self.entries if name in other.entries):
            if self.entries[name].shape != other.entries[name].shape:
                raise ShapeError(
                    f"Delta: {name!r} has shape {self.entries[name].shape} in one delta and "
                    f"{other.entries[name].shape} in the other."
                )
            theirs = other.fingerprints.get(name)
            if theirs is not None and self.fingerprints.get(name, theirs) != theirs:
                raise OptxError(f"Delta: the two are of different bases; they differ at {name!r}.")
            known = (self.content(name), other.content(name))
            if None not in known and known[0] != known[1]:
                raise OptxError(f"Delta: the two are of different bases; they differ at {name!r}.")
            if (name in self.whole) != (name in other.whole):
                raise OptxError(
                    f"Delta: {name!r} is a change in one delta, and taken whole in the other. Leave it out "
                    "of one with subset(exclude=...)."
                )

        def read(name: str) -> Tensor:
            if name not in other.entries:
                return self._read(name)
            if name not in self.entries:
                return other._read(name)
            mine = self._read(name)
            # What is taken whole from one of them is no change that could be added to.
            own = not mine.is_floating_point() or name in self.whole
            return mine if own else total([mine, other._read(name)])

        made = self._with(read, ("plus", self.recipe, other.recipe))
        if self._piece is not None and other._piece is not None:
            made._piece = lambda name, begin, end: total(
                [
                    d._piece(name, begin, end)
                    for d in ((self,) if name in self.whole else (self, other))
                    if d._piece and name in d.entries
                ]
            )
        made.entries = {**other.entries, **self.entries}
        made.fingerprints = {**other.fingerprints, **self.fingerprints}
        made.contents = {**other.contents, **self.contents}
        made.whole = self.whole | (other.whole - self.entries.keys())
        made.bases = (*self.bases, *(base for base in other.bases if base not in self.bases))
        return made

    def __sub__(self, other: Self) -> Self:
        return self + (-other)

    def unbound(self) -> Self:
        """The same change without knowledge of its base: applies to any model of these shapes."""
        made = self._with(self._read, self.recipe, self._piece)
        made.fingerprints, made.contents, made.bases, made._one_pass = {}, {}, (), self._one_pass
        return made

    def _with(self, read: Read, recipe: tuple[Any, ...], piece: Piece | None = None) -> Self:
        made = type(self)(
            self.entries,
            read,
            recipe=recipe,
            fingerprints=self.fingerprints,
            tied=self.tied,
            piece=piece,
            whole=self.whole,
            contents=self.contents,
            bases=self.bases,
        )
        made._tuned = self._tuned
        return made
