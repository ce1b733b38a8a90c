"""A step law of one's own runs, by the procedure of arXiv 2503.04715 and of the code beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optx._errors import OptxError, check_range, check_whole, warn
from optx.scaling._step_law import StepLaw

Array = npt.NDArray[Any]  # float64
COLUMNS = ("params", "tokens", "lr", "batch_tokens", "loss")
_SINGULAR = 1e-10  # least ratio of the eigenvalues of a resample's scatter


def fit_step_law(
    runs: Iterable[Mapping[str, float]] | Mapping[str, Sequence[float]],
    *,
    within: float = 0.0025,
    resamples: int = 1000,
    seed: int = 0,
) -> StepLaw:
    """Fit a step law to training runs: the best learning rates and batches over sizes and numbers of tokens.

    Of the runs with the same N and D those are kept whose loss is within a share of the lowest. Least squares
    of log lr on (log N, log D) and of log batch on log D are repeated over resamples of the kept runs; the
    law has the means of their coefficients, and their covariance.

    Args:
        runs: a table: one mapping a run, or one of columns (a DataFrame too), with ``params`` (N, without
            embeddings), ``tokens`` (D), ``lr`` (peak), ``batch_tokens`` and ``loss`` (smoothed, above 0; not
            a number or infinite where a run diverged).
        within: a run is kept at up to this share above the least loss of its N and D.
        resamples: how often the kept runs are drawn anew, with replacement.
        seed: of the draws.

    Returns:
        A `StepLaw` for ``law=`` of `optx.scaling.step_law`; ``law.rows`` are the numbers of the kept runs.

    Paper values:
        ``within=0.0025, resamples=1000`` (the defaults).

    Limits: The optimum is a plateau, and coarse grids of learning rates gave others another exponent of D:
        take steps of a factor sqrt(2). A group whose best run is at the end of its grid is told by a
        warning. Resamples in which N and D don't vary apart are drawn again.

    Keywords: scaling law, hyperparameters, learning rate, batch size, bootstrap, regression.

    Evidence: ``test_fit_step_law.py``, planted laws; no recipe.

    Source: "Predictable Scale: Part I", Step Law, arXiv 2503.04715, section 3, and the code beside it.

    Raises:
        OptxError: a column is missing or not all above 0, a group has no finite loss, or the kept runs don't
            tell N and D apart.

    Example:
        >>> import optx
        >>> runs = [
        ...     dict(params=n, tokens=d, lr=2 * n**-0.7 * d**0.3, batch_tokens=d**0.5, loss=3.0)
        ...     for n in (1e8, 4e8) for d in (1e9, 8e9)
        ... ]
        >>> law = optx.scaling.fit_step_law(runs)
        >>> [round(x, 6) for x in law.lr[1:]]
        [-0.7, 0.3]
    """
    check_range("fit_step_law", "within", within, 0.0)
    check_whole("fit_step_law", "resamples", resamples, 2)
    check_whole("fit_step_law", "seed", seed, 0)
    table = _table(runs)
    rows = _kept(table, within)
    n, d, lr, batch = (np.log(table[name][rows]) for name in COLUMNS[:4])
    both, one = np.stack([n, d], 1), d[:, None]
    _check_scatter(one, "tokens")
    _check_scatter(both, "params and tokens")
    draws = _draws(both, resamples, np.random.default_rng(seed))
    of_lr, of_batch = _fits(both, lr, draws), _fits(one, batch, draws)
    params, tokens = table["params"][rows], table["tokens"][rows]
    return StepLaw(
        lr=tuple(of_lr.mean(0).tolist()),
        batch=tuple(of_batch.mean(0).tolist()),
        lr_covariance=tuple(map(tuple, np.cov(of_lr.T).tolist())),
        batch_covariance=tuple(map(tuple, np.cov(of_batch.T).tolist())),
        params=(float(params.min()), float(params.max())),
        tokens=(float(tokens.min()), float(tokens.max())),
        rows=tuple(rows.tolist()),
    )


def _table(runs: Any) -> dict[str, Array]:
    if not hasattr(runs, "keys"):
        listed: list[Any] = list(runs) if isinstance(runs, Iterable) else [runs]
        odd = next((i for i, run in enumerate(listed) if not hasattr(run, "keys")), None)
        if odd is not None:
            raise OptxError(
                f"fit_step_law: run {odd} is a {type(listed[odd]).__name__}; it must be a mapping with "
                f"{COLUMNS}."
            )
        lacking = next(((i, c) for i, run in enumerate(listed) for c in COLUMNS if c not in run), None)
        if lacking is not None:
            raise OptxError(f"fit_step_law: run {lacking[0]} has no {lacking[1]!r}; each needs {COLUMNS}.")
        runs = {column: [run[column] for run in listed] for column in COLUMNS}
    lacks = [column for column in COLUMNS if column not in runs]
    if lacks:
        raise OptxError(f"fit_step_law: runs have no {lacks[0]!r}; they need {COLUMNS}.")
    table = {column: _numbers(column, runs[column]) for column in COLUMNS}
    sizes = {column: len(values) for column, values in table.items()}
    if len(set(sizes.values())) > 1 or not sizes["loss"]:
        raise OptxError(f"fit_step_law: the columns have {sizes} runs; they must be one number, above 0.")
    for column, values in table.items():
        good = (values > 0) & np.isfinite(values)
        bad = ~(good | ~np.isfinite(values)) if column == "loss" else ~good
        if bad.any():
            where = int(bad.argmax())
            raise OptxError(f"fit_step_law: {column} of run {where} is {values[where]}; it must be above 0.")
    return table


def _numbers(column: str, values: Any) -> Array:
    try:
        found = np.asarray(list(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptxError(f"fit_step_law: {column} holds what is no number ({error}).") from None
    if found.ndim != 1:
        raise OptxError(f"fit_step_law: {column} has shape {found.shape}; it must be one number a run.")
    return found


def _kept(table: Mapping[str, Array], within: float) -> Array:
    """Numbers of the runs within a share of the least loss of their N and D, in order."""
    groups: dict[tuple[float, float], list[int]] = {}
    for row, (n, d) in enumerate(zip(table["params"].tolist(), table["tokens"].tolist(), strict=True)):
        groups.setdefault((n, d), []).append(row)
    kept: list[int] = []
    edges: list[str] = []
    for (n, d), rows in groups.items():
        losses = np.where(np.isfinite(table["loss"][rows]), table["loss"][rows], np.inf)
        if not np.isfinite(losses.min()):
            raise OptxError(f"fit_step_law: no run with params {n:g} and tokens {d:g} has a finite loss.")
        kept += [row for row, loss in zip(rows, losses, strict=True) if loss <= losses.min() * (1 + within)]
        best = rows[int(losses.argmin())]
        ends = [c for c in ("lr", "batch_tokens") if _at_an_end(table[c][rows], table[c][best])]
        edges += [f"{column} at params {n:g}, tokens {d:g}" for column in ends]
    if edges:
        more = f" and {len(edges) - 3} more" if len(edges) > 3 else ""
        warn(
            f"fit_step_law: the best run is at the end of its grid, so the optimum may lie beyond it: "
            f"{'; '.join(edges[:3])}{more}."
        )
    return np.asarray(sorted(kept))


def _at_an_end(values: Array, best: float) -> bool:
    """Whether the best of a grid of at least three values is its first or last."""
    return len(set(values.tolist())) > 2 and best in (values.min(), values.max())


def _check_scatter(x: Array, what: str) -> None:
    if _spread(x - x.mean(0), np.ones((1, len(x))))[0] < _SINGULAR:
        raise OptxError(
            f"fit_step_law: {what} of the kept runs don't vary independently, so their exponents can't be "
            "told apart; add runs at other sizes and numbers of tokens (not all at one ratio)."
        )


def _spread(x: Array, counts: Array) -> Array:
    """By draw, the least eigenvalue of the scatter of the logarithms, over a unit scatter."""
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ x
    scatter = np.einsum("rn,ni,nj->rij", share, x, x) - mean[:, :, None] * mean[:, None, :]
    return np.linalg.eigvalsh(scatter)[:, 0]


def _draws(x: Array, resamples: int, random: np.random.Generator) -> Array:
    """How often each run is in each resample; those that can't be fitted are drawn again."""
    rows, found = len(x), 0
    good: list[Array] = []
    for _ in range(100):
        drawn = random.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)
        good.append(drawn[_spread(x - x.mean(0), drawn) >= _SINGULAR])
        found += len(good[-1])
        if found >= resamples:
            return np.concatenate(good)[:resamples]
    raise OptxError("fit_step_law: resamples of the kept runs hardly ever vary in N and D; give more runs.")


def _fits(x: Array, y: Array, draws: Array) -> Array:
    """Intercept and slopes of weighted least squares, a row a draw; centred, for the logarithms are large."""
    middle, level = x.mean(0), y.mean()
    design = np.concatenate([np.ones((len(x), 1)), x - middle], 1)
    normal = np.einsum("rn,ni,nj->rij", draws, design, design)
    right = np.einsum("rn,ni,n->ri", draws, design, y - level)
    solved = np.linalg.solve(normal, right[:, :, None])[:, :, 0]
    slopes = solved[:, 1:]
    return np.concatenate([(level + solved[:, 0] - slopes @ middle)[:, None], slopes], 1)
