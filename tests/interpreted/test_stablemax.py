"""StableMax's Triton kernels in the interpreter, beside the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optx.kernels.loss import stablemax_rows as reference
from optx.kernels.loss import stablemax_triton as kernels
from optx.kernels.loss.stablemax_rows import Options

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}
WEIGHTS = {
    classes: torch.rand(classes, generator=torch.Generator().manual_seed(classes)) for classes in (1, 600)
}


@pytest.mark.parametrize(
    ("classes", "dtype", "options", "soft"),
    [
        *((n, torch.float32, Options(), False) for n in (1, 7, 255, 256, 600)),
        (600, torch.float32, Options(WEIGHTS[600], 0, 0.1), False),
        (600, torch.float32, Options(WEIGHTS[600]), True),
        (1, torch.float32, Options(WEIGHTS[1], 0, 0.1), False),
        (1, torch.float32, Options(WEIGHTS[1]), True),
        (513, torch.float64, Options(smoothing=0.1), False),
        (513, torch.bfloat16, Options(smoothing=0.1), False),
    ],
)
def test_kernels_are_the_reference(
    classes: int, dtype: torch.dtype, options: Options, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_MAX_BLOCK", 256)  # 600 classes: two full blocks and a masked one
    torch.manual_seed(classes)
    band = torch.full((4, classes + 9), float("nan"), dtype=dtype)  # unaligned rows between guards
    logits = band[:, 5 : 5 + classes].copy_(torch.randn(4, classes) * 4)
    target = torch.randint(classes, (4,))
    target[2] = options.ignore_index
    target = torch.rand(4, classes).softmax(1) if soft else target
    grad = torch.rand(4, dtype=reference.math_dtype(dtype))
    wanted, found = (m.forward(logits, target, options) for m in (reference, kernels))
    results: list[Any] = [
        m.backward(grad, logits, target, wanted.rest, wanted.mass, options) for m in (reference, kernels)
    ]
    ignored = torch.full((4,), False) if soft else target == options.ignore_index
    for a, b in (*zip(wanted, found, strict=True), results):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            a, b = a[~ignored], b[~ignored]
            bound = TOLERANCE[dtype] * max([1.0, *a.abs().flatten().tolist()])
            assert ((a - b).abs() <= bound).all()
    assert (found.loss[ignored] == 0).all()
    assert (results[1][ignored] == 0).all()


def test_a_certain_row_keeps_its_loss() -> None:
    """Written as 1 - p it would collapse to 0."""
    sums = kernels.forward(torch.tensor([[1e9, 0.0, 0.0]]), torch.tensor([0]), Options())
    assert abs(sums.loss.item() / 2e-9 - 1) < 1e-5
