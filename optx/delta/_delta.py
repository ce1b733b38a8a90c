"""`optx.Delta`: the difference between two checkpoints, read tensor by tensor when it is asked for.

Source: task vectors, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, near
from optx.delta._apply import Onto
from optx.delta._between import Renamed, in_order, pairs
from optx.delta._checkpoint_output import plan_of, write_checkpoint
from optx.delta._checkpoint_source import Checkpoint, Files, Source, open_source
from optx.delta._content import Watched
from optx.delta._delta_file import open_delta, save_delta
from optx.delta._delta_pruning import Prunable
from optx.delta._float32_sums import change_of, difference
from optx.delta._lora import lora_difference
from optx.delta._name_filter import chooser
from optx.delta._one_pass import OnePass
from optx.delta._options import finite_number

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
        whole: str | None = None,
    ) -> Self:
        """Tuned minus base.

        A tensor that one of them has once and the other twice (a tied output head) is paired with what it
        is tied to.

        Args:
            base: a module, a state dict, a safetensors file, or a folder with one or several of them.
            tuned: the same model after fine-tuning, likewise.
            include: regex (full match) of names to keep; None keeps all.
            exclude: regex of names to leave out, such as ``r".*lm_head.*"``: they stay as the base's.
            whole: regex of names that are taken from the tuned model as they are where the base lacks them or
                has them in another shape: a new head, or, as ``r".*(embed_tokens|lm_head).*"``, a vocabulary
                that grew. What is applied then has the tuned model's shapes, and its configuration and
                tokenizer, unless the delta went through a file (`save`), which holds neither: copy the
                tuned model's config.json and tokenizer then.

        Raises:
            OptxError: the names differ, nothing is left, or a tensor is quantised, sharded or offloaded.
            ShapeError: a tensor has two shapes; names it.
            FileError: a file is missing or damaged.
        """
        old, source = Watched(open_source(base, "base")), open_source(tuned, "tuned")
        keep = chooser(include, exclude)
        found = pairs(
            old.inner, source, keep, chooser(whole, None, "whole") if whole else lambda _name: False
        )
        names = in_order(found, source)
        if not names:
            raise OptxError(f"Delta.between: include={include!r} and exclude={exclude!r} leave nothing.")
        new = Renamed(source, found.places, found.tied)

        def piece(name: str, begin: int, end: int) -> Tensor:
            after = new.piece(name, begin, end)
            return after if name in found.whole else difference(old.piece(name, begin, end), after)

        def read(name: str) -> Tensor:
            after = new.read(name)
            change = after.dtype.is_floating_point and name not in found.whole
            return difference(old.read(name), after) if change else after

        entries = {n: entry if n in found.whole else change_of(entry) for n, entry in new.entries.items()}
        entries = {n: entries[n] for n in names}
        floats = [n for n in names if entries[n].dtype.is_floating_point and n not in found.whole]
        made = cls(
            entries,
            read,
            recipe=("between", old.label, old.state, new.label, new.state, sorted(found.whole)),
            fingerprints={n: old.fingerprint(n) for n in floats},
            tied=found.tied,
            piece=piece,
            whole=found.whole,
            bases=[old],
        )
        made._one_pass = OnePass(old, new)
        made._tuned = source if found.whole else None
        return made

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """A delta that `save` wrote, dense, sparse or compressed.

        Raises:
            FileError: the file is missing, damaged, or not a delta's.
        """
        entries, read, about = open_delta(Path(path))
        return cls(
            entries,
            read,
            recipe=("load", str(path), about["plan"], about["state"]),
            fingerprints=about["fingerprints"],
            contents=about["contents"],
            whole=about["whole"],
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
                a part of the weights off the base: what that was is made again from it. Also for GPT-2's
                layers beside a head, where PEFT's one ``fan_in_fan_out`` can't say which weights lie turned.

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
        scale, source = finite_number("Delta.apply", "scale", scale), open_source(base, "base")
        self._check_base(source)
        if out is None and isinstance(source, Files):
            raise OptxError("Delta.apply: base is on the disk; give out=, where the result is written to.")
        entries = {
            **source.entries,
            **{n: e for n, e in self.entries.items() if n in self.whole},
        }
        onto = Onto(self, source, scale)
        if out is None:
            made = {name: onto.whole(name) for name in entries}
            return {**made, **{name: made[first] for name, first in source.tied.items() if name not in made}}
        plan = plan_of("apply", source.label, source.state, scale, self.recipe)
        return write_checkpoint(
            Path(out).expanduser(),
            source,
            entries,
            lambda name: onto.pieces(name) or onto.whole(name),
            plan=plan,
            others=self._tuned,
            reshaped=bool(self.whole),
            progress=progress,
        )

    def _check_base(self, source: Source) -> None:
        for name, entry in self.entries.items():
            if name in self.whole:
                continue
            if name not in source.entries:
                first = source.tied.get(name)
                if first is None:
                    raise OptxError(f"Delta.apply: base has no {name!r}. {near(name, source.entries)}")
                if first not in self.entries or not torch.equal(self[name], self[first]):
                    raise OptxError(
                        f"Delta.apply: {name!r} is tied to {first!r} in base, and changes by itself in the "
                        "delta. Untie them in base, or leave it out with subset(exclude=...)."
                    )
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
            OptxError: the name does not end in ``.safetensors``, the file exists, or the disk is too small.
        """
        return save_delta(self, Path(path).expanduser())
