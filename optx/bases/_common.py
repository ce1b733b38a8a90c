"""What the rules of several optimizers have in common."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from optx._rules import Rule, rule
from optx.ops import sqrt
from optx.step.base_update import BaseRules
from optx.step.bases import Make, register_base
from optx.step.declared import Slot
from optx.step.transform import Group

SIGNED = Slot(dtype=None, moment="signed")
SQUARES = Slot(dtype=None, moment="nonnegative")
PLAIN = Slot(dtype=None)


@rule(writes="g")
def negate(g: Any) -> Any:
    """``maximize=True``."""
    return -g


@rule(writes="g")
def add_l2(g: Any, w: Any, weight_decay: Any) -> Any:
    """Weight decay coupled with the gradient (SGD, Adam)."""
    return g + weight_decay * w


@rule(writes="w")
def shrink(w: Any, keep: Any) -> Any:
    """Weight decay decoupled from the gradient (AdamW)."""
    return w * keep


@rule(writes="keep")
def keep_fixed(weight_decay: Any) -> Any:
    """Decoupled weight decay that does not go with the learning rate."""
    return 1.0 - weight_decay


@rule(writes="keep")
def keep_by_lr(weight_decay: Any, lr: Any) -> Any:
    """Decoupled weight decay that goes with the learning rate."""
    return 1.0 - weight_decay * lr


@rule(writes=("gain1", "gain2"))
def gains(beta1: Any, beta2: Any) -> Any:
    """What a moving average takes of the new value, in float64."""
    return 1.0 - beta1, 1.0 - beta2


@rule(writes=("step_size", "correction2", "gain1", "gain2"))
def debiased(lr: Any, beta1: Any, beta2: Any, step: Any) -> Any:
    """Adam's bias corrections."""
    return lr / (1.0 - beta1**step), sqrt(1.0 - beta2**step), 1.0 - beta1, 1.0 - beta2


@rule(writes=("step_size", "correction2", "gain1", "gain2"))
def half_debiased(lr: Any, beta1: Any, beta2: Any, step: Any) -> Any:
    """``adam_debias=True``: that of the second moment alone."""
    return lr * 1.0, sqrt(1.0 - beta2**step), 1.0 - beta1, 1.0 - beta2


@rule(writes=("weight_sq", "direction_sq"))
def lengths(w: Any, direction: Any) -> Any:
    """Summed over a weight, its squared norm and that of the step before it is scaled."""
    return w * w, direction * direction


def given(group: Group, key: str) -> bool:
    """Whether a number of a group does anything; torch leaves decay out at 0, where 0 * inf would be nan."""
    value = group[key]
    return isinstance(value, Tensor) or bool(value != 0)


def turned(maximize: bool) -> tuple[Rule, ...]:
    """The rule that turns the gradient round, where that is asked for."""
    return (negate,) if maximize else ()


def decayed(decay: str) -> tuple[Rule, ...]:
    """The rule of a kind of weight decay: ``""``, ``"coupled"``, or a decoupled one."""
    return {"": (), "coupled": (add_l2,)}.get(decay, (shrink,))


def start(maximize: bool, decay: str) -> tuple[Rule, ...]:
    """The rules that most updates begin with."""
    return (*turned(maximize), *decayed(decay))


def coupled_decay(group: Group) -> str:
    """The kind of weight decay that a group asks for, where there is one only."""
    return "coupled" if given(group, "weight_decay") else ""


def torch_decay(group: Group) -> str:
    """That of torch's Adam and its kin, which have two."""
    decay = coupled_decay(group)
    return "by lr" if decay and group.get("decoupled_weight_decay", False) else decay


def decay_of(group: Group) -> str:
    """The kind of weight decay that pytorch_optimizer's groups ask for."""
    if not given(group, "weight_decay"):
        return ""
    if not group["weight_decouple"]:
        return "coupled"
    return "fixed" if group["fixed_decay"] else "by lr"


def keeps(decay: str) -> tuple[Rule, ...]:
    """The scalars that such a decay needs."""
    return {"fixed": (keep_fixed,), "by lr": (keep_by_lr,)}.get(decay, ())


def debiasing(decay: str, half: bool = False) -> tuple[Rule, ...]:
    """The scalars of an update that begins so and has Adam's bias corrections, or half of them."""
    return (*keeps(decay), half_debiased if half else debiased)


def asked_for(group: Group, options: Sequence[str]) -> str | None:
    """Why there are no rules, where a group asks for one of these options."""
    on = [option for option in options if group.get(option)]
    return f"its rules don't know {on[0]}={group[on[0]]!r}" if on else None


def register_library(name: str, make: Make, version: str) -> None:
    """Register rules for a library's class that were compared with its step in this version.

    Args:
        name: as ``"library.Optimizer"``; the library is not imported.
        make: its rules.
        version: what the library's version begins with.
    """
    library = name.partition(".")[0]

    def checked(group: Group, base: Any) -> BaseRules | str:
        return _other_version(library, version) or make(group, base)

    register_base(name, checked)


@functools.cache
def _other_version(library: str, known: str) -> str | None:
    found = importlib.metadata.version(library)
    if f"{found}.".startswith(f"{known}."):
        return None
    return f"its rules are those of {library} {known}, and this is {found}"
