"""A rollout with what the policy that made it, and the reference, say of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from optx.thinking._record import Rollout, places_of


@dataclass(frozen=True, eq=False)
class Recorded:
    """A rollout, scored by the policy that made it: what `optx.SofTGRPO` compares a later policy with.

    Attributes:
        rollout: its B rows of T steps.
        logp: (B, T), of the policy that made it.
        mask: (B, T, K) bool, the tokens that counted in the masked mean.
        reference: (B, T), of the reference policy; None without kl.
        group: rows that share a prompt, in the whole rollout.
    """

    rollout: Rollout
    logp: Tensor
    mask: Tensor
    reference: Tensor | None
    group: int

    def __len__(self) -> int:
        return len(self.logp)

    def rows(self, index: Tensor | Sequence[int] | slice) -> Recorded:
        """Some of the rows, for a smaller batch. Parts of a group need ``advantages`` of the whole one.

        Args:
            index: numbers of rows, a mask of rows, or a slice.
        """
        where = index if isinstance(index, slice) else places_of(index, len(self), self.logp.device)
        reference = None if self.reference is None else self.reference[where]
        return Recorded(self.rollout.rows(where), self.logp[where], self.mask[where], reference, self.group)
