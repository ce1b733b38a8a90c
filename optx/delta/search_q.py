"""What DAREx-q divides by: found on labels, on outputs, or from the inputs of layers; or learned.

Source: "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models", arXiv 2410.09344,
sections 3.2 and 4, and its official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_range, near
from optx._no_trace import evaluating
from optx.delta._difference import Difference
from optx.delta._input_stats import InputStats, call, input_stats
from optx.delta._learn_q import learned_q
from optx.delta._random_mask import Dropout, key_of
from optx.delta.prune import check_p, check_stats

Score: TypeAlias = Callable[[nn.Module], float]
"""Of a model with pruned weights, on validation data; higher is better."""
Distance: TypeAlias = Callable[[Any, Any], float]
"""From a full model's output to a pruned one's on the same batch."""

STRATEGIES = ("output", "val", "analytic", "learned", "mse")
_GAMMA = 0.05  # the bound holds with a probability of 95 %
_PATIENCE = 3
_FARTHEST = 16
_ROWS = 1 << 22  # numbers of a weight that are looked at together


def phi(p: float) -> float:
    """(1 - 2p) / log((1-p) / p), with its limit 1/2 at p = 1/2 and 0 at 0 and 1.

    Example:
        >>> round(phi(0.9), 6)
        0.364096
    """
    if p in (0.0, 1.0):
        return 0.0
    return 0.5 if abs(p - 0.5) < 1e-6 else (1 - 2 * p) / math.log((1 - p) / p)


def find_q(
    delta: Difference,
    model: nn.Module,
    batches: Iterable[Any],
    p: float,
    strategy: str = "output",
    *,
    score: Score | None = None,
    distance: Distance | None = None,
    step: float | None = None,
    eta: float = 0.5,
    seeds: Sequence[int] = (0, 1, 2, 3),
    include: str | None = None,
    exclude: str | None = None,
) -> float | dict[str, float]:
    """See `optx.Delta.find_q`."""
    check_p("Delta.find_q", p)
    if strategy not in STRATEGIES:
        raise OptxError(f"Delta.find_q: strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}.")
    if (score is None) == (strategy == "val"):
        raise OptxError(
            "Delta.find_q: strategy 'val' needs score=, a function of the model; no other takes it."
        )
    if not seeds:
        raise OptxError("Delta.find_q: seeds is empty; give at least one.")
    check_range("Delta.find_q", "eta", eta, 0.0)
    chosen = delta.subset(include, exclude)
    if strategy in ("analytic", "mse"):
        return per_layer(chosen, input_stats(model, batches), p, strategy, eta)
    trial = _Trial(chosen, model, p, seeds)
    if score is not None:
        return search(lambda q: trial.mean(q, score), p, step)
    inputs = list(batches)
    if not inputs:
        raise OptxError("Delta.find_q: batches is empty; a few without labels will do.")
    with evaluating(model), torch.no_grad():
        full = [call(model, batch) for batch in inputs]
        apart = distance or output_distance
        if strategy == "learned":
            with torch.enable_grad():
                return learned_q(model, trial.changes, inputs, full, distance or _apart, p, seeds)

        def likeness(pruned: nn.Module) -> float:
            far = [apart(want, call(pruned, batch)) for want, batch in zip(full, inputs, strict=True)]
            return -sum(far) / len(far)

        return search(lambda q: trial.mean(q, likeness, drop=True), p, step)


def search(quality: Callable[[float], float], p: float, step: float | None = None) -> float:
    """The q between 1 - p and 1 of the highest quality: a coarse walk up, then a fine one about its best.

    A walk ends after more than three steps in a row that were no improvement.

    Args:
        quality: of a q; nan counts as worst.
        p: share dropped.
        step: of the coarse walk; the fine one's is a tenth. None: (1 - p) / 2, and no further than
            16 (1 - p), where a sixteenth of the change is expected; at p = 0.999, 1 is 2000 steps away.

    Raises:
        OptxError: step is not above 0.

    Example:
        >>> round(search(lambda q: -(q - 0.23) ** 2, p=0.9), 3)
        0.23
    """
    low = 1.0 - p
    high = min(_FARTHEST * low, 1.0) if step is None else 1.0
    step = low / 2 if step is None else step
    if not step > 0:
        raise OptxError(f"Delta.find_q: step is {step!r}; it must be above 0.")
    seen: dict[float, float] = {}

    def walk(start: float, stop: float, by: float) -> None:
        best, idle, count = -math.inf, 0, math.ceil(round((stop - start) / by, 6))
        for number in range(count):
            q = min(start + number * by, 1.0)
            found = seen[q] if q in seen else quality(q)
            seen[q] = -math.inf if math.isnan(found) else found
            idle = 0 if seen[q] > best else idle + 1
            best = max(best, seen[q])
            if idle > _PATIENCE:
                return

    walk(low, high + step / 1000, step)
    middle = max(seen, key=lambda q: seen[q])
    walk(max(low + 0.1 * step, middle - 0.9 * step), min(middle + step, high), 0.1 * step)
    return max(seen, key=lambda q: seen[q])


def per_layer(
    delta: Difference, stats: Mapping[str, InputStats], p: float, strategy: str, eta: float = 0.5
) -> dict[str, float]:
    """q by tensor name from the layers' inputs: the mean over a layer's output rows.

    Raises:
        OptxError: the statistics are of another model, or the delta has none of its layers.
    """
    served = {name: one for name, one in stats.items() if name in delta.entries}
    if not served:
        name = next(iter(stats))
        raise OptxError(f"Delta.find_q: the delta has no {name!r}. {near(name, delta.entries)}")
    check_stats(delta.entries, served, "Delta.find_q")
    found: dict[str, float] = {}
    for name, one in served.items():
        matrix = delta[name] if one.axis == 1 else delta[name].t()
        mean = one.mean.to(matrix.device)
        bias = name.removesuffix("weight") + "bias"
        # The change of the bias is one more column, whose input is 1.
        extra = delta[bias].to(matrix.device) if bias in delta.entries else None
        rows = max(1, _ROWS // max(1, matrix.shape[1]))
        sums = [_row_sums(matrix[at : at + rows], mean, extra, at) for at in range(0, matrix.shape[0], rows)]
        if sums:
            total, squares = (torch.cat(parts).cpu() for parts in zip(*sums, strict=True))
            q = mse_q(total, squares, p) if strategy == "mse" else analytic_q(total, squares, p, eta)
            found[name] = min(max(float(q.mean()), 1.0 - p), 1.0)
    return found


def _row_sums(rows: Tensor, mean: Tensor, bias: Tensor | None, at: int) -> tuple[Tensor, Tensor]:
    """Of c = change times mean input: its sum and its sum of squares, by row, in float64."""
    c = rows.double() * mean.double()
    total, squares = c.sum(1), c.square().sum(1)
    if bias is None:
        return total, squares
    extra = bias[at : at + len(rows)].double()
    return total + extra, squares + extra.square()


def mse_q(total: Tensor, squares: Tensor, p: float) -> Tensor:
    """The q with the lowest expected squared error of an output, by row: (1-p) + p S2 / S^2, at most 1.

    An extra of optx, not the paper's: a cheap reference. From E[h^2] = S^2 (1-(1-p)/q)^2 + S2 p (1-p) / q^2.

    Args:
        total: (rows,) S, the sum of c.
        squares: (rows,) S2, the sum of its squares.
        p: share dropped.

    Example:
        >>> round(float(mse_q(torch.tensor([-60.0]), torch.tensor([180.0]), 0.9)), 3)
        0.145
    """
    ratio = torch.where(squares > 0, squares / total.square(), torch.zeros_like(squares))
    return ((1.0 - p) + p * ratio).clamp(max=1.0)


def analytic_q(total: Tensor, squares: Tensor, p: float, eta: float = 0.5) -> Tensor:
    """The q at which the paper's bound on an output's error is nearest to zero, by row.

    |eta (1 - (1-p)/q) S + eta^2 Phi(p) S2 / (4 q^2) + log(2/gamma)| over the thousandths from 1-p to 0.998.
    As in the paper's code S has its sign (where it is positive all terms are, and q runs to 0.998), and the
    scan ends once four rows in five no longer improve; unlike it, sums are in float64.

    Args:
        total: (rows,) S, the sum of c.
        squares: (rows,) S2, the sum of its squares.
        p: share dropped.
        eta: the method's one parameter; larger ones trust the mean more. To be found on validation data.

    Example:
        >>> float(analytic_q(torch.tensor([-60.0]), torch.tensor([180.0]), 0.9))
        0.456
    """
    total, squares = total.double(), squares.double()
    best = torch.full_like(total, math.inf)
    q = torch.full_like(total, 1.0 - p)
    for thousandth in range(max(1, int((1.0 - p) * 1000)), 999):
        x = thousandth / 1000
        first = eta * (1 - (1 - p) / x) * total
        bound = (first + eta**2 * phi(p) * squares / (4 * x * x) + math.log(2 / _GAMMA)).abs()
        better = bound < best
        best, q = torch.where(better, bound, best), torch.where(better, x, q)
        if float(better.double().mean()) <= 0.2:
            break
    return q


class _Trial:
    """A model whose weights are pruned for the time of a question; the changes are in memory, once each."""

    def __init__(self, delta: Difference, model: nn.Module, p: float, seeds: Sequence[int]) -> None:
        self.model, self.p, self.seeds = model, p, seeds
        self.own = dict(model.named_parameters()) | dict(model.named_buffers())
        self.names = [name for name in delta.floating if name in self.own]
        if not self.names:
            name = next(iter(delta.entries))
            raise OptxError(f"Delta.find_q: the model has no {name!r}. {near(name, self.own)}")
        self.changes = {name: delta[name].to(self.own[name].device) for name in self.names}
        for name, change in self.changes.items():
            if change.shape != self.own[name].shape:
                raise OptxError(
                    f"Delta.find_q: {name!r} has shape {tuple(self.own[name].shape)} in the model and "
                    f"{tuple(change.shape)} in the delta."
                )

    def mean(self, q: float, ask: Score, drop: bool = False) -> float:
        """Over the seeds; ``drop`` leaves out the one that is farthest from the mean, if there are three."""
        values = [self._ask(q, seed, ask) for seed in self.seeds]
        if drop and len(values) > 2:
            middle = sum(values) / len(values)
            values.remove(max(values, key=lambda value: abs(value - middle)))
        return sum(values) / len(values)

    def _ask(self, q: float, seed: int, ask: Score) -> float:
        with evaluating(self.model), torch.no_grad():
            kept = {name: self.own[name].data for name in self.names}
            try:
                for name, change in self.changes.items():
                    pruned = Dropout(key_of(seed, name), self.p, q).scale(change)
                    self.own[name].data = (kept[name].to(change.dtype) - change + pruned).to(kept[name].dtype)
                return float(ask(self.model))
            finally:
                for name, tensor in kept.items():
                    self.own[name].data = tensor


def output_distance(full: Any, pruned: Any) -> float:
    """How far a pruned model's output is from the full one's.

    For language models (logits of three dimensions) the mean squared difference at the full model's five
    largest logits; else the mean absolute difference of the last hidden state, the logits, or the tensor.
    A classifier of transformers tells its hidden states where a batch has ``output_hidden_states=True``.

    Raises:
        OptxError: the output has neither.
    """
    return float(_apart(full, pruned))


def _last_hidden_state(output: Any) -> Any:
    states = getattr(output, "hidden_states", None)
    return states[-1] if states else getattr(output, "last_hidden_state", None)


def _logits(output: Any) -> Any:
    return getattr(output, "logits", None)


def _apart(full: Any, pruned: Any) -> Tensor:
    """`output_distance` with its gradient."""
    logits = _logits(full)
    if logits is not None and logits.ndim == 3:
        top = logits.float().topk(min(5, logits.shape[-1]), -1)
        return (pruned.logits.float().gather(-1, top.indices) - top.values).square().mean()
    for part in (_last_hidden_state, _logits):
        if (value := part(full)) is not None:
            return (part(pruned).float() - value.float()).abs().mean()
    if isinstance(full, Tensor):
        return (pruned.float() - full.float()).abs().mean()
    raise OptxError(
        f"Delta.find_q: the model gives a {type(full).__name__}, with neither logits nor last_hidden_state; "
        "pass distance=, a function of two outputs."
    )
