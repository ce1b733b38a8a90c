"""`to_config`: what was made, as the plain dict that `optx.from_config` makes it of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from optx._config_names import name_of
from optx._config_values import accepted, dotted
from optx._errors import OptxError, shown
from optx._expression import HasArguments, Unwritable, defaults, plain_number, same, torch_type, what
from optx._module_paths import bare_path
from optx.inject._handle import Handle
from optx.inject._hparams import HParams, hp
from optx.inject._injection import Composite, Injection
from optx.scaling._shapes import Shapes
from optx.step.transform import Transform
from optx.step.wrapped import Wrapped


def to_config(thing: Transform | Injection | Handle | Wrapped) -> dict[str, Any]:
    """What `from_config` makes the same of, as plain data for YAML or JSON.

    Args:
        thing: a transform or an injection, for an entry of ``transforms`` or ``attach``; a handle, likewise
            with the modules that it serves; or a wrapped optimizer: its optimizer, transforms and settings.

    Raises:
        OptxError: it holds what can't be written, as tensors or a function without a name, or its param
            groups differ.

    Example:
        >>> import optx
        >>> optx.to_config(optx.LoRA(rank=4, dora=True))
        {'name': 'LoRA', 'rank': 4, 'dora': True}
        >>> optx.to_config(optx.AdamR(weight=0.1, anchor="base/"))
        {'name': 'AdamR', 'weight': 0.1, 'anchor': 'base/'}
    """
    given: Any = thing
    if isinstance(given, Handle):
        return _of_handle(given)
    if isinstance(given, Wrapped):
        return _of_wrapped(given)
    if isinstance(given, Transform | Injection):
        return _entry(given)
    raise OptxError(
        f"to_config: {shown(given)} is none of these: a transform, an injection, a handle of optx.attach, "
        "what optx.wrap returned."
    )


def _entry(thing: Transform | Injection) -> dict[str, Any]:
    kind = type(thing)
    return {"name": name_of(kind), **_arguments(kind.__name__, kind, thing)}


def _of_handle(handle: Handle) -> dict[str, Any]:
    """The entry of ``attach``, with the served modules as one regex."""
    if handle.removed:
        raise OptxError(f"to_config: {handle!r} is attached no longer.")
    members = handle.injection.members() if isinstance(handle.injection, Composite) else {}
    paths: dict[str, list[str]] = {}
    for one in handle.served:
        member = next((key for key, each in members.items() if each == one.injection), "")
        if member or one.injection == handle.injection:  # what comes with it follows from its options
            path = bare_path(one.path)
            paths.setdefault(member, []).extend(one.paths_as({one.path: path}))
    experts = any(one.part.parameter_names for one in handle.served)
    targets = {member: each if experts else "|".join(map(re.escape, each)) for member, each in paths.items()}
    found: dict[str, Any] = {
        **_entry(handle.injection),
        "targets": targets if members else targets.get("", ""),
    }
    name = handle.served[0].name if handle.served else handle.injection.name
    if name != handle.injection.name:
        found["adapter_name"] = name
    if handle.saved:
        found["modules_to_save"] = [bare_path(kept.path) for kept in handle.saved]
    return found


def _of_wrapped(optimizer: Wrapped) -> dict[str, Any]:
    """Optimizer, transforms and the settings that are not the defaults."""
    # What came with a handle comes with it again.
    transforms = [_entry(one) for one in optimizer.transforms if one not in optimizer.brought]
    for one in optimizer.transforms:
        options = {key: value for key, value in one.group_keys().items() if not key.startswith("optx.")}
        _check_one_for_all(type(optimizer.base).__name__, optimizer.base, options)
    found: dict[str, Any] = {"optimizer": _of_base(optimizer.base), "transforms": transforms}
    if changed := optimizer.given_settings():
        found["wrap"] = changed
    return found


def _of_base(base: Optimizer) -> dict[str, Any]:
    """A base with the numbers that it was made with; a schedule's are not among them."""
    kind, usual = type(base), defaults(type(base))
    who = kind.__name__
    # A schedule moves the rates of all groups.
    _check_one_for_all(who, base, {k: v for k, v in base.defaults.items() if k != "lr" and k in usual})
    first = base.param_groups[0]
    _check_one_for_all(who, base, {k: first[k] for k in ("lr", "initial_lr") if k in first})
    given = {k: v for k, v in base.defaults.items() if k in usual and not same(v, usual[k])}
    ours = getattr(torch.optim, who, None) is kind
    name = who if ours else f"{kind.__module__}.{kind.__qualname__}"
    return {"name": name, **{key: written(who, key, value) for key, value in given.items()}}


def _check_one_for_all(who: str, base: Optimizer, values: dict[str, Any]) -> None:
    for group in base.param_groups:
        for key, value in values.items():
            if not same(group.get(key, value), value):
                raise OptxError(
                    f"to_config: {who} has a param group with {key}={shown(group[key])} beside "
                    f"{key}={shown(value)}, and a config has one for all. Pass the transforms one by one."
                )


def written(who: str, name: str, value: Any) -> Any:
    """A value as plain data that `Reader.read` makes the same of.

    Raises:
        OptxError: there is none.
    """
    value = plain_number(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if isinstance(value, PathLike):
        return fspath(cast("PathLike[str]", value))
    if isinstance(value, Shapes):
        return value.as_data()
    if isinstance(value, HParams):
        return {key: _arguments(f"{who}: {name}", hp, one) for key, one in value.arguments().items()}
    if isinstance(value, tuple | list):
        return [written(who, name, one) for one in cast("Sequence[Any]", value)]
    if isinstance(value, dict) and not _are_tensors(value):
        return {str(k): written(who, name, one) for k, one in cast("dict[Any, Any]", value).items()}
    if isinstance(value, HasArguments) and not isinstance(value, type):
        return {"name": name_of(type(value)), **_arguments(who, type(value), value)}
    return _path_of(who, name, value)


def _are_tensors(value: Any) -> bool:
    return what(value).startswith("tensors")


def _path_of(who: str, name: str, value: Any) -> str:
    """The dotted path of a function or of one of torch's module types."""
    try:
        if isinstance(value, type):
            return torch_type(value)
        path = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        if dotted(path) is value:
            return path
    except (Unwritable, ImportError, AttributeError, ValueError):
        pass
    if _are_tensors(value):
        way = "save it and give the file's path in the config"
    else:
        way = "a config has words, numbers, lists and tables"
    raise OptxError(f"to_config: {who} has {name}, {what(value)}, which can't be written; {way}.")


def _arguments(who: str, maker: Callable[..., Any], thing: HasArguments) -> dict[str, Any]:
    """The arguments of an object that are not its defaults, as plain data.

    Raises:
        OptxError: one can't be written.
    """
    kinds, usual, found = accepted(maker), defaults(maker), dict[str, Any]()
    for name, value in thing.arguments().items():
        if name in usual and same(value, usual[name]):
            continue
        if isinstance(value, nn.Module) and name == "model" and name in kinds:
            if name in usual:
                found[name] = True  # where the constructor asks for one, from_config gives it by itself
            continue
        found[name] = written(who, name, value)
    return found
