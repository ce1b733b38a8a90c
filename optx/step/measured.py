"""The numbers that a step computed of each tensor, kept until the next one and read from the device once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optx._read import values

INCOMING_SQ = "optx.grad_sq"  # the squared norm of the gradient that the step was given
_SAMPLE = 4  # gradients that are looked at again: whoever clears or makes gradients does so with all


def places_of(weights: Sequence[Tensor]) -> dict[int, int]:
    """Each weight's place in a list, by its id."""
    return dict(zip(map(id, weights), range(len(weights)), strict=True))


@dataclass(frozen=True)
class Table:
    """Numbers of some weights.

    Attributes:
        weights: whose.
        names: what they are called: ``adamr.rate`` is the transform adamr's.
        rows: float64, (weights, names), where it was computed; or a column (weights,) for each name.
        known_places: what `places` is, if that is known already.
    """

    weights: Sequence[Tensor]
    names: Sequence[str]
    rows: Tensor | Sequence[Tensor]
    known_places: Mapping[int, int] | None = None  # where they are kept from step to step

    @functools.cached_property
    def places(self) -> Mapping[int, int]:
        """Each weight's row, by its id."""
        return places_of(self.weights) if self.known_places is None else self.known_places

    def flat(self) -> Tensor:
        """All of them on their device, column after column."""
        rows = self.rows.t() if isinstance(self.rows, Tensor) else torch.stack(list(self.rows))
        return rows.reshape(-1)


class Measured:
    """What the last step that was taken computed; nothing before there was one.

    Args:
        tables: the numbers of all weights that had a gradient.
        whole: whether they are of all gradients; a sparse one is in no table.
        rates: the learning rates that the step took, by param group.

    Attributes:
        lasting: whether no other step writes into them.
    """

    def __init__(
        self, tables: Iterable[Table] = (), whole: bool = True, rates: Mapping[int, Any] | None = None
    ) -> None:
        self._tables = list(tables)
        self.whole = whole
        self.rates = rates
        self.lasting = not self._tables
        self._read: list[npt.NDArray[np.float64]] | None = None
        self._gradients: list[tuple[Tensor, weakref.ref[Tensor], int]] = []

    def __bool__(self) -> bool:
        return bool(self._tables)

    def keep(self) -> None:
        """Put the numbers out of reach of the next step."""
        shared = ((t, t.rows) for t in self._tables)  # with a runner, which writes there again
        self._tables = [
            replace(t, rows=rows.clone()) if isinstance(rows, Tensor) else t for t, rows in shared
        ]
        self.lasting = True

    # ---- numbers -------------------------------------------------------------------------------------

    def read(self, others: Sequence[Tensor] = ()) -> list[float]:
        """Bring the numbers here, and some others with them, by one copy from each device.

        Args:
            others: tensors of one number.

        Returns:
            The others' values.
        """
        new = self._tables if self._read is None else []
        read = values([*(t.flat() for t in new), *(o.detach().reshape(1) for o in others)])
        if self._read is None:
            shaped = zip(read, new, strict=False)
            self._read = [flat.reshape(len(t.names), len(t.weights)) for flat, t in shaped]
        return [float(value[0]) for value in read[len(new) :]]

    def _columns(self, name: str) -> list[tuple[Table, npt.NDArray[np.float64]]]:
        if self._read is None:
            self.read()
        assert self._read is not None
        pairs = zip(self._tables, self._read, strict=True)
        return [(table, rows[table.names.index(name)]) for table, rows in pairs if name in table.names]

    def of(self, name: str) -> dict[int, float]:
        """Each weight's number of this name, by its id; of those alone that have one."""
        found: dict[int, float] = {}
        for table, column in self._columns(name):
            found.update({key: float(column[place]) for key, place in table.places.items()})
        return found

    def having(self, name: str) -> Collection[int]:
        """The ids of the weights that have a number of this name, which is not read."""
        tables = [table for table in self._tables if name in table.names]
        return tables[0].places if len(tables) == 1 else {key for table in tables for key in table.places}

    def first(self, name: str, weights: Iterable[Tensor]) -> float | None:
        """The number of the first of some weights that has one of this name."""
        columns = self._columns(name)
        for w in weights:
            for table, column in columns:
                if (place := table.places.get(id(w))) is not None:
                    return float(column[place])
        return None

    def sum(self, name: str, where: str | None = None) -> float | None:
        """A number's sum over all weights, or over those that have another one; None where none has it."""
        columns = self._columns(name)
        kept = [column for table, column in columns if where is None or where in table.names]
        return float(sum(column.sum() for column in kept)) if kept else None

    # ---- gradients ------------------------------------------------------------------------------------

    def look(self) -> None:
        """Remember some of the gradients that the step was given, to know them again."""
        weights = [w for table in self._tables for w in table.weights]
        some = weights[:: -(-len(weights) // _SAMPLE) or 1]
        self._gradients = [(w, weakref.ref(g), g._version) for w in some if (g := w.grad) is not None]

    def gradients(self) -> list[Tensor]:
        """What the step was given, if it is still there as it was; else nothing."""
        for w, grad, version in self._gradients:
            now = w.grad
            if now is None or grad() is not now or now._version != version:
                return []
        grads = [w.grad for table in self._tables for w in table.weights]
        there = [g for g in grads if g is not None]
        return there if self._gradients and len(there) == len(grads) else []


def squares(tensors: Sequence[Tensor]) -> float:
    """The sum of squares of tensors, in float64 where their devices have it."""
    norms = [
        torch.linalg.vector_norm(t.detach(), dtype=torch.float32 if t.device.type == "mps" else torch.float64)
        for t in tensors
    ]
    return sum(float(value[0]) ** 2 for value in values([norm.reshape(1) for norm in norms]))
