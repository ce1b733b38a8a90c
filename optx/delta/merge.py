"""`optx.merge`: several fine-tunings of one base into one model, tensor by tensor.

Source: task vectors, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from optx._errors import OptxError, near
from optx.delta._delta import (
    Delta,
    add,
)
from optx.delta._output import plan_of, write_checkpoint
from optx.delta._prunes import chooser
from optx.delta._safetensors import Entry
from optx.delta._source import Checkpoint, Files, Source, check_alike, open_source

Progress = Callable[[Iterable[str]], Iterable[str]]
Combine = Callable[[str, Sequence[Tensor]], Tensor]
Model: TypeAlias = Checkpoint | Delta


class Changes:
    """What each model changed, by name: one tensor per model, float32 (float64 for such weights).

    Iterating over it is one pass over all the models' numbers, a tensor at a time.

    Attributes:
        entries: shape by name.
        models: how many there are.
        numel: numbers of one model.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        models: int,
        read: Callable[[str], Sequence[Tensor]],
        progress: Progress = lambda names: names,
    ) -> None:
        self.entries, self.models = dict(entries), models
        self.numel = sum(entry.numel for entry in self.entries.values())
        self._read, self._progress = read, progress

    def __iter__(self) -> Iterator[tuple[str, Sequence[Tensor]]]:
        for name in self._progress(list(self.entries)):
            yield name, self._read(name)

    @classmethod
    def of(cls, name: str, tensors: Sequence[Tensor]) -> Changes:
        """Those of one tensor, as if it were the whole model."""
        entry = Entry(tuple(tensors[0].shape), tensors[0].dtype)
        return cls({name: entry}, len(tensors), lambda _: tensors)


class MergeMethod(ABC):
    """How several changes of a model become one.

    A method of your own is a class with `prepare`. Make it a dataclass: its ``repr`` names the computation,
    by which an interrupted merge knows what it was doing.

    Attributes:
        passes: how often `prepare` goes over all tensors at most, for progress bars.

    Example:
        >>> import torch, optx
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Largest(optx.MergeMethod):
        ...     def prepare(self, changes):
        ...         return lambda name, tensors: max(tensors, key=lambda t: float(t.norm()))
        >>> base = {"w": torch.zeros(2)}
        >>> optx.merge(base, [{"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}], Largest())["w"]
        tensor([3., 3.])
    """

    passes: int = 0

    @abstractmethod
    def prepare(self, changes: Changes) -> Combine:
        """Look at all changes, where the method needs that, and give what merges one tensor.

        Args:
            changes: of the whole model; iterating is a pass over every tensor of every model.

        Returns:
            A function of a tensor's name and its changes, one per model, not to be written to. It gives the
            merged change, in memory of its own.
        """

    def mark(self) -> str:
        """All that the result depends on beside the models; an interrupted merge goes on under the same."""
        return repr(self)


def merge(
    base: Checkpoint,
    models: Sequence[Model],
    method: MergeMethod,
    out: str | PathLike[str] | None = None,
    *,
    include: str | None = None,
    exclude: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda names: names,
) -> dict[str, Tensor] | Path:
    """Merge fine-tuned models of one base into one model.

    One tensor is read at a time, so memory is bounded by the largest: once per model, and a few times more
    for what a method computes. A method whose scope is the whole model goes over the files more than once.
    Integer and boolean entries, and whatever is left out, are the base's.

    Args:
        base: what the models were fine-tuned from: a module, a state dict, a safetensors file or a folder.
        models: the fine-tuned models, in any of these forms, or their `optx.Delta` (pruned, compressed).
        method: `optx.TaskArithmetic`, `optx.TIES`, `optx.DARELinear`, `optx.DARETIES`, `optx.PCB`.
        out: a ``.safetensors`` file or a new folder to write to; needed if ``base`` is on the disk. A folder
            is laid out as the base's, configuration and tokenizer included. Killed before it is done, the
            same call goes on where it stopped.
        include: regex (full match) of names to merge; None merges all.
        exclude: regex of names to leave as the base's, such as ``r".*lm_head.*"``.
        dtype: of the result's floating tensors; None: each as in the base. Sums are float32 either way.
        progress: wraps the names of every pass and of what is written, as ``tqdm.tqdm`` does.

    Returns:
        A new state dict, or the path that was written. The inputs stay as they are.

    Raises:
        OptxError: names differ, an option doesn't fit the number of models, numbers that are not finite, or
            ``out`` exists.
        ShapeError: a tensor has two shapes; names it.
        FileError: a file is missing or damaged.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.ones(4)}
        >>> a = {"w": torch.tensor([2.0, -1.0, 4.0, 1.5])}
        >>> b = {"w": torch.tensor([0.0, 0.0, 5.0, -1.0])}
        >>> optx.merge(base, [a, b], optx.TaskArithmetic(lam=0.3))["w"]
        tensor([1.0000, 0.1000, 3.1000, 0.5500])

    Source: arXiv 2212.04089, section 2.
    """
    if not isinstance(method, MergeMethod):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"merge: method is a {type(method).__name__}; it must be one such as optx.TIES().")
    inputs = _Inputs(base, models, chooser(include, exclude))
    source = inputs.base
    if out is None and isinstance(source, Files):
        raise OptxError("merge: base is on the disk; give out=, where the result is written to.")
    if dtype is not None and not dtype.is_floating_point:
        raise OptxError(f"merge: dtype is {dtype}; it must be a floating type such as torch.bfloat16.")
    if out is not None and Path(out).expanduser().exists():
        raise OptxError(f"out: {str(out)!r} exists already. Give another name, or delete it.")
    changes = Changes(inputs.entries, len(models), inputs.read, progress)
    mark, combine = method.mark(), method.prepare(changes)

    def result(name: str) -> Tensor:
        before = source.read(name)
        if not before.is_floating_point():
            return before
        wide = before.to(torch.promote_types(before.dtype, dtype)) if dtype is not None else before
        if name in inputs.entries:
            wide = add(wide, combine(name, inputs.read(name, before)))
        return wide.to(dtype or before.dtype)

    if out is None:
        made = {name: _own(result(name), source.read(name)) for name in source.entries}
        return {**made, **{name: made[first] for name, first in source.tied.items()}}
    entries = {n: Entry(e.shape, _out_dtype(e.dtype, dtype)) for n, e in source.entries.items()}
    plan = plan_of("merge", inputs.labels(), inputs.states(), mark, include, exclude, dtype)
    return write_checkpoint(Path(out).expanduser(), source, entries, result, plan=plan, progress=progress)


class _Inputs:
    """The base and the models, checked against one another."""

    def __init__(self, base: Checkpoint, models: Sequence[Model], keep: Callable[[str], bool]) -> None:
        self.base = open_source(base, "base")
        if isinstance(models, str | PathLike | Mapping | Delta) or not len(models):
            raise OptxError("merge: models must be a list of at least one model.")
        self.models = [
            m if isinstance(m, Delta) else open_source(m, f"models[{i}]") for i, m in enumerate(models)
        ]
        self.entries = {
            name: Entry(entry.shape, torch.promote_types(entry.dtype, torch.float32))
            for name, entry in self.base.entries.items()
            if entry.dtype.is_floating_point and keep(name)
        }
        if not self.entries:
            raise OptxError("merge: include and exclude leave no floating tensor to merge.")
        self._places = [self._find(model, f"models[{i}]", keep) for i, model in enumerate(self.models)]

    def _find(self, model: Source | Delta, what: str, keep: Callable[[str], bool]) -> dict[str, str]:
        """The name that a model has for each tensor of the base."""
        places: dict[str, str] = {}
        aliases = {first: name for name, first in self.base.tied.items()}
        for name, entry in self.base.entries.items():
            if not keep(name):
                continue
            options = (name, model.tied.get(name), aliases.get(name))
            place = next((option for option in options if option in model.entries), None)
            if place is None:
                if isinstance(model, Delta):
                    continue  # a delta may be of some tensors only
                raise OptxError(
                    f"merge: {what} lacks {name!r}, which base has. {near(name, model.entries)} Leave it "
                    "as the base's with exclude=."
                )
            check_alike("merge", name, model.entries[place], what, entry, "Leave it as the base's")
            places[name] = place
        self._check_rest(model, what, keep)
        if isinstance(model, Delta):
            self._check_delta(model, what, places)
        return places

    def _check_rest(self, model: Source | Delta, what: str, keep: Callable[[str], bool]) -> None:
        """What the model has and the base hasn't."""
        for name in model.entries:
            first = self.base.tied.get(name)
            if not keep(name) or name in self.base.entries:
                continue
            if first is None:
                raise OptxError(
                    f"merge: {what} has {name!r}, which base lacks. {near(name, self.base.entries)} Leave it "
                    "out with exclude=."
                )
            if not isinstance(model, Source) or first not in model.entries:
                continue
            if model.fingerprint(name) != model.fingerprint(first):
                raise OptxError(
                    f"merge: {name!r} is tied to {first!r} in base, and has values of its own in {what}. "
                    "Untie them in base, or leave it out with exclude=."
                )

    def _check_delta(self, delta: Delta, what: str, places: Mapping[str, str]) -> None:
        for name, place in places.items():
            known = delta.fingerprints.get(place)
            if known is not None and known != self.base.fingerprint(name):
                raise OptxError(
                    f"merge: {what} was taken from another base: {name!r} differs. To merge it all the same, "
                    "use delta.unbound()."
                )

    def read(self, name: str, before: Tensor | None = None) -> list[Tensor]:
        """Each model's change of a tensor."""
        before = self.base.read(name) if before is None else before
        wide = self.entries[name].dtype
        found: list[Tensor] = []
        for i, (model, places) in enumerate(zip(self.models, self._places, strict=True)):
            if name not in places:
                found.append(torch.zeros(before.shape, dtype=wide, device=before.device))
                continue
            if isinstance(model, Delta):
                change = model[places[name]].to(before.device, wide)
            else:
                change = model.read(places[name]).to(before.device, wide) - before.to(wide)
            if not _finite(change):
                raise OptxError(
                    f"merge: the change of {name!r} in models[{i}] is not finite. Leave it out with "
                    "exclude=, or mend that model."
                )
            found.append(change)
        return found

    def labels(self) -> list[str]:
        """What the inputs are."""
        return [self.base.label, *(repr(m.recipe) if isinstance(m, Delta) else m.label for m in self.models)]

    def states(self) -> list[object]:
        """Tell other numbers under the same labels."""
        return [model.state for model in (self.base, *self.models) if isinstance(model, Source)]


def _finite(tensor: Tensor) -> bool:
    # The sum of finite numbers is nearly always finite, and costs no memory.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _own(made: Tensor, source: Tensor) -> Tensor:
    return made.clone() if made.data_ptr() == source.data_ptr() else made


def _out_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own
