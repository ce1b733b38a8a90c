"""The base updates that are known as rules, by optimizer class: then a whole step is one fused kernel.

`optx.bases` has those that come with optx.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import OptxError
from optx.step.base_update import BaseRules
from optx.step.group_numbers import base_numbers, check_numbers
from optx.step.own_methods import Methods
from optx.step.transform import Group

Make = Callable[[Group, Any], "BaseRules | str"]


@dataclass
class _Known:
    """A registered class."""

    make: Make
    methods: Methods


_KNOWN: dict[type, _Known | None] = {}  # by exact type: a subclass may override anything
_NAMED: dict[str, dict[str, Make]] = {}  # by class name, then by module, of what may not be imported yet


def register_base(cls: type[Optimizer] | str, rules: BaseRules | Make, *, replace: bool = False) -> None:
    """Say how an optimizer class steps, in rules: from then on `optx.wrap` fuses it.

    A wrapped optimizer of exactly that class then takes its whole step, transforms included, in one pass of
    a kernel over memory, on CPU (Numba) and on GPU (Triton); its state keeps the class's own names and
    dtypes, so that checkpoints go both ways. A subclass is another class, and is not served by its parent's
    rules; nor is a class or an optimizer whose ``step``, or a method beside it, was replaced by another.
    `Wrapped.plan` says which path is taken, and why: rules that no kernel can be made of leave the class its
    own step, and ``wrap(..., fused=True)`` raises then. Rules are not compared with ``step``: try both.

    Those that optx has rules for:

    ================= ====================================================================================
    torch.optim       SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, Rprop, ASGD
    pytorch_optimizer Lion, AdaBelief, Yogi, Adan, NovoGrad, LARS (4.1; without gradient centralisation,
                      AdaNorm, rectify and cautious updates)
    torch_optimizer   AdaBelief, Yogi, NovoGrad, Lamb (0.3; pytorch_optimizer's Lamb takes its own step)
    torch.optim       Muon: its products of matrices are torch's, what is around them is fused
    torch.optim,      Adafactor (5 of transformers), where a param group has matrices alone, or vectors
    transformers      alone: one kernel serves a group, and their state differs
    ================= ====================================================================================

    Args:
        cls: the class; or its name, as ``"library.Optimizer"``, where the library need not be imported yet.
        rules: a `BaseRules` (`Sums` has an example with sums over each weight, `Matrices` one with products
            of matrices); or a function of (param group, optimizer) that returns one, or why it can't
            serve that group, in words. It is asked in every step and may look at flags and at which numbers
            are 0; the numbers themselves belong into the rules, where a schedule may change them.
        replace: take these in the place of rules that the class has.

    Raises:
        OptxError: ``cls`` is no optimizer class, ``rules`` are none, or the class has rules already.

    Example:
        A person's own optimizer, and its step as rules:

        >>> import torch, optx
        >>> class SignMomentum(torch.optim.Optimizer):
        ...     def __init__(self, params, lr=0.1, beta=0.9):
        ...         super().__init__(params, dict(lr=lr, beta=beta))
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         loss = None if closure is None else closure()
        ...         for group in self.param_groups:
        ...             for p in [p for p in group["params"] if p.grad is not None]:
        ...                 m = self.state[p].setdefault("average", torch.zeros_like(p))
        ...                 m.mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
        ...                 p.sub_(group["lr"] * m.sign())
        ...         return loss
        >>> @optx.rule(writes=("w", "average"))
        ... def sign_step(w, g, average, lr, beta):
        ...     m = beta * average + (1.0 - beta) * g
        ...     return w - lr * optx.ops.sign(m), m
        >>> rules = optx.BaseRules(update=(sign_step,), slots={"average": optx.like_weight(None)})
        >>> optx.register_base(SignMomentum, rules)
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = optx.wrap(SignMomentum([w]), optx.PerpGrad())
        >>> w.grad = torch.tensor([1.0, -3.0])
        >>> opt.step()
        >>> w.detach(), opt.plan()[0].path
        (tensor([0.9000, 2.1000]), 'fused cpu')
    """
    given: Any = cls
    named = isinstance(given, str) and "." in given
    if not named and not (isinstance(given, type) and issubclass(given, Optimizer)):
        raise OptxError(
            f"register_base: cls is {cls!r}; it must be a class of optimizers, or its name, as "
            "'library.Lion'."
        )
    if not isinstance(rules, BaseRules) and not callable(rules):
        raise OptxError(
            f"register_base: rules is {rules!r}; it must be an optx.BaseRules, or a function of "
            "(group, optimizer) that returns one."
        )
    make: Make = (lambda group, base: rules) if isinstance(rules, BaseRules) else rules
    if isinstance(cls, str):
        module, _, name = cls.rpartition(".")
        there = getattr(sys.modules.get(module), name, None)
        taken = module in _NAMED.get(name, {}) or (isinstance(there, type) and _known(there) is not None)
    else:
        module, name, taken = "", cls.__name__, _known(cls) is not None
    if taken and not replace:
        raise OptxError(f"register_base: {name} has rules already; replace=True takes these in their place.")
    if isinstance(cls, str):
        _NAMED.setdefault(name, {})[module] = make
        for known in [one for one in _KNOWN if one.__name__ == name]:
            del _KNOWN[known]
    else:
        _KNOWN[cls] = _Known(make, Methods(cls, own_file=False))


def _known(cls: type[Optimizer]) -> _Known | None:
    """What was registered of exactly this class."""
    if cls in _KNOWN:
        return _KNOWN[cls]
    for module, make in _NAMED.get(cls.__name__, {}).items():
        if getattr(sys.modules.get(module), cls.__name__, None) is cls:
            _KNOWN[cls] = known = _Known(make, Methods(cls, own_file=True))
            return known
    return None


def fused_classes() -> list[tuple[str, str]]:
    """Library and name of the classes that have rules."""
    by_class = [(cls.__module__, cls.__name__) for cls, known in _KNOWN.items() if known is not None]
    by_name = [(module, name) for name, modules in _NAMED.items() for module in modules]
    return list(dict.fromkeys((module.partition(".")[0], name) for module, name in by_class + by_name))


def has_fused_form(base: Optimizer) -> bool:
    """Whether the update of this optimizer's class is known as rules."""
    return _known(type(base)) is not None


def structure(base: Optimizer, group: Group) -> Any:
    """Changes where a group's rules do; every step asks. None where there are none."""
    known = _known(type(base))
    if known is None or known.methods.step_changed():
        return known
    try:
        return known.make(group, base)
    except Exception as error:  # who makes a program of it looks at the group in words
        return repr(error)


def rules_or_why(base: Optimizer, group: Group) -> BaseRules | str:
    """The rules of ``base`` for one group, or why it has none, in words.

    Raises:
        OptxError: a setting of the group is no number.
    """
    known = _known(type(base))
    if known is None:
        return f"{type(base).__name__} has no fused form (optx.register_base gives it one)"
    check_numbers(base, group)
    if known.methods.step_changed():
        return f"{type(base).__name__}.step was replaced by another"
    made: Any = known.methods.why_changed(base) or known.make(group, base)
    if not isinstance(made, BaseRules | str):
        raise OptxError(
            f"optx: the rules of {type(base).__name__} returned {made!r}; they must return an "
            "optx.BaseRules, or why they can't serve the group, in words."
        )
    for name, first in () if isinstance(made, str) else made.initial.items():
        if isinstance(first, str) and first not in base_numbers(group):
            raise OptxError(
                f"optx: the rules of {type(base).__name__} have initial[{name!r}]={first!r}, which is no "
                "number of the param group."
            )
    return made


def base_rules(base: Optimizer, group: Group) -> BaseRules | None:
    """The rules of ``base`` for one group, or None where it has none.

    Raises:
        OptxError: a setting of the group is no number.
    """
    rules = rules_or_why(base, group)
    return None if isinstance(rules, str) else rules


def check_settings(base: Optimizer, group: Group) -> None:
    """Raise unless a group has what the rules of its base read, if it has any, and all of it is numbers."""
    if has_fused_form(base):
        check_numbers(base, group)


def init_base_state(state: dict[str, Any], p: Tensor, rules: BaseRules, group: Group) -> bool:
    """Give ``p`` the state torch's own first step would; True if there was none."""
    fresh = any(state.get(name) is None for name in rules.slots)
    on_device = group.get("capturable", False) or group.get("fused", False)
    if rules.counts_states and "step" not in state:
        device = p.device if on_device else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device) if rules.counts_tensors else 0
    numbers = base_numbers(group) if rules.initial else {}
    for name, slot in rules.slots.items():
        if state.get(name) is None:
            first = rules.initial.get(name, 0.0)
            made = slot.zeros(p)
            state[name] = made.fill_(numbers[first] if isinstance(first, str) else first) if first else made
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
        return (*rules.elements, *(("step",) if rules.counted else ()))
    for kind, names in _STATE.items():
        if isinstance(base, kind):
            amsgrad = ("max_exp_avg_sq",) if group.get("amsgrad", False) and "exp_avg_sq" in names else ()
            return (*names, *amsgrad)
    known = [base.state[p] for p in group["params"] if base.state.get(p)]
    if known:
        return tuple(n for n in (*_ADAM_NAMES, "step") if all(s.get(n) is not None for s in known))
    return (*_ADAM_NAMES, "step") if "betas" in group else ("step",)
