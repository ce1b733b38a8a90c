"""`Shapes`: what is width in each parameter of a model, kept in a file and checked against a model."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from optx._errors import OptxError, near
from optx.scaling import _shapes_file, _shapes_table
from optx.scaling._parameters import parameters_of
from optx.scaling._width import HeadWidth, Width

if TYPE_CHECKING:
    from rich.table import Table

Patterns = str | Sequence[str] | None


class Shapes(Mapping[str, Width]):
    """What is width in each parameter of a model; `optx.scaling.shapes` makes it.

    A mapping from parameter names to `Width`, in the model's order; it does not change after making. A tensor
    that has several names is in it once, by its first; the others lead to it too. ``print(shapes)`` shows
    the table.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, 3))
        >>> shapes = optx.scaling.shapes(make(64), base=make(16))
        >>> shapes["1.weight"].kind, shapes["1.weight"].m
        ('output', 4.0)
    """

    def __init__(
        self,
        widths: Iterable[Width],
        heads: Mapping[str, HeadWidth] | None = None,
        readouts: Mapping[str, float] | None = None,
    ) -> None:
        self._widths = {width.name: width for width in widths}
        self._first = {other: width.name for width in self._widths.values() for other in width.tied}
        self._heads = dict(heads or {})
        self._readouts = dict(readouts or {})
        self._model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}  # a copy's model is another

    @property
    def model(self) -> nn.Module | None:
        """The module that these were made of, while there is one; not kept alive, nor in a file."""
        return self._model and self._model()

    def made_of(self, model: object) -> Shapes:
        """Remember what they were made of, if that is a module; returns itself."""
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else None
        return self

    def __getitem__(self, name: str) -> Width:
        return self._widths[self._first.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Shapes):
            return NotImplemented
        mine, theirs = ([*one._widths.values(), one._heads, one._readouts] for one in (self, other))
        return mine == theirs

    def __hash__(self) -> int:
        return hash(tuple(self._widths.values()))

    def __repr__(self) -> str:
        return _shapes_table.text(list(self._widths.values()))

    @property
    def heads(self) -> Mapping[str, HeadWidth]:
        """The widths of attention's heads, by the attention module's path."""
        return dict(self._heads)

    @property
    def readouts(self) -> Mapping[str, float]:
        """By path of a head, what its model multiplies its input with besides, relative to base (T5's)."""
        return dict(self._readouts)

    def set(
        self,
        *,
        matrix: Patterns = None,
        input: Patterns = None,
        vector: Patterns = None,
        output: Patterns = None,
        scalar: Patterns = None,
        turned: Patterns = None,
    ) -> Shapes:
        """New shapes, with some parameters of another kind.

        Args:
            matrix: a regex, or a list of them, of which one matches the whole name of each parameter that
                is hidden.
            input: the same for what reads the input: embeddings, first layers, position tables.
            vector: for biases and gains.
            output: for what reads out.
            scalar: for what has no width.
            turned: for weights that are stored as (in, out) and were taken for (out, in), or the reverse.

        Raises:
            OptxError: a regex matches no parameter, or a parameter is given two kinds.
        """
        kinds = {"matrix": matrix, "input": input, "vector": vector, "output": output, "scalar": scalar}
        new, given = dict(self._widths), dict[str, str]()
        for name in self._matching(turned, "turned"):
            new[name] = new[name].turned()
        for kind, patterns in kinds.items():
            for name in self._matching(patterns, kind):
                if given.setdefault(name, kind) != kind:
                    raise OptxError(
                        f"Shapes.set: {name!r} is both {given[name]}= and {kind}=; it can be of one kind."
                    )
                new[name] = new[name].of_kind(kind)
        return Shapes(new.values(), self._heads, self._readouts).made_of(self.model)

    def _matching(self, patterns: Patterns, argument: str) -> Iterator[str]:
        listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
        for pattern in listed:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise OptxError(
                    f"Shapes.set: {argument}={pattern!r} is not a regular expression ({error})."
                ) from None
            names = [name for name, width in self._widths.items() if _any_name(compiled, width)]
            if not names:
                raise OptxError(
                    f"Shapes.set: {argument}={pattern!r} matches no parameter. {near(pattern, self._widths)}"
                )
            yield from names

    def table(self) -> Table:
        """For rich: one row a parameter; those of repeated layers that are alike, in one."""
        return _shapes_table.table(list(self._widths.values()))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file, beside its target and renamed.

        Raises:
            OSError: nothing can be written there.
        """
        _shapes_file.write(path, self.as_data())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Shapes:
        """What `save` wrote.

        Raises:
            FileError: the file is none of these, is damaged, or is of a later version.
            OSError: it can't be read.
        """
        return cls(*_shapes_file.read(path))

    def as_data(self) -> dict[str, Any]:
        """As plain data, which JSON can hold; `from_data` reads it."""
        return _shapes_file.as_data(self._widths.values(), self._heads, self._readouts)

    @classmethod
    def from_data(cls, data: Any) -> Shapes:
        """What `as_data` gave.

        Raises:
            FileError: it is something else, damaged, or of a later version.
        """
        return cls(*_shapes_file.from_data(data, "Shapes.from_data"))

    def check(self, model: nn.Module) -> None:
        """Raise unless these are the shapes of this model.

        Raises:
            OptxError: a parameter is missing, left over, of another shape or tied otherwise; names the first.
        """
        there = parameters_of(model, "Shapes.check")
        tied = {other: one for one in there.values() for other in one.tied}
        for name, width in self._widths.items():
            found = there.get(name)
            if found is None and name in tied:
                raise OptxError(
                    _other(f"has {name!r} and {tied[name].name!r} as one tensor, and they as two")
                )
            if found is None:
                raise OptxError(_other(f"has no parameter {name!r}. {near(name, there)}"))
            if found.shape != width.shape:
                raise OptxError(_other(f"has {name!r} of shape {found.shape}, and they of {width.shape}"))
            if set(found.tied) != set(width.tied):
                raise OptxError(
                    _other(f"ties {name!r} with {_listed(found.tied)}, and they with {_listed(width.tied)}")
                )
        left = next((name for name in there if name not in self._widths), None)
        if left is not None:
            raise OptxError(_other(f"has a parameter {left!r} that they don't know"))


def _any_name(pattern: re.Pattern[str], width: Width) -> bool:
    return any(pattern.fullmatch(name) for name in (width.name, *width.tied))


def _other(difference: str) -> str:
    end = "" if difference.endswith(".") else "."
    return f"These shapes are another model's: this one {difference}{end} Make them with optx.scaling.shapes."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
