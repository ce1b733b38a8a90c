"""A model with a LoRA on it, as a source of tensors: each is merged when it is read.

Source: LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from optx._errors import OptxError, ShapeError, near
from optx.delta._checkpoint_source import Source
from optx.delta._delta import Delta
from optx.delta._float32_sums import add


class Adapted(Source):
    """Base plus scaling times B A, in float32 and rounded once to the base's dtype.

    Args:
        base: the model.
        adapter: `optx.Delta.lora` of the adapter.
        label: what it is, for messages.

    Raises:
        OptxError: the adapter changes a tensor that the model lacks, or that is no float.
        ShapeError: it has another shape; names it.
    """

    def __init__(self, base: Source, adapter: Delta, label: str) -> None:
        self.base, self._adapter, self._label = base, adapter, label
        self.entries, self.tied = base.entries, base.tied
        for name, entry in adapter.entries.items():
            if name not in base.entries:
                raise OptxError(
                    f"{label}: the adapter changes {name!r}, which the model lacks. "
                    f"{near(name, base.entries)}"
                )
            if base.entries[name].shape != entry.shape:
                raise ShapeError(
                    f"{label}: {name!r} has shape {base.entries[name].shape} in the model, and {entry.shape} "
                    "in the adapter."
                )
            if not base.entries[name].dtype.is_floating_point:
                raise OptxError(
                    f"{label}: {name!r} is {base.entries[name].dtype}; a LoRA adds to floats only."
                )

    @property
    def label(self) -> str:
        """What it is."""
        return self._label

    @property
    def state(self) -> tuple[object, ...]:
        """Of the model's files and the adapter's."""
        return (*self.base.state, self._adapter.recipe)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        whole = self.base.read(name)
        return add(whole, self._adapter[name]) if name in self._adapter.entries else whole

    def head(self, name: str, count: int) -> Tensor:
        """Its first numbers."""
        entry = self.entries[name]
        return self.piece(name, 0, min(count, entry.numel))

    def piece(self, name: str, begin: int, end: int) -> Tensor:
        """Some of its numbers; `reader` is cheaper for many pieces."""
        return self.reader(name)(begin, end)

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """What gives a tensor's pieces; it holds the tensor's whole change."""
        if name not in self._adapter.entries:
            return lambda begin, end: self.base.piece(name, begin, end)
        change = self._adapter.reader(name)
        return lambda begin, end: add(self.base.piece(name, begin, end), change(begin, end))
