"""``optx bench softmax`` on little rows: every way is timed, and gives softmax."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from optx.kernels.softmax import cpu
from optx.recipes import _bench_softmax


def test_all_is_timed_and_told(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "bench-softmax.json"
    _bench_softmax.main(
        ["--least", "10", "--most", "11", "--numbers", "10001", "--rounds", "1", "--json", str(file)]
    )
    found = json.loads(file.read_text())
    assert [one["power"] for one in found["lengths"]] == [10, 11]
    assert [one["rows"] for one in found["lengths"]] == [64, 32]
    assert all(set(one["seconds"]) == set(_bench_softmax.WAYS) for one in found["lengths"])
    assert all(0 < error < 1e-6 for error in found["errors"].values())
    assert "MiB in and out" in capsys.readouterr().out


def test_every_way_is_softmax_of_rows_in_pieces() -> None:
    x = torch.randn(2, 2 * cpu.PIECE + 16, generator=torch.Generator().manual_seed(0)) * 10
    wanted = torch.softmax(x.double(), -1)
    for name, way in _bench_softmax.WAYS.items():
        y = torch.zeros_like(x)
        way(x, y)
        assert (y - wanted).abs().max() < 3e-7 * wanted.max(), name
