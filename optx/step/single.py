"""One tensor's step, prepared: what can have changed since the last one is compared, and kernels run.

Hundreds of tensors that are stepped one by one cost Python as many times what one step of all costs: all that
a step of many looks at by arrays is here one comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from optx.step.buckets import ADDRESS
from optx.step.fused import FusedGroup
from optx.step.memory import Likeness
from optx.step.transform import Group


class Single(FusedGroup):
    """Serves one tensor of a group, which draws as it does among all.

    Args:
        shared: serves the group.
        group: the tensor's param group.
        number: of the tensor in it.
    """

    def __init__(self, shared: FusedGroup, group: Group, number: int) -> None:
        self._number = number
        super().__init__([group], *shared.made_of)
        self._like: Likeness | None = None  # of weight, gradient and state; None: look at them in full
        self._addresses: list[int] = []  # of the same
        self._spans: list[tuple[int, int]] = []  # what kernels write
        self._same = False  # whether this step found all as it was

    def _parameters(self) -> list[Tensor]:
        return [self.groups[0]["params"][self._number]]

    def _numbered(self) -> list[tuple[int, int]]:
        return [(0, self._number)]

    def count_groups(self) -> None:
        """Its group is counted once for all of its tensors, by whoever closes the step."""

    def prepare(self, key: Callable[[Group], int]) -> None:
        """See `FusedGroup.prepare`; and calls functions of whole matrices, which may fail."""
        self._same = self._as_before()
        if not self._same:
            self._like = None
            super().prepare(key)
            self._remember()
        else:
            if isinstance(self.rules.counted, str):  # not by the kernels
                self._mark(self._buckets[0], [self.base.state[p] for p in self.active])
            if self._draws or self._numbers.of(self.groups[0]) is not self._rows[0]:
                self._write_numbers(key)
        if self.program.scratch:
            for level in range(len(self.program.levels)):
                self.measure(level)

    def step(self) -> None:
        """A whole step, or what is left of it."""
        for bucket in self._buckets:
            if self.program.scratch:
                bucket.runner.update()
                bucket.runner.commit()
            else:
                bucket.runner.step()
        if not self._same or self.program.scratch or self.rules.counted == "number":
            self._done()

    def _as_before(self) -> bool:
        """Whether all is what it was in the last step, but for where the gradient lies, which is written."""
        if self._like is None:
            return False
        [p], [bucket] = self.active, self._buckets
        if self.groups[0]["params"][self._number] is not p:
            return False
        try:
            state = self.base.state[p]
            tensors: list[Any] = [p, p.grad, *[state[key] for key in bucket.keys]]
            if not self._like(tensors):
                return False
            addresses = list(map(ADDRESS, tensors))
        except (KeyError, TypeError, RuntimeError, AttributeError):  # not there, no tensor, without memory
            return False
        start = addresses[1]
        if addresses == self._addresses:
            return True
        addresses[1] = self._addresses[1]
        end = start + bucket.columns[1].sizes.item()
        if addresses != self._addresses or any(low < end and start < high for low, high in self._spans):
            return False
        self._addresses[1] = bucket.runner.tensors[0, bucket.places_in_row[1]] = start
        bucket.columns[1].addresses = [start]
        return True

    def _remember(self) -> None:
        """What the next step may find unchanged."""
        if len(self._buckets) != 1 or self.triton or self.sharded or self._derived or self.fresh:
            return
        [bucket] = self._buckets
        columns = bucket.columns
        [grad] = self._gradients.all_of(bucket.members)
        if columns[1].like is None or not columns[1].like([grad]) or 0 in (c.addresses[0] for c in columns):
            return  # laid out anew in every step, or without elements
        self._like = Likeness([*bucket.members, grad, *(bucket.found[key][0] for key in bucket.keys)])
        self._addresses = [column.addresses[0] for column in columns]
        written = [c for i, c in enumerate(columns) if i != 1]
        self._spans = [(c.addresses[0], c.addresses[0] + c.sizes.item()) for c in written]
