"""A merge as a YAML file: mergekit's format for the methods that both have, and for optx's own PCB.

What the format means is taken from mergekit 0.1.5's documentation and behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch

from optx._errors import OptxError, near, warn
from optx.delta._inputs import expanded
from optx.delta._merge_file import MergeFile, parse
from optx.delta._merge_method import Progress
from optx.delta._merge_methods import METHODS, check_parameters
from optx.delta._merge_run import job_of
from optx.delta._merge_settings import Kind, Table, number, shown, value_at, word
from optx.delta._yaml import load_yaml
from optx.delta.merge import merge
from optx.delta.pcb import PCB

KNOWN = (*METHODS, "pcb")
"""The methods that a file may name."""


class Merge(Protocol):
    """A merge that a file describes.

    Attributes:
        passes: how often it goes over all tensors at most.
        models: how many are merged into the base, or into one another.
        notes: what of the file has no effect, and what a person should know, in sentences.
        inputs: what is read.
    """

    @property
    def passes(self) -> int: ...
    @property
    def models(self) -> int: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def inputs(self) -> list[Path]: ...
    def run(self, out: Path, progress: Progress) -> Path:
        """Write the result."""
        ...


@dataclass(frozen=True)
class PCBMerge:
    """A merge by `optx.PCB`, which looks at whole models."""

    base: Path
    paths: Sequence[Path]
    method: PCB
    dtype: torch.dtype | None
    notes: list[str]

    @property
    def passes(self) -> int:
        """Once for each number that it needs, and once to write."""
        return 1 + self.method.passes

    @property
    def models(self) -> int:
        """How many are merged."""
        return len(self.paths)

    @property
    def inputs(self) -> list[Path]:
        """What is read."""
        return [self.base, *self.paths]

    def run(self, out: Path, progress: Progress) -> Path:
        """Write the result."""
        made = merge(self.base, list(self.paths), self.method, out, dtype=self.dtype, progress=progress)
        assert isinstance(made, Path)
        return made


def merge_yaml(
    config: str | PathLike[str] | Mapping[str, Any],
    out: str | PathLike[str],
    *,
    seed: int = 0,
    progress: Progress = lambda names: names,
) -> Path:
    """Merge models as a YAML file of mergekit's format describes it; ``optx merge`` is this as a command.

    Methods: linear, slerp, passthrough, model_stock, task_arithmetic, ties, dare_linear, dare_ties, nearswap,
    nuslerp, multislerp, karcher, breadcrumbs, breadcrumbs_ties, della, della_linear, sce, arcee_fusion, and
    optx's pcb. Slices of layers (a frankenmerge), gradients of a parameter over the layers, filters by names,
    ``model+adapter`` and tokenizers of several vocabularies are read as mergekit reads them.

    The numbers are mergekit 0.1.5's, tensor by tensor; masks that it draws at random are optx's own. Tensors
    are read by pieces of a few megabytes, or, where a method looks at a whole tensor (model_stock, nuslerp,
    multislerp, karcher, breadcrumbs, della, sce, arcee_fusion), one tensor of every model at a time. So are
    embeddings whose rows are put in another order.

    Args:
        config: the file, or what is in it: see ``recipes/merges/`` for one of each method. Models are folders
            or safetensors files, by paths from the folder in which the program runs, not from the file's; a
            model of the Hub must be downloaded first. ``model+adapter`` has a LoRA on it.
        out: a new folder, laid out as the base's, or a ``.safetensors`` file. Killed before it is done, the
            same call goes on. One that exists is refused.
        seed: of random masks.
        progress: wraps the names of what is written, as ``tqdm.tqdm`` does.

    Returns:
        The path that was written. What of the file has no effect is warned of.

    Raises:
        OptxError: something that optx does not do, or that does not go together; names it.
        ShapeError: a tensor has several shapes; names it.
        FileError: a file is missing or damaged.

    Example:
        >>> import torch, optx, tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> place = tempfile.mkdtemp()
        >>> for name, value in (("a", 1.0), ("b", 3.0)):
        ...     save_file({"w": torch.full((2,), value)}, f"{place}/{name}.safetensors")
        >>> models = [{"model": f"{place}/{name}.safetensors"} for name in "ab"]
        >>> config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
        >>> load_file(optx.merge_yaml(config, f"{place}/merged.safetensors"))["w"]
        tensor([2., 2.])
    """
    job = read_config(config, seed)
    for note in job.notes:
        warn(f"merge: {note}")
    return job.run(Path(out).expanduser(), progress)


def read_config(config: str | PathLike[str] | Mapping[str, Any], seed: int = 0) -> Merge:
    """Read a YAML file.

    Args:
        config: the file, or what is in it.
        seed: of random masks.

    Raises:
        FileError: there is no such file, or it is no YAML.
        OptxError: something in it that optx does not do; names it.
    """
    if isinstance(config, Mapping):
        file = parse(config, "config", KNOWN)
    else:
        if not isinstance(config, str | PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"config is a {type(config).__name__}; it must be a file, or what is in it.")
        place = expanded(Path(config), "config")
        file = parse(load_yaml(place), repr(str(place)), KNOWN)
    if file.method == "pcb":
        return _pcb(file)
    return job_of(file, seed, [*file.notes, *check_parameters(file)])


# ---- optx's own method -------------------------------------------------------------------------------

_PCB: dict[str, tuple[Kind, Any]] = {
    "ratio": (number, 0.1),
    "lambda": (number, 1.0),
    "score": (word, "code"),
    "inter": (word, "sum"),
    "clip": (number, 1e-4),
    "scope": (word, "global"),
}


def _pcb(file: MergeFile) -> PCBMerge:
    if not file.whole or file.base is None:
        lack = "base_model, the model that the others were fine-tuned from" if file.whole else "'models'"
        raise OptxError(f"config: pcb needs {lack}.")
    parts = [part for part in file.slices[0].parts if part.model != file.base]
    if not parts:
        raise OptxError("config: 'models' names no model besides the base.")
    for model in file.models:
        if model.adapter is not None:
            raise OptxError(f"config: pcb takes no adapter; merge {model.text!r} first.")
    if file.tokenizer is not None and file.tokenizer.get("source") != "base":
        raise OptxError("config: pcb takes no tokenizer but the base's.")
    for table in (file.parameters, *(part.parameters for part in parts)):
        for key, setting in table.items():
            if key not in _PCB:
                raise OptxError(f"config: pcb has no parameter {shown(key)}. {near(str(key)[:80], _PCB)}")
            if isinstance(setting, list | dict):
                raise OptxError(
                    f"config: {key!r} of pcb is {shown(setting)}; it takes one value, for all layers."
                )
            if table is not file.parameters and key != "lambda":
                raise OptxError(f"config: {key!r} holds for the whole merge; a model can't have its own.")

    def value(key: str, *tables: Table) -> Any:
        kind, default = _PCB[key]
        found = value_at(key, (*tables, file.parameters), kind, "", 0.0)
        return default if found is None else found

    method = PCB(
        value("ratio"),
        [value("lambda", part.parameters) for part in parts],
        value("score"),
        value("inter"),
        value("clip"),
        value("scope"),
    )
    paths = [part.model.path for part in parts]
    return PCBMerge(file.base.path, paths, method, file.out_dtype or file.dtype, list(file.notes))
