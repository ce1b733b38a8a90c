"""`optx bench bases` at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optx.recipes import _bench_bases


def test_bytes_are_counted_and_forms_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bases.json"
    small = ["--tensors", "1", "--numbers", "100", "--rounds", "2", "--json", str(file)]
    _bench_bases.main(["--bases", "Lion", *small])
    (found,) = json.loads(file.read_text())["bases"]
    assert found["bytes"] == 4 * 3 + 4 * 2  # weight, gradient and average read, weight and average written
    assert set(found["times"]) == {"AdamW", "ours", "foreach=True", "foreach=False"}
    assert all(len(times) == 2 for times in found["times"].values())
    assert "pytorch_optimizer.Lion" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _bench_bases.main(["--bases", "Leo"])
    with pytest.raises(SystemExit):
        _bench_bases.main(["--shape", "1000"])
    assert "must be ROWSxCOLUMNS" in capsys.readouterr().err
