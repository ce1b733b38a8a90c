"""The optimizer follows the model: what was attached joins the groups, what was put out of work leaves them.

A method that adds or replaces parameters may come after the optimizer. Its handle says which parameters are
new, whose settings each takes, and which take no part any more; all of them go through here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from optx._errors import TransformError
from optx._names import parameter_names
from optx._param_groups import settled
from optx.step.transform import Group, Transform


@dataclass(frozen=True)
class Joining:
    """A parameter that a handle added.

    Attributes:
        name: its name in the model.
        parameter: itself.
        like: whose group it joins, by preference: the first of these that has parameters of the optimizer.
        agreed: whether all of these must be in one group: it takes the place of them all.
        asks: settings that it asks for in the place of that group's, as of `optx.param_groups`.
    """

    name: str
    parameter: nn.Parameter
    like: Sequence[Sequence[Tensor]] = ()
    agreed: bool = False
    asks: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Followed(ABC):
    """What changed a model's parameters, as an optimizer sees it; `optx.Handle` is one."""

    @property
    @abstractmethod
    def removed(self) -> bool:
        """Whether it has been taken off: the optimizer then goes back."""

    @abstractmethod
    def whole(self) -> list[nn.Parameter]:
        """All parameters of the model that it is attached to."""

    @abstractmethod
    def joining(self) -> list[Joining]:
        """The parameters that it added."""

    @abstractmethod
    def leaving(self) -> list[nn.Parameter]:
        """The parameters that take no part while it is there."""

    @abstractmethod
    def transforms(self) -> list[Transform]:
        """New ones of what has to happen in a step or after it."""


def check_followed(handles: Sequence[Followed], before: Sequence[Followed], *, released: bool) -> None:
    """Raise unless these can be followed, beside those that are."""
    for i, one in enumerate(handles):
        if one.removed:
            raise TransformError(
                f"wrap: {one!r} was taken off its model. Attach again, and pass that handle."
            )
        if any(one is other for other in (*before, *handles[:i])):
            raise TransformError(f"wrap: the optimizer follows {one!r} already. Pass a handle once.")
    if released:
        raise TransformError(
            "wrap: the optimizer is released, with hooks on the parameters that it had. Call "
            "opt.released.remove(), wrap with the handle, then release again."
        )


class Following:
    """One handle that an optimizer follows.

    Attributes:
        handle: it.
        transforms: what it brought.
    """

    def __init__(self, handle: Followed, transforms: Sequence[Transform]) -> None:
        self.handle, self.transforms = handle, tuple(transforms)
        self._before: list[tuple[Group, list[Tensor]]] = []
        self._names: dict[int, str] = {}
        self._made = 0  # groups of settings that were asked for, behind all that there were

    def begin(self, optimizer: Optimizer) -> list[Tensor]:
        """Change the groups and drop the state of what leaves, which is returned.

        Raises:
            TransformError: there is no telling which group a parameter belongs to, or the optimizer is of
                another model; nothing is changed.
        """
        groups = optimizer.param_groups
        there = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        if not any(id(p) in there for p in (*self.handle.whole(), *self.handle.leaving())):
            raise TransformError(
                f"wrap: the optimizer has no parameter of the model that {self.handle!r} is attached to. "
                "Make it of that model's parameters, or of handle.parameters()."
            )
        joining: dict[int, list[Tensor]] = {}
        apart: list[tuple[int, Joining]] = []
        names = parameter_names(optimizer)
        for one in self.handle.joining():
            if one.parameter.requires_grad and id(one.parameter) not in there:
                place = _place(one, there, optimizer)
                if _differs(one.asks, groups[place]):
                    apart.append((place, one))
                else:
                    joining.setdefault(place, []).append(one.parameter)
                names[id(one.parameter)] = one.name
        made = _own_groups(apart, groups, optimizer)
        leaving: list[Tensor] = [p for p in self.handle.leaving() if id(p) in there]
        gone = {id(p) for p in leaving}
        self._before = [(group, list(group["params"])) for group in groups]
        self._names = names
        for i, group in enumerate(groups):
            kept = [p for p in group["params"] if id(p) not in gone]
            _put(group, kept + joining.get(i, []), names)
        for group, params in made:
            _put(group, params, names)
            groups.append(group)
        self._made = len(made)
        _forget(optimizer, leaving)
        return leaving

    def end(self, optimizer: Optimizer) -> list[Tensor]:
        """Give the groups what they had before the handle came, each in its place; what leaves is returned.

        What came or left by other ways stays as it is.
        """
        names = {**self._names, **parameter_names(optimizer)}
        there = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        had = {id(p) for _, params in self._before for p in params}
        # What was attached is no model's any more, also where the optimizer had it before it was told.
        still = had & {id(p) for p in self.handle.whole()}
        added = {id(one.parameter) for one in self.handle.joining()} - still
        back = {id(p) for p in self.handle.leaving()} - set(there)
        before = {id(group): params for group, params in self._before}
        if not any(id(group) in before for group in optimizer.param_groups):  # `load_state_dict` has made new
            own_groups = zip(optimizer.param_groups, self._before, strict=False)
            before = {id(group): params for group, (_, params) in own_groups}
        for group in optimizer.param_groups:
            here = [p for p in group["params"] if id(p) not in added]
            own = {id(p) for p in here} | back
            old = [p for p in before.get(id(group), []) if id(p) in own]
            known = {id(p) for p in old}
            _put(group, old + [p for p in here if id(p) not in known], names)
        _drop_made(optimizer, len(self._before), self._made)
        gone = [p for key, p in there.items() if key in added]
        _forget(optimizer, gone)
        return gone


def _differs(asks: Mapping[str, Any], group: Group) -> bool:
    """Whether settings that are asked for are not those of a group."""
    own = settled(asks, group)
    return any(own[name] != group.get(name) for name in own if name != "params")


def _own_groups(
    apart: Sequence[tuple[int, Joining]], groups: Sequence[Group], optimizer: Optimizer
) -> list[tuple[Group, list[Tensor]]]:
    """New groups for what asks for other settings than those of the group that it belongs to.

    Raises:
        TransformError: a scheduler has counted the groups already.
    """
    if apart and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise TransformError(
            f"wrap: {apart[0][1].name!r} asks for settings of its own, and so for a new param group, which a "
            "learning rate scheduler made before it does not know. Make the scheduler after wrap."
        )
    made: dict[tuple[Any, ...], tuple[Group, list[Tensor]]] = {}
    for place, one in apart:
        plain = {
            name: value for name, value in groups[place].items() if name not in ("params", "param_names")
        }
        own = {
            **settled(one.asks, plain),
            **dict.fromkeys(["param_names"] * ("param_names" in groups[place])),
        }
        key = (place, *sorted((name, repr(value)) for name, value in own.items()))
        made.setdefault(key, ({"params": [], **own}, []))[1].append(one.parameter)
    return list(made.values())


def _drop_made(optimizer: Optimizer, before: int, made: int) -> None:
    """Take out groups that were made for what is gone, where nothing else came into them."""
    groups = optimizer.param_groups
    for i in reversed(range(before, min(before + made, len(groups)))):
        if not groups[i]["params"]:
            del groups[i]


def _place(one: Joining, there: dict[int, int], optimizer: Optimizer) -> int:
    """The number of the group that a new parameter joins."""
    for kind in one.like:
        found = list(dict.fromkeys(there[id(p)] for p in kind if id(p) in there))
        if one.agreed and len(found) > 1:
            names = parameter_names(optimizer)
            first = [next(names[id(p)] for p in kind if there.get(id(p)) == i) for i in found[:2]]
            raise TransformError(
                f"wrap: {one.name!r} takes the place of parameters of {len(found)} param groups "
                f"({first[0]!r} of group {found[0]}, {first[1]!r} of group {found[1]}), and has one learning "
                "rate. Put those into one group before wrap."
            )
        if found:
            return found[0]
    if len(optimizer.param_groups) == 1:
        return 0
    raise TransformError(
        f"wrap: {one.name!r} was attached to a module of which the optimizer has no parameter, so which of "
        f"its {len(optimizer.param_groups)} param groups it belongs to is not known. Add it first: "
        "optimizer.add_param_group({'params': handle.parameters(), 'lr': ...})."
    )


def _put(group: Group, params: list[Tensor], names: dict[int, str]) -> None:
    # New lists: the old ones are what is gone back to if something fails.
    group["params"] = params
    if "param_names" in group:
        group["param_names"] = [names[id(p)] for p in params]


def _forget(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        optimizer.state.pop(p, None)
        p.grad = None
