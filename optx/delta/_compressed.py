"""`optx.Compressed`: a delta of signs and one scale, worked on as it is.

Source: ComPEFT, arXiv 2311.13171, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_range
from optx._safetensors import Entry
from optx.delta import _bitmask as bitmask
from optx.delta._apply import verified
from optx.delta._checkpoint_source import Checkpoint, open_source
from optx.delta._compressed_file import describe, file_size, from_state, read, write
from optx.delta._delta import Delta
from optx.delta._signs import About, Signs, decoded

if TYPE_CHECKING:
    from typing_extensions import Self


_NOT_THE_BASE = (
    "Compressed.add_to: this is not the base that the delta was taken from: {} differs. check=False adds "
    "it all the same."
)


class Compressed:
    """A delta as signs and one scale: 2 bits per number in memory, about 1 in a file.

    Made by `optx.compress` or `Compressed.load`. Integer and boolean entries are kept whole.

    Attributes:
        entries: shape and dtype by name.
        masks: int64 (2, words) by name: bit i of a mask is set where number i is +1 (row 0) or -1 (row 1).
        whole: the entries that have no difference, by name.
        about: sigma, alpha, density and where it comes from.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.zeros(4, 4)}
        >>> tuned = {"w": torch.arange(16.0).reshape(4, 4) - 8}
        >>> small = optx.compress(optx.Delta.between(base, tuned), optx.ComPEFT(density=0.25))
        >>> small.delta().apply(base)["w"][0]
        tensor([-4.7610, -4.7610, -4.7610,  0.0000])
        >>> small.nonzeros, round(small.distance(small.scaled(2)), 4)
        (4, 9.5219)
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        masks: Mapping[str, Tensor],
        whole: Mapping[str, Tensor],
        about: About,
        recipe: tuple[Any, ...],
    ) -> None:
        self.entries, self.masks, self.whole = dict(entries), dict(masks), dict(whole)
        self.about, self._recipe = about, recipe
        self._size: int | None = None

    # ---- looking at it ------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """What every kept number became in magnitude: alpha * sigma, rounded to float32."""
        return self.about.scale

    @property
    def closest_alpha(self) -> float:
        """The alpha whose squared distance from the uncompressed delta is smallest: mean |kept| / sigma.

        Not always the best for the task: that is found by evaluation.
        """
        return self.about.kept_mean / self.about.sigma if self.about.sigma else 1.0

    @property
    def numel(self) -> int:
        """Floating numbers of the delta."""
        return sum(self.entries[name].numel for name in self.masks)

    @property
    def nonzeros(self) -> int:
        """How many numbers were kept."""
        return sum(bitmask.overlap(mask, mask).a for mask in self.masks.values())

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(t.nbytes for t in (*self.masks.values(), *self.whole.values()))

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of the file that `save` writes."""
        if self._size is None:
            self._size = file_size(self._parts)
        return self._size

    @property
    def bits_per_parameter(self) -> float:
        """Bits on the disk per floating number, headers and checksums included."""
        return 8 * self.nbytes_on_disk / max(self.numel, 1)

    def __repr__(self) -> str:
        return (
            f"<Compressed: {self.numel:,} numbers, {self.about.density:g} kept, "
            f"{self.bits_per_parameter:.2f} bits each on the disk>"
        )

    # ---- other forms --------------------------------------------------------------------------------

    def scaled(self, alpha: float) -> Self:
        """The same signs with another alpha; costs nothing, so that alphas can be tried.

        Raises:
            OptxError: alpha is negative or not finite.
        """
        check_range("Compressed.scaled", "alpha", alpha, 0.0)
        if not math.isfinite(alpha):
            raise OptxError(f"Compressed.scaled: alpha is {alpha!r}; it must be finite.")
        return self._with(about=replace(self.about, alpha=float(alpha)))

    def to(self, device: torch.device | str) -> Self:
        """The same with its masks on a device, where `delta` and `add_to` then decode."""
        return self._with(
            masks={n: mask.to(device) for n, mask in self.masks.items()},
            whole={n: tensor.to(device) for n, tensor in self.whole.items()},
        )

    @property
    def _parts(self) -> Signs:
        return Signs(self.entries, self.masks, self.whole, self.about, self._recipe)

    def _with(self, **changes: Any) -> Self:
        parts: dict[str, Any] = {"masks": self.masks, "whole": self.whole, "about": self.about, **changes}
        return type(self)(self.entries, recipe=self._recipe, **parts)

    def delta(self) -> Delta:
        """The decoded delta, tensor by tensor when it is asked for."""
        return self._parts.difference(Delta)

    def decode(self) -> dict[str, Tensor]:
        """All tensors at once: an adapter's own, in its dtypes, or a delta's changes.

        Tied names share a tensor again.
        """
        start = self.about.start or 0.0
        made: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            if name in self.whole:
                made[name] = self.whole[name].clone()
            elif start:
                summed = bitmask.dense(self.masks[name], entry.shape, decoded(entry).dtype, self.scale)
                made[name] = summed.add_(start).to(entry.dtype)
            else:
                made[name] = bitmask.dense(self.masks[name], entry.shape, entry.dtype, self.scale)
        return {**made, **{name: made[first] for name, first in self.about.tied.items() if first in made}}

    def add_to(self, model: Checkpoint, scale: float = 1.0, *, check: bool = True) -> None:
        """Add the change to a model's own weights, in place, at the speed of memory.

        With ``scale=-1`` and ``check=False`` it is taken off again, up to the weights' rounding. Integer
        entries stay as they are.

        Args:
            model: a module or a state dict, on any device.
            scale: of the change.
            check: refuse a model that isn't the base the delta was taken from.

        Raises:
            OptxError: another base, a missing tensor, or ``model`` is on the disk; nothing has changed then.
            ShapeError: a shape differs; names the tensor.
        """
        if isinstance(model, str | PathLike):
            raise OptxError(
                "Compressed.add_to: model is on the disk; use compressed.delta().apply(base, out=...)."
            )
        source = open_source(model, "model")
        delta = self.delta()
        (delta if check else delta.unbound())._check_base(source)  # pyright: ignore[reportPrivateUsage]
        for name, tensor in ((n, source.read(n)) for n in self.masks if n in source.entries):
            if not tensor.is_floating_point():
                raise OptxError(f"Compressed.add_to: {name!r} is {tensor.dtype} in the model.")
        if check:  # by every number, before the first of them changes
            base = verified(delta, source, _NOT_THE_BASE)
            for name in delta.floating:
                if name in source.entries:
                    base.read(name)
        with torch.no_grad():
            for name, mask in self.masks.items():
                if name in source.entries:
                    bitmask.add_to(source.read(name), mask, float(np.float32(scale * self.scale)))

    # ---- two of them, without decoding ----------------------------------------------------------------

    def _overlap(self, other: Compressed) -> bitmask.Overlap:
        """Summed over all tensors; one that a delta lacks is unchanged there."""
        totals = [0, 0, 0, 0]
        for name in self.masks.keys() | other.masks.keys():
            mine, theirs = self.masks.get(name), other.masks.get(name)
            if mine is not None and theirs is not None:
                _check_shape(name, self.entries[name], other.entries[name])
            some = mine if mine is not None else theirs
            assert some is not None
            none = torch.zeros_like(some)
            part = bitmask.overlap(none if mine is None else mine, none if theirs is None else theirs)
            totals = [total + number for total, number in zip(totals, part, strict=True)]
        return bitmask.Overlap(*totals)

    def dot(self, other: Compressed) -> float:
        """The inner product of the two decoded deltas, from counts of bits: exact but for the scales.

        Raises:
            ShapeError: a tensor has two shapes; names it.
        """
        part = self._overlap(other)
        return self.scale * other.scale * (part.agree - part.clash)

    def distance(self, other: Compressed) -> float:
        """The Euclidean distance of the two decoded deltas; see `dot`."""
        part = self._overlap(other)
        a, b = self.scale, other.scale
        alone_a, alone_b = part.a - part.agree - part.clash, part.b - part.agree - part.clash
        square = a * a * alone_a + b * b * alone_b + (a - b) ** 2 * part.agree + (a + b) ** 2 * part.clash
        return math.sqrt(square)

    def cosine(self, other: Compressed) -> float:
        """The cosine of the angle between the two, whatever their scales; 0 if one is 0 everywhere."""
        part = self._overlap(other)
        return (part.agree - part.clash) / math.sqrt(part.a * part.b) if part.a and part.b else 0.0

    # ---- many of them -------------------------------------------------------------------------------

    @staticmethod
    def average(blobs: Sequence[Compressed], weights: Sequence[float] | None = None) -> Delta:
        """The weighted sum of several, from their masks, tensor by tensor; by default their mean.

        Args:
            blobs: at least one. A tensor that one lacks is unchanged there.
            weights: one for each; None for ``1 / len(blobs)``.

        Raises:
            OptxError: none given, other weights than blobs, or other bases.
            ShapeError: a tensor has two shapes; names it.
        """
        shares = [1 / max(len(blobs), 1)] * len(blobs) if weights is None else list(weights)
        if len(shares) != len(blobs):
            raise OptxError(f"Compressed.average: there are {len(shares)} weights for {len(blobs)} deltas.")
        return _combined("average", blobs, shares, elect=False)

    @staticmethod
    def ties(blobs: Sequence[Compressed]) -> Delta:
        """Each position's sign by a vote weighted by the scales, then the mean of the scales that have it.

        As TIES-Merging does (arXiv 2306.01708), on ternary deltas. A position where the votes cancel goes
        to +, as in mergekit; where nobody votes it is 0.

        Args:
            blobs: at least one.

        Raises:
            OptxError: none given, or other bases.
            ShapeError: a tensor has two shapes; names it.
        """
        return _combined("ties", blobs, [1.0] * len(blobs), elect=True)

    # ---- keeping it ---------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a file: Golomb-coded positions, sign bits, and a checksum of everything.

        It is written aside and renamed, so that a kill leaves nothing under its name.

        Raises:
            OptxError: the file exists.
            FileError: it could not be written.
        """
        return write(self._parts, Path(path).expanduser())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            FileError: no such file, cut short, or damaged; names the tensor.
        """
        return cls(*read(Path(path).expanduser()))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and one string, for ``torch.save``; loads with ``weights_only=True``."""
        return {"compeft": describe(self._parts), "masks": dict(self.masks), "whole": dict(self.whole)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """What `state_dict` gave.

        Raises:
            FileError: it did not.
        """
        return cls(*from_state(state))


def _check_shape(name: str, one: Entry, other: Entry) -> None:
    if one.shape != other.shape:
        raise ShapeError(
            f"Compressed: {name!r} has shape {one.shape} in one delta and {other.shape} in another."
        )


def _combined(kind: str, blobs: Sequence[Compressed], shares: Sequence[float], elect: bool) -> Delta:
    """A lazy delta of a vote or a sum."""
    if not blobs:
        raise OptxError(f"Compressed.{kind}: there is no delta to combine; give at least one.")
    entries: dict[str, Entry] = {}
    fingerprints: dict[str, str] = {}
    contents: dict[str, str] = {}
    for blob in blobs:
        for name, entry in blob.entries.items():
            _check_shape(name, entries.setdefault(name, decoded(entry)), entry)
        for known, name, print_ in [
            *((fingerprints, *item) for item in blob.about.fingerprints.items()),
            *((contents, *item) for item in blob.about.contents.items()),
        ]:
            if known.setdefault(name, print_) != print_:
                raise OptxError(
                    f"Compressed.{kind}: the deltas are of different bases; they differ at {name!r}."
                )

    def read(name: str) -> Tensor:
        having = [(blob, share) for blob, share in zip(blobs, shares, strict=True) if name in blob.masks]
        if not having:
            return next(blob.whole[name] for blob in blobs if name in blob.whole)
        made = torch.empty(entries[name].shape, dtype=torch.float32)
        if made.numel():
            from optx.kernels.ternary import cpu as ternary_cpu

            weights = torch.tensor([share * blob.scale for blob, share in having], dtype=torch.float32)
            ternary_cpu.vote(made, [blob.masks[name].cpu() for blob, _ in having], weights, elect)
        return made.to(entries[name].dtype)

    recipe = (kind, tuple(shares), tuple(blob.delta().recipe for blob in blobs))
    tied = {name: first for blob in blobs for name, first in blob.about.tied.items()}
    return Delta(entries, read, recipe=recipe, fingerprints=fingerprints, contents=contents, tied=tied)
