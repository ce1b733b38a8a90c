"""The base updates that are known as rules, by optimizer class: then a whole step is one fused kernel.

`optx.bases` has those that come with optx.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import OptxError
from optx._rules import Rule
from optx.step.declared import Slot
from optx.step.group_numbers import base_numbers, check_numbers
from optx.step.own_methods import Methods
from optx.step.transform import Group

Counted = bool | Literal["number", "group"]


@dataclass(frozen=True)
class Sums:
    """Sums over a weight, its rows or its columns amid a base's update, of what the rules before it leave.

    They take a reading pass of their own, which computes what those rules compute and stores nothing; sums
    that see the same share one.

    Args:
        rule: per element; each name that it writes is summed over the tensor, and can be read from then on.
        then: per tensor, in float64, from these sums and whatever else is one number: writes new names, which
            later rules read, and the base's state tensors of one number (`per_tensor`). Over rows: per row,
            writes new names, which later rules per element read as numbers of the element's row, and state
            (`per_row`).
        over: ``"tensor"``, ``"rows"`` or ``"columns"``; `per_row` says what these are.
        total: over rows or columns: per row or column, after ``then``; what it writes is summed to numbers of
            the tensor.
    """

    rule: Rule
    then: Rule | None = None
    over: Literal["tensor", "rows", "columns"] = "tensor"
    total: Rule | None = None

    @property
    def axis(self) -> Literal["", "row", "column"]:
        """What it sums over, in the words of `Slot`."""
        return {"rows": "row", "columns": "column"}.get(self.over, "")  # type: ignore[return-value]


@dataclass(frozen=True)
class BaseRules:
    """How an optimizer steps the parameters of one param group, as rules; see `register_base`.

    The names of a rule's arguments say what it reads. In ``update``: ``w``, ``g`` and ``w0`` (the weight as
    it was when the step began), slots, and numbers. Numbers are those of the param group (those of a tuple
    go by the key without the plural's s: ``betas`` as beta1, beta2), what ``scalars`` computed, cells,
    ``numel``, ``step`` (1 in the first step) where the base counts, and ``fresh`` (1 where the state was made
    in this step, else 0). In ``scalars`` only numbers.

    What a rule of ``update`` writes is ``w``, ``g`` (for the rules after it; the person's gradient stays), a
    slot, or a new name, which later rules of ``update`` read. What a rule of ``scalars`` writes is a cell or
    a new name.

    Attributes:
        update: rules per element, in order, in float32 (in float64 where the weight is), with `Sums` among
            them.
        scalars: rules per tensor, in order, in float64; they run before ``update``.
        slots: the base's state tensors: those with one element per weight element as `like_weight` makes
            them, those of one number for the tensor (cells) as `per_tensor` does.
        initial: what slots begin with where that is not 0: a number, or the name of a number of the group.
        counted: how the base counts steps: False, True (a float32 tensor ``step`` per parameter, in its
            state), ``"number"`` (a Python number there) or ``"group"`` (a number ``step`` in the group).

    Raises:
        OptxError: a rule writes what it may not, or reads one value per element where there is none.
    """

    update: tuple[Rule | Sums, ...]
    scalars: tuple[Rule, ...] = ()
    slots: Mapping[str, Slot] = field(default_factory=dict[str, Slot])
    initial: Mapping[str, float | str] = field(default_factory=dict[str, float | str])
    counted: Counted = False

    def __post_init__(self) -> None:
        _check_state(self)
        _check_rules(self)

    @property
    def counts_tensors(self) -> bool:
        """Whether kernels count in a tensor per parameter."""
        return self.counted is True

    @property
    def counts_states(self) -> bool:
        """Whether each parameter's state has a ``step``."""
        return self.counted is True or self.counted == "number"

    @property
    def elements(self) -> tuple[str, ...]:
        """The slots with one element per weight element."""
        return tuple(name for name, slot in self.slots.items() if slot.kind == "slot")

    @property
    def cells(self) -> tuple[str, ...]:
        """The slots of one number."""
        return tuple(name for name, slot in self.slots.items() if slot.kind == "cell")

    @property
    def state(self) -> tuple[str, ...]:
        """The names of all that it keeps in a parameter's state."""
        return (*self.slots, *(("step",) if self.counts_states else ()))


_TAKEN = ("w", "g", "w0", "numel", "fresh", "step")


def _check_state(rules: BaseRules) -> None:
    slots: Mapping[str, Any] = rules.slots
    for name, slot in slots.items():
        if not isinstance(slot, Slot):
            raise OptxError(
                f"BaseRules: slots[{name!r}] is {slot!r}; it must be optx.like_weight() or optx.per_tensor()."
            )
        if name in _TAKEN or not name.isidentifier():
            raise OptxError(
                f"BaseRules: slots has {name!r}; it must be an identifier other than {', '.join(_TAKEN)}."
            )
    foreign = [name for name in rules.initial if name not in rules.slots]
    if foreign:
        raise OptxError(f"BaseRules: initial has {foreign[0]!r}, which is no slot.")
    if rules.counted not in (False, True, "number", "group"):
        raise OptxError(
            f"BaseRules: counted is {rules.counted!r}; it must be False, True, 'number' or 'group'."
        )


def _check_rules(rules: BaseRules) -> None:
    for kind in ("scalars", "update"):
        given: Any = getattr(rules, kind)
        if not issubclass(type(given), tuple):
            raise OptxError(f"BaseRules: {kind} is {given!r}; it must be a tuple of rules, as (move,).")
        items: tuple[Any, ...] = given
        for one in items:
            if isinstance(one, Sums) and kind == "update":
                _check_sums(rules, one)
            else:
                _check_rule(rules, one, kind, per_tensor=kind == "scalars")
    if not any("w" in one.writes for one in rules.update if isinstance(one, Rule)):
        raise OptxError("BaseRules: no rule of update writes 'w'.")


def _check_sums(rules: BaseRules, sums: Sums) -> None:
    if sums.over not in ("tensor", "rows", "columns") or (sums.total is not None and not sums.axis):
        raise OptxError(
            f"BaseRules: Sums has over={sums.over!r}; it must be 'tensor', 'rows' or 'columns', and one of "
            "the last two where there is a total."
        )
    _check_rule(rules, sums.rule, "update", sums=True)
    for one in (sums.then, sums.total):
        if one is not None:
            _check_rule(rules, one, "update", per_tensor=True)
    for name in () if sums.then is None else sums.then.writes:
        if name in rules.slots and rules.slots[name].axis != sums.axis:
            raise OptxError(
                f"BaseRules: rule {sums.then and sums.then.name!r} writes {name!r}, which is not kept per "
                f"{sums.axis or 'tensor'}, as its sums over the {sums.over} are."
            )


def _check_rule(rules: BaseRules, one: Any, kind: str, per_tensor: bool = False, sums: bool = False) -> None:
    if not isinstance(one, Rule):
        raise OptxError(f"BaseRules: {kind} has {one!r}; decorate it with @optx.rule(writes=...).")
    elements = ("w", "g", "w0", *rules.elements)
    wrong = [name for name in one.reads if per_tensor and name in elements]
    wrong += [name for name in one.writes if (per_tensor or sums) and name in elements]
    if wrong:
        why = "has a value per element, and this rule's results are numbers per tensor"
    else:
        fixed = _TAKEN[2:] if per_tensor else (*_TAKEN[2:], *rules.cells)
        wrong = [name for name in one.writes if name in fixed]
        why = "is one number per tensor, which only scalars write"
    if wrong:
        raise OptxError(f"BaseRules: rule {one.name!r} ({kind}) uses {wrong[0]!r}, which {why}.")


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
    `Wrapped.plan` says which path is taken, and why.

    Those that optx has rules for:

    ================= ====================================================================================
    torch.optim       SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, Rprop, ASGD
    pytorch_optimizer Lion, AdaBelief, Yogi, Adan, NovoGrad, LARS (4.1; without gradient centralisation,
                      AdaNorm, rectify and cautious updates)
    torch_optimizer   AdaBelief, Yogi, NovoGrad, Lamb (0.3)
    torch.optim,      Adafactor (5 of transformers), where a param group has matrices alone, or vectors
    transformers      alone: one kernel serves a group, and their state differs
    ================= ====================================================================================

    Args:
        cls: the class; or its name, as ``"library.Optimizer"``, where the library need not be imported yet.
        rules: a `BaseRules`; or a function of (param group, optimizer) that returns one, or why it can't
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
