"""Modules that all blocks of a stack share: which they are, whether they can be, and the exchange itself.

Source: WideNet, arXiv 2107.11817: attention and one mixture of experts for all depths, norms of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from optx._errors import TargetError, near
from optx.inject._expert_copies import draw_anew, mean_of
from optx.inject._injection import Site
from optx.inject._offload import HOOK
from optx.inject._part import RESERVED
from optx.inject._perp_norms import is_norm

Values: TypeAlias = "dict[str, dict[str, Any]]"
"""Plain attributes by the path of their module."""

_SIMPLE = (bool, int, float, str, type(None), tuple)


def shareable(block: nn.Module, ffn: str, keep: Sequence[str], norms: bool) -> list[str]:
    """The outermost modules of a block that have parameters and nothing in them that stays its own.

    Args:
        block: one of them.
        ffn: the path of its FFN, which is another matter.
        keep: paths of what stays its own.
        norms: whether norms are shared too.
    """

    def own(path: str, module: nn.Module) -> bool:
        return path in keep or path == ffn or (not norms and is_norm(module))

    def walk(path: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            if own(here, child) or not any(True for _ in child.parameters()):
                continue
            if any(own(f"{here}.{inner}", one) for inner, one in child.named_modules() if inner):
                yield from walk(here, child)
            else:
                yield here

    return list(walk("", block))


def check_shared(sites: Sequence[Site], paths: Sequence[str]) -> None:
    """Raise unless the modules of these paths are alike in all blocks, and each block's own.

    Raises:
        TargetError: names the first block and module that differ, and in what.
    """
    first, seen = sites[0], dict[int, str]()
    for site in sites:
        for path in paths:
            module = _found(site, path)
            for name, inner in module.named_modules():
                if RESERVED in name.split(".") or HOOK in inner.__dict__:
                    raise TargetError(
                        f"attach: {site.path}.{path} has something attached or is kept elsewhere, so WideNet "
                        "can't share it. Attach WideNet first."
                    )
            why = _difference(_found(first, path), module)
            if why:
                raise TargetError(
                    f"attach: WideNet shares {path!r} among all blocks, and {site.path!r} differs from "
                    f"{first.path!r} there: {why}. Pass targets= of blocks that are alike."
                )
            for name, p in module.named_parameters():
                full = f"{site.path}.{path}.{name}"
                if p.is_meta:
                    raise TargetError(
                        f"attach: {full!r} is on the meta device and has no values yet for WideNet to copy. "
                        "Load them first, and attach then."
                    )
                if id(p) in seen:
                    raise TargetError(
                        f"attach: WideNet can't share {full!r}, which is tied to {seen[id(p)]!r} already. "
                        "Untie them first, or pass other targets."
                    )
                seen[id(p)] = full


def check_owned(model: nn.Module, sites: Sequence[Site], paths: Sequence[str]) -> None:
    """Raise if a parameter that is to be shared is something else's too.

    Raises:
        TargetError: names both.
    """
    inside = {f"{site.path}.{path}." for site in sites for path in paths}
    mine = {id(p) for site in sites for path in paths for p in _found(site, path).parameters()}
    names: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        own = name.startswith(tuple(inside))
        if id(p) in mine and (not own or id(p) in names):
            raise TargetError(
                f"attach: WideNet can't share {name!r}: it is tied to something else of the model already. "
                "Untie them first, or pass other targets."
            )
        if own:
            names[id(p)] = name


def _found(site: Site, path: str) -> nn.Module:
    modules = dict(site.module.named_modules())
    if path not in modules or not path:
        raise TargetError(
            f"attach: {site.path!r} has no module {path!r} to share. {near(path, filter(None, modules))}"
        )
    return modules[path]


def _difference(one: nn.Module, other: nn.Module) -> str:
    """In what two modules differ that can't be shared; empty: in nothing."""
    if type(one) is not type(other):
        return f"one is a {type(one).__name__}, the other a {type(other).__name__}"
    mine, its = dict(one.named_parameters()), dict(other.named_parameters())
    if list(mine) != list(its):
        return f"it has {sorted(set(mine) ^ set(its))[0]!r} in one of them alone"
    for name, p in mine.items():
        if p.shape != its[name].shape:
            return f"{name!r} has shape {tuple(p.shape)} and {tuple(its[name].shape)}"
    tensors = dict(other.named_buffers())
    for name, t in one.named_buffers():
        if name not in tensors or t.shape != tensors[name].shape or not torch.equal(t, tensors[name]):
            return f"the buffer {name!r} is another"
    return ""


def attributes(modules: Sequence[nn.Module]) -> list[Values]:
    """Plain attributes in which modules differ (a layer's number, a rate that grows), of each of them."""
    found: list[Values] = [{} for _ in modules]
    for path, first in modules[0].named_modules():
        each = [module.get_submodule(path) for module in modules]
        for name, value in vars(first).items():
            values = [vars(one).get(name) for one in each]
            plain = not name.startswith("_") and name != "training" and isinstance(value, _SIMPLE)
            if plain and any(type(other) is not type(value) or other != value for other in values):
                for own, one in zip(found, values, strict=True):
                    own.setdefault(path, {})[name] = one
    return found


def shared_copy(modules: Sequence[nn.Module], init: str, path: str) -> nn.Module:
    """A module for all blocks, which none of them had.

    Args:
        modules: one of each block.
        init: ``"first"`` or ``"mean"`` of these, or drawn ``"fresh"``.
        path: of the first, for messages.
    """
    made = copy.deepcopy(modules[0])
    if init == "fresh":
        draw_anew("WideNet", made, path)
    elif init == "mean":
        every = [dict(one.named_parameters()) for one in modules]
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(mean_of([one[name] for one in every]))
    return made


def put(block: nn.Module, path: str, module: nn.Module) -> None:
    """Make a module the one of this path."""
    owner, _, name = path.rpartition(".")
    block.get_submodule(owner)._modules[name] = module  # pyright: ignore[reportPrivateUsage]


def once(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict in which each tensor has the first of its names alone."""
    seen, found = set[tuple[Any, ...]](), dict[str, Any]()
    for name, t in state.items():
        key = (
            (t.data_ptr(), t.shape, t.stride(), t.device) if isinstance(t, Tensor) and t.numel() else (name,)
        )
        if key not in seen:
            seen.add(key)
            found[name] = t
    return found
