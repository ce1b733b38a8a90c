"""Which modules an injection serves: what the user names, or what its paper serves in a known family."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from optx._errors import TargetError, near, warn
from optx._module_paths import paths_of
from optx.inject import _anatomy
from optx.inject._alternatives import idle
from optx.inject._families import Family
from optx.inject._injection import Injection, Site, Targets
from optx.inject._own_call import adds_bias
from optx.inject._parameters import names_parameters, own_parameters, stacks, with_parameters
from optx.inject._part import RESERVED, Attached
from optx.inject._peft_match import targeted, task_of
from optx.inject._uncalled import reader_of
from optx.inject._weights import is_conv, is_linear

ALL_LINEAR = "all-linear"
"""What stands for every linear module but the head, as in PEFT."""


def family_of(model: nn.Module) -> Family | None:
    """The known family a model belongs to, by the names of its modules."""
    return _anatomy.family_of(paths_of(model).modules)


def resolve(model: nn.Module, injection: Injection, targets: Targets | None) -> list[Site]:
    """The modules to serve, in the model's order, each once.

    Modules that share a weight are served each by itself: what is added acts on a module's own call.

    Raises:
        TargetError: nothing matches, or one of a list doesn't (names near misses), or there are no defaults
            for this model.
    """
    modules = [
        (path, module)
        for path, module in model.named_modules()
        if not isinstance(module, Attached) and RESERVED not in path.split(".")
    ]
    every = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    chosen = default_targets(model, injection) if targets is None else targets
    matches = all_linear(model) if every else matcher(chosen)
    named = injection.serves_parameters and targets is not None and not every and names_parameters(chosen)
    check_each_matches(chosen, modules, parameters=named)
    sites = [Site(path, module, swept=every) for path, module in modules if path and matches(path, module)]
    if injection.serves_parameters:
        sites = with_parameters(sites, modules, matches, named)
    if not sites:
        own = targets is not None
        raise TargetError(
            _none(chosen, modules, named) if own else _none_by_default(model, injection, modules)
        )
    if every:
        _warn_of_experts(modules)
    elif isinstance(chosen, str):
        own = [f"{path}.{name}" for path, name in own_parameters(modules)] if named else []
        _warn_of_idle(chosen, [*(path for path, _ in modules if path), *own])
    return sites


def all_linear(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """PEFT's ``"all-linear"``: every linear module but the output head, or a sequence classifier's."""
    paths, task = paths_of(model), task_of(model)
    config = {"target_modules": ALL_LINEAR, "task_type": task if task == "SEQ_CLS" else None}
    chosen = {paths.here[path] for path in targeted(config, model, paths.modules)}
    return lambda path, module: path in chosen


def _warn_of_experts(modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Linear maps that are no modules: PEFT reads its own word as if they were, in some families."""
    found = [
        f"{path}.{name}"
        for path, module in modules
        if not is_conv(module)
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and path.rpartition(".")[2] == "experts"
    ]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warn(
            f"optx.attach: targets={ALL_LINEAR!r} leaves out {found[0]!r}{more}, experts in one parameter, "
            r"which are no linear modules. LoRA serves them too, by targets=r'.*\.experts' and another name=."
        )


def _warn_of_idle(pattern: str, paths: Sequence[str]) -> None:
    """A part of a regex that matches nothing was meant for something."""
    if found := idle(pattern, paths):
        what = ", ".join(map(repr, found))
        warn(
            f"optx.attach: targets={pattern!r} has {what} among its alternatives, which matches no module. "
            f"{_near_paths(found[0], paths)}"
        )


def _none(targets: Targets, modules: Sequence[tuple[str, nn.Module]], named: bool) -> str:
    """Why nothing is served where a person said what."""
    if isinstance(targets, str):
        paths = _named_paths(modules, named)
        if difflib.get_close_matches(targets, [ALL_LINEAR], cutoff=0.8):
            return f"attach: no module matches targets={targets!r}. Near: {ALL_LINEAR!r}."
        ends = any(path.endswith(f".{targets}") for path in paths)
        hint = f" A string must match the whole name; a list matches its end: targets=[{targets!r}]."
        return f"attach: no module matches targets={targets!r}. {_near_paths(targets, paths)}{hint * ends}"
    if isinstance(targets, type | Sequence):
        return f"attach: no module matches targets={targets!r}. The model has {_types(modules)}."
    return f"attach: targets is a function that no module passes. The model has {_types(modules)}."


def _none_by_default(model: nn.Module, injection: Injection, modules: Sequence[tuple[str, nn.Module]]) -> str:
    """Why nothing is served where a person left it to the injection."""
    method, kind, family = type(injection).__name__, type(model).__name__, family_of(model)
    of_family = f", as in {family.name} models" if family else ""
    why = f"found nothing to serve by default in this {kind}{f', a {family.name} model' if family else ''}"
    if injection.role_in(model) == "biased":
        why = f"trains biases, and no Linear, convolution or norm of this {kind} has one{of_family}"
    return (
        f"attach: {method} {why}. It has {_types(modules)}. Pass targets=, a regex over module names of "
        f"{injection.serves}, or attach another injection."
    )


def _named_paths(modules: Sequence[tuple[str, nn.Module]], parameters: bool) -> list[str]:
    """What can be named: modules, and stacks of experts if parameters can."""
    own = [f"{path}.{name}" for path, module in modules for name in stacks(module) if parameters]
    return [*(path for path, _ in modules if path), *own]


def _near_paths(pattern: str, paths: Sequence[str]) -> str:
    """Modules whose last name is like the last word of a regex."""
    words = re.findall(r"\w+", pattern)
    leaves = {path.rpartition(".")[2] for path in paths}
    like = difflib.get_close_matches(words[-1], leaves, n=3, cutoff=0.5) if words else []
    return near(pattern, [path for path in paths if path.rpartition(".")[2] in like] or paths)


def default_targets(model: nn.Module, injection: Injection) -> Targets:
    """What the injection serves in this model if the user names nothing."""
    known = injection.places(model)
    if known is not None:
        return lambda path, module: path in known
    role = injection.role_in(model)
    if role in _ANY_MODEL:
        return _ANY_MODEL[role]
    paths = paths_of(model)
    wanted = _anatomy.Wanted(type(injection).__name__, injection.serves, type(model).__name__, role)
    chosen = {paths.here[path] for path in _anatomy.of_role(paths.modules, wanted)}
    return lambda path, module: path in chosen


# Roles that need no family.
_ANY_MODEL: dict[str, Targets] = {
    "biased": lambda path, module: adds_bias(module),
    "weighted": lambda path, module: is_linear(module) or is_conv(module),
}


def matcher(targets: Targets) -> Callable[[str, nn.Module], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"attach: targets={targets!r} is not a regular expression ({error}).") from None
        return lambda path, module: pattern.fullmatch(path) is not None
    if isinstance(targets, type):
        return lambda path, module: isinstance(module, targets)
    if isinstance(targets, Sequence):
        return _any_of(targets)
    if callable(targets):
        return targets
    raise TargetError(
        f"attach: targets is a {type(targets).__name__}; it must be a regex, a module type, a list of names "
        "or types, or a function of (name, module)."
    )


def _any_of(targets: Sequence[Any]) -> Callable[[str, nn.Module], bool]:
    """A list: types, and names that match a whole path or its end, as in PEFT's ``target_modules``."""
    for target in targets:
        if not isinstance(target, str | type):
            raise TargetError(
                f"attach: targets has {target!r} in its list; it must hold names or module types."
            )
    names = [target for target in targets if isinstance(target, str)]
    types = tuple(target for target in targets if isinstance(target, type))
    whole, ends = frozenset(names), tuple(f".{name}" for name in names)
    return lambda path, module: path in whole or path.endswith(ends) or isinstance(module, types)


def check_each_matches(
    targets: Targets,
    modules: Sequence[tuple[str, nn.Module]],
    owner: str = "attach: targets",
    *,
    parameters: bool = False,
) -> None:
    """Raise if one of a list matches no module: what it was meant for would be left out in silence.

    Raises:
        TargetError: names what matches nothing, and what is like it.
    """
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        return
    for target in dict.fromkeys(targets):
        matches = _any_of([target])
        if any(path and matches(path, module) for path, module in modules):
            continue
        own = own_parameters(modules) if parameters else ()
        if any(path and matches(f"{path}.{name}", nn.Module()) for path, name in own):
            continue
        if isinstance(target, type):
            continue  # alternatives: all linear and convolution layers, whichever there are
        pattern = not set("*+?()[]{}|^$\\").isdisjoint(target)
        hint = " A list holds names; pass a regex as a string by itself." if pattern else ""
        if target == ALL_LINEAR:
            hint = f" {ALL_LINEAR!r} is a target by itself, not one of a list."
        known = _near_paths(target, _named_paths(modules, parameters))
        raise TargetError(f"{owner} has {target!r} in its list, which matches no module. {known}{hint}")


def _types(modules: Sequence[tuple[str, nn.Module]]) -> str:
    names = sorted({type(module).__name__ for path, module in modules if path})
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def check_servable(site: Site, model: nn.Module) -> None:
    """Raise if what is added to this module would never run, or would run by accident."""
    parent_path, _, _ = site.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if isinstance(parent, nn.MultiheadAttention):
        raise TargetError(
            f"attach: {site.path!r} is inside an nn.MultiheadAttention, which uses its weight without "
            "calling it, so nothing attached to it would act. Target the attention module, or the FFN."
        )
    if (reader := reader_of(model, site.path)) is not None:
        raise TargetError(
            f"attach: {site.path!r} is in a {reader}, which uses its weight without calling it, so nothing "
            "attached to it would act. Pass targets= of other modules."
        )
    if isinstance(site.module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise TargetError(
            f"attach: {site.path!r} is a {type(site.module).__name__}, whose members are its computation; "
            "what is added would become one of them. Target the members."
        )
