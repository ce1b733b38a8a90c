"""The closest point that a model puts into a class: along segments to examples, then along its boundary.

A point of the class on the boundary is bettered by taking the boundary for a plane, beyond which the closest
point of the box is known (of l2 by one multiplier, of l1 feature by feature); what the plane got wrong is
made good by going back along segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx.analysis.counterfactual._box import Box
from optx.analysis.counterfactual._classifier import Classifier
from optx.analysis.counterfactual._rows import Norm, length, spread

_LEAD = (
    1e-4  # of the target's probability over the next: a point within rounding of the boundary is on no side
)
_HALVINGS = 20
_ROUNDS = 30
_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the way to the plane's closest point, tried together
_SHORTER = 1e-3  # relative; less ends a row's search


def closest(classifier: Classifier, x: Tensor, starts: Tensor, box: Box, norm: Norm) -> Tensor:
    """Of each row the nearest point of the target class that is found from one start: like x.

    Args:
        classifier: of the target; with gradients, or an estimator, for which segments are all.
        x: factuals, (N, ...).
        starts: points of the class in the box, like x.
        box: of the rows.
        norm: of the distance.
    """
    found = towards(classifier, x, starts)
    return found if classifier.is_estimator else _along_the_boundary(classifier, x, found, box, norm)


def is_of_class(classifier: Classifier, x: Tensor) -> Tensor:
    """Which rows are of the target class beyond rounding, (N,)."""
    return classifier.leads(x) >= _LEAD


def towards(classifier: Classifier, x: Tensor, good: Tensor) -> Tensor:
    """Points of the class on the segments from x to points of it: on the boundary that is between."""
    low, high = (torch.full((len(x),), end, dtype=torch.float64, device=x.device) for end in (0.0, 1.0))
    high[is_of_class(classifier, x)] = 0.0  # it is where it shall be
    found = torch.where(spread(high == 0, x).bool(), x, good)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        point = torch.lerp(x, good, spread(middle, x))
        inside = is_of_class(classifier, point)
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
        found = torch.where(spread(inside, x).bool(), point, found)
    return found


def _along_the_boundary(classifier: Classifier, x: Tensor, found: Tensor, box: Box, norm: Norm) -> Tensor:
    """Points nearer to x than these, of the class too."""
    far = length(found - x, norm)
    going = far > 0
    for _ in range(_ROUNDS):
        rows = going.nonzero()[:, 0]
        if not len(rows):
            break
        here, at = x[rows], found[rows]
        lead, slope = _lead_and_slope(classifier, at)
        best = beyond_plane(here, at, lead - _LEAD, slope, box[rows], norm)
        tries = torch.stack([torch.lerp(at, best, share) for share in _SHARES], 1)  # (R, shares, ...)
        flat, factual = tries.flatten(0, 1), here.repeat_interleave(len(_SHARES), 0)
        inside = is_of_class(classifier, flat)
        flat[inside] = towards(classifier, factual[inside], flat[inside])
        reach = length(flat - factual, norm)
        reach[~inside] = torch.inf
        nearest, which = reach.view(len(rows), -1).min(1)
        nearer = nearest < far[rows]
        points = flat.view_as(tries)[torch.arange(len(rows), device=x.device), which]
        found[rows[nearer]] = points[nearer]
        going[rows] = nearest < (1 - _SHORTER) * far[rows]
        far[rows] = torch.minimum(nearest, far[rows])
    return found


def _lead_and_slope(classifier: Classifier, at: Tensor) -> tuple[Tensor, Tensor]:
    leads: list[Tensor] = []
    slopes: list[Tensor] = []
    with torch.enable_grad():
        for part in classifier.pieces(at):
            here = part.clone().requires_grad_()
            lead = classifier.lead(here)
            slopes += classifier.gradient(lead, (here,))
            leads.append(lead.detach())
    return torch.cat(leads), torch.cat(slopes)


def beyond_plane(x: Tensor, at: Tensor, lead: Tensor, slope: Tensor, box: Box, norm: Norm) -> Tensor:
    """The closest points z to x in the box with lead + slope . (z - at) >= 0, a plane for each row.

    Where the whole box is on this side of the plane, the corner that comes nearest to it.
    """
    g = slope.flatten(1).double()
    start, low, high = (part.flatten(1).double() for part in (x, box.low, box.high))
    lacks = -(lead.double() + (g * (start - at.flatten(1).double())).sum(1))  # what g . (z - x) must be
    least = _cheapest if norm == "l1" else _shortest
    move = least(g, low - start, high - start, lacks)
    return box.clamp(x + move.to(x.dtype).view_as(x))


def _shortest(g: Tensor, low: Tensor, high: Tensor, lacks: Tensor) -> Tensor:
    """The v of least l2 norm in a box about 0 with g . v >= lacks: v = clamp(c g), where c solves for it."""
    corner = torch.where(g > 0, high, low)
    # From this c on every feature that the plane leans on is at its end.
    ends = torch.where(g != 0, corner / torch.where(g != 0, g, 1), 0)
    top = torch.where(ends.isfinite(), ends, 0).amax(1)
    free = (ends.isfinite() | (g == 0)).all(1)
    # Where there is no end the plane is reached no later than by the features that never get to theirs.
    open_ = torch.where(ends.isfinite(), 0, g).square().sum(1)
    top = torch.where(free, top, torch.maximum(top, lacks.clamp_min(0) / open_.clamp_min(1e-300)))
    bottom = torch.zeros_like(top)
    for _ in range(60):
        c = (bottom + top) / 2
        enough = (g * (c[:, None] * g).clamp(low, high)).sum(1) >= lacks
        bottom, top = torch.where(enough, bottom, c), torch.where(enough, c, top)
    return torch.where(lacks[:, None] > 0, (top[:, None] * g).clamp(low, high), 0)


def _cheapest(g: Tensor, low: Tensor, high: Tensor, lacks: Tensor) -> Tensor:
    """The v of least l1 norm in a box about 0 with g . v >= lacks: steep features go to their ends first."""
    order = g.abs().argsort(dim=1, descending=True, stable=True)
    steep = g.gather(1, order)
    room = torch.where(g > 0, high, low).gather(1, order)
    gains = torch.where(steep != 0, steep * room, 0)
    before = torch.nn.functional.pad(gains.cumsum(1)[:, :-1], (1, 0))  # what the steeper ones give
    still = (lacks[:, None] - before).clamp_min(0)
    share = torch.minimum(still, gains)
    move = torch.where(steep != 0, share / torch.where(steep != 0, steep, 1), 0)
    return torch.zeros_like(g).scatter(1, order, move)
