"""A merge as a YAML file: mergekit's format for the methods that both have, and for optx's own PCB.

What the format means is taken from mergekit 0.1.5's documentation and behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch

from optx._errors import OptxError, near
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


def read_config(path: str | PathLike[str], seed: int = 0) -> Merge:
    """Read a YAML file.

    Args:
        path: the file.
        seed: of random masks.

    Raises:
        FileError: there is no such file, or it is no YAML.
        OptxError: something in it that optx does not do; names it.
    """
    place = expanded(Path(path), "config")
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
                raise OptxError(f"config: pcb has no parameter {key!r}. {near(str(key), _PCB)}")
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
