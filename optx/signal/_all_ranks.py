"""One number per sample from every process, in one collective of a fixed size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from optx._errors import OptxError

NO_SAMPLE = -float("inf")
"""What stands where a process has no sample, or one that does not count."""


def largest(count: int, device: torch.device, group: dist.ProcessGroup | None = None) -> int:
    """The largest of all processes' counts: what a collective's size can be, which has to be one for all."""
    most = torch.tensor([count], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most)


class Gathered(NamedTuple):
    """The numbers of all processes, and which of them are this one's.

    Attributes:
        values: a number for each place, `NO_SAMPLE` where there is none.
        lengths: how many tokens each place's sample has; None if they were not sent.
        own: the places of this process's samples, in their order.
        world: how many processes there are.
    """

    values: Tensor
    lengths: Tensor | None
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
        world = dist.get_world_size(self.group)
        if world < 1:
            raise OptxError(
                f"{self.owner}: this process is not in process_group; give a group that it is in."
            )
        return world

    def gather(self, values: Tensor, lengths: Tensor | None = None) -> Gathered:
        """The values, shape (B,), of all processes, and lengths of their dtype if there are; B may differ.

        Raises:
            OptxError: this process has more samples than any had in the first call.
        """
        count, world = len(values), self.world()
        if world == 1:
            return Gathered(values, lengths, slice(0, count), 1)
        if self._room is None:
            self._room = largest(max(count, self.at_least), values.device, self.group)
        if count > self._room:
            raise OptxError(
                f"{self.owner}: a batch of {count} samples on this process, after a first one of at most "
                f"{self._room} on any; give max_batch={count} (or more) on every process."
            )
        columns = [values] if lengths is None else [values, lengths]
        padded = values.new_full((len(columns), self._room), NO_SAMPLE)
        padded[:, :count] = torch.stack(columns)
        found = values.new_empty(world, *padded.shape)
        dist.all_gather(list(found.unbind()), padded, group=self.group)
        start = dist.get_rank(self.group) * self._room
        every = found.transpose(0, 1).flatten(1)
        return Gathered(every[0], None if lengths is None else every[1], slice(start, start + count), world)
