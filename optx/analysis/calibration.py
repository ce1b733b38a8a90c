"""Whether predicted probabilities are as often right as they say.

Source of `calibration_error`: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML
2017, arXiv 1706.04599, equation 3, after Naeini, Cooper, Hauskrecht, AAAI 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError, check_whole
from optx.analysis._class_numbers import check_classes, check_samples


def calibration_error(probs: Tensor, target: Tensor, bins: int = 15, *, ignore_index: int = -100) -> float:
    """Expected calibration error: the gap between confidence and accuracy, averaged over samples.

    Samples are sorted by confidence, the largest probability of each, into ``bins`` intervals of equal width,
    each with its upper end; of every interval |accuracy - mean confidence| counts by its share of the
    samples.

    Args:
        probs: probabilities, not logits: shape (N, C) or (N, C, d1, ...), any float dtype.
        target: class numbers, any integer dtype, shape (N,) or (N, d1, ...).
        bins: how many intervals.
        ignore_index: samples with this class number are not counted.

    Returns:
        A number in [0, 1]; nan if no sample counts.

    Paper values:
        ``bins=15``: every table of the paper (the default).

    Limits: Of the most probable class alone. It is biased upwards where intervals have few samples, so only
        numbers of equal sample sizes and intervals compare.

    Keywords: ECE, reliability, uncertainty, confidence, overconfident, Bayesian, diagnostics.

    Evidence: ``optx run meta``; ``test_calibration.py``.

    Source: arXiv 1706.04599, equation 3.

    Raises:
        ShapeError: target does not fit the probabilities.
        OptxError: probs are no probabilities, target is not of an integer dtype, or bins is below 1.
        IndexError: a class number is out of range.

    Example:
        >>> import torch, optx
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
        >>> round(optx.analysis.calibration_error(probs, torch.tensor([0, 1, 1, 1])), 6)
        0.4
    """
    bins = check_whole("calibration_error", "bins", bins, 1)
    check_samples("calibration_error", "probs", probs, target)
    counts = target != ignore_index
    with torch.no_grad(), torch.autocast(probs.device.type, enabled=False):
        confidence, guess = probs.detach().double().max(1)
        confidence, guess, label = confidence[counts], guess[counts], target[counts]
        _check_values(probs)
        check_classes("calibration_error", label, probs.shape[1], ignore_index)
        if not len(label):
            return float("nan")
        place = (confidence.clamp(0, 1) * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
        gap = (guess == label).double() - confidence
        sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, place, gap)
        return float(sums.abs().sum() / len(label))


def _check_values(probs: Tensor) -> None:
    sums = probs.detach().double().sum(1)
    # Half precision rounds each of the classes' numbers.
    slack = max(1e-3, 2 * float(torch.finfo(probs.dtype).eps))
    if not bool(((sums - 1).abs() <= slack).all() & (probs >= 0).all()):
        raise OptxError(
            "calibration_error: probs must be probabilities that sum to 1 over dimension 1. Pass "
            "logits.softmax(1), not logits."
        )
