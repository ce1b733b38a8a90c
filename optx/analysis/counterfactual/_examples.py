"""Examples of the target class: those that are nearest to a factual, and the first of them that is stable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.analysis.counterfactual._box import Box
from optx.analysis.counterfactual._classifier import Classifier
from optx.analysis.counterfactual._closest import closest, is_of_class
from optx.analysis.counterfactual._rows import Norm, length
from optx.analysis.counterfactual.stability import relaxed

_STARTS = 5  # nearest examples from which the closest point is searched


def of_class(who: str, classifier: Classifier, data: Tensor) -> Tensor:
    """The rows that the model gives the target."""
    found = data[is_of_class(classifier, data)]
    if not len(found):
        raise OptxError(
            f"{who}: of the {len(data)} rows of data the model gives none the target. Pass others, or "
            "base= a tensor of points like x."
        )
    return found


def nearest_points(
    classifier: Classifier, x: Tensor, examples: Tensor, box: Box, norm: Norm, count: int = 1
) -> list[Tensor]:
    """Of each row the nearest examples, nearest first; in its box they may be fewer, or none.

    An example that is outside takes the nearest values that are inside, if it stays of the class: so it gets
    the factual's where a feature may not move.
    """
    found: list[Tensor] = []
    for i in range(len(x)):
        inside = Box(box.low[i], box.high[i]).clamp(examples)
        changed = (inside != examples).flatten(1).any(1)
        kept = inside[is_of_class(classifier, inside)] if bool(changed.any()) else inside
        found.append(kept[length(kept - x[i], norm).argsort(stable=True)[:count]])
    return found


def closest_points(classifier: Classifier, x: Tensor, examples: Tensor, box: Box, norm: Norm) -> Tensor:
    """Of each row the nearest point of the class that is found; itself if no example is in its box."""
    starts = nearest_points(classifier, x, examples, box, norm, _STARTS)
    rows = torch.cat([torch.full((len(some),), i) for i, some in enumerate(starts)]).to(x.device)
    found = closest(classifier, x[rows], torch.cat(starts), box[rows], norm)
    best = x.clone()
    for i in range(len(x)):
        if len(mine := found[rows == i]):
            best[i] = mine[length(mine - x[i], norm).argmin()]
    return best


def first_stable(
    classifier: Classifier,
    x: Tensor,
    examples: Tensor,
    box: Box,
    norm: Norm,
    neighbours: int,
    tau: float,
    noise: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """T-Rex:NN: of each row's nearest examples the first that has tau, else the one that comes nearest to it.

    Returns:
        The examples, their Stability, and how many nearer ones were passed by.
    """
    orders: list[Tensor] = []
    for i in range(len(x)):
        there = Box(box.low[i], box.high[i]).holds(examples).nonzero()[:, 0]
        if not len(there):
            raise OptxError(
                f"robust_counterfactual: no example of the target is in the bounds, for row {i} of x. Pass "
                "wider bounds, or method='iterative'."
            )
        far = length(examples[there] - x[i], norm)
        orders.append(there[far.argsort(stable=True)[:neighbours]])
    # What is near to several factuals is measured once.
    wanted = torch.zeros(len(examples), dtype=torch.bool, device=x.device)
    wanted[torch.cat(orders)] = True
    asked = wanted.nonzero()[:, 0]
    held = torch.full((len(examples),), -torch.inf, device=x.device)
    measured = relaxed(classifier, examples[asked], noise)
    held = held.to(measured.dtype).index_copy(0, asked, measured)
    passed = [_first(held[order], tau) for order in orders]
    rows = torch.stack([order[at] for order, at in zip(orders, passed, strict=True)])
    return examples[rows], held[rows], torch.tensor(passed, device=x.device)


def _first(held: Tensor, tau: float) -> int:
    enough = (held >= tau).nonzero()
    return int(enough[0]) if len(enough) else int(held.argmax())
