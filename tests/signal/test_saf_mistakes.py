"""What SAF refuses, in one sentence each, before anything has changed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import optx
from optx._errors import FileError, OptxError, ShapeError


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_samples": 0}, "num_samples is 0; it must be a whole number from 1 on"),
        ({"num_samples": 3.0}, "num_samples is 3.0"),
        ({"weight": -0.1}, "weight is -0.1; it must be at least 0"),
        ({"tau": 0}, "tau is 0"),
        ({"lookback": 0}, "lookback is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"start_epoch": 1}, "start_epoch is 1 with lookback=3"),
        ({"lookback": 9}, "start_epoch must be at least 8."),
        ({"start_epoch": 5, "end_epoch": 6}, "end_epoch is 6, so no epoch has the loss; the first one is 6"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_options_out_of_range(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptxError, match=re.escape(words)):
        optx.SAF(**{"num_samples": 4} | given)


LOGITS = torch.zeros(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("logits", "index", "where", "error", "words"),
    [
        (
            LOGITS,
            [0, 4],
            None,
            OptxError,
            "index 4 is out of range: num_samples is 4, so indices are 0 to 3.",
        ),
        (LOGITS, [-1, 0], None, OptxError, "index -1 is out of range"),
        (LOGITS, [2, 2], None, OptxError, "index 2 is in the batch twice"),
        (
            LOGITS,
            [0, 1, 2],
            None,
            ShapeError,
            "index is torch.int64 in shape (3,); it must be 2 whole numbers",
        ),
        (LOGITS, torch.tensor([0.0, 1.0]), None, ShapeError, "index is torch.float32 in shape (2,)"),
        (LOGITS.detach(), [0, 1], None, OptxError, "these logits need no gradient"),
        (LOGITS.view(1, 2, 3, 1), [0], None, ShapeError, "classes last"),
        (torch.zeros(2, 4, requires_grad=True), [0, 1], None, ShapeError, "made for (B, 3)"),
        (torch.zeros(2, 1, 3, requires_grad=True), [0, 1], None, ShapeError, "made for (B, 3)"),
        (
            LOGITS,
            [0, 1],
            torch.ones(2),
            ShapeError,
            "where is torch.float32 in shape (2,); it must be torch.bool",
        ),
        (LOGITS, [0, 1], torch.ones(3) > 0, ShapeError, "where is torch.bool in shape (3,)"),
    ],
)
def test_calls_that_are_wrong(logits: Tensor, index: Any, where: Any, error: type, words: str) -> None:
    saf = optx.SAF(4)
    saf.set_epoch(0)
    saf(LOGITS, [0, 1])
    before = saf.state_dict()["record"]
    with pytest.raises(error, match=re.escape(words)):
        saf(logits, index, where)
    after = saf.state_dict()["record"]
    assert torch.equal(after["values"], before["values"])
    assert torch.equal(after["tags"], before["tags"])


def test_sequences_that_do_not_fit() -> None:
    saf = optx.SAF(4)
    saf.set_epoch(0)
    saf(torch.zeros(1, 3, 5, requires_grad=True), [0])
    with pytest.raises(ShapeError, match="have 4 positions and the record has 3; give SAF the longest"):
        saf(torch.zeros(1, 4, 5, requires_grad=True), [0])
    saf = optx.SAF(4, max_length=9)
    saf.set_epoch(0)
    with pytest.raises(ShapeError, match=r"max_length is 9, but logits are \(B, C\)"):
        saf(LOGITS, [0, 1])


def test_epochs_must_be_told() -> None:
    saf = optx.SAF(2)
    with pytest.raises(OptxError, match=r"no epoch was set; call set_epoch\(epoch\)"):
        saf(LOGITS, [0, 1])
    with pytest.raises(OptxError, match=r"epoch is 1\.5; it must be a whole number"):
        saf.set_epoch(1.5)  # type: ignore[arg-type]
    saf.set_epoch(0)
    saf(LOGITS, [0, 1])
    with pytest.warns(UserWarning, match="2 samples came again within epoch 0"):
        saf(LOGITS, [0, 1])
    saf(LOGITS, [0, 1])  # said once


def test_a_state_of_something_else_is_refused() -> None:
    state = optx.SAF(3, lookback=2, top_k=2, dtype=torch.float32).state_dict()
    for options, words in (
        ({"num_samples": 5}, "a dataset with 3 samples and this one has 5"),
        ({"lookback": 1}, "lookback=2, this one has lookback=1"),
        ({"top_k": 3}, "top_k=2, this one has top_k=3"),
        ({"tau": 4.0}, "tau=5.0, this one has tau=4.0"),
        ({"dtype": torch.float16}, "dtype=torch.float32, this one has dtype=torch.float16"),
    ):
        usual = {"num_samples": 3, "lookback": 2, "top_k": 2, "dtype": torch.float32}
        saf = optx.SAF(**usual | options)
        with pytest.raises(FileError, match=words):
            saf.load_state_dict(state)
        assert saf.epoch is None
    with pytest.raises(FileError, match="none of SAF's"):
        optx.SAF(3).load_state_dict({"epoch": 3})
