"""T-Rex:I's steps: up the gradient of Stability, until it is enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optx.analysis.counterfactual._box import Box
from optx.analysis.counterfactual._classifier import Classifier
from optx.analysis.counterfactual._rows import length, spread
from optx.analysis.counterfactual.stability import relaxed, relaxed_gradient


@dataclass(frozen=True)
class Walk:
    """What steps keep to.

    Attributes:
        box: of each row.
        tau: the Stability at which a row is done.
        eps_max: the radius of the l2 ball about the base.
        eta: the length of a step.
        judge: noise that measures where a row has come to, the same everywhere and never stepped by: points
            are then chosen by it alone, and none for having met kind noise on its way.
    """

    box: Box
    tau: float
    eps_max: float
    eta: float
    judge: Sequence[Tensor]

    def up(
        self, classifier: Classifier, base: Tensor, noises: Iterable[Iterable[Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row the first point of the class that has tau, else the best one met; a step a noise.

        Returns:
            The points, their Stability, and how many steps they are from the base.
        """
        here, best = base.clone(), base.clone()
        held, valid = relaxed(classifier, base, self.judge), classifier.leads(base) > 0
        steps = torch.zeros(len(base), dtype=torch.int64, device=base.device)
        for count, noise in enumerate(noises, 1):
            rows = ((held < self.tau) | ~valid).nonzero()[:, 0]
            if not len(rows):
                break
            here[rows] = now = self._step(classifier, here[rows], base[rows], self.box[rows], noise)
            measured = relaxed(classifier, now, self.judge)
            counts = classifier.leads(now) > 0
            # Where no point of the class is near, the measure is higher: 0, and not below.
            better = (counts & ~valid[rows]) | ((counts >= valid[rows]) & (measured > held[rows]))
            mine = rows[better]
            best[mine], held[mine], valid[mine], steps[mine] = (
                now[better],
                measured[better],
                counts[better],
                count,
            )
        return best, held, steps

    def _step(
        self, classifier: Classifier, x: Tensor, base: Tensor, box: Box, noise: Iterable[Tensor]
    ) -> Tensor:
        slope = relaxed_gradient(classifier, x, noise)
        # A feature that may not move has no part in a step's length.
        slope = torch.where(box.low < box.high, slope, 0)
        size = length(slope)
        moved = x + spread(self.eta / torch.where(size > 0, size, 1), slope) * slope
        away = moved.to(x.dtype) - base
        # The base is in the box, so that what clamps does not lead out of the ball.
        far = length(away)
        return box.clamp(base + spread(self.eps_max / far.clamp_min(self.eps_max), away) * away)
