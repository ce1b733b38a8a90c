"""Modules whose weights accelerate keeps elsewhere (in memory, on disk) and brings for the time of a call.

Its hooks are known by what they have, so that accelerate need not be imported. They replace a module's
forward; what optx adds acts in torch's hooks, outside of it, and so has to see to its own tensors.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import MergeError, OptxError, warn

HOOK = "_hf_hook"


def align_hook(module: nn.Module) -> Any:
    """The hook that places a module's tensors, the offloading one of several; None if there is none."""
    hook = module.__dict__.get(HOOK)
    hooks: list[Any] = [one for one in getattr(hook, "hooks", (hook,)) if hasattr(one, "execution_device")]
    return next((one for one in hooks if one.offload), hooks[0] if hooks else None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes, if a hook brings it there."""
    for one in module.modules():
        hook = align_hook(one)
        if hook is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook takes a module's own tensors away after every call."""
    hook = align_hook(module)
    return hook is not None and bool(hook.offload)


def kept_elsewhere(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of an offloaded module as it is kept; None if it is not kept elsewhere."""
    hook = align_hook(module)
    if hook is None or not hook.offload or hook.weights_map is None:
        return None
    try:
        return hook.weights_map[name]
    except KeyError:
        return None


def at_hand(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A module's tensor, brought from where it is kept if the module has only its shape now."""
    kept = kept_elsewhere(module, name) if tensor.is_meta else None
    if kept is None:
        return tensor
    device = execution_device(module)
    return kept if device is None else kept.to(device)


def tensors_of(part: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a part by name, live, wherever they are kept."""
    found: dict[str, Tensor] = dict(part.state_dict(keep_vars=True))
    for path, module in part.named_modules():
        for name in (*module._parameters, *module._buffers):  # pyright: ignore[reportPrivateUsage]
            key = f"{path}.{name}" if path else name
            if key in found and found[key].is_meta:
                found[key] = at_hand_of(module, name, found[key])
    return found


def at_hand_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """As `at_hand`, where it is kept and not where it is needed: writing to it writes what is kept."""
    kept = kept_elsewhere(module, name)
    return tensor if kept is None else kept


def check_writable(part: nn.Module, path: str) -> None:
    """Raise if what is written to a part's tensors would be lost.

    Raises:
        OptxError: they are offloaded to files, which are read anew at every call.
    """
    for module in part.modules():
        for name in module._parameters:  # pyright: ignore[reportPrivateUsage]
            first, again = kept_elsewhere(module, name), kept_elsewhere(module, name)
            if first is not None and again is not None and first.data_ptr() != again.data_ptr():
                raise OptxError(
                    f"load_state_dict: what is attached to {path!r} is offloaded to disk. Remove the hooks "
                    "first (accelerate.hooks.remove_hook_from_submodules), load, and offload again."
                )


def check_here(module: nn.Module, part: nn.Module, path: str) -> None:
    """Raise if weights that are to be merged, or what is merged into them, are offloaded.

    Raises:
        MergeError: they are; says what to do.
    """
    if any(is_offloaded(one) for one in (module, *part.modules())):
        raise MergeError(
            f"merge: {path!r} is offloaded by accelerate, which brings its weight anew at every call. Remove "
            "the hooks first (accelerate.hooks.remove_hook_from_submodules), merge, and offload again."
        )


def is_free(part: nn.Module, module: nn.Module) -> bool:
    """Whether no hook moves a part's tensors, or its module's."""
    if HOOK in part.__dict__ or HOOK in module.__dict__:
        return False
    return not any(HOOK in child.__dict__ for child in part._modules.values() if child is not None)  # pyright: ignore[reportPrivateUsage]


@contextmanager
def brought(part: nn.Module) -> Generator[None]:
    """A part's tensors where they compute, for the time of its turn, as for a module that is called."""
    hooked: list[Any] = [one for one in part.modules() if HOOK in one.__dict__]
    for one in hooked:
        one._hf_hook.pre_forward(one)
    if part.training and torch.is_grad_enabled() and any(is_offloaded(one) for one in hooked):
        warn(
            "optx: what was attached is offloaded by accelerate, and no gradient reaches it there. Attach "
            "after the model has been dispatched (what is attached then stays where it computes), or remove "
            "the hooks."
        )
    try:
        yield
    finally:
        for one in reversed(hooked):
            one._hf_hook.post_forward(one, None)


def placed(value: Any, device: torch.device | None) -> Any:
    """A call's arguments on its module's device: hooks outside of it see where they came from."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if type(value) is tuple:
        return tuple(placed(one, device) for one in value)
    if type(value) is dict:
        return {name: placed(one, device) for name, one in value.items()}
    return value
