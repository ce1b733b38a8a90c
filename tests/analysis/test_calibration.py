"""The expected calibration error, against torchmetrics' and a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx.analysis import calibration_error


def plain(probs: Tensor, target: Tensor, bins: int) -> float:
    groups: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probs.double(), target, strict=True):
        sure = float(row.max())
        place = next(i for i in range(bins) if sure <= (i + 1) / bins or i == bins - 1)
        groups.setdefault(place, []).append((sure, int(row.argmax()) == int(label)))
    gaps = [abs(sum(right - sure for sure, right in group)) for group in groups.values()]
    return sum(gaps) / len(target)


def drawn(seed: int, samples: int, classes: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=g, dtype=torch.float64)
    return logits.softmax(1), torch.randint(classes, (samples,), generator=g)


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 2, 15]))
def test_it_is_that_of_a_plain_loop(seed: int, samples: int, classes: int, bins: int):
    probs, target = drawn(seed, samples, classes)
    assert calibration_error(probs, target, bins) == pytest.approx(plain(probs, target, bins), abs=1e-12)


def test_it_is_that_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    for seed in range(3):
        probs, target = (t.float() if t.is_floating_point() else t for t in drawn(seed, 200, 4))
        theirs = functional.multiclass_calibration_error(probs, target, num_classes=4, n_bins=15)
        assert calibration_error(probs, target) == pytest.approx(float(theirs), abs=1e-5)


def test_the_ends_of_intervals_and_known_values():
    sure = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert calibration_error(sure, torch.tensor([0, 0])) == 0.25
    assert calibration_error(sure, torch.tensor([1, -100])) == 1.0
    assert math.isnan(calibration_error(sure, torch.tensor([-100, -100])))
    deep = sure.view(1, 2, 2).movedim(1, -1)  # (N, C, d)
    assert calibration_error(deep, torch.tensor([[0, 0]])) == 0.25
    # 0.5 is in (0, 0.5] and not in the next: alone there, and wrong.
    four = torch.tensor([[0.5, 0.5], [0.6, 0.4]])
    assert calibration_error(four, torch.tensor([1, 0]), bins=2) == pytest.approx((0.5 + 0.4) / 2)
    assert calibration_error(four.bfloat16(), torch.tensor([1, 0]), bins=2) == pytest.approx(0.45, abs=3e-3)


@pytest.mark.parametrize(
    ("probs", "target", "bins", "words"),
    [
        (torch.tensor([[2.0, 1.0]]), torch.tensor([0]), 15, "must be probabilities that sum to 1"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), 15, "must be probabilities"),
        (torch.tensor([[float("nan"), 0.5]]), torch.tensor([0]), 15, "must be probabilities"),
        (torch.tensor([0.5, 0.5]), torch.tensor(0), 15, r"shape \(2,\)"),
        (torch.tensor([[1, 0]]), torch.tensor([0]), 15, "dtype torch.int64; they must be floating"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), 15, "target has dtype torch.float32"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), 15, r"target has shape \(2,\).*must be \(1,\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0, "bins is 0"),
    ],
)
def test_what_has_no_calibration_is_refused(probs: Tensor, target: Tensor, bins: int, words: str):
    with pytest.raises(optx.OptxError, match=words):
        calibration_error(probs, target, bins)


def test_class_numbers_out_of_range_are_refused():
    with pytest.raises(IndexError, match=r"from 2 to 2; with 2 classes they must be in 0\.\.1"):
        calibration_error(torch.tensor([[0.5, 0.5]]), torch.tensor([2]))
