"""One number per sample from every process, in one collective of a fixed size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from optx._errors import OptxError

NO_SAMPLE = -float("inf")
"""What stands where a process has no sample, or one that does not count."""


class Gathered(NamedTuple):
    """The numbers of all processes, and which of them are this one's.

    Attributes:
        values: a number for each place, `NO_SAMPLE` where there is none.
        own: the places of this process's samples, in their order.
        world: how many processes there are.
    """

    values: Tensor
    own: slice
    world: int


class AllRanks:
    """Gathers from the processes of a group; a process may have fewer samples than another, or none.

    A collective needs one size for all, which no process can know from its own batch. So the first call finds
    out the largest batch there is (one number more to exchange, once), and later ones are padded to it.

    Args:
        owner: whose errors they are.
        group: of processes; the default group if None.
        at_least: how large a batch may become later on.
    """

    def __init__(self, owner: str, group: dist.ProcessGroup | None, at_least: int) -> None:
        self.owner, self.group, self.at_least = owner, group, at_least
        self._room: int | None = None

    def world(self) -> int:
        """How many processes there are; 1 without torch.distributed."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def gather(self, values: Tensor) -> Gathered:
        """The values, shape (B,), of all processes; B may differ.

        Raises:
            OptxError: this process has more samples than any had in the first call.
        """
        count, world = len(values), self.world()
        if world == 1:
            return Gathered(values, slice(0, count), 1)
        if self._room is None:
            most = torch.tensor([max(count, self.at_least)], device=values.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
            self._room = int(most)
        if count > self._room:
            raise OptxError(
                f"{self.owner}: a batch of {count} samples on this process, after a first one of at most "
                f"{self._room} on any; give max_batch={count} (or more) on every process."
            )
        padded = values.new_full((self._room,), NO_SAMPLE)
        padded[:count] = values
        found = values.new_empty(world * self._room)
        dist.all_gather(list(found.chunk(world)), padded, group=self.group)
        start = dist.get_rank(self.group) * self._room
        return Gathered(found, slice(start, start + count), world)
