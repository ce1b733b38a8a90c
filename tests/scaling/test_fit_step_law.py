"""Laws that were planted in tables of runs are found again, and tables that can't tell are refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optx._errors import OptxError
from optx.scaling import StepLaw, fit_step_law, step_law

SIZES, AMOUNTS = (1e8, 3e8, 1e9), (2e9, 1e10, 8e10)
LR, BATCH = (math.log(1.79), -0.713, 0.307), (math.log(0.58), 0.571)


def optimum(n, d, lr=LR, batch=BATCH):
    return (
        math.exp(lr[0] + lr[1] * math.log(n) + lr[2] * math.log(d)),
        math.exp(batch[0] + batch[1] * math.log(d)),
    )


def run(n, d, lr, batch, loss=3.0):
    return {"params": n, "tokens": d, "lr": lr, "batch_tokens": batch, "loss": loss}


def optima(**law):
    return [run(n, d, *optimum(n, d, **law)) for n, d in itertools.product(SIZES, AMOUNTS)]


def bowls(across=2.0):
    """Losses of a grid of rates and batches, steps of sqrt 2 apart, whose middle is off the optimum."""
    steps = [math.sqrt(2) ** k for k in range(-6, 7)]
    rows = []
    for n, d in itertools.product(SIZES, AMOUNTS):
        lr, batch = optimum(n, d)
        base = (2.0 ** round(math.log2(lr)), 2.0 ** round(math.log2(batch)))
        for x, y in itertools.product(steps, steps):
            off = (math.log(base[0] * x / lr), math.log(base[1] * y / batch))
            loss = across * (1 + 0.02 * off[0] ** 2 + 0.01 * off[1] ** 2)
            rows.append(run(n, d, base[0] * x, base[1] * y, loss))
    return rows


exponents = st.floats(-1, 1)


@settings(max_examples=20)
@given(st.tuples(st.floats(-3, 3), exponents, exponents), st.tuples(st.floats(-3, 3), exponents))
def test_a_law_without_noise_is_found(lr, batch):
    found = fit_step_law(optima(lr=lr, batch=batch), resamples=50)
    assert found.lr == pytest.approx(lr, abs=1e-6)
    assert found.batch == pytest.approx(batch, abs=1e-6)
    assert np.allclose(found.lr_covariance, 0, atol=1e-12)


def test_resamples_that_cannot_be_fitted_are_drawn_again():
    """Of four runs, most resamples have one size or one number of tokens, or both on a line."""
    runs = [run(n, d, *optimum(n, d)) for n in SIZES[:2] for d in AMOUNTS[:2]]
    found = fit_step_law(runs, resamples=300)
    assert found.lr == pytest.approx(LR, abs=1e-6)
    assert found.batch == pytest.approx(BATCH, abs=1e-6)


def test_the_published_constants_come_back_and_say_the_same():
    found = fit_step_law(optima())
    assert found.lr == pytest.approx(LR, abs=1e-6)
    assert found.batch == pytest.approx(BATCH, abs=1e-6)
    r = step_law(5e8, 5e9, law=found)
    assert (r.lr, r.batch_tokens) == pytest.approx(optimum(5e8, 5e9))
    assert r.interval.lr == pytest.approx((r.lr, r.lr), rel=1e-6)
    assert (found.params, found.tokens) == ((1e8, 1e9), (2e9, 8e10))
    with pytest.warns(UserWarning, match=r"2e\+09 parameters, fitted to 1e\+08 to 1e\+09"):
        step_law(2e9, 5e9, law=found)


@pytest.mark.parametrize("within", [0.0, 0.0025, 0.01])
def test_exactly_the_rows_within_the_share_are_kept(within):
    planted = [1.001, 0.0, 0.5, 0.999, 2.0, 40.0, math.nan, math.inf]
    rows = [
        run(n, d, lr * (1 + 0.1 * k), batch, 3.0 * (1 + share * (within or 0.001)))
        for n, d in itertools.product(SIZES, AMOUNTS)
        for lr, batch in [optimum(n, d)]
        for k, share in enumerate(planted, start=-1)
    ]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    good = [i for i, r in enumerate(rows) if r["loss"] <= 3.0 * (1 + (0.9995 * within))]
    assert fit_step_law(rows, within=within, resamples=20).rows == tuple(good)
    assert len(good) == 9 * (3 if within else 1)


def test_exponents_from_bowls_on_a_grid():
    found = fit_step_law(bowls(), resamples=200)
    assert found.lr[1:] == pytest.approx(LR[1:], abs=0.03)
    assert found.batch[1] == pytest.approx(BATCH[1], abs=0.03)
    assert len(found.rows) > 9
    assert 0 < found.lr_covariance[1][1] < 0.03**2


def test_the_covariance_is_that_of_fits_to_resamples():
    rows = bowls()
    found = fit_step_law(rows, resamples=400, seed=1)
    kept = [rows[i] for i in found.rows]
    x = np.array([[1, math.log(r["params"]), math.log(r["tokens"])] for r in kept])
    y = np.log([r["lr"] for r in kept])
    draws = np.random.default_rng(7).integers(len(kept), size=(400, len(kept)))
    fits = np.array([np.linalg.lstsq(x[i], y[i], rcond=None)[0] for i in draws])
    assert np.sqrt(np.diag(found.lr_covariance)) == pytest.approx(fits.std(0, ddof=1), rel=0.2)
    assert found.lr == pytest.approx(fits.mean(0), abs=4 * float(fits.std(0)[0]) / 20)
    assert found.lr_covariance[0][1] < 0


def test_a_table_of_columns_and_the_seed():
    rows = bowls()
    columns = {name: [r[name] for r in rows] for name in rows[0]}
    assert fit_step_law(columns, resamples=30) == fit_step_law(rows, resamples=30)
    assert fit_step_law(iter(rows), resamples=30) == fit_step_law(rows, resamples=30)
    assert fit_step_law(rows, resamples=30, seed=1) != fit_step_law(rows, resamples=30)
    pandas = pytest.importorskip("pandas")
    assert fit_step_law(pandas.DataFrame(rows), resamples=30) == fit_step_law(rows, resamples=30)


def test_an_optimum_at_the_end_of_its_grid_is_told():
    rows = optima()
    lr, batch = optimum(SIZES[0], AMOUNTS[0])
    rows += [run(SIZES[0], AMOUNTS[0], lr * factor, batch, 3.1) for factor in (2, 4)]
    with pytest.warns(UserWarning, match=r"end of its grid.*: lr at params 1e\+08, tokens 2e\+09\."):
        assert isinstance(fit_step_law(rows, resamples=20), StepLaw)


@pytest.mark.parametrize("keep", [lambda n, d: d == 2e9, lambda n, d: n * 20 == d or n * 20 == d / 4])
def test_runs_that_do_not_tell_sizes_from_tokens_are_refused(keep):
    pairs = [(n, d) for n in (1e8, 3e8, 1e9) for d in (2e9, 6e9, 2e10) if keep(n, d)]
    assert len(pairs) > 2
    rows = [run(n, d, *optimum(n, d)) for n, d in pairs]
    with pytest.raises(OptxError, match="don't vary independently"):
        fit_step_law(rows)


def test_runs_of_one_ratio_are_refused():
    with pytest.raises(OptxError, match="params and tokens of the kept runs don't vary"):
        fit_step_law([run(n, 20 * n, *optimum(n, 20 * n)) for n in SIZES])


@pytest.mark.parametrize("column", ["params", "tokens", "lr", "batch_tokens", "loss"])
def test_bad_tables_are_refused_by_column_and_run(column):
    rows = optima()
    for bad in (0.0, -1.0):
        with pytest.raises(OptxError, match=f"{column} of run 2 is {bad}"):
            fit_step_law([*rows[:2], {**rows[2], column: bad}, *rows[3:]])
    del rows[3][column]
    with pytest.raises(OptxError, match=f"run 3 has no '{column}'"):
        fit_step_law(rows)
    whole = {name: [1.0, 2.0] for name in rows[0]}
    with pytest.raises(OptxError, match=f"no '{column}'"):
        fit_step_law({name: values for name, values in whole.items() if name != column})
    with pytest.raises(OptxError, match="they must be one number"):
        fit_step_law({**whole, column: [1.0]})


def test_a_group_that_diverged_and_no_runs():
    rows = optima()
    rows[4]["loss"] = math.nan
    with pytest.raises(OptxError, match="no run with params 3e"):
        fit_step_law(rows)
    with pytest.raises(OptxError, match="they must be one number, above 0"):
        fit_step_law([])


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        (5, "run 0 is a int"),
        ([[1.0, 2.0]], "run 0 is a list"),
        ([{**optima()[0], "lr": "x"}], "lr holds what is no number"),
        ({name: [[1.0], [2.0]] for name in optima()[0]}, r"params has shape \(2, 1\)"),
    ],
)
def test_what_is_no_table_is_told(runs, told):
    with pytest.raises(OptxError, match=told):
        fit_step_law(runs)
    with pytest.raises(OptxError, match="seed is -1"):
        fit_step_law(optima(), seed=-1)
    with pytest.raises(OptxError, match="law is a str"):
        step_law(1e9, 1e11, law="mine")
