"""What `python -m optx.kernels.device_check` runs on a GPU, at small sizes in the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optx.kernels import device_check
from optx.kernels.device import buckets
from optx.kernels.device.checks import Check, LeftOut, Place, Wrong, run

PLACE = Place("cpu", 512, (1, 300), 1)
NAMES = (
    *(f"{kind}: AdamW" for kind in ("correct", "speed", "registers", "launches", "graph")),
    *("correct: AdamW bf16 stochastic", "correct: Clip + AdamW", "correct: KeepMask + AdamW"),
    "correct: AdamW bf16 split, 8-bit moments",
    *("correct: ternary, bfloat16", "correct: loss, float32", "correct: entries (CPU)"),
    *("correct: rf8, bfloat16", "correct: rf8 product", "correct: softmax2, float32"),
    *("speed: ternary add, float32", "speed: loss, float32"),
)


@pytest.fixture(scope="module")
def every() -> dict[str, Check]:
    return {check.name: check for check in device_check.every()}


@pytest.mark.long(keep=3)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_agrees(name: str, every: dict[str, Check]) -> None:
    row = run(every[name], PLACE)
    assert (row.state, row.said) == (
        ("left out", "the interpreter has no CUDA graphs") if name.startswith("graph") else ("ok", "")
    )
    assert all(not isinstance(v, float) or math.isfinite(v) for v in row.figures.values())
    assert row.figures or row.state == "left out"


def test_every_family_is_there(every: dict[str, Check]) -> None:
    """And each program of the audit; the most telling first, and no name twice."""
    from optx import _audit

    assert len(every) == len(device_check.every())
    assert {f"correct: {case.name}" for case in _audit.all_cases()} <= set(every)
    assert {"ternary", "rf8", "loss", "entries"} <= {
        check.what.split(",")[0].split(" (")[0] for check in every.values()
    }
    assert next(iter(every)) == "correct: AdamW"


def test_a_wrong_kernel_is_a_row(every: dict[str, Check], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's lr is another, as if a kernel read it from elsewhere."""
    from optx.kernels.step.cpu import CpuStep

    plain = CpuStep.update

    def other(self: Any) -> None:
        self.hypers[:] *= 1.5
        plain(self)

    monkeypatch.setattr(CpuStep, "update", other)
    row = run(every["correct: AdamW"], PLACE)
    assert row.state == "wrong"
    assert "apart from the CPU's kernels" in row.said
    assert "w of 1 " in row.said


def raising(error: Exception) -> Check:
    def raises(_: Place) -> dict[str, Any]:
        raise error

    return Check("correct", "this", raises)


def test_whatever_is_raised_is_a_row() -> None:
    cases = {"left out": LeftOut("no"), "wrong": Wrong("no"), "error": ZeroDivisionError("no")}
    for state, error in cases.items():
        row = run(raising(error), PLACE)
        assert (row.state, row.said) == (state, "ZeroDivisionError: no" if state == "error" else "no")


def test_numbers_of_groups_are_plausible() -> None:
    assert buckets.number("lr") == 1e-3
    assert buckets.number("clip.max_norm") == 1.0
    assert buckets.number("another.option") == 0.5
    assert torch.get_default_dtype() == torch.float32
