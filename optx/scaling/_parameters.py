"""A model's parameters by their names in the bare model, each tensor once, with its other names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from optx._errors import OptxError
from optx._module_paths import paths_of
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
        makes: the module whose tensor is computed from it, and that tensor's name there, for the originals of
            `torch.nn.utils.parametrize`, weight_norm, spectral_norm and pruning.
    """

    name: str
    shape: tuple[int, ...]
    owner: nn.Module
    leaf: str
    tied: dict[str, nn.Module]
    makes: tuple[nn.Module, str] | None = None


def parameters_of(model: nn.Module, doing: str) -> dict[str, Found]:
    """By first name, in the model's order; what optx has attached is left out.

    Raises:
        OptxError: there are none, or one has no shape yet.
    """
    found: dict[int, Found] = {}
    places = dict(_every_place(model))
    for path, module in places.items():
        for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{leaf}".removeprefix(".")
            if isinstance(p, UninitializedParameter):
                raise OptxError(
                    f"{doing}: {name!r} of this {type(model).__name__} is lazy and has no shape yet. Call "
                    "the model once before."
                )
            known = found.get(id(p))
            if known is None:
                makes = made_of_it(path, module, leaf, places)
                found[id(p)] = Found(name, tuple(p.shape), module, leaf, {}, makes)
            elif name != known.name:
                known.tied[name] = module
    if not found:
        raise OptxError(f"{doing}: this {type(model).__name__} has no parameters.")
    return {one.name: one for one in found.values()}


def made_of_it(
    path: str, module: nn.Module, leaf: str, places: Mapping[str, nn.Module]
) -> tuple[nn.Module, str] | None:
    """The module and its tensor that a parameter is the original of, if it is one."""
    if isinstance(module, ParametrizationList):
        parent, _, tensor = f".{path}".rpartition(".parametrizations.")
        return places[parent.removeprefix(".")], tensor
    before = re.fullmatch(r"(.+)_(?:orig|g|v)", leaf)  # by hooks, as weight_norm and pruning were and are
    if before and isinstance(vars(module).get(before[1]), Tensor):  # parameters and buffers are not in vars
        return module, before[1]
    return None


def _every_place(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by their paths in the bare model; one that is in two places, under both."""
    plain = dict(paths_of(model).plain)
    for here, module in model.named_modules(remove_duplicate=False):
        parent, _, leaf = here.rpartition(".")
        if here not in plain and parent in plain and leaf != RESERVED:  # seen before, in another place
            plain[here] = f"{plain[parent]}.{leaf}".removeprefix(".")
        if here in plain:
            yield plain[here], module


def check_nothing_attached(model: nn.Module, argument: str) -> None:
    """Raise if optx has attached parameters to the model, which its base does not have.

    Raises:
        OptxError: names the first.
    """
    for name, _ in model.named_parameters():
        if RESERVED in name.split("."):
            raise OptxError(
                f"shapes: {argument} has {name!r} attached to it. Take the shapes before optx.attach, or "
                "after handle.remove(); they hold for the model's own parameters while it is attached too."
            )
