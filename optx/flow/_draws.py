"""Random draws of a batch, from one generator or from one for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optx._errors import OptxError
from optx._gumbel import gumbel

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Where draws come from; one generator a row makes a row's draws its own, whatever else is in the batch."""


class Draws:
    """Draws whose first axis is the batch's.

    Args:
        owner: whose argument ``generator`` is.
        generator: one for all, one a row, or None: torch's own.
        rows: of the batch.
        dtype: float32 or float64.
        device: where the draws are wanted; they are made where their generator is.
    """

    def __init__(
        self, owner: str, generator: Generators, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        if generator is None or isinstance(generator, torch.Generator):
            self._one, self._each = generator, None
            return
        if not isinstance(generator, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"{owner}: generator is {generator!r:.60}; it must be a torch.Generator, or a list of one "
                "for each row."
            )
        self._one, self._each = None, list(generator)
        if len(self._each) != rows or not all(isinstance(g, torch.Generator) for g in self._each):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"{owner}: generator has {len(self._each)} entries; it must be a torch.Generator, or "
                f"one for each of the {rows} rows."
            )

    def gumbel(self, *shape: int) -> Tensor:
        """g = -ln(-ln u)."""
        return self._drawn(shape, lambda s, g, where: gumbel(s, generator=g, dtype=self.dtype, device=where))

    def normal(self, *shape: int) -> Tensor:
        """Of mean 0 and deviation 1."""
        return self._drawn(
            shape, lambda s, g, where: torch.randn(s, generator=g, dtype=self.dtype, device=where)
        )

    def uniform(self, *shape: int) -> Tensor:
        """Between 0 and 1."""
        return self._drawn(
            shape, lambda s, g, where: torch.rand(s, generator=g, dtype=self.dtype, device=where)
        )

    def _drawn(
        self,
        shape: Sequence[int],
        draw: Callable[[Sequence[int], torch.Generator | None, torch.device], Tensor],
    ) -> Tensor:
        if self._each is None:
            where = self._one.device if self._one is not None else self.device
            return draw(shape, self._one, where).to(self.device)
        rows = [draw(shape[1:], one, one.device).to(self.device) for one in self._each]
        return torch.stack(rows) if rows else torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
