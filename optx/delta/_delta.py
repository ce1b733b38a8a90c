"""`optx.Delta`: the difference between two checkpoints, read tensor by tensor when it is asked for.

Source: task vectors, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from optx._errors import OptxError, ShapeError, near
from optx._safetensors import Entry
from optx.delta._checkpoint_output import plan_of, write_checkpoint
from optx.delta._checkpoint_source import Checkpoint, Files, Source, check_same, open_source
from optx.delta._delta_file import open_delta, save_delta
from optx.delta._delta_pruning import Prunable
from optx.delta._float32_sums import add, difference, difference_dtype
from optx.delta._lora import lora_difference
from optx.delta._name_filter import chooser
from optx.delta._one_pass import OnePass

if TYPE_CHECKING:
    from typing_extensions import Self


class Delta(Prunable):
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
    """

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
        made._one_pass = OnePass(old, new)
        return made

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """A delta that `save` wrote, dense, sparse or compressed.

        Raises:
            FileError: the file is missing, damaged, or not a delta's.
        """
        entries, read, about = open_delta(Path(path))
        return cls(
            entries, read, recipe=("load", str(path), about["plan"]), fingerprints=about["fingerprints"]
        )

    @classmethod
    def lora(
        cls,
        adapter: str | PathLike[str],
        target: Literal["product", "factors"] = "product",
        *,
        base: Checkpoint | None = None,
    ) -> Self:
        """What a LoRA adapter changed, from its folder: PEFT's, or what ``handle.save`` wrote.

        Args:
            adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            target: ``"product"``: the change of the weights, scaling times B A, by the weights' names in the
                base; one at a time is in memory. ``"factors"``: the entries of each ``lora_A`` and
                ``lora_B`` by their keys in the file, as a change from 0, so that `dare` gives each factor a
                mask of its own: the expected product stays, and the noise of both compounds. The scaling
                counts in the product only.
            base: the checkpoint that it was trained from, if PEFT started it with PiSSA or OLoRA, which take
                a part of the weights off the base: what that was is made again from it.

        Paper values:
            ``target="product"``: one change of each weight, as DARE prunes any (the default). Which of the
                two DAREx prunes could not be checked.

        Limits: Linear layers only. Factors that are pruned apart lose their low rank's advantage: they are
        saved entry by entry.

        Keywords: LoRA, PEFT, adapters, pruning.

        Evidence: ``test_delta_lora.py``; no recipe.

        Raises:
            OptxError: it has more than LoRA factors of linear layers (DoRA, biases, embeddings, whole
                modules): merge such a one into its model and take `between`. Or ``base`` is needed and not
                given, or given and not needed.
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
        return lora_difference(cls, Path(adapter).expanduser(), target, base)

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
        if self._one_pass is not None and scale == 1.0:
            count, shape = source.entries[name].numel, source.entries[name].shape
            return self._one_pass.onto(source, name, 0, count).view(shape)
        return add(source.read(name), self._read(name), scale)

    def _pieces_onto(
        self, source: Source, scale: float
    ) -> Callable[[str], Callable[[int, int], Tensor] | None]:
        """By name, what gives the result by pieces, if anything does."""
        one_pass, inner = self._one_pass, self._piece

        def pieces(name: str) -> Callable[[int, int], Tensor] | None:
            if name not in self.entries:
                return lambda begin, end: source.piece(name, begin, end)
            if not source.entries[name].dtype.is_floating_point:
                return None
            if one_pass is not None and scale == 1.0:
                return partial(one_pass.onto, source, name)
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

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the change itself as a safetensors file: tensors with few nonzeros as indices and values.

        Raises:
            OptxError: the file exists, or the disk is too small.
        """
        return save_delta(self, Path(path).expanduser())
