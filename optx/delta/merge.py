"""`optx.merge`: several fine-tunings of one base into one model, tensor by tensor.

Source: task vectors, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from optx._buffers import PIECE
from optx._errors import OptxError, near
from optx._safetensors import Entry
from optx.delta._apply import verified
from optx.delta._checkpoint_output import plan_of, write_checkpoint
from optx.delta._checkpoint_source import Checkpoint, Files, Memory, Source, check_alike, open_source
from optx.delta._claim import claimed
from optx.delta._content import same_source
from optx.delta._delta import Delta
from optx.delta._entrywise import Entrywise
from optx.delta._float32_sums import add, check_overflow, difference, difference_dtype, finite, narrow, wide
from optx.delta._merge_method import ByPieces, Changes, Combine, MergeMethod, OfPiece, Progress, Raw
from optx.delta._name_filter import chooser
from optx.delta._refusals import check_not_quantised
from optx.delta._ties import is_copy, same_content, stands_for
from optx.delta._work_files import check_new

Model: TypeAlias = Checkpoint | Delta


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

    optx's own methods work on a few megabytes at a time, whatever the models' size; a delta that can't be
    made by pieces (pruned by importance, loaded from a file) has one tensor in memory. A method whose scope
    is the whole model goes over the files more than once. Integer and boolean entries, and whatever is left
    out, are the base's.

    Args:
        base: what the models were fine-tuned from: a module, a state dict, a safetensors file or a folder.
        models: the fine-tuned models, in any of these forms, or their `optx.Delta` (pruned, compressed).
        method: `optx.TaskArithmetic`, `optx.TIES`, `optx.DARELinear`, `optx.DARETIES`, `optx.PCB`.
        out: a ``.safetensors`` file or a new folder to write to; needed if ``base`` is on the disk. A folder
            is laid out as the base's, configuration and tokenizer included. Killed before it is done, the
            same call goes on where it stopped. One that exists is refused: delete it first. (Only the command
            ``optx merge`` replaces one, with ``--overwrite``.)
        include: regex (full match) of names to merge; None merges all.
        exclude: regex of names to leave as the base's, such as ``r".*lm_head.*"``.
        dtype: of the result's floating tensors; None: each as in the base. Sums are float32 either way.
        progress: wraps the names of every pass and of what is written, as ``tqdm.tqdm`` does.

    Returns:
        A new state dict, or the path that was written. The inputs stay as they are.

    Paper values:
        Those of the method that is given: each has its own.

    Limits: All models must be of one base and one architecture; optimizer state is not merged.

    Keywords: mergekit, model soup, merging, averaging.

    Evidence: ``optx run merge``; ``test_merge.py``, ``test_merge_peers.py``, ``test_merge_cli.py``.

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
    source = inputs.source
    if out is None and isinstance(source, Files):
        raise OptxError("merge: base is on the disk; give out=, where the result is written to.")
    # float8_e8m0fnu has powers of two and nothing else: no zero, no sign.
    known: bool = dtype is None or getattr(dtype, "is_floating_point", False)  # not of a dtype's name
    if not known or dtype == torch.float8_e8m0fnu:
        raise OptxError(f"merge: dtype is {dtype}; it must be a floating type such as torch.bfloat16.")
    if out is not None:
        check_new(Path(out).expanduser())
    if out is not None:
        with claimed(Path(out).expanduser()):  # from the first pass on: a second writer is refused at once
            return _run(inputs, models, method, Path(out).expanduser(), include, exclude, dtype, progress)
    return _run(inputs, models, method, None, include, exclude, dtype, progress)


def _run(
    inputs: _Inputs,
    models: Sequence[Model],
    method: MergeMethod,
    out: Path | None,
    include: str | None,
    exclude: str | None,
    dtype: torch.dtype | None,
    progress: Progress,
) -> dict[str, Tensor] | Path:
    source = inputs.source
    changes = Changes(inputs.entries, len(models), inputs.reader, progress, inputs.raw, inputs.in_memory)
    mark, combine = method.mark(), method.prepare(changes)
    result = partial(_merged, inputs, combine, dtype)
    entries = {n: Entry(e.shape, _out_dtype(e.dtype, dtype)) for n, e in source.entries.items()}
    if out is None:
        made = {name: _own(result(name), entries[name], source.read(name)) for name in entries}
        return {**made, **{name: made[first] for name, first in source.tied.items()}}
    plan = plan_of("merge", inputs.labels(), inputs.states(), mark, include, exclude, dtype)
    return write_checkpoint(out, source, entries, result, plan=plan, dtype=dtype, progress=progress)


def _merged(
    inputs: _Inputs, combine: Combine, dtype: torch.dtype | None, name: str
) -> Tensor | Callable[[int, int], Tensor]:
    """One tensor of the result: what makes its pieces, or all of it where only that can be."""
    source, entry = inputs.base, inputs.base.entries[name]
    own = dtype or entry.dtype
    if not entry.dtype.is_floating_point:
        return source.read(name)
    if name not in inputs.entries:
        return lambda begin, end: source.piece(name, begin, end).to(own)
    read, sum_dtype = inputs.reader(name), wide(entry.dtype, own)
    if not isinstance(combine, ByPieces):
        before = source.read(name)
        changes = [change.view(entry.shape) for change in read(0, entry.numel, before.reshape(-1))]
        return _rounded(name, before.to(sum_dtype), combine(name, changes), own)
    return _Pieces(inputs, name, combine.of(name), sum_dtype, own)


@dataclass(frozen=True)
class _Pieces:
    """Makes pieces of one tensor of the result."""

    inputs: _Inputs
    name: str
    merge: OfPiece
    sum_dtype: torch.dtype
    dtype: torch.dtype

    def at_once(self, begin: int, end: int) -> Tensor | None:
        """One in one compiled pass over what it is made of; None where that can't be."""
        raw = self.inputs.raw(self.name)
        if raw is None or not isinstance(self.merge, Entrywise):
            return None
        return self.merge.onto(*raw(begin, end), begin, self.dtype)

    def __call__(self, begin: int, end: int) -> Tensor:
        if (made := self.at_once(begin, end)) is not None:
            return made
        before = self.inputs.base.piece(self.name, begin, end)
        change = self.merge(self.inputs.reader(self.name)(begin, end, before), begin)
        return _rounded(self.name, before.to(self.sum_dtype), change, self.dtype)


def _rounded(name: str, before: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    made = narrow(add(before, change), dtype)
    if not finite(made):
        check_overflow("merge", name, made, before)  # every change that was read is finite
    return made


class _Inputs:
    """The base and the models, checked against one another."""

    def __init__(self, base: Checkpoint, models: Sequence[Model], keep: Callable[[str], bool]) -> None:
        self.source = open_source(base, "base")
        self.base = self.source
        wrong = isinstance(models, str | PathLike | Mapping | Delta) or not hasattr(models, "__len__")
        if wrong or not len(models):
            raise OptxError("merge: models must be a list of at least one model.")
        self.models = [
            m if isinstance(m, Delta) else open_source(m, f"models[{i}]") for i, m in enumerate(models)
        ]
        self.entries = {
            name: Entry(entry.shape, difference_dtype(entry.dtype))
            for name, entry in self.base.entries.items()
            if entry.dtype.is_floating_point and keep(name)
        }
        check_not_quantised("merge", self.base.entries, "base", keep)
        if not self.entries:
            raise OptxError("merge: include and exclude leave no floating tensor to merge.")
        self._places = [self._find(model, f"models[{i}]", keep) for i, model in enumerate(self.models)]

    def _find(self, model: Source | Delta, what: str, keep: Callable[[str], bool]) -> dict[str, str]:
        """The name that a model has for each tensor of the base."""
        if isinstance(model, Source):
            check_not_quantised("merge", model.entries, what, keep)
        places: dict[str, str] = {}
        aliases = {first: name for name, first in self.base.tied.items()}
        for name, entry in self.base.entries.items():
            if not keep(name):
                continue
            options = (name, model.tied.get(name), aliases.get(name))
            place = next((option for option in options if option in model.entries), None)
            if place is None and isinstance(model, Source):
                place = stands_for(name, model, self.base)
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
            if first is None and isinstance(model, Source) and is_copy(name, model, self.base, "merge", what):
                continue
            if first is None:
                raise OptxError(
                    f"merge: {what} has {name!r}, which base lacks. {near(name, self.base.entries)} Leave it "
                    "out with exclude=."
                )
            if not isinstance(model, Source) or first not in model.entries:
                continue
            if not same_content(model, name, model, first):
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
        if not any(same_source(base, self.source) for base in delta.bases):
            complaint = (
                f"merge: {what} was taken from another base: {{}} differs. To merge it all the same, use "
                "delta.unbound()."
            )
            self.base = verified(delta, self.base, complaint)

    def reader(self, name: str) -> Callable[..., list[Tensor]]:
        """What reads each model's change of a tensor, from one place to another, flat.

        It takes the base's piece too, where that has been read already.
        """
        sum_dtype = self.entries[name].dtype
        readers = [
            _reader(model, places[name]) if name in places else None
            for model, places in zip(self.models, self._places, strict=True)
        ]

        def read(begin: int, end: int, before: Tensor | None = None) -> list[Tensor]:
            before = self.base.piece(name, begin, end) if before is None else before
            start, found = before.to(sum_dtype), list[Tensor]()
            for i, (model, reader) in enumerate(zip(self.models, readers, strict=True)):
                if reader is None:
                    found.append(torch.zeros_like(start))
                    continue
                own = reader(begin, end).to(before.device, sum_dtype)
                change = own if isinstance(model, Delta) else own - start
                # Looked through once: only where something is not finite may equal infinities cancel.
                if not finite(change) and not (
                    isinstance(model, Source) and finite(change := difference(start, own))
                ):
                    raise OptxError(
                        f"merge: the change of {name!r} in models[{i}] is not finite. Leave it out with "
                        "exclude=, or mend that model."
                    )
                found.append(change)
            return found

        return read

    def raw(self, name: str) -> Raw | None:
        """What reads the numbers of a tensor as they are; None where one is a delta's."""
        sources = [
            (model, places[name])
            for model, places in zip(self.models, self._places, strict=True)
            if isinstance(model, Source) and name in places
        ]
        if len(sources) < len(self.models):
            return None
        return lambda begin, end: (
            self.base.piece(name, begin, end),
            [model.piece(place, begin, end) for model, place in sources],
        )

    @property
    def in_memory(self) -> bool:
        """Whether nothing has to be read."""
        return all(isinstance(one, Memory) for one in (self.base, *self.models))

    def labels(self) -> list[str]:
        """What the inputs are."""
        return [
            self.source.label,
            *(repr(m.recipe) if isinstance(m, Delta) else m.label for m in self.models),
        ]

    def states(self) -> list[object]:
        """Tell other numbers under the same labels."""
        return [model.state for model in (self.source, *self.models) if isinstance(model, Source)]


def _reader(model: Source | Delta, name: str) -> Callable[[int, int], Tensor]:
    return model.reader(name) if isinstance(model, Delta) else partial(model.piece, name)


def _own(made: Tensor | Callable[[int, int], Tensor], entry: Entry, source: Tensor) -> Tensor:
    """A tensor of the result, whole, in memory of its own and on the base's device."""
    if isinstance(made, Tensor):
        return made.clone() if made.data_ptr() == source.data_ptr() else made
    if isinstance(made, _Pieces) and (whole := made.at_once(0, entry.numel)) is not None:
        return whole.view(entry.shape)
    flat = torch.empty(entry.numel, dtype=entry.dtype, device=source.device)
    for begin in range(0, entry.numel, PIECE):
        end = min(begin + PIECE, entry.numel)
        flat[begin:end] = made(begin, end)
    return flat.view(entry.shape)


def _out_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own
