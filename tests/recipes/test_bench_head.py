"""The benchmark of output heads, and the vocab recipe's words, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optx.recipes import _bench_head, _vocab_words


def test_bench_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench-head.json"
    sizes = ["--width", "4", "--batch", "3", "--rounds", "1", "--most", "10000"]
    _bench_head.main([*sizes, "--json", str(file)])
    (found,) = json.loads(file.read_text())["classes"]
    assert found["classes"] == 10_000
    assert list(found["beside"]) == ["SphericalHead", *_bench_head.DENSE]
    assert all(taken > 0 for taken in (*found["beside"].values(), found["step"], found["upkeep"]))
    assert "10,000" in capsys.readouterr().out


def test_words_are_numbered_by_how_often_they_are() -> None:
    text = ["the", "king", "the", "queen", "the", "king"] * 20
    words = _vocab_words._numbered(text, 2)
    assert (len(words.train), len(words.test), words.count) == (114, 6, 2)
    assert words.test.tolist() == [0, 1, 0, -100, 0, 1]
    context, labels = _vocab_words._examples(words.test, torch.tensor([2, 4]))
    assert labels.tolist() == [0, 0]
    assert context.tolist() == [[0, 1], [0, _vocab_words.KNOWN_WORDS]]


def test_each_head_learns_words() -> None:
    torch.manual_seed(0)
    numbers = torch.arange(4000) % 50  # each word has one that follows
    words = _vocab_words.Words(numbers[:3000], numbers[3000:], 50)

    class Args:
        word_steps, word_batch, word_lr, word_mse_lr, word_body_lr = 80, 32, 5.0, 0.1, 1e-2

    class Run:
        results: dict[str, Any] = {"arms": {}}  # noqa: RUF012
        interrupt = type("Interrupt", (), {"wanted": False})

        def steps(self, what: str, first: int, last: int) -> range:
            return range(first, last)

    run: Any = Run()
    for arm in ("Z-loss, 10k", "squared error, 10k", "softmax in that time, 10k", "softmax, 10k"):
        found = _vocab_words.train(arm, 0, {"10k": words}, Args, run)
        assert found is not None
        run.results["arms"][f"{arm}/0"] = found
        assert found["classes"] == 50
        assert found["tops"]["100"] == 100
        assert found["tops"]["1"] > (4 if "that time" in arm else 30), arm
    settings = {"word_steps": 80, "word_batch": 32}
    (table,) = _vocab_words.tables({"settings": settings, "arms": run.results["arms"]})
    assert [row[0] for row in table.rows] == [arm for arm in _vocab_words.ARMS if "10k" in arm]
