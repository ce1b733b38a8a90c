"""What a batch of self-tuning networks is computed with, and by whom: where its examples are, and when.

Source: STN, arXiv 1903.03088, algorithm 1: each example has perturbed hyperparameters of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optx._errors import OptxError, warn

ORDER = ("first", "second")
"""Axes in words."""


@dataclass
class Draw:
    """What a batch is computed with, between the two ends of a ``with``.

    Attributes:
        valid: whether a gradient is to reach the hyperparameters (a validation batch).
        rows: how many examples it has; None: all share one row.
        noise: standard normal, (rows or 1, H); None: nothing is perturbed.
        shift: sigma * noise, without a gradient.
        axis: of its examples in inputs of three and more axes, as given to `optx.STN`.
        dual: what gates get instead, for a linearised prediction.
        called: whether something was computed with it.
        waiting: whether that may be computed again in a backward pass that has not come yet.
    """

    valid: bool
    rows: int | None
    noise: Tensor | None
    shift: Tensor | None
    axis: int | None = None
    dual: Tensor | None = None
    called: bool = False
    waiting: bool = False


class Calls:
    """Tells calls of a forward pass from those that activation checkpointing makes again in backward.

    A compiled graph has what it computes again among its inputs, so it needs no look.
    """

    MANY = 256
    """Calls of served layers, in training and outside of any batch, after which there is a word about it."""

    def __init__(self) -> None:
        self.left_waiting = False
        """Whether the last batch was left before any backward pass through checkpoints came."""
        self.outside = 0
        """Calls in training mode with gradients since the last batch; -1: it has been told."""

    def stray(self) -> None:
        """Note a call that trains and is in no batch; warn, once, where a loop goes on like that."""
        if torch.compiler.is_compiling() or self.outside < 0 or not torch.is_grad_enabled():
            return
        self.outside += 1
        if self.outside == self.MANY:
            self.outside = -1
            warn(
                f"STN: served layers have been called {self.MANY} times in training mode outside of "
                "stn.train_batch(), where nothing is perturbed, so no hyperparameter is tuned. Compute each "
                "training loss, and its backward pass, within `with stn.train_batch(x):`."
            )

    def look(self, draw: Draw | None) -> None:
        """Note a call; raise if it is one again, and not in the batch that it was in before."""
        if torch.compiler.is_compiling():
            return
        again = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
        if not again:
            if draw is not None:
                draw.called = draw.waiting = True
                self.outside = min(self.outside, 0)
        elif self.left_waiting if draw is None else not draw.called:
            raise OptxError(
                "STN: backward computes the model again (activation checkpointing) outside of the batch that "
                "it was computed in, where hyperparameters have other values. Call loss.backward() within "
                "the same stn.train_batch() or stn.valid_batch()."
            )
        elif draw is not None:
            draw.waiting = False

    def leave(self, draw: Draw) -> None:
        """The batch ends."""
        self.left_waiting = draw.waiting


class Axes:
    """Which axis of an input is that of the examples, each of which has a row of its own."""

    def __init__(self) -> None:
        self.first = set[str]()
        """Where the shape of an input has shown that it is the first one."""

    def of(self, x: Tensor, draw: Draw, where: str) -> int:
        """0, or 1 where ``batch_axis=1`` was given and there is a third.

        Raises:
            OptxError: two axes are as long as the batch, nothing has said which it is, and no earlier input
                of this module could have.
        """
        if x.ndim < 3 or draw.rows is None:
            return 0
        if draw.axis is not None:
            return draw.axis
        if x.ndim == 3 and x.shape[0] == draw.rows and where not in self.first:
            if x.shape[1] == draw.rows > 1:
                raise OptxError(
                    f"STN: the input of {where} has shape {tuple(x.shape)}, and two of its axes are as long "
                    f"as the batch of {draw.rows} examples. Say which is theirs by optx.STN(..., "
                    "batch_axis=0), or 1 for (time, batch, features)."
                )
            if not torch.compiler.is_compiling():
                self.first.add(where)
        return 0
