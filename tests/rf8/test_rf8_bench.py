"""``optx bench rf8`` on little numbers: everything is timed, and errors are RF8's."""

from __future__ import annotations

import json
from pathlib import Path

from optx.recipes import _bench_rf8


def test_all_is_timed_and_told(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "bench-rf8.json"
    _bench_rf8.main(["--numbers", "1000", "--size", "64", "--rounds", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    assert set(found["codes"]) == {"float32", "bfloat16"}
    assert list(found["linear"]) == [str(batch) for batch in _bench_rf8.BATCHES]
    errors = {kind: one["error"] for kind, one in found["linear"]["1"].items()}
    assert errors["float32"] == 0
    assert 0 < errors["bfloat16"] < errors["int8"] < errors["RF8"] < 0.1
    assert "unpack / copy" in capsys.readouterr().out
    assert len(_bench_rf8.tables(found)) == 2
