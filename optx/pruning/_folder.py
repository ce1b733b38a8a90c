"""Pruning of checkpoints, a tensor at a time: files, folders of shards, and state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from optx._errors import OptxError
from optx._mask_bits import pack
from optx._masks import Masks
from optx.delta._checkpoint_output import plan_of, write_checkpoint
from optx.delta._checkpoint_source import Files, Source, open_source
from optx.delta._float32_sums import wide
from optx.inject._injection import Targets
from optx.pruning._folder_layers import Matrix, matrices
from optx.pruning._method import PruneMethod, check_finite


def prune_folder(
    target: Mapping[str, Tensor] | str | PathLike[str],
    method: PruneMethod,
    *,
    targets: str | None,
    exclude: Targets | None,
    out: str | PathLike[str] | None,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> Masks:
    """Prune a checkpoint; see `optx.prune`.

    Args:
        target: a state dict, a safetensors file, or a folder of shards.
        method: one that needs no inputs.
        targets: a regex over modules' names; None: the linear layers and convolutions of numbered blocks.
        exclude: which modules are left out, by names, in any form that `optx.attach` takes.
        out: where the result is written to; None: into the state dict's own tensors.
        progress: wraps the names of what is pruned or written.

    Raises:
        OptxError: the method needs inputs, nothing is left to prune, ``out`` is needed or exists, or a weight
            is quantised or has inf or nan; names it.
        ShapeError: the pattern doesn't divide a weight's inputs; names it.
        FileError: a file is missing or damaged.
    """
    who = type(method).__name__
    if method.needs_inputs:
        raise OptxError(
            f"prune: {who} needs the inputs of layers, which a checkpoint hasn't got. Load "
            "the model and prune that, or use optx.Magnitude."
        )
    source = open_source(target, "target")
    if out is None and isinstance(source, Files):
        raise OptxError("prune: target is on the disk; give out=, where the result is written to.")
    chosen = matrices(source.entries, source.label, targets, exclude)
    for name, matrix in chosen.items():
        method.check_shape(name, matrix.inputs)
    job = _Job(source, method, chosen)
    if out is None:
        masks = job.masks(progress)
        for name in chosen:
            source.read(name).masked_fill_(~masks[name].to(source.read(name).device), 0)
        return masks
    plan = plan_of("prune", source.label, source.state, repr(method), sorted(chosen))
    write_checkpoint(Path(out).expanduser(), source, source.entries, job.tensor, plan=plan, progress=progress)
    return job.masks()


class _Job:
    """One pruning of one source.

    Args:
        source: of the tensors.
        method: that prunes.
        chosen: what it prunes.
    """

    def __init__(self, source: Source, method: PruneMethod, chosen: Mapping[str, Matrix]) -> None:
        self._source, self._method, self._chosen = source, method, chosen
        self._bits: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor | Callable[[int, int], Tensor]:
        """One tensor of the result; what is not pruned comes by pieces."""
        if name not in self._chosen:
            return lambda begin, end: self._source.piece(name, begin, end)
        weight = self._source.read(name)
        return weight.masked_fill(~self._kept(name, weight), 0)

    def masks(self, progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names) -> Masks:
        """All masks; those of tensors that an earlier run had written are computed anew."""
        for name in progress([name for name in self._chosen if name not in self._bits]):
            self._kept(name, self._source.read(name))
        shapes = {name: matrix.shape for name, matrix in self._chosen.items()}
        return Masks({name: self._bits[name] for name in self._chosen}, shapes)

    def _kept(self, name: str, weight: Tensor) -> Tensor:
        check_finite(name, weight)
        matrix = as_matrix(weight.to(wide(weight.dtype)), self._chosen[name].transposed)
        kept = self._method.prune_matrix(matrix)[0]
        mask = (kept.t() if self._chosen[name].transposed else kept).reshape(weight.shape)
        self._bits[name] = pack(mask).cpu()
        return mask


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """A weight as (outputs, inputs): transposed where inputs come first, a convolution's kernel flattened."""
    return weight.t() if transposed else weight.reshape(weight.shape[0], -1)
