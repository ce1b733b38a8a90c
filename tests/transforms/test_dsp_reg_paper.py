"""What DSP-Reg is for, small: features that predict the label in every domain, and some that do not."""

from __future__ import annotations

from typing import Any

import pytest

from optx.recipes._spurious import fit


@pytest.mark.long
def test_spurious_features_are_dropped() -> None:
    """ERM and a uniform decay of the same strength keep them; accuracy on domains as seen falls a little."""
    erm, uniform, ours = ([fit(arm, seed, steps=400) for seed in range(2)] for arm in ("erm", "l2", "dsp"))

    def mean(runs: list[dict[str, Any]], name: str) -> float:
        return sum(run[name] for run in runs) / len(runs)

    for other in (erm, uniform):
        assert mean(ours, "unseen") > mean(other, "unseen") + 0.25
    assert mean(ours, "seen") > 0.85
    assert mean(ours, "spurious") < 0.1 < 0.9 < mean(erm, "spurious")
    assert mean(ours, "invariant") > 0.7 * mean(erm, "invariant")
    assert mean(ours, "ratio") > 20.0
