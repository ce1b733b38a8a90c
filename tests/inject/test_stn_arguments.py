"""What self-tuning networks take as arguments, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

import optx


def hparams(count: int = 1, **options: Any) -> optx.HParams:
    return optx.HParams(**{f"h{i}": optx.hp(0.5 * i, **options) for i in range(count)})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: optx.hp(0.9, (0, 0.9)), r"value is 0\.9; it must lie strictly between 0\.0 and 0\.9"),
        (lambda: optx.hp(-1, (0, None)), r"value is -1; it must lie strictly between 0\.0 and inf"),
        (lambda: optx.hp(25, (0, 24), discrete=True), r"value is 25; it must lie from 0\.0 to 24\.0"),
        (lambda: optx.hp(0.5, (1, 0)), r"range is \(1, 0\); its low must be below its high"),
        (lambda: optx.hp(0.5, 3), r"range is 3; it must be \(low, high\)"),
        (lambda: optx.hp(float("nan")), "value is nan; it must be a finite number"),
        (lambda: optx.hp(1, sigma=-1), "sigma is -1; it must be a finite number of at least 0"),
        (lambda: optx.hp(1.5, (0, 4), discrete=True), "must be whole numbers if discrete=True"),
        (lambda: optx.HParams(), "none is given"),
        (lambda: optx.HParams(drop=0.1), r"drop is 0\.1; it must be made by optx\.hp"),
        (lambda: optx.STN(0.1), r"hparams is 0\.1; it must be optx\.HParams"),
        (lambda: optx.STN(hparams(), lr=0), "lr is 0; it must be at least"),
        (lambda: optx.STN(hparams(), lr=float("inf")), "lr is inf; it must be a finite number"),
        (lambda: optx.STN(hparams(), warmup=1.5), r"warmup is 1\.5; it must be a whole number"),
        (lambda: optx.STN(hparams(), train_steps=True), "train_steps is True; it must be a whole number"),
        (lambda: optx.STN(hparams(), seed="a"), "seed is 'a'; it must be a whole number"),
        (lambda: optx.STN(hparams(), delta="no"), "delta is 'no'; it must be one of True, False"),
        (lambda: optx.hp(1, shared="no"), "shared is 'no'; it must be one of True, False"),
        (lambda: optx.hp(1, sigma=1e-50), "sigma is 1e-50; it must be 0 or at least 1e-30"),
        (lambda: optx.HParams(batches=optx.hp(3)), "'batches' is what stn.history calls something else"),
        (lambda: optx.STN(hparams(), tau=-1), "tau is -1; it must be at least 0"),
        (lambda: optx.STN(hparams(), train_steps=0), "train_steps is 0; it must be at least 1"),
        (lambda: optx.STN(hparams(), dropout="h"), "no hyperparameter is called 'h'. Near: 'h0'"),
        (lambda: optx.STN(hparams(), dropout="h0"), "a rate must be continuous with a range from 0 at least"),
        (lambda: optx.STN(hparams(), dropout=0.5), r"dropout is 0\.5; it must be a hyperparameter's name"),
    ],
)
def test_what_is_refused_at_once(make: Any, says: str) -> None:
    with pytest.raises(optx.OptxError, match=says):
        make()


def test_numbers_of_numpy_are_numbers(tmp_path: Any) -> None:
    spec = optx.hp(np.int64(4), (np.int64(0), np.float32(24)), sigma=np.float32(0.5), discrete=np.True_)
    assert spec == optx.hp(4, (0, 24), discrete=True)
    options = {"lr": np.float32(0.5), "warmup": np.int64(0), "seed": np.int64(3)}
    stn = optx.attach(nn.Sequential(nn.Linear(2, 2)), optx.STN(optx.HParams(cut=spec), **options))
    stn.save(tmp_path / "saved")
    with stn.train_batch(np.int64(3)):
        assert stn.hparams["cut"].value.shape == (3,)
