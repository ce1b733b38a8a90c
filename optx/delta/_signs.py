"""What a compressed delta holds: two masks of signs per tensor, one scale, and what is known of them.

Source: ComPEFT, arXiv 2311.13171, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from optx._safetensors import Entry
from optx.delta import _bitmask as bitmask
from optx.delta._difference import Difference
from optx.delta._float32_sums import wide

D = TypeVar("D", bound=Difference)


@dataclass(frozen=True)
class About:
    """What is known of a compressed delta besides its signs.

    Args:
        sigma: standard deviation of all its numbers, before.
        alpha: the scale in units of sigma.
        density: share that was to be kept.
        kept_mean: mean magnitude of what was kept, before.
        compat: see `ComPEFT`.
        start: of an adapter: what its numbers were before training; None for a delta.
        fingerprints: of the base's tensors.
        tied: names that are another's tensor.
        contents: hashes of the base's whole tensors.
    """

    sigma: float
    alpha: float
    density: float
    kept_mean: float
    compat: str = "paper"
    start: float | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict[str, str])
    tied: Mapping[str, str] = field(default_factory=dict[str, str])
    contents: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def scale(self) -> float:
        """What every kept number became in magnitude: alpha * sigma, rounded to float32."""
        return float(np.float32(self.alpha * self.sigma))


class Signs(NamedTuple):
    """The parts of an `optx.Compressed`, in the order in which it is made of them."""

    entries: Mapping[str, Entry]
    masks: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    about: About
    recipe: tuple[Any, ...]

    def difference(self, kind: type[D]) -> D:
        """Decoded, tensor by tensor when it is asked for."""
        scale = self.about.scale
        entries = {name: decoded(entry) for name, entry in self.entries.items()}

        def read(name: str) -> Tensor:
            if name in self.whole:
                return self.whole[name]
            return bitmask.dense(self.masks[name], entries[name].shape, entries[name].dtype, scale)

        def piece(name: str, begin: int, end: int) -> Tensor:
            first, last = begin // 64, bitmask.words(end)
            masks = self.masks[name][:, first:last]
            shape = (min(64 * last, entries[name].numel) - 64 * first,)
            some = bitmask.dense(masks, shape, entries[name].dtype, scale)
            return some[begin - 64 * first : end - 64 * first]

        return kind(
            entries,
            read,
            recipe=("decoded", scale, self.recipe),
            fingerprints=self.about.fingerprints,
            tied=self.about.tied,
            contents=self.about.contents,
            piece=piece,
        )


def decoded(entry: Entry) -> Entry:
    """What a tensor becomes: float32, or wider where it was."""
    if not entry.dtype.is_floating_point:
        return entry
    return Entry(entry.shape, wide(entry.dtype))
