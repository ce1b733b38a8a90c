"""How much a record's short form changes the loss: measured on a few samples kept exactly besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from optx.kernels.loss.trajectory_rows import centred, divergence
from optx.signal._record import NEVER, Record, Rows, binned

SAMPLES = 8
SPOTS = (0, 3, 15, 63)
"""Positions of a sequence that are looked at."""


class Audit:
    """The first few samples seen, in float32 and with all classes, one slot an epoch as in the record."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # (slots, SAMPLES, positions, C)
        self.epochs: list[list[int]] = []  # in which each row was seen, (slots, SAMPLES): not all are in each
        self.chosen: dict[int, int] = {}
        self.exact = self.off = self.count = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes kept for it."""
        return 0 if self.rows is None else self.rows.numel() * self.rows.element_size()

    def look(
        self,
        record: Record,
        z: Tensor,
        index: Sequence[int],
        epoch: int,
        past: tuple[Rows, Tensor | None, int] | None,
        where: Tensor | None,
    ) -> None:
        """Compare the record with what is kept here, where there is a past, and keep this epoch's.

        Args:
            record: whose form is judged.
            z: centred logits, (B, C) or (B, T, V).
            index: of the samples.
            epoch: now.
            past: what the record has of these samples; None: the loss is off.
            where: which positions count; None: all.
        """
        rows = self._rows_of(index)
        if not rows:
            return
        own = [self.chosen[index[row]] for row in rows]
        now = _spots(z.detach()[rows]).float().cpu()
        table = self._rows(record, now.shape[1:])
        slot = epoch % record.slots
        if past is not None:
            kept, values = past[0], _spots(past[0].values[rows]).cpu()
            short = now if kept.classes is None else binned(now, _spots(kept.classes[rows]).cpu(), record.tau)
            exact = divergence(now, table[slot, own], record.tau)
            off = divergence(short, values, record.tau) - exact
            then = torch.tensor([self.epochs[slot][place] for place in own])
            counted = off.isfinite() & (then == epoch - record.slots).unsqueeze(-1)
            for flags in (past[1], where):
                if flags is not None:
                    counted &= _spots(flags[rows].unsqueeze(-1)).squeeze(-1).cpu()
            self.exact += float(exact[counted].sum())
            self.off += float(off[counted].abs().sum())
            self.count += float(counted.sum())
        table[slot, own] = now
        for place in own:
            self.epochs[slot][place] = epoch

    def look_at_few(
        self, record: Record, z: Tensor, index: Sequence[int], epoch: int, losses: Tensor | None
    ) -> None:
        """`look` for (B, C) on a CPU, all classes kept, what was computed being at hand.

        Args:
            record: whose form is judged.
            z: logits.
            index: of the samples.
            epoch: now.
            losses: each sample's divergence as computed from the record, NaN where none counts; None: the
                loss is off.
        """
        rows = self._rows_of(index)
        if not rows:
            return
        own = [self.chosen[index[row]] for row in rows]
        # NumPy takes a tenth of the time of a few rows.
        now: Any = centred(z[rows]).float().numpy()
        slot = epoch % record.slots
        kept: Any = self._rows(record, (1, now.shape[1])).numpy()[slot, :, 0]
        epochs = self.epochs[slot]
        if losses is not None:
            exact = _divergences(now, kept[own], record.tau)
            off: Any = losses.numpy()[rows] - exact
            then = [epochs[place] == epoch - record.slots for place in own]
            counted = np.isfinite(off) & np.array(then)
            self.exact += float(exact[counted].sum() * record.tau**2)
            self.off += float(np.abs(off[counted]).sum() * record.tau**2)
            self.count += float(counted.sum())
        kept[own] = now
        for place in own:
            epochs[place] = epoch

    def _rows(self, record: Record, shape: Sequence[int]) -> Tensor:
        """What is kept, made at the first sight of a sample."""
        if self.rows is None:
            self.rows = torch.full((record.slots, SAMPLES, *shape), math.nan)
            self.epochs = [[NEVER] * SAMPLES for _ in range(record.slots)]
        return self.rows

    def _rows_of(self, index: Sequence[int]) -> list[int]:
        """Which of a batch's samples are looked at."""
        for i in index[: SAMPLES - len(self.chosen)]:
            self.chosen.setdefault(i, len(self.chosen))
        if self.chosen.keys().isdisjoint(index):
            return []
        return [row for row, i in enumerate(index) if i in self.chosen]

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {
            "rows": None if self.rows is None else self.rows.clone(),
            "epochs": [list(each) for each in self.epochs],
            "chosen": list(self.chosen),
            "sums": [self.exact, self.off, self.count],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.rows = None if state["rows"] is None else state["rows"].clone()
        self.epochs = [list(each) for each in state["epochs"]]
        self.chosen = {int(i): place for place, i in enumerate(state["chosen"])}
        self.exact, self.off, self.count = state["sums"]


def _divergences(z: Any, past: Any, tau: float) -> Any:
    """KL(softmax(past / tau) || softmax(z / tau)) of rows of NumPy's that are centred; NaN stays."""
    a, b = z / tau, past / tau
    p, q = np.exp(a).sum(-1), np.exp(b)
    return ((b - a) * q).sum(-1) / q.sum(-1) + np.log(p) - np.log(q.sum(-1))


def _spots(t: Tensor) -> Tensor:
    """(B, C) as (B, 1, C); of (B, T, C) some positions, which are NaN (classes and flags: 0) past the end."""
    if t.ndim == 2:
        return t.unsqueeze(1)
    if (missing := SPOTS[-1] + 1 - t.shape[1]) > 0:
        t = F.pad(t, (0, 0, 0, missing), value=math.nan if t.is_floating_point() else 0)
    return t[:, SPOTS]
