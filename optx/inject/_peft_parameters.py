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
from optx._module_paths import Paths
from optx.inject._injection import Site
from optx.inject._parameters import Exactly, own_parameters, with_parameters
from optx.inject._served import Served

_BASE = "base_layer."
_TURNED = (0, 19, 1)  # the first version of PEFT that takes a stack's matrices for (out, in)
LAYOUT = "0.19.1"


def meant(config: Mapping[str, Any], paths: Paths, where: str) -> list[Site]:
    """The parameters that a configuration adapts, by module; paths are those of the bare model.

    Raises:
        FileError: a name matches none, or one that optx does not serve.
    """
    wanted: Any = config.get("target_parameters") or ()
    if not wanted:
        return []
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):  # pyright: ignore[reportUnknownVariableType]
        raise FileError(
            f"{where} has target_parameters={wanted!r} in its configuration; it must be a list of names."
        )
    wanted = sorted(wanted)  # pyright: ignore[reportUnknownArgumentType]
    modules = list(paths.modules.items())
    every = [f"{path}.{name}" for path, name in own_parameters(modules) if path]
    for name in wanted:
        if not _named([name], every):
            raise FileError(
                f"{where} was trained with PEFT's target_parameters={wanted!r}, and this model has no "
                f"parameter {name!r}. {near(name, every)}"
            )
    try:
        return with_parameters([], modules, Exactly(_named(wanted, every)), True)
    except TargetError as error:
        raise FileError(f"{where} was trained with PEFT's target_parameters={wanted!r}. {error}") from None


def collect(
    config: Mapping[str, Any], named: Mapping[str, dict[str, Tensor]], sites: Iterable[Site], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """A file's tensors by module path and suffix, apart: those of modules, and those of parameters.

    Raises:
        FileError: a parameter has none, or has such as can be read in two ways.
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
            tensors = _as_now(rest.pop(path), site, name, config.get("peft_version"), where)
            own.update({f"{_BASE * outer}{suffix}": tensor for suffix, tensor in tensors.items()})
        found[site.path] = own
    for path in rest:
        _check_not_old(path, where)
    return rest, found


def _as_now(tensors: dict[str, Tensor], site: Site, name: str, version: Any, where: str) -> dict[str, Tensor]:
    """The factors of a stack of (out, in) matrices, which PEFT took for (in, out) before 0.19.1."""
    weight = getattr(site.module, name)
    A, B = (tensors.get(f"lora_{factor}.weight") for factor in "AB")
    if A is None or B is None or A.ndim != 2 or B.ndim != 2:
        return tensors
    if weight.ndim != 3 or getattr(site.module, "is_transposed", False):
        return tensors
    experts, rows, columns = weight.shape
    if (A.shape[1], len(B)) != (rows, columns) or len(A) != B.shape[1] or len(A) % experts:
        return tensors
    if rows == columns:  # the shapes do not tell
        written = tuple(int(number) for number in re.findall(r"\d+", str(version))[:3])
        if written >= _TURNED:
            return tensors
        if not written or written >= (0, 19) or experts == 1:
            raise FileError(
                f"{where} has factors for {f'{site.path}.{name}'!r}, whose matrices are square, and "
                f"peft_version={version!r} in its configuration does not say which of them is which: PEFT "
                "changed that in 0.19.1. Merge it (merge_and_unload) in the version that wrote it."
            )
    rank = len(A) // experts
    return {
        "lora_A.weight": B.view(columns, rank, experts).permute(2, 1, 0).reshape(-1, columns),
        "lora_B.weight": A.view(experts, rank, rows).permute(2, 1, 0).reshape(rows, -1),
        **{key: tensor for key, tensor in tensors.items() if key not in ("lora_A.weight", "lora_B.weight")},
    }


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
