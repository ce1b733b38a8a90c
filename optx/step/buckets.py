"""Which tensors one kernel of the fused paths serves, and what they were when it was pointed at them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from optx._names import is_dtensor
from optx.kernels.step.program import AXES, Call
from optx.step.measured import places_of
from optx.step.memory import Likeness, extent
from optx.step.sharded import Shards, Share, all_here, here, specs_of

ADDRESS = Tensor.data_ptr


@dataclass
class Column:
    """What the tensors of one column of a table were when their addresses were taken."""

    like: Likeness | None  # None for single numbers: at the same address they are what they were
    addresses: list[int]
    sizes: npt.NDArray[np.int64]  # in bytes
    # Of packed slots: the tensors, and others on their memory, which thus stays where it is. That a tensor is
    # the same object is then all that a step has to look at; only `.data = ...` goes unseen.
    held: tuple[list[Tensor], list[Tensor]] | None = None
    specs: list[Any] | None = None  # of DTensors: how they are spread; all else is said of what lies here

    @classmethod
    def of(cls, tensors: Sequence[Tensor], single: bool, packed: bool = False) -> Column:
        """Of tensors that have been looked at; ``single`` where each is one number."""
        given, tensors = tensors, list(map(here, tensors))
        specs = specs_of(given) if given and all(map(is_dtensor, given)) else None
        like = None if single else Likeness(tensors)
        held = (list(given), [t.detach() for t in tensors]) if packed else None
        sizes = np.array(list(map(extent, tensors)), np.int64)
        return cls(like, list(map(ADDRESS, tensors)), sizes, held, specs)

    def here(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What of a column of DTensors lies here.

        Raises:
            AttributeError: one is no DTensor, or is spread in another way.
        """
        if specs_of(tensors) != self.specs:
            raise AttributeError("spread in another way")
        return all_here(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the packed slots whose memory is held."""
        return self.held is not None and all(map(is_, tensors, self.held[0]))


@dataclass
class Bucket:
    """Tensors that one kernel serves: all of the same dtypes, and spread over the same processes."""

    members: list[Tensor]
    runner: Any  # CpuStep or TritonStep
    keys: list[str]  # where state[p] has each role after w and g, then each cell
    places_in_row: list[int]  # of w, g and these in a tensor's row
    owners: list[int]  # which of the groups each member is of
    shards: Shards | None = None
    own_rows: bool = False  # whether no process needs the sums over rows that lie elsewhere
    columns: list[Column] = field(default_factory=list[Column])
    found: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])  # in a step, by key
    # The parameters that had state, in the order of `base.state`, and where the members are among them.
    known: list[Tensor] = field(default_factory=list[Tensor])
    places: list[int] = field(default_factory=list[int])
    in_order: bool = False  # whether these are the members, in their order
    # By key of a derived number: its sources and itself, and their versions, as last seen.
    looked: dict[str, tuple[list[Any], list[int] | None]] = field(default_factory=dict[str, Any])

    @functools.cached_property
    def rows(self) -> dict[int, int]:
        """The members' places in the tables, by id."""
        return places_of(self.members)

    def partial(self, calls: Sequence[Call]) -> list[Share]:
        """Of shards: what some calls have summed of them, to be completed over the mesh."""
        if self.shards is None:
            return []
        kinds = [ref.kind for call in calls for ref in call.writes]
        count = sum(kind not in AXES for kind in kinds)
        shares = [(self.runner.sums[:, :count], self.shards)] if count else []
        # Of rows that lie here as a whole there is nothing to complete, unless all are kept or summed.
        if "column" in kinds or ("row" in kinds and not self.own_rows):
            shares.append((self.runner.axis_sums, self.shards))
        return shares
