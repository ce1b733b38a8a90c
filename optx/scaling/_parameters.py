"""A model's parameters by their names in the bare model, each tensor once, with its other names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from optx._errors import OptxError
from optx.inject._module_paths import paths_of
from optx.inject._part import RESERVED


@dataclass
class Found:
    """One tensor of a model.

    Attributes:
        name: its first.
        shape: whole, also of one that is sharded.
        owner: the module that has it under that name.
        leaf: the name there.
        tied: its other names, with the modules that have it under them.
    """

    name: str
    shape: tuple[int, ...]
    owner: nn.Module
    leaf: str
    tied: dict[str, nn.Module]


def parameters_of(model: nn.Module, doing: str) -> dict[str, Found]:
    """By first name, in the model's order; what optx has attached is left out.

    Raises:
        OptxError: there are none, or one has no shape yet.
    """
    paths = paths_of(model)
    found: dict[int, Found] = {}
    for here, module in model.named_modules(remove_duplicate=False):
        if RESERVED in here.split(".") or here not in paths.plain:
            continue
        for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{paths.plain[here]}.{leaf}".removeprefix(".")
            if isinstance(p, UninitializedParameter):
                raise OptxError(
                    f"{doing}: {name!r} of this {type(model).__name__} is lazy and has no shape yet. Call "
                    "the model once before."
                )
            known = found.get(id(p))
            if known is None:
                found[id(p)] = Found(name, tuple(p.shape), module, leaf, {})
            elif name != known.name:
                known.tied[name] = module
    if not found:
        raise OptxError(f"{doing}: this {type(model).__name__} has no parameters.")
    return {one.name: one for one in found.values()}
