"""Let a name on a module mean another tensor for the length of one call: the parameter and its place stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from optx.inject._call_locks import lock_of


def called_with(
    make: Callable[[], Mapping[str, Any]],
    call: Callable[..., Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A module's call, in which some of its names mean what is made for it.

    Args:
        make: by name, what stands in; it may read what the names mean before, which another handle, further
            out, may have made.
        call: the call.
        module: whose; no other call of it is let in meanwhile.
        args: of the call, and
        kwargs: likewise.
    """
    if torch.compiler.is_compiling():
        return _called_with(make, call, module, args, kwargs)
    with lock_of(module):
        return _called_with(make, call, module, args, kwargs)


def _called_with(
    make: Callable[[], Mapping[str, Any]],
    call: Callable[..., Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    own = module.__dict__
    new = make()
    before = {name: own[name] for name in new if name in own}
    for name, tensor in new.items():
        own[name] = tensor
    try:
        return call(*args, **kwargs)
    finally:
        for name in new:
            if name in before:
                own[name] = before[name]
            else:
                del own[name]
