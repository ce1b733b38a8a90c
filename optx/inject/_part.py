"""What an injection adds to one module, and the submodule all of them live under.

A served module gets one submodule, ``optx``, with one `Part` per injection in it. So the new parameters
move, train, compile and save with the module they serve, and its own parameters keep their names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

RESERVED = "optx"
"""The name of the submodule under which everything added lives."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Weights:
    """A module's own weights during a merge, in the precision of the sum."""

    weight: Tensor
    bias: Tensor | None


class Part(nn.Module):
    """What one injection adds to one module: its tensors, and how the module's call changes.

    A subclass overrides what it needs of `before`, `after` and `around`; `fold` if it can be merged.
    The base's own tensors are never written while a part is attached and not merged.
    """

    folds_input: ClassVar[bool] = False
    """Whether `fold` acts on the module's input: such a fold comes after all others, as in the call."""

    enabled: bool
    merged: bool

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.merged = False
        self.register_load_state_dict_pre_hook(_keep_if_absent)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """New arguments for the module's call, or None to leave them."""
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A new output of the module's call, or None to leave it."""
        raise NotImplementedError

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call itself, where neither of the others will do; ``call`` is what it was."""
        raise NotImplementedError

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """The weights with which the bare module does what it does with this part.

        Args:
            module: the served module.
            now: its weights with earlier parts folded in.
            base: its own weights, which the call with hooks works from.
        """
        raise NotImplementedError

    def suffixes(self) -> dict[str, str]:
        """What follows the module's path in a saved key, by tensor; ``<name>.<tensor>`` if not given."""
        return {}

    @classmethod
    def overrides(cls, moment: str) -> bool:
        """Whether this kind of part acts at this moment (``before``, ``after``, ``around``, ``fold``)."""
        return getattr(cls, moment) is not getattr(Part, moment)

    @property
    def active(self) -> bool:
        """Whether the hooks act: switched on, and not already in the weights."""
        return self.enabled and not self.merged

    @property
    def adds(self) -> bool:
        """Whether all it does is add something that depends on the module's input: such parts commute."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name, live."""
        return dict(self.state_dict(keep_vars=True))

    def trainable(self) -> int:
        """How many numbers an optimizer can move."""
        return sum(p.numel() for p in self.parameters())

    def owns(self, module: nn.Module) -> bool:
        """Whether a linear module's output is new, and this part the first to see it."""
        first = next(iter(module._forward_hooks.values()), None)  # pyright: ignore[reportPrivateUsage]
        return type(module) is nn.Linear and getattr(first, "__self__", None) is self

    def note(self) -> str:
        """What was added, in a word or two, for the report."""
        return ""

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        return self.before(module, args, kwargs) if self.active else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.after(module, args, kwargs, output) if self.active else None


def _keep_if_absent(part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of the bare model says nothing of what was added, so that stays as it is."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update(part.state_dict(prefix=prefix, keep_vars=True))


class Attached(nn.Module):
    """All that is attached to one module: parts by name, in the order in which they came."""

    def __init__(self, served: nn.Module) -> None:
        super().__init__()
        # Weakly: the module holds this, and a model that is dropped must not wait for the cycle collector.
        self._served = weakref.ref(served)
        self._forward: Callable[..., Any] | None = None  # one that was set on the module, not its class's
        self.originals: dict[str, Tensor] = {}
        """The module's own tensors while parts are merged into it."""
        self.tied: list[nn.Parameter] = []
        """The weight that the module shares with others, while it has a merged one of its own."""
        self.versions: dict[str, tuple[int, int]] = {}
        """Address and version of the merged tensors: another means that someone changed them since."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_served": self._target()}  # a copy of the model serves the copied module

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_served": weakref.ref(state["_served"])})

    def _target(self) -> nn.Module:
        """The module that all this is attached to."""
        module = self._served()
        if module is None:
            raise ReferenceError("the module that this was attached to is gone")
        return module

    @property
    def parts(self) -> Mapping[str, Part]:
        """The parts by name, in order."""
        return self._modules  # pyright: ignore[reportReturnType]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The served module's forward while a part goes around it."""
        module = self._target()
        inner = self._forward or partial(type(module).forward, module)
        for part in self.parts.values():
            if part.overrides("around") and part.active:
                inner = partial(_go_around, part, inner, module)
        return inner(*args, **kwargs)

    def hook(self, part: Part) -> list[RemovableHandle]:
        """Make a part that is already among the parts act."""
        module = self._target()
        hooks: list[RemovableHandle] = []
        if part.overrides("before"):
            hooks.append(module.register_forward_pre_hook(part._before, with_kwargs=True))  # pyright: ignore[reportPrivateUsage]
        if part.overrides("after"):
            hooks.append(module.register_forward_hook(part._after, with_kwargs=True))  # pyright: ignore[reportPrivateUsage]
        if part.overrides("around") and module.__dict__.get("forward") != self.call:
            self._forward = module.__dict__.get("forward")
            module.forward = self.call
        return hooks

    def unhook(self) -> None:
        """Give the module its own forward back once no part goes around it."""
        module = self._target()
        around = any(part.overrides("around") for part in self.parts.values())
        if not around and module.__dict__.get("forward") == self.call:
            if self._forward is None:
                del module.forward
            else:
                module.forward = self._forward
                self._forward = None


def _go_around(part: Part, call: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return part.around(call, module, args, kwargs)


def attached(module: nn.Module) -> Attached | None:
    """What is attached to a module, if anything is."""
    found = module._modules.get(RESERVED)  # pyright: ignore[reportPrivateUsage]
    return found if isinstance(found, Attached) else None


def original(module: nn.Module, name: str) -> Any:
    """A module's own weight or bias (None if it has none), without what is merged into it."""
    container = attached(module)
    kept = container.originals.get(name) if container is not None else None
    return getattr(module, name, None) if kept is None else kept


def new_tensor(module: nn.Module, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros on the module's device; float32 where its weights are of half precision."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    half = like.dtype.itemsize < 4
    return torch.zeros(shape, device=like.device, dtype=dtype or (torch.float32 if half else like.dtype))


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor a module computes from: its first positional argument, else its first keyword one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a module that optx serves was called without a tensor")


def output_of(output: Any) -> Tensor:
    """The tensor a module computed: its output, or the first item of it."""
    return output[0] if isinstance(output, tuple | list) else output


def with_output(output: Any, new: Tensor) -> Any:
    """The output with its tensor exchanged."""
    if isinstance(output, tuple):
        first_changed = (new, *output[1:])
        return type(output)(*first_changed) if hasattr(output, "_fields") else first_changed
    return [new, *output[1:]] if isinstance(output, list) else new
