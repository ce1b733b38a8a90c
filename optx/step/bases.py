"""The base updates that have a fused form: torch's SGD, Adam and AdamW, written as rules.

Scalars are rules of their own and run in float64: ``1 - beta2`` in float32 is off by 5e-5 at 0.999.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError
from optx._rules import Rule, rule
from optx.ops import maximum, sqrt
from optx.step.numbers import as_float, as_number
from optx.step.transform import Group, Slot


@rule(writes="g")
def negate(g: Any) -> Any:
    """``maximize=True``."""
    return -g


@rule(writes="g")
def add_l2(g: Any, w: Any, weight_decay: Any) -> Any:
    """Weight decay coupled with the gradient (SGD, Adam)."""
    return g + weight_decay * w


@rule(writes=("step_size", "correction2", "keep", "gain1", "gain2"))
def adam_scalars(lr: Any, beta1: Any, beta2: Any, weight_decay: Any, step: Any) -> Any:
    """Bias corrections (Kingma & Ba 2015, section 3) and the constants of one Adam step."""
    return (
        lr / (1.0 - beta1**step),
        sqrt(1.0 - beta2**step),
        1.0 - lr * weight_decay,
        1.0 - beta1,
        1.0 - beta2,
    )


@rule(writes="w")
def shrink(w: Any, keep: Any) -> Any:
    """Weight decay decoupled from the gradient (AdamW)."""
    return w * keep


@rule(writes=("exp_avg", "exp_avg_sq"))
def adam_moments(g: Any, exp_avg: Any, exp_avg_sq: Any, gain1: Any, beta2: Any, gain2: Any) -> Any:
    """Moving averages of the gradient and its square."""
    return exp_avg + gain1 * (g - exp_avg), exp_avg_sq * beta2 + gain2 * g * g


@rule(writes="w")
def adam_update(w: Any, exp_avg: Any, exp_avg_sq: Any, step_size: Any, correction2: Any, eps: Any) -> Any:
    """Adam's step."""
    return w - step_size * exp_avg / (sqrt(exp_avg_sq) / correction2 + eps)


@rule(writes=("w", "max_exp_avg_sq"))
def amsgrad_update(
    w: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, step_size: Any, correction2: Any, eps: Any
) -> Any:
    """Adam's step with the largest second moment so far (Reddi et al. 2018)."""
    largest = maximum(max_exp_avg_sq, exp_avg_sq)
    return w - step_size * exp_avg / (sqrt(largest) / correction2 + eps), largest


@rule(writes="gain")
def momentum_scalars(dampening: Any, fresh: Any) -> Any:
    """torch starts the buffer at the first gradient itself, undampened."""
    return 1.0 - dampening * (1.0 - fresh)


@rule(writes="momentum_buffer")
def momentum_update(momentum_buffer: Any, g: Any, momentum: Any, gain: Any) -> Any:
    """SGD's momentum buffer."""
    return momentum * momentum_buffer + gain * g


@rule(writes="g")
def take_buffer(momentum_buffer: Any) -> Any:
    """Step along the buffer."""
    return momentum_buffer * 1.0


@rule(writes="g")
def look_ahead(g: Any, momentum_buffer: Any, momentum: Any) -> Any:
    """Nesterov's step."""
    return g + momentum * momentum_buffer


@rule(writes="w")
def descend(w: Any, g: Any, lr: Any) -> Any:
    """SGD's step."""
    return w - lr * g


@dataclass(frozen=True)
class Sums:
    """Sums over a weight tensor in the middle of a base's update, of what the rules before it leave.

    They take a reading pass of their own, which computes what those rules compute and stores nothing; sums
    that see the same share one.

    Args:
        rule: per element; each name that it writes is summed over the tensor, and can be read from then on.
        then: per tensor, in float64, from these sums and whatever else is one number: writes new names, which
            later rules read, and the base's state tensors of one number (`per_tensor`).
    """

    rule: Rule
    then: Rule | None = None


@dataclass(frozen=True)
class BaseRules:
    """One base's update for one param group.

    Attributes:
        scalars: rules per tensor, which need no sums.
        update: rules per element, in order, with `Sums` among them. A rule may write ``w``, ``g`` and slots;
            any other name that it writes is a value of the element that later rules read.
        slots: the base's state tensors with one element per weight element, or (`per_tensor`) one number.
        counted: whether the base keeps a ``step`` count per tensor.
    """

    scalars: tuple[Rule, ...]
    update: tuple[Rule | Sums, ...]
    slots: Mapping[str, Slot] = field(default_factory=dict[str, Slot])
    counted: bool = True


_SIGNED = Slot(dtype=None, moment="signed")
_SQUARES = Slot(dtype=None, moment="nonnegative")


def _adam(group: Group, decoupled: bool) -> BaseRules:
    decay = shrink if decoupled or group.get("decoupled_weight_decay", False) else add_l2
    slots = {"exp_avg": _SIGNED, "exp_avg_sq": _SQUARES}
    if group["amsgrad"]:
        slots["max_exp_avg_sq"] = _SQUARES
    update = (
        *((negate,) if group["maximize"] else ()),
        *((decay,) if _decays(group) else ()),
        adam_moments,
        amsgrad_update if group["amsgrad"] else adam_update,
    )
    return BaseRules((adam_scalars,), update, slots)


def _sgd(group: Group) -> BaseRules:
    start = (*((negate,) if group["maximize"] else ()), *((add_l2,) if _decays(group) else ()))
    if group["momentum"] == 0:
        return BaseRules((), (*start, descend), counted=False)
    step = look_ahead if group["nesterov"] else take_buffer
    update = (*start, momentum_update, step, descend)
    return BaseRules((momentum_scalars,), update, {"momentum_buffer": _SIGNED}, counted=False)


def _decays(group: Group) -> bool:
    """Whether weight decay does anything; torch leaves it out at 0, where 0 * inf would be nan."""
    decay = group["weight_decay"]
    return isinstance(decay, Tensor) or bool(decay != 0)


# What the rules read of a group.
_NEEDED = frozenset(
    ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "amsgrad", "maximize", "nesterov")
)


# By exact type: a subclass may override anything.
_FUSED: dict[type[torch.optim.Optimizer], Callable[[Group], BaseRules]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: lambda group: _adam(group, decoupled=False),
    torch.optim.AdamW: lambda group: _adam(group, decoupled=True),
}


def has_fused_form(base: torch.optim.Optimizer) -> bool:
    """Whether the update of this optimizer is known as rules."""
    return type(base) in _FUSED


def base_rules(base: torch.optim.Optimizer, group: Group) -> BaseRules | None:
    """The fused form of ``base`` for one group, or None where it has none.

    Raises:
        OptxError: a setting of the group is no number.
    """
    make = _FUSED.get(type(base))
    if make is None:
        return None
    check_settings(base, group)
    return make(group)


def check_settings(base: torch.optim.Optimizer, group: Group) -> None:
    """Raise unless a group has what the rules of its base read, if it has any, and all of it is numbers."""
    if not has_fused_form(base):
        return
    missing = [key for key in base.defaults if key in _NEEDED and key not in group]
    if missing:
        raise OptxError(
            f"optx: a param group of {type(base).__name__} has no {missing[0]!r}. Add groups with "
            "add_param_group, which fills in the defaults."
        )
    for key in ("lr", "eps", "weight_decay", "momentum", "dampening"):
        if key in group and as_number(group[key]) is None:
            raise OptxError(f"optx: a param group has {key}={group[key]!r}; it must be one number.")
    if "betas" in group:
        check_betas(group["betas"])


def check_betas(betas: Any) -> None:
    """Raise unless these are two numbers from 0 to below 1, as torch's constructors want them."""
    pair = [as_number(beta) for beta in betas] if isinstance(betas, tuple | list | Tensor) else []
    numbers = [None if beta is None else as_float(beta) for beta in pair]
    if len(numbers) != 2 or not all(beta is not None and 0.0 <= beta < 1.0 for beta in numbers):
        raise OptxError(
            f"optx: a param group has betas={betas!r}; they must be two numbers from 0 to below 1."
        )


def base_numbers(group: Group) -> dict[str, float | Tensor]:
    """What rules may read of a base's param group: every number in it, ``betas`` as beta1, beta2."""
    numbers: dict[str, float | Tensor] = {}
    for key, value in group.items():
        if key == "betas":
            betas = [as_number(beta) for beta in value]
            numbers.update({f"beta{i + 1}": beta for i, beta in enumerate(betas) if beta is not None})
        elif (number := as_number(value)) is not None:
            numbers[key] = number
    return numbers


def rule_numbers(group: Group, names: Iterable[str]) -> dict[str, float | Tensor]:
    """The numbers of those names, as the group has them now: the base's, and options (``adamr_weight``).

    Raises:
        OptxError: one of them is no number any more.
    """
    numbers: dict[str, float | Tensor] = {}
    for name in names:
        value = _setting(group, name)
        number = value if type(value) is float else as_number(value)
        if number is None:
            key = "betas" if name.startswith("beta") else name.replace(".", "_")
            raise OptxError(f"optx: a param group has {key}={group.get(key)!r}; it must be one number.")
        numbers[name] = number
    return numbers


def _setting(group: Group, name: str) -> Any:
    """What a group has under a rule's name for it."""
    key = name.replace(".", "_")
    if key in group or name not in ("beta1", "beta2"):
        return group.get(key)
    betas: Any = group.get("betas", ())
    index = 0 if name == "beta1" else 1
    return betas[index] if len(betas) > index else None


def init_base_state(state: dict[str, Any], p: Tensor, rules: BaseRules, group: Group) -> bool:
    """Give ``p`` the state torch's own first step would; True if there was none."""
    fresh = any(state.get(name) is None for name in rules.slots)
    if rules.counted and "step" not in state:
        on_device = group.get("capturable", False) or group.get("fused", False)
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
    for name, slot in rules.slots.items():
        if state.get(name) is None:
            state[name] = slot.zeros(p)
    return fresh


# What torch's bases without a fused form, and classes made from its bases, keep under the names of Adam's.
_ADAM_NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_STATE: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.NAdam: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.RAdam: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.Adamax: ("exp_avg", "step"),
    torch.optim.SGD: (),
    torch.optim.Adadelta: ("step",),
    torch.optim.Adagrad: ("step",),
    torch.optim.ASGD: ("step",),
    torch.optim.Rprop: ("step",),
    torch.optim.RMSprop: ("step",),
    torch.optim.Adafactor: ("step",),
    torch.optim.LBFGS: (),
}


def readable_state(base: torch.optim.Optimizer, group: Group) -> tuple[str, ...]:
    """The names of the base's state that rules may read in one group; ``step`` where it counts.

    Of a base from another library they are known once it has taken a step; before that, Adam's names and
    ``step`` are taken on trust where the group has ``betas``.
    """
    rules = base_rules(base, group)
    if rules is not None:
        return (*rules.slots, *(("step",) if rules.counted else ()))
    for kind, names in _STATE.items():
        if isinstance(base, kind):
            amsgrad = ("max_exp_avg_sq",) if group.get("amsgrad", False) and "exp_avg_sq" in names else ()
            return (*names, *amsgrad)
    known = [base.state[p] for p in group["params"] if base.state.get(p)]
    if known:
        return tuple(n for n in (*_ADAM_NAMES, "step") if all(s.get(n) is not None for s in known))
    return (*_ADAM_NAMES, "step") if "betas" in group else ("step",)
