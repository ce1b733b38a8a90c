"""The line beside a recipe's progress bar: its loss, and what optimizer and handle tell of themselves."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

import optx
from optx.integrations._metrics import collect

from ._report import console

SECONDS = 0.5
"""Between two updates: a line that nobody could read costs nothing."""

SHOWN = 4
"""Metrics beside the loss, at most: a line has to fit beside a bar."""


class Live:
    """What a training loop tells of its steps, a few times a second, where there is a terminal."""

    def __init__(self) -> None:
        self._next = 0.0

    def line(
        self, loss: Tensor | float | None, optimizer: Optimizer | None, handle: optx.Handle | None
    ) -> str | None:
        """The line, or None where nobody looks or it is too early: then nothing is read or measured."""
        if console.quiet or not console.is_terminal or time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + SECONDS
        return line(loss, collect(optimizer, handle))


def line(loss: Any, metrics: dict[str, float]) -> str:
    """In words: the methods' own numbers first, without what every optimizer has."""
    own = [name for name in metrics if not name.startswith("optx/")]
    general = [name for name in metrics if name in ("optx/grad_norm", "optx/lr")]
    numbers = {name.removeprefix("optx/"): metrics[name] for name in (*own, *general)[:SHOWN]}
    if loss is not None:
        numbers = {"loss": float(loss)} | numbers
    return "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
