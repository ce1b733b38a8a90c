"""Parameter names, for messages and for matching anchors by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

RESERVED = "optx"
"""The name of the submodule under which everything lives that `optx.attach` adds to a module."""


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> dict[int, str]:
    """Names of an optimizer's parameters, by ``id``.

    Taken from the model if given (DDP's and compile's prefixes are dropped), else from the optimizer if it
    was built from ``named_parameters()``, else made up from the position:
    ``param_groups[0]['params'][3]``.
    """
    names: dict[int, str] = {}
    for g, group in enumerate(optimizer.param_groups):
        given: list[str] = group.get("param_names", [])
        for i, p in enumerate(group["params"]):
            names[id(p)] = given[i] if i < len(given) else f"param_groups[{g}]['params'][{i}]"
    if model is not None:
        for name, p in model.named_parameters():
            if id(p) in names:
                names[id(p)] = plain_name(name)
    return names


def has_names(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer was built from ``named_parameters()``."""
    return all("param_names" in group for group in optimizer.param_groups)


def plain_name(name: str) -> str:
    """A parameter's name in the user's model, without what wrappers put before it."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in ("module", "_orig_mod", "_fsdp_wrapped_module"))


def whole(t: Tensor) -> Tensor:
    """A reduction completed over the device mesh, if there is one."""
    return t.full_tensor() if is_dtensor(t) else t  # type: ignore[attr-defined]


def replicated(t: Tensor, p: Tensor) -> Tensor:
    """A tensor that is the same in all processes, beside a sharded parameter: for arithmetic with it."""
    if not is_dtensor(p):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


def placed_like(t: Tensor, p: Tensor) -> Tensor:
    """A tensor on its parameter's device, and sharded as the parameter is if it has its shape."""
    if is_dtensor(p) and not is_dtensor(t) and t.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return t.to(p.device)


def is_dtensor(p: Tensor) -> bool:
    """Whether a tensor is sharded or replicated over a device mesh."""
    if torch.compiler.is_compiling():  # which can't go through a class's bases
        return _is_instance(p)
    return _is_dtensor_type(type(p))


@functools.cache
def _is_dtensor_type(kind: type) -> bool:
    # Looked up by name: importing torch.distributed.tensor costs a second.
    return any(c.__name__ == "DTensor" for c in kind.__mro__)


def _is_instance(p: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)
