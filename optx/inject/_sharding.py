"""Refuse what a wrapper has gathered or sharded already: what is added now would be in no bucket of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError
from optx._names import is_dtensor
from optx._pieces import pieces_of
from optx.inject._injection import Site

# By name: importing torch.distributed.fsdp costs a second, and DeepSpeed may not be there.
_WRAPPERS = {
    "FSDPModule": ("is sharded by fully_shard", "shard"),
    "FullyShardedDataParallel": ("is a FullyShardedDataParallel", "wrap"),
    "DistributedDataParallel": ("is a DistributedDataParallel", "wrap"),
    "DataParallel": ("is a DataParallel", "wrap"),
    "DeepSpeedEngine": ("is a DeepSpeedEngine", "initialize"),
}
_DRIFT = "the gradients of what is added now would not be reduced, and ranks would drift apart"


def wrapped_by(kind: type) -> tuple[str, str] | None:
    """What has gathered the parameters of a module of this class, and the verb for it; None: nothing has."""
    names = (one.__name__ for one in kind.__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank has to ask for it."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def anything_is_sharded() -> bool:
    """Whether `fully_shard` has sharded any module of this process."""
    states: Any = sys.modules.get("torch.distributed._composable_state")
    return states is not None and len(states._module_state_mapping) > 0


def check_whole(model: nn.Module) -> None:
    """Raise if the model as a whole, or one that it is in, is wrapped: nothing can be added to it.

    Raises:
        OptxError: it is; says what to do.
    """
    found = wrapped_by(type(model))
    if found is not None:
        what, verb = found
        raise OptxError(
            f"attach: this model {what}, which has gathered its parameters already: {_DRIFT}. Attach to the "
            f"model first and {verb} it then."
        )
    if _around(model):
        gc.collect()  # one that was dropped, but is not gone yet
        around = _around(model)
        if around:
            raise OptxError(
                f"attach: this model is in a {around}, which has gathered its parameters already: {_DRIFT}. "
                "Attach first and wrap it then."
            )


def check_sites(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise if a served module is inside of something that is wrapped or sharded.

    Raises:
        TargetError: one is; names it, and what it is in.
    """
    wrapped = {path: found for path, module in model.named_modules() if (found := wrapped_by(type(module)))}
    for site in sites:
        for path in _from_root(site.path):
            if path in wrapped:
                what, verb = wrapped[path]
                raise TargetError(
                    f"attach: {site.path!r} is in {path!r}, which {what} already: {_DRIFT}. Attach first and "
                    f"{verb} it then."
                )
        inner = [path.removeprefix(f"{site.path}.") for path in wrapped if path.startswith(f"{site.path}.")]
        for name, p in site.module.named_parameters():
            if not any(name.startswith(f"{path}.") for path in inner):
                _check_parameter(f"{site.path}.{name}", p)


def _from_root(path: str) -> Iterator[str]:
    """A module's path and those of all that it is in."""
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _check_parameter(name: str, p: nn.Parameter) -> None:
    if is_dtensor(p):
        raise TargetError(
            f"attach: {name!r} is a DTensor, spread over a device mesh already: {_DRIFT}. Attach first and "
            "shard the model then; modules under tensor parallelism can't be served."
        )
    pieces = pieces_of(p)
    if pieces is not None:
        raise TargetError(
            f"attach: {name!r} is {pieces.what}; it has shape {tuple(p.shape)} here: {_DRIFT}. "
            f"{pieces.way_out}, after attaching."
        )


def _around(model: nn.Module) -> str:
    """The class of a wrapper that the model is in, or whose parameters it has; only the wrapper knows."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    own = {id(p) for p in model.parameters()}
    inside = {id(module) for module in model.modules()}
    kinds: dict[type, bool] = {}
    for found in gc.get_objects():
        kind = type(found)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, nn.Module) and wrapped_by(kind) is not None
        if kinds[kind] and id(found) not in inside and not isinstance(found, nn.DataParallel):
            parts = (*found.modules(), *found.parameters())
            if any(part is model or id(part) in own for part in parts):
                return kind.__name__
    return ""
