"""`optx.Delta`: the difference between two checkpoints, read tensor by tensor when it is asked for.

Source: task vectors, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from optx._errors import OptxError, ShapeError, near
from optx.delta._checkpoint_output import plan_of, write_checkpoint
from optx.delta._checkpoint_source import Checkpoint, Files, Source, check_same, open_source
from optx.delta._float32_sums import add, difference, difference_dtype, total
from optx.delta._pruning import Plain, Prunes, chooser
from optx.delta._safetensors import Entry

if TYPE_CHECKING:
    from typing_extensions import Self

Read = Callable[[str], Tensor]
Piece = Callable[[str, int, int], Tensor]


class Delta(Prunes):
    """What fine-tuning changed: tuned minus base, by name, in float32 (float64 for such weights).

    Nothing is read before it is asked for, and one tensor at a time is in memory: models of any size do.
    Every operation gives a new delta; the inputs stay as they are. Integer and boolean entries have no
    difference: they are taken whole from the tuned checkpoint, wherever the delta has not left them out.

    Attributes:
        entries: shape and dtype by name.
        fingerprints: of the base's tensors, so that `apply` knows its base again.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
        >>> tuned = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
        >>> delta = optx.Delta.between(base, tuned)
        >>> half = 0.5 * delta
        >>> half.apply(base)["w"][0]
        tensor([0.5000, 0.5000, 0.5000])

    Source: arXiv 2212.04089, section 2.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        read: Read,
        *,
        recipe: tuple[Any, ...],
        fingerprints: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        piece: Piece | None = None,
    ) -> None:
        self.entries = dict(entries)
        self._read = read
        self.recipe = recipe
        self.fingerprints = dict(fingerprints or {})
        self.tied = dict(tied or {})
        self._piece = piece
        self._plain: Plain | None = None

    # ---- making one ---------------------------------------------------------------------------------

    @classmethod
    def between(
        cls,
        base: Checkpoint,
        tuned: Checkpoint,
        *,
        include: str | None = None,
        exclude: str | None = None,
    ) -> Self:
        """Tuned minus base.

        Args:
            base: a module, a state dict, a safetensors file, or a folder with one or several of them.
            tuned: the same model after fine-tuning, likewise.
            include: regex (full match) of names to keep; None keeps all.
            exclude: regex of names to leave out, such as ``r".*lm_head.*"``.

        Raises:
            OptxError: the names differ, or nothing is left.
            ShapeError: a tensor has two shapes; names it.
            FileError: a file is missing or damaged.
        """
        old, new = open_source(base, "base"), open_source(tuned, "tuned")
        keep = chooser(include, exclude)
        names = [name for name in new.entries if keep(name)]
        check_same(old, new, keep)
        if not names:
            raise OptxError(f"Delta.between: include={include!r} and exclude={exclude!r} leave nothing.")

        def piece(name: str, begin: int, end: int) -> Tensor:
            return difference(old.piece(name, begin, end), new.piece(name, begin, end))

        def read(name: str) -> Tensor:
            whole = new.entries[name].dtype.is_floating_point
            return difference(old.read(name), new.read(name)) if whole else new.read(name)

        entries = {n: Entry(new.entries[n].shape, difference_dtype(new.entries[n].dtype)) for n in names}
        prints = {n: old.fingerprint(n) for n in names if old.entries[n].dtype.is_floating_point}
        recipe = ("between", old.label, old.state, new.label, new.state)
        made = cls(entries, read, recipe=recipe, fingerprints=prints, tied=new.tied, piece=piece)
        made._plain = Plain(old, new)
        return made

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """A delta that `save` wrote, dense, sparse or compressed.

        Raises:
            FileError: the file is missing, damaged, or not a delta's.
        """
        from optx.delta._delta_file import open_delta

        entries, read, about = open_delta(Path(path))
        return cls(
            entries, read, recipe=("load", str(path), about["plan"]), fingerprints=about["fingerprints"]
        )

    @classmethod
    def lora(cls, adapter: str | PathLike[str], target: Literal["product", "factors"] = "product") -> Self:
        """What a LoRA adapter changed, from its folder: PEFT's, or what ``handle.save`` wrote.

        Args:
            adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            target: ``"product"``: the change of the weights, scaling times B A, by the weights' names in the
                base; one at a time is in memory. ``"factors"``: the entries of each ``lora_A`` and
                ``lora_B`` by their keys in the file, as a change from 0, so that `dare` gives each factor a
                mask of its own: the expected product stays, and the noise of both compounds. The scaling
                counts in the product only.

        Raises:
            OptxError: it has more than LoRA factors of linear layers (DoRA, biases, embeddings, whole
                modules): merge such a one into its model and take `between`.
            FileError: a file is missing or damaged.

        Example:
            >>> import torch, optx, tempfile
            >>> handle = optx.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), optx.LoRA(rank=2), "0")
            >>> folder = tempfile.mkdtemp()
            >>> handle.save(folder)
            >>> list(optx.Delta.lora(folder).dare(0.5))
            ['0.weight']

        Source: arXiv 2106.09685, section 4.1; pruning it, arXiv 2410.09344.
        """
        from optx.delta._lora import lora_delta

        return lora_delta(cls, Path(adapter).expanduser(), target)

    # ---- looking at it ------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """The change of one tensor."""
        if name not in self.entries:
            raise KeyError(f"the delta has no {name!r}. {near(name, self.entries)}")
        return self._read(name)

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """What gives the change of a tensor from one place to another, flat, in little memory if it can."""
        if self._piece is not None:
            return partial(self._piece, name)
        whole = self[name].reshape(-1)
        return lambda begin, end: whole[begin:end]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and changes, one tensor at a time."""
        for name in self.entries:
            yield name, self._read(name)

    def __repr__(self) -> str:
        numbers = sum(entry.numel for entry in self.entries.values())
        return f"<Delta of {len(self)} tensors, {numbers:,} numbers>"

    @property
    def floating(self) -> list[str]:
        """Names of the tensors that have a difference."""
        return [name for name, entry in self.entries.items() if entry.dtype.is_floating_point]

    # ---- arithmetic ---------------------------------------------------------------------------------

    def map(self, change: Callable[[str, Tensor], Tensor], recipe: tuple[Any, ...]) -> Self:
        """Each floating tensor changed by a function of its name and itself.

        Args:
            change: must give the same shape, and the same result whenever it is called.
            recipe: plain values that say what it does, so that an interrupted `apply` can be gone on with.
        """

        def read(name: str) -> Tensor:
            tensor = self._read(name)
            return change(name, tensor) if tensor.is_floating_point() else tensor

        return self._with(read, (*recipe, self.recipe))

    def _elementwise(self, change: Callable[[str, Tensor, int], Tensor], recipe: tuple[Any, ...]) -> Self:
        """`map` for what can be done by pieces: ``change`` is given where its piece begins."""
        made = self.map(lambda name, tensor: change(name, tensor, 0), recipe)
        if (inner := self._piece) is not None:
            made._piece = lambda name, begin, end: change(name, inner(name, begin, end), begin)
        return made

    def subset(self, include: str | None = None, exclude: str | None = None) -> Self:
        """Only the tensors whose whole name matches ``include`` and not ``exclude`` (regexes)."""
        keep = chooser(include, exclude)
        entries = {name: entry for name, entry in self.entries.items() if keep(name)}
        if not entries:
            raise OptxError(f"Delta.subset: include={include!r} and exclude={exclude!r} leave nothing.")
        made = self._with(self._read, ("subset", include, exclude, self.recipe), self._piece)
        made.entries, made._plain = entries, self._plain
        return made

    def __mul__(self, factor: float) -> Self:
        return self._elementwise(lambda _name, tensor, _begin: tensor * factor, ("times", float(factor)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        return self * (1 / divisor)

    def __neg__(self) -> Self:
        return self * -1.0

    def __add__(self, other: Delta) -> Self:
        """Both changes; a tensor that one lacks is unchanged there."""
        for name in (name for name in self.entries if name in other.entries):
            if self.entries[name].shape != other.entries[name].shape:
                raise ShapeError(
                    f"Delta: {name!r} has shape {self.entries[name].shape} in one delta and "
                    f"{other.entries[name].shape} in the other."
                )
            theirs = other.fingerprints.get(name)
            if theirs is not None and self.fingerprints.get(name, theirs) != theirs:
                raise OptxError(f"Delta: the two are of different bases; they differ at {name!r}.")

        def read(name: str) -> Tensor:
            if name not in other.entries:
                return self._read(name)
            if name not in self.entries:
                return other._read(name)
            mine = self._read(name)
            return total([mine, other._read(name)]) if mine.is_floating_point() else mine

        made = self._with(read, ("plus", self.recipe, other.recipe))
        if self._piece is not None and other._piece is not None:
            made._piece = lambda name, begin, end: total(
                [d._piece(name, begin, end) for d in (self, other) if d._piece and name in d.entries]
            )
        made.entries = {**other.entries, **self.entries}
        made.fingerprints = {**other.fingerprints, **self.fingerprints}
        return made

    def __sub__(self, other: Delta) -> Self:
        return self + (-other)

    def _with(self, read: Read, recipe: tuple[Any, ...], piece: Piece | None = None) -> Self:
        return type(self)(
            self.entries, read, recipe=recipe, fingerprints=self.fingerprints, tied=self.tied, piece=piece
        )

    # ---- giving it back -----------------------------------------------------------------------------

    def apply(
        self,
        base: Checkpoint,
        out: str | PathLike[str] | None = None,
        *,
        scale: float = 1.0,
        progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
    ) -> dict[str, Tensor] | Path:
        """Base plus scale times the change, in the base's dtypes; the base stays as it is.

        Args:
            base: what `between` had as base, in any of its forms.
            out: a ``.safetensors`` file or a new folder to write to; needed if ``base`` is on the disk. A
                folder is laid out as the base's, and loads with transformers if that did.
            scale: of the change.
            progress: wraps the names that are written, as ``tqdm.tqdm`` does.

        Returns:
            A new state dict, or the path that was written.

        Raises:
            OptxError: another base than the delta was taken from; names the tensor. Or ``out`` exists.
        """
        source = open_source(base, "base")
        self._check_base(source)
        if out is None and isinstance(source, Files):
            raise OptxError("Delta.apply: base is on the disk; give out=, where the result is written to.")

        if out is None:
            made = {name: self._applied(source, name, scale) for name in source.entries}
            return {**made, **{name: made[first] for name, first in source.tied.items()}}
        pieces = self._pieces_onto(source, scale)
        plan = plan_of("apply", source.label, source.state, scale, self.recipe)
        return write_checkpoint(
            Path(out).expanduser(),
            source,
            source.entries,
            lambda name: pieces(name) or self._applied(source, name, scale),
            plan=plan,
            progress=progress,
        )

    def _applied(self, source: Source, name: str, scale: float) -> Tensor:
        """One tensor of the result, whole."""
        if name not in self.entries:
            return source.read(name).clone()
        if not source.entries[name].dtype.is_floating_point:
            tensor = source.read(name)
            return self._read(name).to(tensor.device, tensor.dtype, copy=True)
        if self._plain is not None and scale == 1.0:
            count, shape = source.entries[name].numel, source.entries[name].shape
            return self._plain.onto(source, name, 0, count).view(shape)
        return add(source.read(name), self._read(name), scale)

    def _pieces_onto(
        self, source: Source, scale: float
    ) -> Callable[[str], Callable[[int, int], Tensor] | None]:
        """By name, what gives the result by pieces, if anything does."""
        plain, inner = self._plain, self._piece

        def pieces(name: str) -> Callable[[int, int], Tensor] | None:
            if name not in self.entries:
                return lambda begin, end: source.piece(name, begin, end)
            if not source.entries[name].dtype.is_floating_point:
                return None
            if plain is not None and scale == 1.0:
                return partial(plain.onto, source, name)
            if inner is not None:
                change = partial(inner, name)
                return lambda begin, end: add(source.piece(name, begin, end), change(begin, end), scale)
            return None

        return pieces

    def _check_base(self, source: Source) -> None:
        for name, entry in self.entries.items():
            if name not in source.entries:
                first = source.tied.get(name)
                if first is None:
                    raise OptxError(f"Delta.apply: base has no {name!r}. {near(name, source.entries)}")
                continue
            if source.entries[name].shape != entry.shape:
                raise ShapeError(
                    f"Delta.apply: {name!r} has shape {entry.shape} in the delta and "
                    f"{source.entries[name].shape} in the base."
                )
            if name in self.fingerprints and source.fingerprint(name) != self.fingerprints[name]:
                raise OptxError(
                    f"Delta.apply: this is not the base that the delta was taken from: {name!r} differs. To "
                    "apply it to another model all the same, use delta.unbound()."
                )

    def unbound(self) -> Self:
        """The same change without knowledge of its base: applies to any model of these shapes."""
        made = self._with(self._read, self.recipe, self._piece)
        made.fingerprints, made._plain = {}, self._plain
        return made

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the change itself as a safetensors file: tensors with few nonzeros as indices and values.

        Raises:
            OptxError: the file exists, or the disk is too small.
        """
        from optx.delta._delta_file import save_delta

        return save_delta(self, Path(path).expanduser())
