"""`optx.search`: the numbers of a merge that a score of yours likes best, within a budget of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optx._errors import OptxError, check_range

Point = dict[str, float]
Space = Mapping[str, Sequence[float]]
_LINE = 5  # values along one coordinate before its bounds are drawn in


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: the values with the best score; of equal ones, those tried first.
        score: theirs.
        history: every evaluation in order, values and score.
    """

    best: Point
    score: float
    history: list[tuple[Point, float]] = field(repr=False)


def search(
    evaluate: Callable[..., float],
    space: Space,
    budget: int,
    *,
    start: Mapping[str, float] | None = None,
    maximize: bool = True,
) -> Found:
    """Find the numbers that a score likes best, by lines along one coordinate after another.

    Along each coordinate some evenly spaced values are tried and the best is kept; after each round over
    the coordinates the bounds are drawn in around it, so that one coordinate gets a grid that becomes finer.
    No random numbers: the same call gives the same result. No point is evaluated twice.

    Args:
        evaluate: called with one keyword per name, such as ``lam=0.4``; gives a score. NaN counts as worst.
        space: name -> ``(low, high)`` bounds as a tuple, or a list of the values to try.
        budget: the number of evaluations, at most; fewer if nothing is left to try.
        start: where to begin; the middle by default. It is the first that is evaluated.
        maximize: False looks for the lowest score.

    Raises:
        OptxError: bounds the wrong way round, a start outside, no budget, or a score that is no number.

    Example:
        >>> import optx
        >>> found = optx.search(lambda lam: -((lam - 0.7) ** 2), {"lam": (0.0, 2.0)}, budget=20)
        >>> round(found.best["lam"], 2)
        0.7
        >>> # With models: lambda lam: accuracy(optx.merge(base, models, optx.TIES(lam=lam)))
    """
    axes = {name: _Axis(name, values) for name, values in space.items()}
    check_range("search", "budget", budget, 1)
    if not axes:
        raise OptxError("search: space is empty; name at least one number to search, as {'lam': (0, 2)}.")
    trials = _Trials(evaluate, budget, maximize)
    point = {name: axis.middle() for name, axis in axes.items()}
    for name, value in (start or {}).items():
        if name not in axes or not axes[name].holds(value):
            raise OptxError(f"search: start has {name}={value!r}, which space does not allow.")
        point[name] = value
    trials.score(point)
    while not trials.spent:
        before = len(trials.known)
        for name, axis in axes.items():
            for value in axis.line():
                trials.score({**trials.best, name: value})
        for name, axis in axes.items():
            axis.draw_in(trials.best[name])
        if len(trials.known) == before and not any(axis.finer() for axis in axes.values()):
            break
    return Found(dict(trials.best), trials.best_score, trials.history)


class _Trials:
    """What was evaluated, and the best of it."""

    def __init__(self, evaluate: Callable[..., float], budget: int, maximize: bool) -> None:
        self._evaluate, self._budget, self._sign = evaluate, budget, 1 if maximize else -1
        self.known: set[tuple[float, ...]] = set()
        self.history: list[tuple[Point, float]] = []
        self.best: Point = {}
        self.best_score = math.nan

    @property
    def spent(self) -> bool:
        return len(self.history) >= self._budget

    def score(self, point: Point) -> None:
        """Evaluate a point, unless it is known or the budget is spent."""
        key = tuple(point.values())
        if key in self.known or self.spent:
            return
        given = self._evaluate(**point)
        try:
            score = float(given)
        except (TypeError, ValueError):
            raise OptxError(f"search: evaluate gave {given!r} at {point}; it must give one number.") from None
        self.known.add(key)
        self.history.append((dict(point), score))
        better = self._sign * score > self._sign * self.best_score
        if not self.best or better or (math.isnan(self.best_score) and not math.isnan(score)):
            self.best, self.best_score = dict(point), score


class _Axis:
    """One number: its values, or its bounds and how far they are drawn in."""

    def __init__(self, name: str, values: Sequence[float]) -> None:
        self.bounded = isinstance(values, tuple)
        self.values = [float(value) for value in values]
        wrong = any(not math.isfinite(value) for value in self.values) or not self.values
        if wrong or (self.bounded and (len(self.values) != 2 or not self.values[0] < self.values[1])):
            raise OptxError(
                f"search: space[{name!r}] is {values!r}; it must be (low, high) with low < high, or a list "
                "of finite values."
            )
        self.low, self.high = min(self.values), max(self.values)
        self._ends = self.low, self.high

    def middle(self) -> float:
        return (self.low + self.high) / 2 if self.bounded else self.values[len(self.values) // 2]

    def holds(self, value: float) -> bool:
        return self._ends[0] <= value <= self._ends[1] if self.bounded else value in self.values

    def line(self) -> list[float]:
        """The values to try now."""
        if not self.bounded:
            return self.values
        step = (self.high - self.low) / (_LINE - 1)
        return [float(f"{self.low + i * step:.12g}") for i in range(_LINE)]  # 0.3, not 0.30000000000000004

    def draw_in(self, best: float) -> None:
        """Half the width, around the best, within the first bounds."""
        width = (self.high - self.low) / 2
        low = min(max(best - width / 2, self._ends[0]), self._ends[1] - width)
        self.low, self.high = low, low + width

    def finer(self) -> bool:
        """Whether the bounds can still tell values apart."""
        return self.bounded and self.high - self.low > 1e-9 * (self._ends[1] - self._ends[0])
