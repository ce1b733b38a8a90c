"""PEFT's ``target_parameters``: which parameters a configuration means, and which keys are whose.

PEFT wraps a module once for each of its parameters, in the module's order, so that the keys of all but the
last have ``base_layer.`` in front, once for every wrapper that is further out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from optx._errors import FileError, TargetError, near
from optx.inject._injection import Site
from optx.inject._module_paths import Paths
from optx.inject._parameters import Exactly, own_parameters, with_parameters
from optx.inject._served import Served

_BASE = "base_layer."


def meant(config: Mapping[str, Any], paths: Paths, where: str) -> list[Site]:
    """The parameters that a configuration adapts, by module; paths are those of the bare model.

    Raises:
        FileError: a name matches none, or one that optx does not serve.
    """
    wanted: Any = config.get("target_parameters") or ()
    if not wanted:
        return []
    modules = list(paths.modules.items())
    every = [f"{path}.{name}" for path, name in own_parameters(modules) if path]
    for name in wanted:
        if not _named([name], every):
            raise FileError(
                f"{where} was trained with PEFT's target_parameters={list(wanted)!r}, and this model has no "
                f"parameter {name!r}. {near(name, every)}"
            )
    try:
        return with_parameters([], modules, Exactly(_named(wanted, every)), True)
    except TargetError as error:
        raise FileError(
            f"{where} was trained with PEFT's target_parameters={list(wanted)!r}. {error}"
        ) from None


def collect(
    named: Mapping[str, dict[str, Tensor]], sites: Iterable[Site], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """A file's tensors by module path and suffix, apart: those of modules, and those of parameters.

    Raises:
        FileError: a parameter has none.
    """
    rest, found = dict(named), dict[str, dict[str, Tensor]]()
    for site in sites:
        own: dict[str, Tensor] = {}
        for i, name in enumerate(site.parameters):
            outer = len(site.parameters) - 1 - i
            path = f"{site.path}.{_BASE * outer}".removesuffix(".")
            if path not in rest:
                raise FileError(
                    f"{where} has no tensors at {path!r}, where those of {f'{site.path}.{name}'!r} are, "
                    "which target_parameters means."
                )
            own.update({f"{_BASE * outer}{suffix}": tensor for suffix, tensor in rest.pop(path).items()})
        found[site.path] = own
    for path in rest:
        _check_not_old(path, where)
    return rest, found


def _check_not_old(path: str, where: str) -> None:
    """Raise for experts that were modules, as in transformers 4; PEFT converts such files on loading."""
    head, _, tail = path.partition(".experts.")
    if tail and tail.split(".")[0].isdigit():
        raise FileError(
            f"{where} has {path!r}: it was trained with transformers 4, where each expert was a module, and "
            f"here all of {head!r} are one parameter. Load it in PEFT, which converts it, and save it again."
        )


def ranks_above(sites: Sequence[Site], rank_at: Callable[[str], int]) -> dict[str, int]:
    """Ranks that are above a matrix's, which PEFT allows, as patterns over the parameters' paths."""
    above: dict[str, int] = {}
    for site in sites:
        for name in site.parameters:
            path, weight = f"{site.path}.{name}", getattr(site.module, name)
            if rank_at(path) > min(weight.shape[-2:]):
                above[f"^{re.escape(path)}"] = rank_at(path)
    return above


def objection(served: Sequence[Served], config: Mapping[str, Any], paths: Paths) -> str:
    """Why PEFT would not do the same with these parameters."""
    every = [f"{path}.{name}" for path, name in own_parameters(list(paths.modules.items())) if path]
    wanted = config["target_parameters"]
    for name in _named(wanted, every):
        if name not in wanted:
            return f"it takes target_parameters by the ends of their paths, so it would adapt {name!r} too"
    for one in served:
        for name in one.part.parameter_names:
            weight = getattr(one.module, name)
            if weight.ndim == 3 and len(weight) == 1 and getattr(one.module, "is_transposed", False):
                return f"its LoRA does not serve a single transposed expert, and {one.path!r} has one"
    return ""


def _named(wanted: Iterable[str], every: Iterable[str]) -> list[str]:
    wanted = tuple(wanted)
    ends = tuple(f".{name}" for name in wanted)
    return [path for path in every if path in wanted or path.endswith(ends)]
