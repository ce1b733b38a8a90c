"""Put an injection's parts on the modules of a model, all of them or none, and take them off again."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from optx._errors import OptxError, TargetError, near, warn
from optx.inject import _encoder
from optx.inject._followed import Resting
from optx.inject._injection import Composite, Injection, Site, Targets
from optx.inject._narrow import Layers, narrowed
from optx.inject._own_call import check_attach, check_values
from optx.inject._part import RESERVED, Attached, attached
from optx.inject._served import Served
from optx.inject._sharding import check_sites, check_whole
from optx.inject._targets import ALL_LINEAR, check_servable, resolve
from optx.inject._task_heads import heads_of
from optx.inject._trained_whole import Saved, Values, begin, end
from optx.inject._uncalled import watch
from optx.inject._unfollowed import Unfollowed
from optx.inject.bitfit import warn_of_biases


def check_model(model: nn.Module) -> None:
    """Raise if the model is wrapped already by what would not notice anything new in it."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        raise OptxError(
            "attach: this is a compiled model. Attach to the module itself (model._orig_mod) before its "
            "first call: torch.compile ignores hooks that are added later."
        )
    check_whole(model)


def install(
    model: nn.Module,
    injection: Injection,
    targets: Targets | Mapping[str, Targets] | None,
    name: str | None,
    modules_to_save: Sequence[str] | None,
    layers: Layers | None = None,
    exclude: Targets | None = None,
) -> tuple[list[Served], list[Saved]]:
    """Serve the targets; arguments and errors are those of `optx.attach`.

    Returns:
        What is served, and what is trained whole beside it.
    """
    if name is not None and not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"attach: name is {name!r}; it must be a Python identifier.")
    members = _members(injection, targets)
    found = [resolve(model, member, wanted) for member, wanted in members]
    if layers is not None or exclude is not None:
        found = narrowed(model, found, layers, exclude)
    found = [member.expanded(sites) for (member, _), sites in zip(members, found, strict=True)]
    if modules_to_save is None:
        asked = [sites for (_, wanted), sites in zip(members, found, strict=True) if wanted is not None]
        modules_to_save = heads_of(model, asked, found)
    adapter = name or injection.name
    saved = [_saved(model, path, adapter) for path in _wholes(modules_to_save)]
    served: list[Served] = []
    every_bias = False
    for (member, wanted), sites in zip(members, found, strict=True):
        of_all_biases = wanted is None and member.role_in(model) == "biased"
        every_bias = every_bias or of_all_biases
        of_all_weights = wanted is None and member.role_in(model) == "weighted"
        lenient = (
            of_all_biases or of_all_weights or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR)
        )
        made = _serve(model, member, sites, name, modules_to_save, lenient)
        if not made:
            raise TargetError("attach: every target is in modules_to_save, so nothing is left to serve.")
        served.extend(made)
    _check_names(served)
    whole = targets is None and layers is None and exclude is None
    if every_bias or getattr(injection, "bias", None) == "all" or (whole and injection.trains_biases):
        warn_of_biases(model, served, modules_to_save)
    _warn_if_compiled(model)
    _put(model, served)
    for one in served:
        one.part.adapter, one.part.reads_weight = adapter, one.injection.needs_weight
    for kept in saved:
        begin(kept)
    return served, saved


def _members(
    injection: Injection, targets: Targets | Mapping[str, Targets] | None
) -> list[tuple[Injection, Targets | None]]:
    if not isinstance(injection, Composite):
        if isinstance(targets, Mapping):
            raise TargetError(
                f"attach: targets is a dict, but {type(injection).__name__} has no members. Pass a regex."
            )
        return [(injection, targets)]
    members = injection.members()
    if targets is None:
        return [(member, None) for member in members.values()]
    if not isinstance(targets, Mapping):
        raise TargetError(
            f"attach: {type(injection).__name__} serves several kinds of modules; pass targets as a dict of "
            f"{', '.join(map(repr, members))}, or None for its defaults."
        )
    for key in targets:
        if key not in members:
            raise TargetError(
                f"attach: {type(injection).__name__} has no member {key!r}. {near(key, members)}"
            )
    return [(member, targets.get(key)) for key, member in members.items()]


def _serve(
    model: nn.Module,
    injection: Injection,
    sites: Sequence[Site],
    name: str | None,
    whole: Sequence[str],
    lenient: bool,
    beside: bool = False,
) -> list[Served]:
    """What the injection and its companions will add; the model is not touched yet.

    A lenient choice, of all biases or linear modules, leaves out what can't be served, if anything is left.
    Nothing in modules that are trained whole is served; PEFT too adapts none of them.
    """
    sites = [site for site in sites if not any(f"{site.path}.".startswith(f"{path}.") for path in whole)]
    if lenient:
        kept = _servable(model, injection, sites, name or injection.name)
        sites = kept if kept or beside else sites
    if not sites:
        return []
    for site in sites:
        check_servable(site, model)
        _check_not_taken(site, injection)
        _check_not_replaced(site, model)
        if injection.needs_weight:
            check_values(site.module, site.path)
            _check_in_use(site, injection)
    check_sites(model, sites)
    served = [
        Served(site.path, site.module, part, injection, name or injection.name)
        for site, part in zip(sites, injection.parts(sites), strict=True)
    ]
    for one in served:
        _check_takes_all(one)
        _check_unread(one)
        if one.part.overrides("fold"):
            check_attach(one.module, one.path, needs_weight=injection.needs_weight)
    for companion, others in injection.companions(model, sites):
        served.extend(_serve(model, companion, others, name, whole, lenient=True, beside=True))
    return served


def _check_not_taken(site: Site, injection: Injection) -> None:
    """Raise if what is on the module bears nothing beside it."""
    container = attached(site.module)
    for name, part in container.parts.items() if container is not None else ():
        if part.alone:
            raise TargetError(
                f"attach: {type(injection).__name__} can't serve {site.path!r}: {name!r} is there and "
                "takes the place of all that it computes. Remove that first, or leave the module out."
            )


def _check_takes_all(one: Served) -> None:
    """Raise if the part bears nothing beside it, and something is there."""
    container = attached(one.module)
    if one.part.alone and container is not None:
        raise TargetError(
            f"attach: {next(iter(container.parts))!r} is attached to {one.path!r} already, and "
            f"{type(one.injection).__name__} takes the place of all that it computes. Remove that first."
        )


def _check_in_use(site: Site, injection: Injection) -> None:
    """Raise if a method works with a weight that another has put out of work."""
    container = attached(site.module)
    for name, part in container.parts.items() if container is not None else ():
        if part.in_place:
            raise TargetError(
                f"attach: {type(injection).__name__} works with the weight of {site.path!r}, which takes no "
                f"part while {name!r} is attached. Remove that first, or leave the module out."
            )


def _check_unread(new: Served) -> None:
    """Raise if a method puts a weight out of work that another works with."""
    if not new.part.in_place:
        return
    container = attached(new.module)
    for name, part in container.parts.items() if container is not None else ():
        if part.reads_weight:
            raise TargetError(
                f"attach: {type(new.injection).__name__} puts the weight of {new.path!r} out of work, with "
                f"which {name!r} works. Remove that first, or leave the module out."
            )


def _check_not_replaced(site: Site, model: nn.Module) -> None:
    """Raise if others compute in the place of something that the module is in."""
    names = site.path.split(".")
    for depth in range(1, len(names)):
        outer = ".".join(names[:depth])
        container = attached(model.get_submodule(outer))
        by = next((key for key, part in container.parts.items() if part.replaces), "") if container else ""
        if by:
            raise TargetError(
                f"attach: {site.path!r} is in {outer!r}, in whose place {by!r} computes while it trains, so "
                "nothing attached to it would act then. Leave it out by exclude=, or merge that one first."
            )


def _servable(model: nn.Module, injection: Injection, sites: Sequence[Site], name: str) -> list[Site]:
    """Those that can be served and have no part of this name; of linear modules, the others are told."""
    kept = [site for site in sites if _is_servable(site, model) and not _has(site.module, name)]
    left = [site.path for site in sites if not _is_servable(site, model)]
    if left and kept and injection.role_in(model) != "biased":
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        what = type(injection).__name__ if injection.role_in(model) == "weighted" else repr(ALL_LINEAR)
        warn(
            f"attach: {what} leaves out {left[0]!r}{more}, whose weight is used without a call of "
            "the module, so that nothing attached to it would act."
        )
    return kept


def _has(module: nn.Module, name: str) -> bool:
    container = attached(module)
    return container is not None and name in container.parts


def _is_servable(site: Site, model: nn.Module) -> bool:
    try:
        check_servable(site, model)
    except TargetError:
        return False
    return True


def _check_names(served: Sequence[Served]) -> None:
    taken, plain = set[tuple[int, str]](), Attached(nn.Module())
    for one in served:
        container = one.module._modules.get(RESERVED)  # pyright: ignore[reportPrivateUsage]
        if container is None and hasattr(one.module, RESERVED):
            raise OptxError(f"attach: {one.path!r} has an attribute {RESERVED!r} of its own.")
        names = set(container.parts) if isinstance(container, Attached) else set[str]()
        key = (id(one.module), one.name)
        if one.name in names or key in taken:
            raise OptxError(
                f"attach: {one.path!r} has a {one.name!r} attached already. Remove that one, or pass "
                f"name={one.name + '2'!r}."
            )
        if not one.name.isidentifier() or hasattr(plain, one.name):
            raise OptxError(f"attach: name={one.name!r} must be a Python identifier that means nothing else.")
        taken.add(key)


def _wholes(given: Any) -> list[str]:
    """Each path of ``modules_to_save`` once.

    Raises:
        TargetError: it is no list of paths, or one of them is inside another.
    """
    if isinstance(given, str) or not all(isinstance(path, str) for path in given):
        raise TargetError(f"attach: modules_to_save is {given!r}; it must be a list of paths of modules.")
    paths = list(dict.fromkeys(given))
    for path in paths:
        outer = next((one for one in paths if path.startswith(f"{one}.")), None)
        if outer is not None:
            raise TargetError(
                f"attach: modules_to_save has {outer!r} and {path!r}, which is inside it. Leave that out."
            )
    return paths


def _saved(model: nn.Module, path: str, adapter: str) -> Saved:
    modules = dict(model.named_modules())
    if path not in modules or not path:
        raise TargetError(f"attach: modules_to_save has {path!r}, no module. {near(path, modules)}")
    return Saved(path, modules[path], Values(adapter))


def _put(model: nn.Module, served: Sequence[Served]) -> None:
    """Add all parts and hooks; if anything fails half-way, nothing stays."""
    done: list[Served] = []
    try:
        for one in served:
            container = attached(one.module)
            if container is None:
                container = Attached(one.module)
                container.train(one.module.training)
                one.module.add_module(RESERVED, container)
            one.part.train(one.module.training)
            container.add_module(one.name, one.part)
            done.append(one)
            one.hooks.extend(container.hook(one.part))
            one.hooks.append(Resting(one.part.retired(one.module)))
            one.hooks.extend(_encoder.Use(encoder) for encoder in _encoder.nesting(model, one.path))
        if (look := watch(model)) is not None:
            served[0].hooks.append(look)
        if served:
            served[0].hooks.append(Unfollowed(served, model))
    except BaseException:
        for one in reversed(done):
            detach(one)
        raise


def uninstall(served: Sequence[Served], saved: Sequence[Saved], *, restore: bool) -> None:
    """Take off what `install` gave.

    Args:
        served: modules that have parts.
        saved: modules that were trained whole.
        restore: whether these get their values of before back.
    """
    for one in reversed(served):
        detach(one)
    for kept in saved:
        end(kept, restore=restore)


def detach(one: Served) -> None:
    """Take one part off its module, and the container with the last of them."""
    container = attached(one.module)
    for hook in one.hooks:
        hook.remove()
    one.hooks.clear()
    if container is not None and container.parts.get(one.name) is one.part:
        del container._modules[one.name]  # pyright: ignore[reportPrivateUsage]
        container.unhook()
        if not container.parts:
            del one.module._modules[RESERVED]  # pyright: ignore[reportPrivateUsage]


def _warn_if_compiled(model: nn.Module) -> None:
    """torch.compile does not see hooks that come after a model's first compiled call."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None or not frames.FRAME_COUNTER:  # nothing at all has been compiled yet
        return
    compiled = any(module._compiled_call_impl is not None for module in model.modules())  # pyright: ignore[reportPrivateUsage]
    if not compiled:
        kind = sys.modules["torch._dynamo.eval_frame"].OptimizedModule
        modules = {id(module) for module in model.modules()}
        wrappers = (one for one in gc.get_objects() if type(one) is kind)
        compiled = any(id(wrapper._orig_mod) in modules for wrapper in wrappers)
    if compiled:
        warn(
            "optx.attach: this model has been given to torch.compile. If it has run since, the compiled code "
            "does not know what is attached now: call torch._dynamo.reset() before its next call."
        )
