"""A module's own forward, exchanged and given back, also where another library has exchanged it too.

accelerate puts its forward on the module and keeps the one of before as ``_old_forward``, which it puts back
when its hooks go. So while they are there, the place for another forward is inside of them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_WITHIN = "_old_forward"

Forward = Callable[..., Any]


def leads_to(module: nn.Module, call: Forward) -> bool:
    """Whether the module's forward is ``call``, or one that is known to call it."""
    own = module.__dict__
    return own.get("forward") == call or (own.get(_WITHIN) == call and "_hf_hook" in own)


def put(module: nn.Module, call: Forward) -> Forward | None:
    """Make ``call`` the module's forward; what was there, None for its class's."""
    name = _WITHIN if _WITHIN in module.__dict__ and "_hf_hook" in module.__dict__ else "forward"
    before = module.__dict__.get(name)
    setattr(module, name, call)
    return None if before is None or before == _of_class(module) else before


def take(module: nn.Module, call: Forward, before: Forward | None) -> None:
    """Undo `put`, wherever ``call`` is now."""
    if module.__dict__.get("forward") == call:
        if before is None:
            del module.forward
        else:
            module.forward = before
    if module.__dict__.get(_WITHIN) == call:
        module._old_forward = _of_class(module) if before is None else before  # pyright: ignore


def _of_class(module: nn.Module) -> Forward:
    return MethodType(type(module).forward, module)
