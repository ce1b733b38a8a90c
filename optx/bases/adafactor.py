"""torch's and transformers' Adafactor as rules (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 to 6).

Of a matrix, means of g² over rows and columns are kept. They are summed in one pass, the length of the step
that follows from them in a second, and a third takes the step. A vector keeps a mean per element. These are
different state, and one kernel serves a param group, so a group has to be of matrices or of vectors alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import Rule, rule
from optx.bases._common import SIGNED, SQUARES, lengths, register_library, turned
from optx.ops import maximum, minimum, sqrt
from optx.step.base_update import BaseRules, Sums
from optx.step.bases import register_base
from optx.step.declared import per_column, per_row, per_tensor
from optx.step.transform import Group


def kind_of(group: Group) -> int | str:
    """How many dimensions a group's weights have, 2 or less; or why they can't be served."""
    dims = {p.ndim for p in group["params"]}
    if any(ndim > 2 for ndim in dims):
        return "Adafactor's means are over the last two dimensions of a weight, and one of the group has more"
    if 2 in dims and len(dims) > 1:
        return (
            "Adafactor keeps other state of matrices than of vectors; put the vectors into a param group of "
            "their own to have both fused"
        )
    return 2 if 2 in dims else 1


@rule(writes="row_sq")
def row_square(g: Any) -> Any:
    """Summed over a row."""
    return g * g


@rule(writes="column_sq")
def column_square(g: Any) -> Any:
    """Summed over a column."""
    return g * g


# ---- torch -----------------------------------------------------------------------------------------------


@rule(writes=("share", "pace", "keep"))
def torch_scalars(step: Any, beta2_decay: Any, lr: Any, weight_decay: Any) -> Any:
    """What the means take of a new square, the rate before it is scaled, and what decay leaves."""
    return step**beta2_decay, minimum(lr, 1.0 / sqrt(step)), 1.0 - lr * weight_decay


@rule(writes="row_var")
def row_mean(row_sq: Any, row_var: Any, columns: Any, share: Any) -> Any:
    """The rows' moving averages."""
    return row_var + share * (row_sq / columns - row_var)


@rule(writes=("col_var", "column_pace"))
def column_mean(column_sq: Any, col_var: Any, rows: Any, share: Any) -> Any:
    """The columns', and their inverse roots, which are too slow to be taken per element."""
    mean = col_var + share * (column_sq / rows - col_var)
    return mean, 1.0 / sqrt(mean)


@rule(writes="row_total")
def all_rows(row_var: Any) -> Any:
    """Summed over the rows."""
    return row_var * 1.0


@rule(writes="variance")
def vector_mean(g: Any, variance: Any, share: Any) -> Any:
    """A vector's."""
    return variance + share * (g * g - variance)


@rule(writes="w")
def torch_step(w: Any, direction: Any, rate: Any, keep: Any) -> Any:
    """Decay and step."""
    return w * keep - rate * direction


@functools.cache
def _torch_parts(eps1: float, eps2: float) -> dict[str, Rule]:
    """The rules that read eps, which torch has as a pair whose first may be None."""
    fastest = 1.0 / max(eps1, 1e-38)  # eps may be 0, and float32 has no more

    @rule(writes="direction")
    def of_matrix(g: Any, row_var: Any, column_pace: Any, row_total: Any, rows: Any) -> Any:
        row_pace = 1.0 / sqrt(row_var / maximum(row_total / rows, eps1))  # once per row
        return g * minimum(row_pace * column_pace, fastest)

    @rule(writes="direction")
    def of_vector(g: Any, variance: Any) -> Any:
        return g / sqrt(maximum(variance, eps1 * eps1))

    @rule(writes="rate")
    def rate(weight_sq: Any, direction_sq: Any, numel: Any, pace: Any, d: Any) -> Any:
        scale = maximum(eps2, sqrt(weight_sq / numel))
        return scale * pace / maximum(1.0, sqrt(direction_sq / numel) / d)

    return {"of_matrix": of_matrix, "of_vector": of_vector, "rate": rate}


def torch_adafactor(group: Group, _: Any) -> BaseRules | str:
    """The rules of torch's."""
    kind = kind_of(group)
    dtypes = {p.dtype for p in group["params"]}
    if isinstance(kind, str):
        return kind
    if len(dtypes) > 1:
        return "Adafactor's eps depends on the dtype, and the group has several"
    eps1, eps2 = group["eps"]
    eps1 = torch.finfo(dtypes.pop()).eps if eps1 is None else eps1
    return _torch_adafactor(kind, float(eps1), float(eps2), bool(group["maximize"]))


@functools.cache
def _torch_adafactor(kind: int, eps1: float, eps2: float, maximize: bool) -> BaseRules:
    parts = _torch_parts(eps1, eps2)
    last = (Sums(lengths, then=parts["rate"]), torch_step)
    if kind == 1:
        update = (*turned(maximize), vector_mean, parts["of_vector"], *last)
        return BaseRules(update, (torch_scalars,), {"variance": SQUARES}, counted=True)
    sums = (
        Sums(row_square, then=row_mean, over="rows", total=all_rows),
        Sums(column_square, then=column_mean, over="columns"),
    )
    slots = {"row_var": per_row(None, keepdim=True), "col_var": per_column(None, keepdim=True)}
    return BaseRules(
        (*turned(maximize), *sums, parts["of_matrix"], *last), (torch_scalars,), slots, counted=True
    )


# ---- transformers ----------------------------------------------------------------------------------------
# Its eps is a pair of numbers, of which rules have the first as ep1.


@rule(writes=("beta2t", "pace"))
def given_pace(step: Any, decay_rate: Any, lr: Any) -> Any:
    """``relative_step=False``."""
    return 1.0 - step**decay_rate, lr * 1.0


@rule(writes=("beta2t", "pace"))
def relative_pace(step: Any, decay_rate: Any) -> Any:
    """``relative_step=True``."""
    return 1.0 - step**decay_rate, minimum(0.01, 1.0 / sqrt(step))


@rule(writes=("beta2t", "pace"))
def warm_pace(step: Any, decay_rate: Any) -> Any:
    """``warmup_init=True``."""
    return 1.0 - step**decay_rate, minimum(1e-6 * step, 1.0 / sqrt(step))


@rule(writes="exp_avg_sq_row")
def row_average(row_sq: Any, exp_avg_sq_row: Any, columns: Any, beta2t: Any, ep1: Any) -> Any:
    """The rows' moving averages."""
    return exp_avg_sq_row * beta2t + (1.0 - beta2t) * (row_sq / columns + ep1)


@rule(writes=("exp_avg_sq_col", "column_pace"))
def column_average(column_sq: Any, exp_avg_sq_col: Any, rows: Any, beta2t: Any, ep1: Any) -> Any:
    """The columns', and their inverse roots."""
    mean = exp_avg_sq_col * beta2t + (1.0 - beta2t) * (column_sq / rows + ep1)
    return mean, 1.0 / sqrt(mean)


@rule(writes="row_total")
def all_averages(exp_avg_sq_row: Any) -> Any:
    """Summed over the rows."""
    return exp_avg_sq_row * 1.0


@rule(writes="direction")
def of_matrix(g: Any, exp_avg_sq_row: Any, column_pace: Any, row_total: Any, rows: Any) -> Any:
    """The step before it is scaled."""
    return g * (1.0 / sqrt(exp_avg_sq_row / (row_total / rows))) * column_pace


@rule(writes="exp_avg_sq")
def vector_average(g: Any, exp_avg_sq: Any, beta2t: Any, ep1: Any) -> Any:
    """A vector's moving average."""
    return exp_avg_sq * beta2t + (1.0 - beta2t) * (g * g + ep1)


@rule(writes="direction")
def of_vector(g: Any, exp_avg_sq: Any) -> Any:
    """The step before it is scaled."""
    return g / sqrt(exp_avg_sq)


@rule(writes=("RMS", "rate", "decay"))
def plain_rate(
    weight_sq: Any, direction_sq: Any, numel: Any, pace: Any, clip_threshold: Any, weight_decay: Any
) -> Any:
    """``scale_parameter=False``."""
    shorter = maximum(1.0, sqrt(direction_sq / numel) / clip_threshold)
    return sqrt(weight_sq / numel), pace / shorter, weight_decay * pace


@rule(writes=("RMS", "rate", "decay"))
def scaled_rate(
    weight_sq: Any,
    direction_sq: Any,
    numel: Any,
    pace: Any,
    clip_threshold: Any,
    weight_decay: Any,
    ep2: Any,
) -> Any:
    """By the weight's own size."""
    size = sqrt(weight_sq / numel)
    pace = maximum(ep2, size) * pace
    shorter = maximum(1.0, sqrt(direction_sq / numel) / clip_threshold)
    return size, pace / shorter, weight_decay * pace


@rule(writes="w")
def step_by(w: Any, direction: Any, rate: Any, decay: Any) -> Any:
    """Decay and step."""
    return w - decay * w - rate * direction


@rule(writes=("w", "exp_avg"))
def step_by_average(w: Any, direction: Any, exp_avg: Any, rate: Any, decay: Any, beta1: Any) -> Any:
    """The same along a moving average of steps."""
    exp_avg = exp_avg * beta1 + (1.0 - beta1) * (rate * direction)
    return w - decay * w - exp_avg, exp_avg


def transformers_adafactor(group: Group, _: Any) -> BaseRules | str:
    """The rules of transformers'."""
    kind = kind_of(group)
    if isinstance(kind, str):
        return kind
    pace = given_pace
    if group["relative_step"]:
        pace = warm_pace if group["warmup_init"] else relative_pace
    rate = scaled_rate if group["scale_parameter"] else plain_rate
    return _transformers_adafactor(kind, pace, rate, group["beta1"] is not None)


@functools.cache
def _transformers_adafactor(kind: int, pace: Rule, rate: Rule, averaged: bool) -> BaseRules:
    slots = {"RMS": per_tensor(torch.float32), **({"exp_avg": SIGNED} if averaged else {})}
    last = (Sums(lengths, then=rate), step_by_average if averaged else step_by)
    if kind == 1:
        update = (vector_average, of_vector, *last)
        return BaseRules(update, (pace,), {**slots, "exp_avg_sq": SQUARES}, counted="number")
    sums = (
        Sums(row_square, then=row_average, over="rows", total=all_averages),
        Sums(column_square, then=column_average, over="columns"),
    )
    slots |= {"exp_avg_sq_row": per_row(None), "exp_avg_sq_col": per_column(None)}
    return BaseRules((*sums, of_matrix, *last), (pace,), slots, counted="number")


register_library("transformers.optimization.Adafactor", transformers_adafactor, "5")
register_base(torch.optim.Adafactor, torch_adafactor)
