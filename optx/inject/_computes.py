"""How a module computes from its weight: as it is, made from others, from codes, or kept elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optx._errors import MergeError, TargetError
from optx._names import is_dtensor
from optx.inject import _offload, _own_call, _quantised
from optx.inject._part import Part, original


def derived(module: nn.Module, name: str = "weight") -> str:
    """What a module's tensor is made by at every call, in words; empty if it is a parameter of its own."""
    if parametrize.is_parametrized(module, name):
        by = [type(one).__name__.lstrip("_") for one in module.parametrizations[name]]  # pyright: ignore
        return f"the parametrization {', '.join(by)}"
    tensor = getattr(module, name, None)
    own = name in module._parameters or name in module._buffers  # pyright: ignore[reportPrivateUsage]
    if own or not isinstance(tensor, Tensor):
        return ""
    maker = _maker(module, name)
    return type(maker).__name__ if maker is not None else "code outside of the module"


def _maker(module: nn.Module, name: str) -> Any:
    """The hook of torch's older weight norm, spectral norm and pruning that makes a tensor."""
    for hook in module._forward_pre_hooks.values():  # pyright: ignore[reportPrivateUsage]
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return hook
    return None


def _remade(module: nn.Module) -> Tensor:
    """The weight as the next call makes it: what is there may be older than what it is made from."""
    maker: Any = _maker(module, "weight")
    weight: Any = module.weight
    if hasattr(maker, "apply_mask"):
        return maker.apply_mask(module)
    if hasattr(maker, "do_power_iteration") or hasattr(maker, "n_power_iterations"):
        return maker.compute_weight(module, do_power_iteration=False)
    return maker.compute_weight(module) if hasattr(maker, "compute_weight") else weight


def _parametrized(module: nn.Module) -> Tensor:
    """A parametrized weight; looked at in training mode, a spectral norm would take a step of its own."""
    chain: Any = module.parametrizations["weight"]  # pyright: ignore
    training = chain.training
    chain.eval()
    try:
        return module.weight  # pyright: ignore[reportReturnType]
    finally:
        chain.train(training)


def weight_of(module: nn.Module, path: str = "") -> Tensor:
    """The weight that a module's own call uses, in floating point; not one that is merged into it.

    Args:
        module: a linear module, a convolution or an embedding.
        path: for errors.

    Raises:
        TargetError: it can't be read.
    """
    if parametrize.is_parametrized(module, "weight"):
        return _parametrized(module)
    weight: Any = original(module, "weight")
    if _quantised.kind_of(module):
        if isinstance(weight, Tensor) and weight.is_meta:
            raise TargetError(
                f"attach: {path}.weight is quantised and offloaded, or on the meta device, so its codes "
                "can't be read here. Attach before that, or use an injection that doesn't need the weight."
            )
        return _quantised.read(module, weight, path)
    if not torch.compiler.is_compiling():
        weight = _offload.at_hand(module, "weight", weight)
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias that a module's own call adds."""
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None or torch.compiler.is_compiling():
        return bias
    return _offload.at_hand(module, "bias", bias)


def weight_now(module: nn.Module, path: str = "") -> Tensor:
    """As `weight_of`, before a call: a derived weight is made anew."""
    return _remade(module).detach() if _maker(module, "weight") is not None else weight_of(module, path)


def check_weights(module: nn.Module, part: Part, path: str) -> None:
    """Raise if a module's weight is nothing that a merge can write to.

    Raises:
        MergeError: it is derived, sharded, offloaded, not there yet, codes of an unknown kind, or not used as
            torch uses it.
    """
    _offload.check_here(module, part, path)
    for name in ("weight", "bias"):
        if by := derived(module, name):
            raise MergeError(
                f"merge: {path}.{name} is made by {by} at every call, so a merge into it would be undone by "
                f"the next one. Make it a parameter first (as "
                "torch.nn.utils.parametrize.remove_parametrizations does), or keep the adapter attached."
            )
    for name, tensor in (*module.named_parameters(recurse=False), *part.named_parameters()):
        if is_dtensor(tensor):
            raise MergeError(
                f"merge: {path}'s {name} is sharded over a device mesh (a DTensor). Save the adapter with "
                "handle.save(), and merge it into the model where it is whole."
            )
        if tensor.is_meta:
            raise MergeError(
                f"merge: {path}'s {name} is on the meta device and has no values yet. Load them first."
            )
    kind = _quantised.kind_of(module)
    if kind and not _quantised.can_write(module):
        raise MergeError(
            f"merge: the weight of {path!r} is {kind}, which optx can't write. Keep the adapter attached, or "
            "save it and merge it into the model as it was before it was quantised."
        )
    _own_call.check_merge(module, path)
