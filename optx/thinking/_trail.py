"""The steps of a generation that is under way: what they feed to the model, and the record they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optx.thinking._embedding import Inputs
from optx.thinking._record import Rollout
from optx.thinking._state import Step


class Trail:
    """Steps since the prompts, B rows.

    Attributes:
        prompts: (B, P).
        mask: (B, P) bool.
        steps: in their order.
    """

    def __init__(self, prompts: Tensor, mask: Tensor, start: Rollout | None = None) -> None:
        self.prompts, self.mask = prompts, mask.bool()
        self.steps: list[Step] = []
        if start is not None:
            fields = (getattr(start, name).unbind(1) for name in Step._fields)
            self.steps = [Step(*one) for one in zip(*fields, strict=True)]

    def tokens(self) -> Tensor:
        """(B, P + steps): what the model is given where no mixture is."""
        return torch.cat([self.prompts, *(step.ids[:, :1] for step in self.steps)], 1)

    def inputs(self, every: bool) -> Inputs | None:
        """What the next call is fed beside tokens: of the last step, or of all; None if that is nothing."""
        steps = self.steps if every else self.steps[-1:]
        if not any(bool(step.soft.any()) for step in steps):
            return None
        fields = ("ids", "weights", "soft")
        return Inputs(*(torch.stack([getattr(step, name) for step in steps], 1) for name in fields))

    def record(self, running: Tensor, group: int, policy: str, options: Mapping[str, Any]) -> Rollout:
        """All of it.

        Args:
            running: (B,) rows that have not come to a stop token.
            group: rows of one prompt.
            policy: the fingerprint of the weights.
            options: those in force.
        """
        fields = {name: torch.stack([getattr(s, name) for s in self.steps], 1) for name in Step._fields}
        return Rollout(
            prompts=self.prompts,
            prompt_mask=self.mask,
            finished=~running.to(self.prompts.device),
            group=group,
            policy=policy,
            options=options,
            **fields,
        )
