"""How an optimizer steps, as rules: `BaseRules`, and what may stand among its rules per element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from optx._errors import OptxError
from optx._rules import Rule
from optx.step.declared import Slot

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

    Example:
        A trust ratio, as in LAMB: the direction is given the weight's length. `register_base` takes these.

        >>> import torch, optx
        >>> from optx.ops import maximum, sqrt, where
        >>> @optx.rule(writes=("average", "way"))
        ... def follow(w, g, average, beta, weight_decay):
        ...     new = beta * average + (1.0 - beta) * g
        ...     return new, new + weight_decay * w
        >>> @optx.rule(writes=("w_sq", "way_sq"))
        ... def squares(w, way):
        ...     return w * w, way * way
        >>> @optx.rule(writes="trust")
        ... def ratio(w_sq, way_sq):
        ...     return where(w_sq * way_sq > 0.0, sqrt(w_sq / maximum(way_sq, 1e-38)), 1.0)
        >>> @optx.rule(writes="w")
        ... def walk(w, way, lr, trust):
        ...     return w - lr * trust * way
        >>> rules = optx.BaseRules(
        ...     update=(follow, optx.Sums(squares, then=ratio), walk),
        ...     slots={"average": optx.like_weight(None, moment="signed")},  # may be kept in 8 bits
        ... )
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
class Matrices:
    """A function of whole matrices amid a base's update: products, inverses, whatever torch can do.

    What the rules before it make of a weight is computed in a pass of its own, which changes nothing, and
    stored as matrices, those of one shape in one stack; a weight of more than two dimensions is a matrix of
    (shape[0], all the rest), one of fewer a single row. The function is given these, and the rules after it
    read what it makes, element by element.

    It is called with no gradients, before anything of the step is written: where it raises, the step has not
    been taken. The room costs ``dtype``'s bytes per weight during a step (all the time on a GPU, where a CUDA
    graph may use it). Weights that are sharded or not contiguous are left to the base's own step. It sees
    this one tensor and keeps nothing: a base whose state has another shape than its weights (the factors of
    Shampoo and SOAP) can't be said in rules, and takes its own step, with transforms around it.

    Args:
        name: what it is given, a new name that a rule before it wrote; later rules read under this name what
            it makes.
        function: of one tensor, (matrices, rows, columns), which it may overwrite; returns one of this shape.
        dtype: in which it is given and read.

    Example:
        Steps along the sign of every weight's first singular vectors:

        >>> import torch, optx
        >>> class Spectral(torch.optim.Optimizer):
        ...     def __init__(self, params, lr=0.1):
        ...         super().__init__(params, dict(lr=lr))
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 p.sub_(group["lr"] * first_vectors(p.grad))
        >>> def first_vectors(stack):
        ...     u, s, v = torch.linalg.svd(stack, full_matrices=False)
        ...     return u[..., :1] * v[..., :1, :]
        >>> @optx.rule(writes="direction")
        ... def along(g):
        ...     return g * 1.0
        >>> @optx.rule(writes="w")
        ... def walk(w, direction, lr):
        ...     return w - lr * direction
        >>> rules = optx.BaseRules(update=(along, optx.Matrices("direction", first_vectors), walk))
        >>> optx.register_base(Spectral, rules)
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> opt = optx.wrap(Spectral([w]))
        >>> w.grad = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> opt.step()
        >>> w.detach()
        tensor([[ 1.0000, -0.1000],
                [ 0.0000,  1.0000]])
        >>> print(opt.plan())
        group 0: fused cpu (1 tensor, 4 numbers, 2 passes, whole matrices in first_vectors): Spectral
    """

    name: str
    function: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32


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
        update: rules per element, in order, in float32 (in float64 where the weight is), with `Sums` and
            `Matrices` among them.
        scalars: rules per tensor, in order, in float64; they run before ``update``.
        slots: the base's state tensors, all of them, by the names that they have in ``state[p]``: those with
            one element per weight element as `like_weight` makes them (``like_weight(None)``: in the weight's
            dtype; with ``moment=`` where `wrap` may keep it in fewer bits), those of one number for the
            tensor (cells) as `per_tensor` does, those of one per row or column as `per_row`, `per_column`.
            State of any other shape can't be said in rules.
        initial: what slots begin with where that is not 0: a number, or the name of a number of the group.
        counted: how the base counts steps: False, True (a float32 tensor ``step`` per parameter, in its
            state), ``"number"`` (a Python number there) or ``"group"`` (a number ``step`` in the group).

    Raises:
        OptxError: a rule writes what it may not, or reads one value per element where there is none.
    """

    update: tuple[Rule | Sums | Matrices, ...]
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
            elif isinstance(one, Matrices) and kind == "update":
                _check_matrices(rules, one)
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


def _check_matrices(rules: BaseRules, one: Matrices) -> None:
    before = rules.update[: rules.update.index(one)]
    made = {name for r in before if isinstance(r, Rule) for name in r.writes} - {*_TAKEN, *rules.slots}
    if one.name not in made:
        raise OptxError(
            f"BaseRules: Matrices has name={one.name!r}; it must be a new name that a rule before it writes, "
            f"one of {sorted(made)}."
        )
    if not callable(one.function):
        raise OptxError(f"BaseRules: Matrices has function={one.function!r}; it must be callable.")
    if one.dtype not in _FLOATS:
        names = ", ".join(map(str, _FLOATS))
        raise OptxError(f"BaseRules: Matrices has dtype={one.dtype!r}; it must be one of {names}.")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_rule(rules: BaseRules, one: Any, kind: str, per_tensor: bool = False, sums: bool = False) -> None:
    if not isinstance(one, Rule):
        raise OptxError(f"BaseRules: {kind} has {one!r}; decorate it with @optx.rule(writes=...).")
    if results := one.wrong_results(one.results):
        raise OptxError(f"BaseRules: rule {one.name!r} ({kind}) {results}.")
    elements = ("w", "g", "w0", *rules.elements)
    wrong = [name for name in one.reads if per_tensor and name in elements]
    wrong += [name for name in one.writes if (per_tensor or sums) and name in elements]
    if wrong:
        why = "has a value per element, and this rule's results are numbers per tensor"
    else:
        fixed = _TAKEN[2:] if per_tensor else (*_TAKEN[2:], *rules.cells)
        wrong = [name for name in one.writes if name in fixed]
        is_taken = bool(wrong) and wrong[0] in _TAKEN
        why = "no rule may write" if is_taken else "is one number per tensor, which only scalars write"
    if wrong:
        raise OptxError(f"BaseRules: rule {one.name!r} ({kind}) uses {wrong[0]!r}, which {why}.")
