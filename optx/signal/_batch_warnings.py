"""What a batch of losses may mean without its being wrong: told once."""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import warn


class BatchWarnings:
    """Looks at the sizes of batches, and once at their numbers.

    Args:
        owner: whose warnings they are.
        strategy: its name, for them.
    """

    def __init__(self, owner: str, strategy: str) -> None:
        self.owner, self.strategy = owner, strategy
        self._single, self._looked = 0, False

    def of_one_sample(self, samples: int, uniform: bool) -> None:
        """Warn of batches of one sample, the second time in a row: once may be the end of an epoch."""
        self._single = self._single + 1 if samples == 1 and not uniform else 0
        if self._single == 2:
            warn(
                f"{self.owner}: each call has one sample, whose weight is 1 whatever its loss, so that "
                f"{self.strategy!r} has no effect. Give larger batches; to accumulate gradients does not "
                "help, as the weights are those of one call."
            )

    def of_zeros(self, losses: Tensor) -> None:
        """Warn if the first per-token losses without a mask have zeros, as `cross_entropy` leaves them."""
        if self._looked or torch.compiler.is_compiling():
            return
        self._looked = True
        if zeros := int((losses == 0).sum()):
            warn(
                f"{self.owner}: {zeros} of {losses.numel()} losses are exactly 0, as cross_entropy leaves "
                "them for an ignored label, and count in the means; give a mask (labels != -100), of ones if "
                "they are to count."
            )
