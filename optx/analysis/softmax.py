"""Whether a softmax still tells classes apart in the numbers that it is computed in.

Source of `softmax_collapse`: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical
Stability", ICLR 2025, arXiv 2501.04697, sections 3 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx.analysis._class_numbers import check_classes, check_samples


def softmax_collapse(logits: Tensor, target: Tensor, ignore_index: int = -100) -> float:
    """Fraction of samples whose softmax has collapsed: only the true class's term is left in its sum.

    A sample has collapsed when, in the dtype of the logits,
    ``sum_k exp(z_k - max z) == exp(z_y - max z)`` (arXiv 2501.04697, definition 2): its cross-entropy is
    exactly 0 and so is its gradient at the true class. In float32 this takes every other logit being more
    than about 16.6 below, in float16 7.6, in bfloat16 5.5, in float64 36.7. So pass logits in the dtype
    in which the loss sees them (inside autocast torch's loss sees float32).

    Args:
        logits: unnormalised scores, shape (C,), (N, C) or (N, C, d1, ...), any float dtype.
        target: class numbers, any integer dtype, shape (), (N,) or (N, d1, ...).
        ignore_index: samples with this class number are not counted.

    Returns:
        A number in [0, 1]; nan if no sample counts.

    Paper values:
        There is nothing to set. Computed in the dtype that the loss sees.

    Limits: Only of classes; it says that gradients are gone, not why logits grew.

    Keywords: grokking, numerical stability, float16, bf16, bfloat16, diagnostics.

    Evidence: ``optx run grokking``; ``test_analysis.py``.

    Source: "Grokking at the Edge of Numerical Stability", arXiv 2501.04697, definition 2.

    Raises:
        ShapeError: target does not fit the logits.
        OptxError: logits are not floating, or target is not of an integer dtype.
        IndexError: a class number is out of range.

    Example:
        >>> import torch, optx
        >>> logits = torch.tensor([[20.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
        >>> optx.analysis.softmax_collapse(logits, torch.tensor([0, 0]))
        0.5
    """
    class_dim = check_samples("softmax_collapse", "logits", logits, target, one=True)
    counts = target != ignore_index
    check_classes("softmax_collapse", target[counts], logits.shape[class_dim], ignore_index)
    label = torch.where(counts, target, 0).to(torch.int64)
    with torch.no_grad():
        # out of autocast: it would compute exp and sum in float32
        with torch.autocast(logits.device.type, enabled=False):
            z = logits.detach()
            terms = (z - z.amax(class_dim, keepdim=True)).exp_()
            own = terms.gather(class_dim, label.unsqueeze(class_dim)).squeeze(class_dim)
            collapsed = (terms.sum(class_dim) == own) & counts
        return float(collapsed.sum() / counts.sum())
