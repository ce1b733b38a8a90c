"""What an injection adds to one module, and the submodule all of them live under.

A served module gets one submodule, ``optx``, with one `Part` per injection in it. So the new parameters
move, train, compile and save with the module they serve, and its own parameters keep their names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from optx._errors import OptxError
from optx._names import RESERVED as RESERVED
from optx.inject import _forward, _offload, _unfilled

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Weights:
    """A module's own weights during a merge, in the precision of the sum."""

    weight: Tensor
    bias: Tensor | None
    others: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of(self, name: str) -> Tensor:
        """One of them by name."""
        own = self.weight if name == "weight" else self.bias if name == "bias" else self.others[name]
        assert own is not None
        return own

    def having(self, new: Mapping[str, Tensor]) -> Weights:
        """These, and new ones in the place of some."""
        others = {name: tensor for name, tensor in new.items() if name not in ("weight", "bias")}
        return Weights(new.get("weight", self.weight), new.get("bias", self.bias), {**self.others, **others})


@dataclass
class Requantised:
    """A module's weight while it has been exchanged for other codes.

    Attributes:
        undo: gives the module its own again.
        rounding: what the merged weight lost.
    """

    undo: Callable[[], None]
    rounding: Any


class Part(nn.Module):
    """What one injection adds to one module: its tensors, and how the module's call changes.

    A subclass overrides what it needs of `before`, `after` and `around`; `fold` if it can be merged.
    The base's own tensors are never written while a part is attached and not merged.
    """

    folds_input: ClassVar[bool] = False
    """Whether `fold` acts on the module's input: such a fold comes after all others, as in the call."""

    inside: ClassVar[bool] = False
    """Whether all it changes is what the module's own parameters are while it computes: such a part is inside
    of all others, and folds before them, whenever they were attached."""

    in_place: ClassVar[bool] = False
    """Whether the module computes with a weight of this part's own, which folds in its weight's place: what
    is merged into that before this is lost."""

    comes_last: ClassVar[bool] = False
    """Whether its `after` comes after those of all other parts, whenever they were attached."""

    weightless: ClassVar[bool] = False
    """Whether it acts in training alone, so that a merge, which is of weights, goes on without it."""

    replaces: ClassVar[bool] = False
    """Whether others compute in the place of the module, so that nothing attached inside of it would act."""

    alone: ClassVar[bool] = False
    """Whether it is all that the module computes, or gives another kind of thing, so that nothing else can be
    attached to it."""

    enabled: bool
    merged: bool
    adapter: str = ""
    """The name of the adapter that it belongs to: `attach`'s ``name``, or its injection's."""
    reads_weight: bool = False
    """Whether it works with the module's own weight, as its injection says (``needs_weight``)."""

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

    def retired(self, module: nn.Module) -> Sequence[nn.Parameter]:
        """Parameters of the served module that take no part while this is attached: they ask for no gradient.

        An optimizer that follows the handle (``optx.wrap(optimizer, handle)``) has them no longer.
        """
        return ()

    def settings_of(self, name: str) -> Sequence[Tensor]:
        """The parameters whose param group one of its own belongs to, all of them; none: its module's."""
        return ()

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
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters that it serves one by one; none for a part that serves the module."""
        return ()

    @property
    def adds(self) -> bool:
        """Whether all it does is add something that depends on the module's input: such parts commute."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name, live."""
        return _offload.tensors_of(self)

    def trainable(self) -> int:
        """How many numbers an optimizer can move."""
        return sum(p.numel() for p in self.parameters())

    def absent(self, prefix: str) -> dict[str, Any]:
        """What a checkpoint that says nothing of it means for it: by default, that it stays as it is."""
        return self.state_dict(prefix=prefix, keep_vars=True)

    def owns(self, module: nn.Module) -> bool:
        """Whether a linear module's output is new, and this part the first and only one to hold it."""
        if torch.compiler.is_compiling():
            return False
        first = next(iter(module._forward_hooks.values()), None)  # pyright: ignore[reportPrivateUsage]
        return (
            type(module) is nn.Linear
            and getattr(first, "__self__", None) is self
            and "forward" not in module.__dict__  # another library's may return what it was given, or keep it
            and nn.Linear.forward is _LINEAR
            and type(module.weight) is nn.Parameter  # a subclass computes as it likes
            and not _seen_elsewhere()
        )

    def change_sq(self) -> Tensor | None:
        """The squared norm of what it adds to the module's weights; None if that is not had without them."""
        return None

    def note(self) -> str:
        """What was added, in a word or two, for the report."""
        return ""

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if not self.active:
            return None
        if torch.compiler.is_compiling() or _offload.is_free(self, module):
            return self.before(module, args, kwargs)
        where = _offload.execution_device(module)
        with _offload.brought(self):
            return self.before(module, _offload.placed(args, where), _offload.placed(kwargs, where))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.active:
            return None
        if torch.compiler.is_compiling() or _offload.is_free(self, module):
            return self.after(module, args, kwargs, output)
        where = _offload.execution_device(module)
        with _offload.brought(self):
            return self.after(module, _offload.placed(args, where), _offload.placed(kwargs, where), output)


_LINEAR = nn.Linear.forward


def _seen_elsewhere() -> bool:
    """Whether something else sees every output: hooks on all modules, or a mode that may keep what it saw."""
    everywhere = torch.nn.modules.module._global_forward_hooks  # pyright: ignore[reportPrivateUsage]
    return bool(everywhere) or torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore


def _keep_if_absent(part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of the bare model says nothing of what was added."""
    assert isinstance(part, Part)
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update(part.absent(prefix))


class Attached(nn.Module):
    """All that is attached to one module: parts by name, in the order in which they came."""

    def __init__(self, served: nn.Module) -> None:
        super().__init__()
        # Weakly: the module holds this, and a model that is dropped must not wait for the cycle collector.
        self._served = weakref.ref(served)
        self._forward: Callable[..., Any] | None = None  # one that was set on the module, not its class's
        self._reached = True
        self.called_by: int | None = None
        """The exchanged forward of the parent that is known to call this module."""
        self.originals: dict[str, Tensor] = {}
        """The module's own tensors while parts are merged into it."""
        self.requantised: Requantised | None = None
        """While parts are merged into codes: how to get the module's own back, and what was lost."""
        self.tied: dict[str, nn.Parameter] = {}
        """The weight and bias that the module shares with others, while it has merged ones of its own."""
        self.versions: dict[str, tuple[int, int]] = {}
        """Address and version of the merged tensors: another means that someone changed them since."""
        self.unfilled: list[str] = []
        """Tensors of parts that got memory by ``to_empty``, until they are seen to have values."""
        self._filling: RemovableHandle | None = None

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
        if not torch.compiler.is_compiling():
            self._reached = True
        inner = self._forward or partial(type(module).forward, module)
        for part in self.parts.values():
            if part.overrides("around") and part.active:
                inner = partial(_go_around, part, inner, module)
        return inner(*args, **kwargs)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Attached:
        empty = _unfilled.on_meta(self)
        super()._apply(fn, recurse)
        if empty and (got := _unfilled.fill(self, empty)):
            self.unfilled = [*dict.fromkeys([*self.unfilled, *got])]
            if self._filling is None:
                self._filling = self._target().register_forward_pre_hook(self._look_for_values)
        return self

    def _look_for_values(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.check_filled("optx")
            self._stop_looking()

    def _stop_looking(self) -> None:
        if self._filling is not None:
            self._filling.remove()
        self._filling, self.unfilled = None, []

    def check_filled(self, doing: str) -> None:
        """Raise if a part has memory and no values.

        Raises:
            OptxError: names the first such tensor, and what to do.
        """
        if self.unfilled and (without := _unfilled.still(self, self.unfilled)):
            raise OptxError(
                f"{doing}: {without[0]!r}, attached to a {type(self._target()).__name__}, has no values: it "
                "was attached on the meta device, and to_empty() gave it memory alone. Load them "
                "(handle.load, handle.load_state_dict), or attach after to_empty()."
            )

    def _look_for_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a call: whether the forward that it will take leads to `call` is known, or will be seen."""
        if not torch.compiler.is_compiling():
            self._reached = _forward.leads_to(module, self.call)

    def _check_reached(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a call: someone may have given the module a forward that knows nothing of the last one."""
        if self._reached or torch.compiler.is_compiling():
            return
        acting = [name for name, part in self.parts.items() if part.overrides("around") and part.active]
        if acting:
            raise OptxError(
                f"{acting[0]!r} on a {type(module).__name__} did not act in this call: the module's forward "
                "was replaced by one that does not call the forward of before. Remove the handle and attach "
                "again."
            )

    def hook(self, part: Part) -> list[RemovableHandle]:
        """Make a part that is already among the parts act."""
        module = self._target()
        hooks: list[RemovableHandle] = []
        if part.overrides("before"):
            hooks.append(module.register_forward_pre_hook(part._before, with_kwargs=True))  # pyright: ignore[reportPrivateUsage]
        if part.overrides("after"):
            hooks.append(module.register_forward_hook(part._after, with_kwargs=True))  # pyright: ignore[reportPrivateUsage]
            self._put_last(module)
        if part.overrides("around"):
            if not _forward.leads_to(module, self.call):
                self._forward = _forward.put(module, self.call)
            hooks.append(module.register_forward_pre_hook(self._look_for_call))
            hooks.append(module.register_forward_hook(self._check_reached))
        return hooks

    def _put_last(self, module: nn.Module) -> None:
        hooks: Any = module._forward_hooks  # pyright: ignore[reportPrivateUsage]
        for key, hook in [*hooks.items()]:
            if getattr(getattr(hook, "__self__", None), "comes_last", False) is True:
                hooks.move_to_end(key)

    def unhook(self) -> None:
        """Give the module its own forward back once no part goes around it.

        Where another library has wrapped `call`, what is wrapped is exchanged if it can be reached; else
        `call` stays in there and does what the old forward did.
        """
        if not self.parts:
            self._stop_looking()
        if not any(part.overrides("around") for part in self.parts.values()):
            _forward.take(self._target(), self.call, self._forward)

    def bare(self) -> Callable[..., Any]:
        """The module's forward without the parts that go around it."""
        module = self._target()
        return self._forward or partial(type(module).forward, module)


def _go_around(part: Part, call: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or _offload.is_free(part, module):
        return part.around(call, module, args, kwargs)
    with _offload.brought(part):
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


def bare_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's forward without what is attached to it."""
    container = attached(module)
    around = container is not None and module.__dict__.get("forward") == container.call
    return container.bare() if container is not None and around else module.forward


def new_tensor(module: nn.Module, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros where the module computes; float32 where its weights are of half precision, or codes."""
    own = next(iter((*module.parameters(), *module.buffers())), torch.empty(0))
    like = next((p for p in module.parameters() if p.is_floating_point()), own)
    half = like.dtype.itemsize < 4 or not like.is_floating_point()
    device = _offload.execution_device(module) or like.device
    return torch.zeros(shape, device=device, dtype=dtype or (torch.float32 if half else like.dtype))


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
