"""What a recipe shows beside its progress bar: some numbers, seldom, and only where there is a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import optx

pytest.importorskip("matplotlib")

from optx.recipes import _live, _run


class Steps:
    """A loop, and how often it was asked for what."""

    def __init__(self) -> None:
        model = nn.Linear(3, 2)
        base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        self.optimizer = optx.wrap(base, optx.AdamR(weight=0.1))
        self.read = 0
        model(torch.ones(1, 3)).sum().backward()

    def __float__(self) -> float:
        self.read += 1
        return 1.25

    def run(self, folder: Path, steps: int) -> None:
        run = _run.Run(folder, {}, resume=False)
        for _ in run.steps("a", 0, steps):
            self.optimizer.step()
            run.live(self, self.optimizer)  # type: ignore[arg-type]


def on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    said = io.StringIO()
    console = Console(file=said, force_terminal=terminal, width=160)
    for module in (_run, _live):
        monkeypatch.setattr(module, "console", console)
    return said


def test_loss_and_metrics_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = on(True, monkeypatch)
    # Where time goes on, a step that compiles is long enough for a second look.
    monkeypatch.setattr(_live, "time", SimpleNamespace(monotonic=lambda: 7.0))
    steps = Steps()
    steps.run(tmp_path, 3)
    assert "loss 1.25" in said.getvalue()
    assert "lr 0.1" in said.getvalue()
    assert steps.read == 1  # the others came too early


def test_nothing_is_read_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(False, monkeypatch)
    steps = Steps()
    steps.run(tmp_path, 3)
    assert steps.read == 0


@pytest.mark.parametrize(
    ("loss", "metrics", "line"),
    [
        (None, {}, ""),
        (torch.tensor(2.0), {}, "loss 2"),
        (0.123456, {"optx/lr": 0.1, "optx/skipped_steps": 0.0}, "loss 0.123  lr 0.1"),
        (
            1,
            {"optx/lr": 0.1, "hft/active": 0.5, "optx/grad_norm": 7.0},
            "loss 1  hft/active 0.5  lr 0.1  grad_norm 7",
        ),
        (1, {f"a/{i}": i for i in range(9)}, "loss 1  a/0 0  a/1 1  a/2 2  a/3 3"),
    ],
)
def test_a_line(loss: Any, metrics: dict[str, float], line: str) -> None:
    assert _live.line(loss, metrics) == line
