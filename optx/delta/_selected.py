"""The change of weights of which only some entries were trained: exact, base plus change is what they are.

A float32 difference of two float32 numbers, added to one of them, need not give the other. So each tensor's
change is kept in the narrowest of float32 and float64 that does; and where not even that does (a number that
is 2^29 times smaller than it was), the tensor itself is.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, near
from optx._safetensors import Entry
from optx.delta._checkpoint_source import Checkpoint, Source, open_source
from optx.delta._content import Contents
from optx.delta._delta import Delta
from optx.delta._float32_sums import add, wide


@dataclass(frozen=True)
class Trained:
    """One tensor as it is now.

    Attributes:
        weight: the tensor.
        selected: the entries that are trained; None: all may have changed.
        threshold: in the base, whatever was selected is below it in size.
        all_below: whether everything below it is still selected.
    """

    weight: Tensor
    selected: Tensor | None = None
    threshold: float = 0.0
    all_below: bool = False


@dataclass(frozen=True)
class _Kept:
    """A change, in the memory of its nonzeros."""

    places: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.values.dtype)
        out.view(-1)[self.places] = self.values
        return out


def selected_delta(who: str, base: Checkpoint, tensors: Mapping[str, Trained]) -> Delta:
    """Weights as they are now minus their base, copied: what is trained later does not move it.

    Raises:
        OptxError: the base lacks a tensor, has it in another dtype, or differs where nothing was trained.
        ShapeError: it has a tensor in another shape.
    """
    source = open_source(base, "base")
    kept: dict[str, _Kept] = {}
    whole: dict[str, Tensor] = {}
    contents = Contents(source.entries)
    names: dict[str, str] = {}
    for name, trained in tensors.items():
        names[name] = place = _place(who, source, name, trained.weight)
        old = source.read(place).cpu()
        contents.put(place, 0, old.reshape(-1))
        new = trained.weight.detach().cpu()
        _check_rest(who, name, old, new, trained)
        change = _exact(old, new)
        if change is None:
            whole[place] = new.clone()
        else:
            kept[place] = change
    entries = {n: Entry(c.shape, c.values.dtype) for n, c in kept.items()}
    entries |= {n: Entry(tuple(t.shape), t.dtype) for n, t in whole.items()}
    places = [names[name] for name in tensors]
    return Delta(
        {place: entries[place] for place in places},
        lambda name: whole[name].clone() if name in whole else kept[name].dense(),
        recipe=(who, source.label, _digest(kept, whole)),
        fingerprints={n: source.fingerprint(n) for n in kept},
        contents={n: found for n in kept if (found := contents.print_of(n))},
        whole=whole.keys(),
    )


def _place(who: str, source: Source, name: str, weight: Tensor) -> str:
    """The base's name for a tensor."""
    place = name if name in source.entries else source.tied.get(name)
    if place is None:
        raise OptxError(f"{who}: base has no {name!r}. {near(name, source.entries)}")
    entry = source.entries[place]
    if entry.shape != tuple(weight.shape):
        raise ShapeError(f"{who}: {name!r} has shape {tuple(weight.shape)}, in base {entry.shape}.")
    if entry.dtype != weight.dtype:
        raise OptxError(
            f"{who}: {name!r} is {weight.dtype}, in base {entry.dtype}: no change makes one of the other bit "
            "for bit. Give the base as it was loaded before training, as model.state_dict()."
        )
    return place


def _check_rest(who: str, name: str, old: Tensor, new: Tensor, trained: Trained) -> None:
    """Raise unless a base is the same wherever nothing can have been trained."""
    if trained.selected is None:
        return
    size = old.abs()
    within = (size if size.dtype == torch.float64 else size.float()) < trained.threshold
    same = (old == new) | (old.isnan() & new.isnan())
    selected = trained.selected.cpu()
    wrong = int((~within & (~same | selected)).sum())
    if wrong == 0 and trained.all_below:
        lost = int((within & ~selected).sum())
        if lost:
            raise OptxError(
                f"{who}: {lost:,} entries of {name!r} are below {trained.threshold:g} in the base and were "
                f"not selected, so the selection was made of weights that had been trained. {_OWN}"
            )
    if wrong:
        raise OptxError(
            f"{who}: this is not the base that was trained from: {wrong:,} entries of {name!r} differ, or "
            f"are trained, that are not below {trained.threshold:g} in it. {_OWN}"
        )


_OWN = "A resumed run has to load its optimizer's checkpoint, which has the base's selection."


def _exact(old: Tensor, new: Tensor) -> _Kept | None:
    """The change that makes the new numbers of the old ones; None where there is none."""
    places = ((old != new) & ~(old.isnan() & new.isnan())).reshape(-1).nonzero().flatten()
    before, after = old.reshape(-1)[places], new.reshape(-1)[places]
    for dtype in dict.fromkeys((wide(old.dtype), torch.float64)):
        change = after.to(dtype) - before.to(dtype)
        if torch.equal(add(before, change), after):
            return _Kept(places, change, tuple(old.shape))
    return None


def _digest(kept: Mapping[str, _Kept], whole: Mapping[str, Tensor]) -> int:
    """Of all that is in it, so that an interrupted `Delta.apply` of another is not gone on with."""
    digest = 0
    for name, change in kept.items():
        digest = zlib.crc32(name.encode(), digest)
        for t in (change.places, change.values):
            digest = zlib.crc32(t.numpy().tobytes(), digest)
    for t in whole.values():
        digest = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().tobytes(), digest)
    return digest
