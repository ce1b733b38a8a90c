"""Which parameters are targets of their own: experts in one 3-D tensor, and the matrices of their routers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any

from torch import nn

from optx._errors import TargetError
from optx.inject._injection import Site
from optx.inject._weights import is_conv, is_linear

_ROUTERS = ("Router", "Gate", "Gating")  # how transformers' classes of them end

_NOT_COMPUTING = ("__init__", "reset_parameters", "extra_repr", "__repr__")

Named = Callable[[str, Any], bool]


class Exactly:
    """Targets that are these modules and, as ``module.name``, these parameters."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = frozenset(paths)

    def __call__(self, path: str, module: Any) -> bool:
        """Whether a module or a parameter is one of them."""
        return path in self.paths


def names_parameters(targets: Any) -> bool:
    """Whether targets are names, which a parameter can have too."""
    if isinstance(targets, str | Exactly):
        return True
    return isinstance(targets, Sequence) and any(isinstance(target, str) for target in targets)  # pyright: ignore[reportUnknownVariableType]


def own_parameters(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, str]]:
    """(module's path, name) of every parameter of these modules."""
    for path, module in modules:
        for name, _ in module.named_parameters(recurse=False):
            yield path, name


def stacks(module: nn.Module) -> tuple[str, ...]:
    """What LoRA serves in a module that is a target as a whole: stacks of experts, or a router's matrix."""
    own = dict(module.named_parameters(recurse=False))
    three = [name for name, p in own.items() if p.ndim == 3]
    if three and (hasattr(module, "num_experts") or "Expert" in type(module).__name__):
        experts = getattr(module, "num_experts", None)
        return tuple(name for name in three if experts in (None, len(own[name])))
    weight = own.get("weight")
    plain = is_linear(module) and type(module).forward is nn.Linear.forward
    router = type(module).__name__.endswith(_ROUTERS) and not plain
    return ("weight",) if router and weight is not None and weight.ndim == 2 else ()


def with_parameters(
    sites: Sequence[Site], modules: Sequence[tuple[str, nn.Module]], matches: Named, named: bool
) -> list[Site]:
    """Sites with what is served in them: all stacks of a module that is a target, or those that are named.

    Args:
        sites: modules that are targets themselves.
        modules: all of the model.
        matches: whether a path is a target.
        named: whether targets are names; a function that a person wrote sees modules alone.

    Raises:
        TargetError: a name is that of a parameter which cannot be served; says why.
    """
    whole = {site.path: site for site in sites}
    found: list[Site] = []
    for path, module in modules:
        if path in whole:
            names = stacks(module)
        elif not named or not path:
            continue
        else:
            own = (name for name, _ in module.named_parameters(recurse=False))
            names = tuple(name for name in own if matches(f"{path}.{name}", module))
            for name in names:
                _check_kind(module, path, name)
        if names or path in whole:
            found.append(replace(whole.get(path, Site(path, module)), parameters=names))
    _check_each(found, modules)
    return found


def _check_each(sites: Sequence[Site], modules: Sequence[tuple[str, nn.Module]]) -> None:
    owners: dict[int, list[str]] = {}
    for path, module in modules:
        for name, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append(f"{path}.{name}".removeprefix("."))
    for site in sites:
        for name in site.parameters:
            others = owners[id(getattr(site.module, name))]
            if len(others) > 1:
                raise TargetError(
                    f"attach: {' and '.join(map(repr, others))} are one parameter, and an update of one "
                    "would not reach the others. Untie them first."
                )
            _check_parameter(site.module, site.path, name)


def _check_kind(module: nn.Module, path: str, name: str) -> None:
    """Raise for a parameter that is some module's ordinary weight, or no matrix at all."""
    ndim = getattr(module, name).ndim
    if is_linear(module) or is_conv(module) or isinstance(module, nn.Embedding):
        raise TargetError(
            f"attach: {f'{path}.{name}'!r} is the {name} of a {type(module).__name__}. Target the module, "
            f"{path!r}."
        )
    if ndim not in (2, 3):
        raise TargetError(
            f"attach: {f'{path}.{name}'!r} has shape {tuple(getattr(module, name).shape)}; LoRA serves "
            "matrices, and stacks of them (experts, rows, columns)."
        )


def _check_parameter(module: nn.Module, path: str, name: str) -> None:
    """Raise if an update of this parameter would not act, or could not be computed."""
    p, what = getattr(module, name), f"{path}.{name}"
    if not p.is_floating_point() or p.dtype.itemsize < 2:
        raise TargetError(
            f"attach: {what!r} is of {p.dtype}, a quantised stack of experts, to which nothing can be added. "
            "Load the model with weights in bfloat16 or float32."
        )
    if isinstance(module, nn.MultiheadAttention):
        raise TargetError(
            f"attach: {what!r} is of an nn.MultiheadAttention, which torch's fast path uses without calling "
            "it. Target the FFN, or attach another injection."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise TargetError(
            f"attach: the experts of {path!r} are spread over devices (expert parallelism), which LoRA does "
            "not serve. Load the model without it."
        )
    if p.is_meta and hasattr(module, "_hf_hook"):
        raise TargetError(
            f"attach: {what!r} is offloaded, and there while its module computes alone. Load the model "
            "without offloading these experts."
        )
    if not _reads(module, name):
        raise TargetError(
            f"attach: {what!r} is not read by {type(module).__name__} itself when it computes, so that an "
            "update of it would not act."
        )


def _reads(module: nn.Module, name: str) -> bool:
    """Whether a method of the module, other than its constructor, reads an attribute of this name.

    DBRX's experts are in a module that gets them as arguments: its parent reads them, before it is called.
    """
    if hasattr(module, "is_transposed"):  # transformers' registry of implementations: they all do
        return True
    methods: list[CodeType] = []
    for kind in type(module).__mro__:
        if kind in (nn.Module, object):
            continue
        for method_name, method in vars(kind).items():
            function = inspect.unwrap(method) if callable(method) else None
            code = getattr(function, "__code__", None)
            if code is not None and method_name not in _NOT_COMPUTING:
                methods.append(code)
    return not methods or any(name in code.co_names for code in methods)


def parameter_paths(path: str, names: Sequence[str]) -> list[str]:
    """Paths of a served module's parameters; its own if it is served as a module."""
    return [f"{path}.{name}" for name in names] or [path]
