"""Whether a module whose forward was exchanged still calls what is served in it.

A kernel of a hub (gpt-oss' MegaBlocksMoeMLP) takes the place of a module's forward and reads the weights of
the modules inside without calling them, so that nothing attached to those acts. Whether it does shows in the
first call with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from optx._errors import OptxError
from optx.inject._part import Attached, attached


class FirstCall:
    """Notes, for the length of one call of the model, which served modules are called by such a parent."""

    def __init__(self, parents: Iterable[tuple[nn.Module, dict[str, Attached]]]) -> None:
        self.parents = [one for one in parents if not _is_compiled(one[0])]
        self._called: set[int] = set()
        self._hooks: list[RemovableHandle] = []

    def begin(self, model: nn.Module) -> None:
        """Put hooks on what is looked at, and on the model, whose end takes them off."""
        for parent, children in self.parents:
            for module in (parent, *(parent.get_submodule(name) for name in children)):
                self._hooks.append(module.register_forward_pre_hook(self._note))
        self._hooks.append(model.register_forward_hook(self._end, always_call=True))

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._called.add(id(module))

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        if output is None or sys.exc_info()[0] is not None:  # something else is wrong
            return
        for parent, children in self.parents:
            if id(parent) in self._called:
                self._judge(parent, children)

    def _judge(self, parent: nn.Module, children: dict[str, Attached]) -> None:
        for name, container in children.items():
            if id(parent.get_submodule(name)) not in self._called:
                acting = [key for key, part in container.parts.items() if part.active]
                kind, forward = type(parent).__name__, getattr(parent.forward, "__qualname__", parent.forward)
                raise OptxError(
                    f"optx: {acting[0]!r} on {name!r} of a {kind} did not act in this call: the forward of "
                    f"the {kind} was exchanged for {forward!r} (a kernel?), which does not call {name!r}. "
                    "Load the model without it (use_kernels=False)."
                )
        for container in children.values():
            container.called_by = _of(parent)


def doubtful(parent: nn.Module, names: Iterable[str]) -> dict[str, Attached]:
    """What is served right inside of a parent whose forward is not its class's, and not seen called by it."""
    container, forward = attached(parent), _of(parent)
    if container is not None and parent.__dict__["forward"] == container.call:
        return {}
    if "_hf_hook" in parent.__dict__ or forward == id(type(parent).forward):
        return {}  # accelerate's calls the one of before
    found: dict[str, Attached] = {}
    for name in names:
        child = parent._modules.get(name)  # pyright: ignore[reportPrivateUsage]
        own = attached(child) if child is not None else None
        if own is not None and own.called_by != forward and any(part.active for part in own.parts.values()):
            found[name] = own
    return found


def _of(parent: nn.Module) -> int:
    """What tells one forward of a module from another."""
    forward = parent.forward
    return id(getattr(forward, "__func__", forward))


def _is_compiled(module: nn.Module) -> bool:
    """Whether hooks that come now may be ignored in it."""
    return any(one._compiled_call_impl is not None for one in module.modules())  # pyright: ignore[reportPrivateUsage]
