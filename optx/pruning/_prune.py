"""`optx.prune`: a model, or a checkpoint, pruned in one go."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, near
from optx._masked_model import without_numbers
from optx._masks import Masks
from optx._module_paths import paths_of
from optx.inject._weights import is_conv, is_linear
from optx.pruning._folder import as_matrix, prune_folder
from optx.pruning._method import PruneMethod, check_finite

HEADS = re.compile(r".*(classifier|lm_head|score|qa_outputs).*")


def prune(
    target: nn.Module | Mapping[str, Tensor] | str | PathLike[str],
    method: PruneMethod,
    data: Any = None,
    *,
    targets: str | None = None,
    exclude: Sequence[str] | str = (),
    progress: bool = True,
    out: str | PathLike[str] | None = None,
) -> Masks:
    """Prune a model, or a checkpoint, in one go; give back which weights are kept.

    Args:
        target: a module, which is pruned in place; or, for `optx.Magnitude`, a state dict (in place too,
            unless ``out`` is given), a safetensors file, or a folder of shards, a tensor at a time in memory.
        method: which weights go, and how many.
        data: batches of inputs, for methods that need them.
        targets: a regex over modules' names; None: all linear layers and convolutions but the head.
        exclude: regexes over modules' names, which are left out.
        progress: whether a terminal shows how far it is.
        out: a ``.safetensors`` file or a new folder, for what is on the disk. It is written under a hidden
            name and renamed; killed, the same call goes on where it stopped.

    Raises:
        OptxError: nothing is left to prune, or a weight is quantised or has inf or nan; names it.
        ShapeError: the pattern doesn't divide a weight's inputs; names it.
    """
    skip = excluded(exclude)
    bar = bar_of(type(method).__name__, progress)
    if not isinstance(target, nn.Module):
        return prune_folder(target, method, targets=targets, exclude=skip, out=out, progress=bar)
    chosen = _layers(target, targets, skip)
    masks = dict[str, Tensor]()
    for path, module in chosen.items():
        weight: Any = module.weight
        why = without_numbers(weight)
        if why:
            raise OptxError(f"prune: {path + '.weight'!r} {why}")
        method.check_shape(f"{path}.weight", as_matrix(weight, not _plain(module)).shape[1])
        check_finite(f"{path}.weight", weight)
    for path in bar(list(chosen)):
        module = chosen[path]
        own: Any = module.weight
        matrix = as_matrix(own.detach().float(), not _plain(module))
        kept, new = method.prune_matrix(matrix)
        turned = (kept, new) if _plain(module) else (kept.t(), new.t())
        masks[f"{path}.weight" if path else "weight"] = turned[0].reshape(own.shape)
        with torch.no_grad():
            own.copy_(turned[1].reshape(own.shape))
    made = Masks.from_bool(masks)
    made.apply_(target)
    return made


def excluded(patterns: Sequence[str] | str) -> Callable[[str], bool]:
    """Whether a module's name is left out.

    Raises:
        OptxError: a pattern is no regular expression.
    """
    every = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in every:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptxError(f"prune: exclude={pattern!r} is not a regular expression ({error}).") from None
    return lambda path: any(re.fullmatch(pattern, path) for pattern in every)


def bar_of(title: str, shown: bool) -> Callable[[Iterable[str]], Iterable[str]]:
    """What shows on a terminal how far it is."""

    def bar(names: Iterable[str]) -> Iterable[str]:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        return track(list(names), title, console=console, transient=True, disable=not sys.stderr.isatty())

    return bar if shown else lambda names: names


def _plain(module: nn.Module) -> bool:
    return type(module).__name__ != "Conv1D"


def _layers(model: nn.Module, targets: str | None, skip: Callable[[str], bool]) -> dict[str, nn.Module]:
    every = {
        path: module
        for path, module in paths_of(model).modules.items()
        if is_linear(module) or is_conv(module)
    }
    if targets is not None:
        chosen = {path: module for path, module in every.items() if re.fullmatch(targets, path)}
    else:
        chosen = {path: module for path, module in every.items() if not HEADS.fullmatch(path)}
    chosen = {path: module for path, module in chosen.items() if not skip(path)}
    if not chosen:
        raise OptxError(f"prune: nothing is left to prune. {near(targets or '', every)}")
    return chosen
