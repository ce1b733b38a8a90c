"""The step does not crash, and agrees with torch or says why not: see `state_machine.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = 20


def test_no_edit_crashes_a_step_or_makes_it_wrong(tmp_path: Path, drawn_seed: int | None) -> None:
    """In a process of its own, whose death is a failure that shows what it did last."""
    seed = 3 if drawn_seed is None else drawn_seed
    log, counts = tmp_path / "log", tmp_path / "counts.json"
    script = Path(__file__).with_name("state_machine.py")
    # Half of its time goes into optimising a dozen kernels; what they read and write is the same without. A
    # run with a drawn seed has them as they are shipped.
    level = {"NUMBA_OPT": "0"} if drawn_seed is None else {}
    arguments = ["--examples", str(EXAMPLES), "--seed", str(seed), "--log", str(log), "--counts", str(counts)]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **level},
        timeout=1200,  # minutes on a machine that is busy or slow
    )
    lines = log.read_text().splitlines() if log.exists() else []
    start = max((i for i, line in enumerate(lines) if line.startswith("start ")), default=0)
    sequence = "\n".join(lines[start:])
    how = f"died of signal {-done.returncode}" if done.returncode < 0 else "found a disagreement"
    assert done.returncode == 0, f"{how} with --seed {seed}, after\n{sequence}\n{done.stderr[-6000:]}"
    found = json.loads(counts.read_text())
    # It has done something: examples, rules, steps that agreed and steps that were refused.
    assert found["examples"] >= EXAMPLES
    assert found["rules"] > 5 * EXAMPLES
    assert found["steps taken"] > 2 * EXAMPLES
    assert found["agreed: torch"] > EXAMPLES
    assert any(key.startswith("refused as by torch") for key in found)
