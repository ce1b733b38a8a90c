"""The protocol of a transform: rules for up to three moments of a step, and the state they need."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import TransformError
from optx._expression import NotKept, expression
from optx.step.declared import Slot
from optx.step.measured import Measured
from optx.step.numbers import as_float
from optx.step.state import SlotStore
from optx.step.step_moments import Moments

Group = dict[str, Any]
Fused = bool | Literal["auto", "cpu", "triton"]
Rounding = Literal["stochastic", "kahan", "nearest"]
StateFormat = Literal["float32", "bfloat16", "8bit"]
Master = Literal["split", "split16"]


class Host(Protocol):
    """The wrapped optimizer (`optx.wrap` returns it), as those see it that work in it."""

    base: Optimizer
    transforms: tuple[Transform, ...]
    fused: Fused
    rounding: Rounding
    rounding_asked: bool
    state_format: StateFormat | None
    master: Master | None
    skip_nonfinite: bool
    skipped_steps: int
    closure_pending: bool
    closure_loss: Any
    totals: dict[str, Any]
    metering: bool
    metrics_asked: bool
    sharded: bool

    @property
    def measured(self) -> Measured:
        """Numbers of the last step."""
        ...

    @property
    def param_groups(self) -> list[Group]:
        """The base's param groups."""
        ...

    @property
    def state(self) -> Any:
        """The base's state, ours within it."""
        ...

    @property
    def slot_store(self) -> SlotStore:
        """Where the transforms' tensors are kept."""
        ...

    def settings(self) -> tuple[str, ...]:
        """Of `optx.wrap`'s settings, those that differ from the defaults."""
        ...

    def served(self, transform: Transform) -> list[Tensor]:
        """The parameters of the groups that a transform is not left out of."""
        ...

    def slot(
        self, p: Tensor, transform: Transform, name: str, make: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """A transform's state tensor for ``p``, made on first use."""
        ...

    def drop_base_state(self, p: Tensor) -> None:
        """Forget the base's state of a parameter."""
        ...

    def follow_parameters(self) -> None:
        """Take on what was put into the groups by hand."""
        ...

    def around_step(self) -> AbstractContextManager[Any]:
        """All transforms' `Transform.around_step`."""
        ...


class Transform:
    """A change to what an optimizer step does to the weights.

    A subclass sets ``name`` and either the rules as class attributes (a dict of `Moments` fields called
    ``rules``) or `moments`. One plain elementwise function is enough, and it is fused like the built-in
    ones:

    Example:
        >>> import torch, optx
        >>> @optx.rule(writes="g")
        ... def soft_sign(g, limit):
        ...     return g / (1.0 + optx.ops.abs(g) / limit)
        >>> class SoftClip(optx.Transform):
        ...     name = "soft_clip"
        ...     rules = dict(gradient=soft_sign)
        ...     def __init__(self, limit=1.0):
        ...         self.options = {"limit": limit}
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), SoftClip(limit=1.0))
        >>> w.grad = torch.tensor([1.0, -3.0])
        >>> opt.step()
        >>> w.detach()
        tensor([0.5000, 2.7500])

        With state: a slot per weight, which the rule reads as it was left and writes beside the gradient.

        >>> @optx.rule(writes=("g", "average"))
        ... def averaged(g, average, beta):
        ...     new = beta * average + (1.0 - beta) * g
        ...     return new, new
        >>> class Average(optx.Transform):
        ...     name = "average"
        ...     slots = {"average": optx.like_weight()}  # float32, zeros at first
        ...     rules = dict(gradient=averaged)
        ...     def __init__(self, beta=0.9):
        ...         self.options = {"beta": beta}
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), Average(beta=0.5))
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> opt.step()
        >>> opt.step()
        >>> w.detach()  # the averages were 0.5 and 0.75 of the gradient
        tensor([-0.2500,  4.5000])
        >>> opt.state[w]["optx.average.average"]
        tensor([ 0.7500, -1.5000])

    A rule's arguments may also be the numbers of the param group, ``lr`` and ``weight_decay`` among them, and
    the base's state: `Moments` has the table.

    Attributes:
        name: names the state (``optx.<name>.<slot>``), the group keys (``<name>`` = False leaves a group
            out, ``<name>_<option>`` overrides an option there) and the attribute on the wrapped optimizer.
        slots: state tensors per weight.
        options: numbers that param groups may override. Each is an attribute too: setting it
            (``opt.soft_clip.limit = 0.5``, by a schedule) sets it in every group that does not override it.
            Other arguments of the constructor are read at wrap time: setting one from outside afterwards
            raises, but for properties with a setter (``opt.hft.rounds_every``).
        limits: the range of each option, both ends included.
        keeps_shapes: whether the base's state of a weight has the weight's shape; where not, the transform
            looks at loaded state itself (`before_load`).
        encloses: it holds whatever the others do, and wherever it stands among them: its ``gradient`` rule
            comes first and again after each of theirs, its ``after`` rule last.
        looks_at_gradients: whether its `before_step`, if it has one, looks at gradients; where not,
            `Wrapped.release` calls it before they are there.
    """

    name: ClassVar[str]
    keeps_shapes: bool = True
    encloses: ClassVar[bool] = False
    looks_at_gradients: ClassVar[bool] = True
    slots: Mapping[str, Slot] = {}
    options: Mapping[str, float] = {}
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}
    rules: ClassVar[Mapping[str, Any]] = {}
    _wrapped_by: weakref.ref[Host] | None = None

    def _served_groups(self) -> list[Group]:
        """The param groups that this serves; none before it is wrapped."""
        wrapped = wrapped_by(self)
        return [group for group in wrapped.param_groups if self.serves(group)] if wrapped else []

    def set_owner(self, optimizer: Host | None) -> None:
        """Tell whose groups this serves; does not keep it alive."""
        object.__setattr__(self, "_wrapped_by", optimizer and weakref.ref(optimizer))

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v for k, v in vars(self).items() if k != "_wrapped_by"
        }  # a copy is bound by its own optimizer

    def __getattr__(self, name: str) -> Any:
        # Only asked for what is no attribute: an option.
        if not name.startswith("_") and name in self.options:
            key, default = f"{self.name}_{name}", self.options[name]
            values = {group.get(key, default) for group in self._served_groups()}
            return values.pop() if len(values) == 1 else default
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if name in ("options", "slots") or name not in self.options:
            # Its own methods may write what they like.
            if wrapped_by(self) is not None and not _is_method_of(self, sys._getframe(1)):  # pyright: ignore
                self._check_settable(name)
            object.__setattr__(self, name, value)
            return
        self.check_option(name, value, f"{type(self).__name__}: {name} is {value!r}")
        key, old = f"{self.name}_{name}", self.options[name]
        self.options = {**self.options, name: value}
        for group in self._served_groups():
            if group.get(key, old) == old:
                group[key] = value
        if name in vars(self):
            object.__setattr__(self, name, value)

    def _check_settable(self, name: str) -> None:
        """Raise for what was read once, when the optimizer was wrapped: a new value would change nothing."""
        kind = type(self)
        if getattr(getattr(kind, name, None), "fset", None) is not None:
            return  # a property that takes it
        settings = _constructor_arguments(kind)
        if name in settings or name in _SETTLED:
            way_out = f"call remove() and wrap again with a new {kind.__name__}({name}=...)"
            if name in _SETTLED:
                options = ", ".join(map(repr, self.options)) or "there are none"
                way_out = f"set an option of it by its own name ({options}), or call remove() and wrap again"
            raise TransformError(
                f"{kind.__name__}: {name!r} was read when the optimizer was wrapped, and setting it now "
                f"would change nothing; {way_out}."
            )
        if not hasattr(self, name):
            like = difflib.get_close_matches(name, [*self.options, *settings], n=1, cutoff=0.75)
            if like:
                raise TransformError(f"{kind.__name__}: {name!r} is no option of it. Is {like[0]!r} meant?")

    def adopt(self, before: Sequence[Group], after: Sequence[Group]) -> None:
        """Options as a checkpoint has them, where it has the same in all groups that did not override one.

        Else a schedule that is resumed would take what it set before for an override, and leave it.
        """
        for name, old in self.options.items():
            key = f"{self.name}_{name}"
            followers = [g for b, g in zip(before, after, strict=True) if b.get(key, old) == old]
            values = [group[key] for group in followers if key in group]
            if values and values[0] != old and all(value == values[0] for value in values):
                self.options = {**self.options, name: values[0]}
                if name in vars(self):
                    object.__setattr__(self, name, values[0])

    def check_option(self, name: str, value: Any, given: str) -> None:
        """Raise unless an option may have this value.

        Args:
            name: the option's.
            value: given for it.
            given: how, for the message.
        """
        low, high = self.limits.get(name, (-math.inf, math.inf))
        number = as_float(value)
        switch = isinstance(self.options.get(name), bool)
        if number is None or not math.isfinite(number) or (isinstance(value, bool) and not switch):
            raise TransformError(f"{given}; it must be a number{'' if switch else ', and finite'}.")
        if not low <= number <= high:
            wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise TransformError(f"{given}; it must be {wanted}.")

    def describe(self, group: Group) -> str:
        """The transform with the numbers that are in force in a param group."""
        if type(self).__repr__ is not Transform.__repr__:
            return repr(self)
        numbers = {k: group.get(f"{self.name}_{k}", v) for k, v in self.options.items()}
        return expression(type(self), {**self.arguments(), **numbers}, always=self.options)

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes, by name, with the values in force; ``repr`` and `to_config` write it.

        As it is found in attributes of these names. Override it where an argument is kept otherwise.
        """
        return {name: getattr(self, name, NotKept()) for name in _own_arguments(type(self))}

    def moments(self, group: Group, base: torch.optim.Optimizer) -> Moments:
        """The rules for one param group; by default the same for all."""
        return Moments(**self.rules)

    def check(self, base: torch.optim.Optimizer) -> None:
        """Raise a clear error, at wrap time, if this base can't be served."""

    def bind(self, optimizer: Host) -> None:
        """Called once at wrap time, after all checks; may look at the parameters."""

    def serves(self, group: Group) -> bool:
        """Whether a param group takes part; ``<name>=False`` in it leaves it out."""
        return bool(group.get(self.name, True))

    def init_slot(self, name: str, p: Tensor, optimizer: Host) -> Tensor:
        """The first value of a slot for ``p``; zeros by default."""
        return self.slots[name].zeros(p)

    def unwrap(self, optimizer: Host) -> None:
        """Undo what ``bind`` did outside the optimizer's state."""

    def before_step(self, optimizer: Host) -> None:
        """Called before anything of a step is measured, and after every evaluation of a closure.

        With a closure the first call comes before it (``optimizer.closure_pending``), and sees old gradients.
        """

    def around_step(self, optimizer: Host) -> AbstractContextManager[None]:
        """Entered once a step's gradients are there, left when it is over, skipped or undone too.

        Inside, ``p.grad`` and what the groups hold may be others than before and after.
        """
        return nullcontext()

    def groups_changed(self, optimizer: Host) -> None:
        """Called after param groups came, by ``add_param_group`` or by hand, or parameters were replaced."""

    def after_totals(self, optimizer: Host) -> None:
        """Called once ``optimizer.totals`` has a step's sums, before anything is changed; may raise."""

    def after_step(self, optimizer: Host) -> None:
        """Called once after each step that was not skipped."""

    def gradients_dropped(self, optimizer: Host) -> None:
        """Called by the optimizer's ``zero_grad()``."""

    def weights_moved(self, optimizer: Host) -> None:
        """Called where the base moved weights outside of a step: in its ``train()`` and ``eval()``."""

    def before_load(self, optimizer: Host, state_dict: Mapping[str, Any]) -> None:
        """Called with what ``load_state_dict`` was given, before anything is changed; may raise."""

    def after_load(self, optimizer: Host) -> None:
        """Called after ``load_state_dict``."""

    def metrics(self, optimizer: Host) -> Mapping[str, float]:
        """Numbers of the last step for `Wrapped.metrics`, where they are called ``<name>/<key>``."""
        return {}

    def group_numbers(self) -> dict[str, float | int | bool]:
        """Plain numbers to keep in every param group under ``optx.<name>.<key>`` (counters, seeds)."""
        return {}

    def group_keys(self) -> dict[str, float | int | bool]:
        """All keys this transform adds to a param group, with their defaults."""
        keys: dict[str, float | int | bool] = {self.name: True}
        keys.update({f"{self.name}_{option}": value for option, value in self.options.items()})
        keys.update({f"optx.{self.name}.{key}": value for key, value in self.group_numbers().items()})
        return keys

    def __repr__(self) -> str:
        return expression(type(self), self.arguments(), always=self.options)


# What a step's program is made of, beside the constructor's arguments.
_SETTLED = ("name", "rules", "limits", "slots", "options")


def wrapped_by(transform: Transform) -> Host | None:
    """The optimizer that a transform serves, while there is one."""
    wrapped = transform._wrapped_by  # pyright: ignore[reportPrivateUsage]
    return wrapped and wrapped()


def _constructor_arguments(kind: type[Transform]) -> list[str]:
    """The names of what a transform, or a class that it inherits from, is made with."""
    makers = [vars(c)["__init__"] for c in kind.__mro__[:-1] if "__init__" in vars(c)]
    return [name for maker in makers for name in list(inspect.signature(maker).parameters)[1:]]


def _own_arguments(kind: type[Transform]) -> list[str]:
    """The names that a transform is made with, without ``*args`` and ``**kwargs``."""
    every = list(inspect.signature(kind).parameters.values())
    return [p.name for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _is_method_of(transform: Transform, frame: FrameType) -> bool:
    """Whether a frame is that of one of the transform's own methods."""
    first = frame.f_code.co_varnames[: frame.f_code.co_argcount][:1]
    return bool(first) and frame.f_locals.get(first[0]) is transform
