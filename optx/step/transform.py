"""The protocol of a transform: rules for up to three moments of a step, and the state they need."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import TransformError
from optx._expression import NotKept, expression
from optx._rules import Rule
from optx.kernels.step.tiles import matrix
from optx.step.measured import Measured
from optx.step.numbers import as_float
from optx.step.state import SlotStore

Group = dict[str, Any]
Fused = bool | Literal["auto", "cpu", "triton"]
Rounding = Literal["stochastic", "kahan", "nearest"]
StateFormat = Literal["float32", "bfloat16", "8bit"]
Master = Literal["split", "split16"]
Moment = Literal["", "signed", "nonnegative"]
# What every path can read and write.
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SLOT_DTYPES = (*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Slot:
    """One state tensor per weight.

    Rules see numbers, whatever the slot's dtype: bool and integers of up to 16 bits, float16 and bfloat16
    come as float32 (as float64 beside a float64 weight), integers of 32 and 64 bits and float64 as float64.
    A number written into an integer slot is truncated towards zero, as by torch's ``copy_``, and one written
    into a bool slot is kept as whether it is not 0; later rules of the same step see it so. One written into
    a float slot is rounded once, when it is stored: to nearest, but in bfloat16 stochastically, so that a
    slow average moves.

    Args:
        dtype: the dtype it is kept in, whatever the weight's dtype; None for the weight's own.
        scalar: one number per weight tensor instead of one per element.
        saved: False leaves it out of ``state_dict``; `Transform.init_slot` must then find it again.
        derived: the state tensor of the base that this is a function of (`Transform.init_slot` computes it):
            made anew whenever that was changed by anything but a step that keeps this up.
        lasting: it can't be made again later (an anchor: the weights have moved), so it survives
            ``optimizer.state.clear()``.
        packed: one bit an element, which rules can read (as 0 or 1) and not write; needs
            ``dtype=torch.bool``. It is kept as uint8 of (rows, bytes of a row), laid out as in `Masks`, where
            the weight's rows are multiples of 8 long and lie one after another; else as bool of the
            weight's shape; and as one number where all bits are 1, which costs nothing to read.
            `Transform.init_slot` may return any of the three.
        moment: ``"signed"`` or ``"nonnegative"`` for a moving average of gradients or of their squares, which
            may be kept in fewer bits; ``""`` for what may not.
        counts: it counts the weight's steps, see `counter`.
        axis: ``"row"`` or ``"column"``: one number per row or column of the weight, see `per_row`.
        keepdim: such a slot has two dimensions, (rows, 1) or (1, columns).

    Raises:
        TransformError: a dtype that no rule can read: complex, quantised, of 8 or fewer float bits; or
            a packed slot that is not bool, or one number; or a moment that is no float per element.
    """

    dtype: torch.dtype | None = torch.float32
    scalar: bool = False
    saved: bool = True
    derived: str = ""
    lasting: bool = False
    packed: bool = False
    moment: Moment = ""
    counts: bool = False
    axis: Literal["", "row", "column"] = ""
    keepdim: bool = False

    def __post_init__(self) -> None:
        if self.moment:
            self._check_moment()
        if self.packed and (self.dtype != torch.bool or self.scalar):
            raise TransformError(
                "like_weight: packed=True is for dtype=torch.bool, one bit an element; dtype is "
                f"{self.dtype!r}."
            )
        if self.dtype is not None and self.dtype not in SLOT_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in SLOT_DTYPES)
            raise TransformError(
                f"{'per_tensor' if self.scalar else 'like_weight'}: dtype is {self.dtype!r}; it must be a "
                f"torch dtype that rules can read ({names}), or None for the weight's."
            )

    def _check_moment(self) -> None:
        if self.moment not in ("signed", "nonnegative"):
            raise TransformError(
                f"like_weight: moment is {self.moment!r}; it must be '', 'signed' or 'nonnegative'."
            )
        if (
            self.scalar
            or self.axis
            or self.lasting
            or (self.dtype is not None and not self.dtype.is_floating_point)
        ):
            raise TransformError(
                f"like_weight: moment={self.moment!r} is for a moving average, a float per element that a "
                f"step renews; this slot is {self!r}."
            )

    def shape(self, p: Tensor) -> tuple[int, ...]:
        """The shape that it has for ``p``."""
        if self.scalar:
            return ()
        if not self.axis:
            return tuple(p.shape)
        length = matrix(p.shape)[self.axis == "column"]
        return ((length, 1) if self.axis == "row" else (1, length)) if self.keepdim else (length,)

    def zeros(self, p: Tensor) -> Tensor:
        """A slot of zeros for ``p``."""
        dtype = p.dtype if self.dtype is None else self.dtype
        if self.scalar:
            return torch.zeros((), dtype=dtype, device=p.device)
        if self.axis:
            return torch.zeros(self.shape(p), dtype=dtype, device=p.device)
        # A packed one is settled where it is kept.
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def like_weight(
    dtype: torch.dtype | None = torch.float32,
    saved: bool = True,
    lasting: bool = False,
    packed: bool = False,
    moment: Moment = "",
) -> Slot:
    """A slot with one element per weight element; ``packed=True`` with ``torch.bool``: one bit.

    See `Slot` for what the arguments mean.
    """
    return Slot(dtype, saved=saved, lasting=lasting, packed=packed, moment=moment)


def per_tensor(dtype: torch.dtype = torch.float64, derived: str = "") -> Slot:
    """A slot with one number per weight tensor."""
    return Slot(dtype, scalar=True, derived=derived)


def per_row(dtype: torch.dtype | None = torch.float32, keepdim: bool = False) -> Slot:
    """A slot with one number per row of the weight, which the moment ``rows`` reads and writes.

    A weight of two or more dimensions is a matrix of (shape[0], all the rest): a row is what makes one output
    of a linear or convolutional layer. A weight of one dimension, or of none, is a single row.

    Args:
        dtype: a float's; None for the weight's.
        keepdim: it is of shape (rows, 1), not (rows,).

    Example:
        Gradient centralisation (Yong et al. 2020, equation 1): the rows' means are taken out of the gradient.

        >>> import torch, optx
        >>> @optx.rule(writes="row_sum")
        ... def along_rows(g):
        ...     return g * 1.0
        >>> @optx.rule(writes="g")
        ... def centralise(g, row_sum, columns, ndim):
        ...     return g - optx.ops.where(ndim > 1.0, row_sum / columns, 0.0)
        >>> class Centralise(optx.Transform):
        ...     name = "centralise"
        ...     rules = dict(row_sums=along_rows, gradient=centralise)
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), Centralise())
        >>> w.grad = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
        >>> opt.step()
        >>> w.detach()
        tensor([[ 1., -1.],
                [ 0.,  0.]])

        Each row's gradient clipped to a multiple of its usual norm, which is kept.

        >>> @optx.rule(writes="row_sq")
        ... def squares(g):
        ...     return g * g
        >>> @optx.rule(writes=("usual", "factor"))
        ... def follow(row_sq, usual, limit):
        ...     norm = optx.ops.sqrt(row_sq)
        ...     usual = optx.ops.where(usual > 0.0, usual, norm)
        ...     kept = optx.ops.minimum(norm, limit * usual)
        ...     return 0.9 * usual + 0.1 * kept, kept / optx.ops.maximum(norm, 1e-30)
        >>> @optx.rule(writes="g")
        ... def shorten(g, factor):
        ...     return g * factor
        >>> class ClipRows(optx.Transform):
        ...     name = "clip_rows"
        ...     slots = {"usual": optx.per_row()}
        ...     rules = dict(row_sums=squares, rows=follow, gradient=shorten)
        ...     def __init__(self, limit=2.0):
        ...         self.options = {"limit": limit}
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), ClipRows())
        >>> for scale in (1.0, 10.0):
        ...     w.grad = scale * torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        ...     opt.step()
        >>> w.detach()
        tensor([[ -9., -12.],
                [  0.,  -3.]])
        >>> opt.state[w]["optx.clip_rows.usual"]
        tensor([5.5000, 1.1000])
    """
    return Slot(dtype, axis="row", keepdim=keepdim)


def per_column(dtype: torch.dtype | None = torch.float32, keepdim: bool = False) -> Slot:
    """A slot with one number per column of the weight, which the moment ``columns`` reads and writes.

    Args:
        dtype: a float's; None for the weight's. `per_row` says what rows and columns are.
        keepdim: it is of shape (1, columns), not (columns,).
    """
    return Slot(dtype, axis="column", keepdim=keepdim)


def counter() -> Slot:
    """A slot that counts each weight's steps: on every base, and on every path.

    Rules read it by its name and do not write it. It is 1 in the first step (in ``sums``, as any `per_tensor`
    slot, what it was before: 0), is saved with the rest, and stays what it is in a step that is skipped, or
    that has neither a gradient nor a learning rate, as torch's distributed checkpoint takes one.

    Example:
        Lookahead (Zhang et al. 2019, algorithm 1): every k steps the weights go back part of their way.

        >>> import torch, optx
        >>> @optx.rule(writes="due")
        ... def every_k(steps, k):
        ...     return optx.ops.where(steps % k < 0.5, 1.0, 0.0)
        >>> @optx.rule(writes=("w", "slow"))
        ... def look_back(w, slow, due, alpha):
        ...     new = slow + due * alpha * (w - slow)
        ...     return optx.ops.where(due > 0.5, new, w), new
        >>> class Lookahead(optx.Transform):
        ...     name = "lookahead"
        ...     slots = {"slow": optx.like_weight(lasting=True), "steps": optx.counter()}
        ...     rules = dict(scalars=every_k, after=look_back)
        ...     def __init__(self, k=5, alpha=0.5):
        ...         self.options = {"k": k, "alpha": alpha}
        ...     def init_slot(self, name, p, optimizer):
        ...         slot = self.slots[name].zeros(p)
        ...         return slot.copy_(p.detach()) if name == "slow" else slot
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), Lookahead(k=2))
        >>> for _ in range(4):
        ...     w.grad = torch.ones(1)
        ...     opt.step()
        ...     print(w.item())
        -1.0
        -1.0
        -2.0
        -2.0
    """
    return Slot(torch.float64, scalar=True, counts=True)


@dataclass(frozen=True)
class Moments:
    """What a transform does in a step, as rules. Each is optional.

    The names of a rule's arguments bind it. What a name means depends on the moment, never on the path
    (fused or not) that a step takes:

    ============ =================== ================== ==================== ================== ==============
    name         sums                scalars, finish    gradient             weight             after, observe
    ============ =================== ================== ==================== ================== ==============
    ``w``        when the step began --                 when the step began  as it stands       as it stands
    ``w0``       when the step began --                 when the step began  when the step      when the step
                                                                             began              began
    ``g``        as it stands        --                 as it stands, before what the base is   what the base
                                                        and after this rule  given              was given
    own slot     before the step     --                 as it stands         as it stands       as it stands
    base's state before the step     --                 before the step      before the step    after the step
    own cell     before the step     as it stands       as scalars left it   as scalars left it as scalars
                                                                                                left it
    ``grad_sq``  --                  sum of ``g * g``   the same number      the same number    the same
                                     as sums see ``g``
    a sum        --                  of this step       of this step         of this step       of this step
    a scalar     --                  once computed      of this step         of this step       of this step
    ``total_x``  --                  finish only        of this step         of this step       of this step
    a number     of the group        of the group       of the group         of the group       of the group
    may write    new names           new names, cells;  ``g``, own slots     ``w``, own slots   after: as
                                     scalars: grad_sq                                           weight;
                                                                                                observe: cells
    ============ =================== ================== ==================== ================== ==============

    ``after_sums`` see what ``after`` sees, and write new names. What they and everything before computed is
    there for ``after_scalars`` and ``after_finish``, which are to them what ``scalars`` and ``finish`` are to
    ``sums``; none of the three writes again what those wrote, as rules before the base's update read it.

    *As it stands*: as the rules before this one, in the order of the moments and of the transforms, left it;
    ``w`` in ``after`` is what the base made of it. ``g`` never shows what a base's own update does to its
    gradient (momentum, coupled weight decay, ``maximize``). In ``observe``, ``w`` and all state are as they
    were stored, rounded to their dtypes (a ``"kahan"`` weight with its compensation): what the next step
    will read. Before, what a rule wrote in this step is not rounded yet, but see `Slot`; only what a base
    without a fused form wrote is.

    A *slot* is a `like_weight` of the transform, a *cell* a `per_tensor`. What ``scalars`` and ``finish``
    write into a cell, and what ``observe`` sums for it, is kept once the step is done: a step that is skipped
    keeps nothing. Where ``scalars`` did not write it, a rule reads the cell as it was before the step, in
    ``observe`` too. Numbers of the group are the transform's options, and what is in the base's param group:
    ``lr``, ``weight_decay``, ``eps``, ``beta1``, ``beta2``; everywhere ``numel``, ``ndim``, ``rows`` and
    ``columns`` (the weight's), and ``step`` (1 in the
    first step) where the base counts. The base's state goes by its names (``exp_avg_sq``) and is zero before
    a parameter's first step. A number in a rule per element is rounded to float32 (float64 where the weight
    is), in ``scalars`` and ``finish`` all is float64. A name of the transform hides one of the base.

    Whatever is not in the table is refused by `optx.wrap`, with the names of transform, rule and argument.

    Args:
        sums: per element; what it returns is summed over the tensor (in float64).
        row_sums: as ``sums``, but summed over each row of the weight (`per_row` says what that is): in later
            rules per element it is the number of the element's row.
        column_sums: the same over columns.
        scalars: per tensor, from sums, options and cells. If it returns ``grad_sq``, it promises that this
            will be the sum of squares after its ``gradient`` rule, and saves later ones a pass.
        rows: per row, after ``scalars``: from sums over rows, `per_row` slots and numbers of the tensor;
            writes such slots and new names, which rules per element read as numbers of the element's row.
        columns: the same per column, after ``rows``.
        totals: names of sums and scalars to be added over the whole optimizer; ``finish`` and the rules
            after it read them as ``total_<name>``. ``numel`` may be among them.
        finish: per tensor, after the totals.
        gradient: per element, writes ``g`` (and own slots). All gradient rules run, in order, before
            any weight is touched.
        weight: per element, writes ``w`` (and own slots) before the base update.
        after_sums: as ``sums``, of what the base update and the ``after`` rules before this one make of the
            weight. It takes a pass that reads what the update reads.
        after_scalars: as ``scalars``, from these sums too, and from all that was computed before.
        after_totals: names of ``after_sums`` and ``after_scalars`` to be added over the whole optimizer.
        after_finish: per tensor, after these totals.
        after: per element, writes ``w`` (and own slots) after the base update.
        observe: per element, after everything; what it returns is summed into cells of that name.
        meter: per element, as ``observe``, but it reads no ``g`` and writes new names; summed once
            `Wrapped.metrics` are asked for, and kept nowhere: `Transform.metrics` finds it in
            ``optimizer.measured``.

    Example:
        A cautious update (Liang et al. 2024, arXiv 2411.16085, algorithm 1): what goes against the gradient
        is left out, and the rest makes up for it.

        >>> import torch, optx
        >>> @optx.rule(writes="agreeing")
        ... def agree(w, w0, g):
        ...     return optx.ops.where((w0 - w) * g > 0.0, 1.0, 0.0)
        >>> @optx.rule(writes="rescale")
        ... def make_up(agreeing, numel):
        ...     return numel / (agreeing + 1.0)
        >>> @optx.rule(writes="w")
        ... def only_agreeing(w, w0, g, rescale):
        ...     return optx.ops.where((w0 - w) * g > 0.0, w0 + rescale * (w - w0), w0)
        >>> class Cautious(optx.Transform):
        ...     name = "cautious"
        ...     rules = dict(after_sums=agree, after_scalars=make_up, after=only_agreeing)
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0, momentum=0.5), Cautious())
        >>> for g in ([4.0, 4.0, 4.0], [4.0, -1.0, -1.0]):
        ...     w.grad = torch.tensor(g)
        ...     opt.step()
        ...     print(w.detach())
        tensor([-2., -1.,  0.])
        tensor([-11.,  -1.,   0.])
    """

    sums: Rule | None = None
    row_sums: Rule | None = None
    column_sums: Rule | None = None
    scalars: Rule | None = None
    rows: Rule | None = None
    columns: Rule | None = None
    totals: tuple[str, ...] = ()
    finish: Rule | None = None
    gradient: Rule | None = None
    weight: Rule | None = None
    after_sums: Rule | None = None
    after_scalars: Rule | None = None
    after_totals: tuple[str, ...] = ()
    after_finish: Rule | None = None
    after: Rule | None = None
    observe: Rule | None = None
    meter: Rule | None = None


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
