"""`optx.prune`: a model, or a checkpoint, pruned in one go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, shown
from optx._mask_bits import pack
from optx._masks import Masks
from optx.inject._injection import Targets
from optx.pruning._blocks import prune_blocks, pruned
from optx.pruning._blocks_resume import Ledger
from optx.pruning._calibration import batches_of
from optx.pruning._folder import prune_folder
from optx.pruning._method import PruneMethod
from optx.pruning._prune_layers import Layer, layers_of

Bar = Callable[[Iterable[str]], Iterable[str]]


def prune(
    target: nn.Module | Mapping[str, Tensor] | str | PathLike[str],
    method: PruneMethod,
    data: Any = None,
    *,
    targets: Targets | None = None,
    exclude: Targets | None = None,
    progress: bool | Bar = True,
    resume: str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
) -> Masks:
    """Prune a model, or a checkpoint, in one go; give back which weights are kept.

    A model is pruned in place, in the order in which it runs. Methods that look at inputs go through it block
    by block: each is fed what the pruned blocks before it make of ``data``, pruned by what its dense layers
    are given then, and run once more. Blocks are numbered modules each of which hands its output to the next,
    whatever they are called; other layers are reached by running the model up to them, once for each. The
    model is in eval mode meanwhile, without gradients, and random numbers go on as if none had been drawn.

    Beside the model are held: the activations between two blocks, of all of ``data``; what blocks are given
    beside them (masks, positions); and of one block each layer's sums, (inputs) numbers for `optx.Wanda`,
    (inputs)^2 for `optx.SparseGPT`.

    Args:
        target: a module; or, for `optx.Magnitude`, a state dict (in place too, unless ``out`` is given), a
            safetensors file, or a folder of shards, a tensor at a time in memory.
        method: which weights go, and how many.
        data: calibration data for methods that look at inputs: batches, each one a tensor, a dict of keyword
            arguments or a tuple of positional ones, as the model is called. Tokens that an ``attention_mask``
            (batch, tokens) leaves out are not counted.
        targets: which modules, in any form that `optx.attach` takes; of a checkpoint a regex over names.
            None: the linear layers and convolutions in the blocks of the families that optx knows; in other
            models all but output embeddings and what is called head, classifier, score, or the like.
        exclude: what is left out of these, in any form of ``targets``; of a checkpoint by names.
        progress: True shows it on a terminal; or what wraps the names of blocks, as ``tqdm.tqdm`` does.
        resume: a folder for finished blocks: killed, the same call on the same dense model goes on where it
            stopped, to the same result.
        out: a ``.safetensors`` file or a new folder, for what is on the disk. It is written under a hidden
            name and renamed; killed, the same call goes on where it stopped.

    Raises:
        TargetError: there is nothing to prune, or a layer can't be: its weight is tied to another
            module's, or it is used without a call; names it.
        OptxError: there is no calibration data, or a weight is quantised or has inf or nan, before
            anything is changed; or a layer's inputs are inf or nan once what comes before it is pruned.
        ShapeError: the pattern doesn't divide a weight's inputs; names it.
        FileError: a file is missing or damaged.
    """
    if not isinstance(method, PruneMethod):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"prune: method is {shown(method)}; it must be one such as optx.Wanda(0.5).")
    bar = bar_of(type(method).__name__, progress)
    if not isinstance(target, nn.Module):
        if resume is not None or not isinstance(targets, str | None):
            what = "resume is for models" if resume is not None else f"targets is {shown(targets)}"
            raise OptxError(
                f"prune: {what}; a checkpoint takes targets= as a regex, and goes on with the same out=."
            )
        return prune_folder(target, method, targets=targets, exclude=exclude, out=out, progress=bar)
    if out is not None:
        raise OptxError("prune: out= is for checkpoints; a model is pruned in place.")
    target = unwrapped(target)
    layers = layers_of(target, method, targets, exclude)
    if method.needs_inputs:
        batches = batches_of(target, data, type(method).__name__)
        ledger = None if resume is None else Ledger(resume, target, method, layers, batches)
        bits = prune_blocks(target, method, layers, batches, bar, ledger)
    else:
        if resume is not None:
            raise OptxError(f"prune: {type(method).__name__} takes moments, and has nothing to resume.")
        bits = _without_inputs(method, layers, bar)
    masks = Masks(bits, {layer.name: layer.weight.shape for layer in layers if layer.name in bits})
    masks.apply_(target)
    return masks


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile, DDP or DataParallel was given: their calls run no new hooks, nor blocks."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _without_inputs(method: PruneMethod, layers: list[Layer], bar: Bar) -> dict[str, Tensor]:
    known = {layer.name: layer for layer in layers}
    bits: dict[str, Tensor] = {}
    for name in bar(list(known)):
        layer = known[name]
        kept, new = pruned(layer, method)
        with torch.no_grad():
            layer.weight.copy_(new)
        bits[name] = pack(kept).cpu()
    return bits


def bar_of(title: str, shown: bool | Bar) -> Bar:
    """What shows how far it is."""

    def bar(names: Iterable[str]) -> Iterable[str]:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        return track(list(names), title, console=console, transient=True, disable=not sys.stderr.isatty())

    if callable(shown):
        return shown
    return bar if shown else lambda names: names
