"""What a model said of each sample in each of the last epochs, in few bytes.

A table has one slot an epoch, used again once the epoch is as old as there are slots, and each entry has the
number of the epoch that it is of: what was not written exactly so many epochs ago is not read.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from optx._errors import FileError, OptxError, ShapeError

NEVER = -1
UNSEEN = -2
"""An epoch that no entry is of."""


class Rows(NamedTuple):
    """Logits in the form that is kept.

    Attributes:
        values: (B, C) or (B, T, C); of top-k its k largest, and what all others together are as one logit.
        classes: which classes the k are; None where all are kept.
    """

    values: Tensor
    classes: Tensor | None


def binned(z: Tensor, classes: Tensor, tau: float) -> Tensor:
    """The logits of some classes and, last, the one that has the others' probability at temperature tau."""
    others = z.scatter(-1, classes, -math.inf)
    rest = tau * torch.logsumexp(others / tau, -1, keepdim=True)
    return torch.cat((z.gather(-1, classes), rest), -1)


class Record:
    """A table (slots, samples, [positions,] numbers), made at the first write.

    On a CPU the memory is the system's zero pages until they are written to. Logits on another device go
    there through pinned memory, without waiting: what was sent is put into the table at the next call.

    Args:
        samples: rows of the table.
        slots: epochs that are kept.
        top_k: how many logits of each position are kept; None: all.
        tau: the temperature at which the others are summed.
        length: positions of a sequence that are kept; None: as many as the first batch has.
        dtype: of the values kept.
        device: where the table lies.
    """

    def __init__(
        self,
        samples: int,
        slots: int,
        top_k: int | None,
        tau: float,
        length: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.samples, self.slots, self.top_k, self.tau, self.length = samples, slots, top_k, tau, length
        self.dtype, self.device = dtype, device
        self.clear()

    def clear(self) -> None:
        """Forget everything, the table's size too."""
        self.values: Tensor | None = None
        self.classes: Tensor | None = None
        self.tags = torch.full((self.slots, self.samples), NEVER, dtype=torch.int32)
        self.shape: tuple[int, ...] | None = None  # (C,) or (T, V)
        self._sent: tuple[Any, int, Tensor, Rows] | None = None

    @property
    def _tags(self) -> Any:
        """The same memory: of a few entries NumPy takes a tenth of the time. Never kept: copies part."""
        return self.tags.numpy()

    @property
    def nbytes(self) -> int:
        """Bytes of the table, its tags included."""
        return sum(
            t.numel() * t.element_size() for t in (self.values, self.classes, self.tags) if t is not None
        )

    @property
    def whole(self) -> bool:
        """Whether all logits are kept."""
        return self.top_k is None or (self.shape is not None and self.top_k >= self.shape[-1])

    @property
    def plain(self) -> bool:
        """Whether it is on a CPU and keeps all logits, nothing being on its way there."""
        return self.device.type == "cpu" and self.whole and self._sent is None

    def past_of(self, epoch: int) -> int:
        """The epoch that an epoch's reference is of; one that no entry has where that is before the first."""
        return epoch - self.slots if epoch >= self.slots else UNSEEN

    def fit(self, logits: Tensor) -> None:
        """Make the table for such logits, or raise if it was made for others."""
        shape = tuple(logits.shape[1:])
        if self.shape is None:
            if len(shape) == 2:
                shape = (self.length or shape[0], shape[1])
            elif self.length is not None:
                raise ShapeError(f"SAF: max_length is {self.length}, but logits are (B, C), no sequences.")
            self._make(shape)
        kept = cast("tuple[int, ...]", self.shape)
        if len(shape) != len(kept) or shape[-1] != kept[-1]:
            raise ShapeError(
                f"SAF: logits have shape {tuple(logits.shape)}, but the record was made for (B, "
                f"{', '.join(map(str, kept))}); make another SAF for another number of classes."
            )
        if len(shape) == 2 and shape[0] > kept[0]:
            raise ShapeError(
                f"SAF: these sequences have {shape[0]} positions and the record has {kept[0]}; give SAF the "
                "longest that there is, as max_length."
            )

    def _make(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        width = shape[-1] if self.whole else cast("int", self.top_k) + 1
        size = (self.slots, self.samples, *shape[:-1])
        self.values = _zeros((*size, width), self.dtype, self.device)
        if not self.whole:
            small = torch.int16 if shape[-1] <= 2**15 else torch.int32
            self.classes = _zeros((*size, width - 1), small, self.device)

    def encode(self, z: Tensor) -> Rows:
        """Centred logits in the form that the table has."""
        if self.whole:
            return Rows(z.to(self.dtype), None)
        classes = z.topk(cast("int", self.top_k), -1).indices
        bins = binned(z, classes, self.tau).clamp_min(torch.finfo(torch.float16).min)
        return Rows(bins.to(self.dtype), classes.to(cast("Tensor", self.classes).dtype))

    def write(self, index: Tensor, epoch: int, rows: Rows) -> None:
        """Keep rows of the samples at `index`, which lies on the CPU."""
        self.settle()
        if rows.values.device.type == self.device.type or rows.values.device.type == "cpu":
            self._put(index, epoch, rows)
            return
        event = torch.Event(rows.values.device)
        classes = None if rows.classes is None else rows.classes.to(self.device, non_blocking=True)
        sent = Rows(rows.values.to(self.device, non_blocking=True), classes)
        event.record()
        self._sent = (event, epoch, index, sent)

    def settle(self) -> None:
        """Put into the table what is on its way."""
        if self._sent is not None:
            event, epoch, index, rows = self._sent
            self._sent = None
            event.synchronize()
            self._put(index, epoch, rows)

    def _put(self, index: Tensor, epoch: int, rows: Rows) -> None:
        slot = epoch % self.slots
        there = index.to(self.device, non_blocking=True)
        for table, given in ((self.values, rows.values), (self.classes, rows.classes)):
            if table is not None and given is not None:
                if given.ndim == 3 and (
                    short := table.shape[2] - given.shape[1]
                ):  # positions never seen are NaN
                    fill = math.nan if given.is_floating_point() else 0
                    given = F.pad(given, (0, 0, 0, short), value=fill)
                table[slot].index_copy_(0, there, given.to(self.device))
        self._tags[slot, index.numpy()] = epoch

    def read(self, index: Tensor, epoch: int, device: torch.device) -> tuple[Rows, Tensor | None, int]:
        """What was kept of these samples in an epoch.

        Returns:
            Rows on `device`, anything where nothing was kept, NaN at positions that were not there; which
            positions have something (None: all); of how many samples there is something.
        """
        self.settle()
        slot = epoch % self.slots
        values = self._taken(cast("Tensor", self.values), slot, index, device)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        classes = None if self.classes is None else self._taken(self.classes, slot, index, device).long()
        fresh: Any = self._tags[slot, index.numpy()] == epoch
        count = int(fresh.sum())
        if count == len(fresh):
            return Rows(values, classes), None, count
        serves = torch.from_numpy(fresh).to(device).view(-1, *[1] * (values.ndim - 2))
        return Rows(values, classes), serves.expand(values.shape[:-1]), count

    def _taken(self, table: Tensor, slot: int, index: Tensor, device: torch.device) -> Tensor:
        if self.device.type != "cpu":
            return table[slot].index_select(0, index.to(self.device, non_blocking=True)).to(device)
        pinned = device.type == "cuda"
        out = torch.empty(len(index), *table.shape[2:], dtype=table.dtype, pin_memory=pinned)
        torch.index_select(table[slot], 0, index, out=out)
        return out.to(device, non_blocking=pinned)

    def seen(self, index: Tensor, epoch: int) -> int:
        """How many of these samples were written in this epoch already."""
        return int((self._tags[epoch % self.slots, index.numpy()] == epoch).sum())

    # ---- state ------------------------------------------------------------------------------------------

    def geometry(self) -> dict[str, Any]:
        """What a table depends on."""
        made = {
            "num_samples": self.samples,
            "lookback": self.slots,
            "top_k": self.top_k,
            "dtype": str(self.dtype),
        }
        return made if self.top_k is None else {**made, "tau": self.tau}

    def state(self) -> dict[str, Any]:
        """The table as it is now, copied."""
        self.settle()
        return {
            "shape": None if self.shape is None else list(self.shape),
            "values": None if self.values is None else self.values.detach().clone(),
            "classes": None if self.classes is None else self.classes.detach().clone(),
            "tags": self.tags.clone(),
        }

    def forget_from(self, epoch: int) -> None:
        """Drop entries of this epoch and later ones."""
        self.settle()
        self.tags[self.tags >= epoch] = NEVER

    def check(self, state: Any) -> None:
        """Raise unless it is a table of this geometry, whole; nothing changes."""
        wanted = Record(
            self.samples, self.slots, self.top_k, self.tau, None, self.dtype, torch.device("meta")
        )
        if not isinstance(state, dict) or {"shape", "values", "classes", "tags", "audit"} - state.keys():
            raise FileError("SAF: the state's record is not whole.")
        if (shape := state["shape"]) is not None:
            wanted._make(tuple(shape))
        for name in ("values", "classes", "tags"):
            mine, given = getattr(wanted, name), state[name]
            kind = None if mine is None else (mine.shape, mine.dtype)
            found = (given.shape, given.dtype) if isinstance(given, Tensor) else given
            if found != kind:
                raise FileError(
                    f"SAF: the record's {name} do not have the shape and dtype that the rest of the state "
                    "says."
                )

    def load(self, state: dict[str, Any]) -> None:
        """Take over a table; it was checked."""
        self.clear()
        if (shape := state["shape"]) is not None:
            self._make(tuple(shape))
        for name in ("values", "classes", "tags"):
            if (mine := getattr(self, name)) is not None:
                mine.copy_(state[name])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU pages that are not written to take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    try:
        pages = np.zeros(count * dtype.itemsize, np.uint8)
    except MemoryError:
        raise OptxError(
            f"SAF: the record would take {count * dtype.itemsize / 1e9:,.0f} GB; keep fewer epochs "
            "(lookback=2), or the largest logits only (top_k=)."
        ) from None
    return torch.from_numpy(pages).view(dtype).view(shape)
