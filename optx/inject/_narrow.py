"""Fewer of what targets find: layers by their numbers, and what is left out by name.

The meaning is that of PEFT's ``layers_to_transform`` and ``exclude_modules``; what has no effect is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import nn

from optx._errors import TargetError, near
from optx.inject._injection import Site, Targets
from optx.inject._parameters import Named, names_parameters, parameter_paths
from optx.inject._targets import matcher

Layers: TypeAlias = int | Sequence[int]
"""Numbers of layers: an int, a range or a list; negative ones count from the end of their stack."""


def narrowed(
    model: nn.Module, found: Sequence[Sequence[Site]], layers: Layers | None, exclude: Targets | None
) -> list[list[Site]]:
    """What is left of several members' sites; arguments are those of `optx.attach`.

    Raises:
        TargetError: a layer that isn't there or in which nothing is targeted, an entry of ``exclude`` that
            matches nothing targeted, or nothing is left.
    """
    every = [site for sites in found for site in sites]
    kept = {id(site): site for site in every}
    if layers is not None:
        inside = _in_layers(model, every, layers)
        kept = {key: site for key, site in kept.items() if key in inside}
    if exclude is not None:
        left_over = _without(every, exclude)
        kept = {key: left_over[key] for key in kept if key in left_over}
    left = [[kept[id(site)] for site in sites if id(site) in kept] for sites in found]
    for sites, few in zip(found, left, strict=True):
        if not few:
            raise TargetError(
                f"attach: layers={layers!r} and exclude={exclude!r} leave nothing to serve of "
                f"{', '.join(repr(site.path) for site in sites[:3])} ({len(sites)} in all)."
            )
    return left


def _in_layers(model: nn.Module, sites: Sequence[Site], layers: Layers) -> set[int]:
    wanted = _numbers(layers)
    sizes = _sizes(model)
    placed = [(site, *place) for site in sites if (place := layer_of(site.path)) is not None]
    if not placed:
        raise TargetError(
            f"attach: layers={layers!r}, and none of the targeted modules is in a numbered layer, as "
            f"{sites[0].path!r} shows. Leave layers out."
        )
    kept: set[int] = set()
    for number in wanted:
        own = {id(site) for site, stack, layer in placed if layer == number + (number < 0) * sizes[stack]}
        if not own:
            there = ", ".join(
                f"{sorted({i for _, s, i in placed if s == stack})} of the {sizes[stack]} in {stack!r}"
                for stack in dict.fromkeys(stack for _, stack, _ in placed)
            )
            raise TargetError(
                f"attach: layers has {number}, and no targeted module is in such a layer; they are in "
                f"layers {there}."
            )
        kept |= own
    return kept


def _numbers(layers: Any) -> list[int]:
    """Distinct whole numbers, in their order."""
    given: list[Any] = [layers]
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        given = list(layers)  # pyright: ignore[reportUnknownArgumentType]
    try:
        if any(isinstance(number, bool) for number in given):  # a number by inheritance only
            raise TypeError
        numbers = [operator.index(number) for number in given]
    except TypeError:
        raise TargetError(
            f"attach: layers is {layers!r}; it must be a whole number, a range or a list of them."
        ) from None
    if not numbers:
        raise TargetError(f"attach: layers is {layers!r}, which is no layer at all. Leave it out for all.")
    return list(dict.fromkeys(numbers))


def layer_of(path: str) -> tuple[str, int] | None:
    """The stack that a module is in and its layer there: the first whole number in its path."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:i]), int(part)
    return None


def _sizes(model: nn.Module) -> dict[str, int]:
    """How many layers each stack has."""
    sizes: dict[str, int] = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        place = layer_of(path)
        if place is not None:
            sizes[place[0]] = max(sizes.get(place[0], 0), place[1] + 1)
    return sizes


def _without(sites: Sequence[Site], exclude: Targets) -> dict[int, Site]:
    """What is not left out, by the site that it was; each entry of a list must leave something out."""
    entries: list[Any] = [exclude]
    if isinstance(exclude, Sequence) and not isinstance(exclude, str):
        entries = [[entry] for entry in exclude]
    out: set[tuple[int, str]] = set()
    for entry in entries:
        try:
            matches = matcher(entry)
        except TargetError as error:
            raise TargetError(str(error).replace("targets", "exclude", 1)) from None
        named = names_parameters(entry)
        own = {(id(site), name) for site in sites for name in _matched(site, matches, named)}
        if not own:
            what = entry[0] if isinstance(entry, list) else entry
            every = [path for site in sites for path in parameter_paths(site.path, site.parameters)]
            raise TargetError(
                f"attach: exclude has {what!r}, which matches nothing that is targeted. "
                f"{near(str(what), every)}"
            )
        out |= own
    left: dict[int, Site] = {}
    for site in sites:
        names = [name for name in site.parameters or ("",) if (id(site), name) not in out]
        if names:
            left[id(site)] = replace(site, parameters=tuple(names)) if site.parameters else site
    return left


def _matched(site: Site, matches: Named, named: bool) -> list[str]:
    """Which of a site's parameters are meant, by their own names or their module's; [""]: the module."""
    if matches(site.path, site.module):
        return list(site.parameters or ("",))
    own = site.parameters if named else ()
    return [name for name in own if matches(f"{site.path}.{name}", nn.Module())]
