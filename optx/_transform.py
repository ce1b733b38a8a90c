"""The protocol of a transform: rules for up to three moments of a step, and the state they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from optx._rules import Rule

if TYPE_CHECKING:
    from optx._wrap import Wrapped

Group = dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One state tensor per weight.

    Args:
        dtype: the dtype it is kept in, whatever the weight's dtype; None for the weight's own.
        scalar: one number per weight tensor instead of one per element.
        saved: False leaves it out of ``state_dict``; `Transform.init_slot` must then find it again.
        derived: a function of the base's state: made anew if a loaded checkpoint lacks it.
    """

    dtype: torch.dtype | None = torch.float32
    scalar: bool = False
    saved: bool = True
    derived: bool = False

    def zeros(self, p: Tensor) -> Tensor:
        """A slot of zeros for ``p``."""
        dtype = p.dtype if self.dtype is None else self.dtype
        if self.scalar:
            return torch.zeros((), dtype=dtype, device=p.device)
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def like_weight(dtype: torch.dtype | None = torch.float32, saved: bool = True) -> Slot:
    """A slot with one element per weight element."""
    return Slot(dtype, saved=saved)


def per_tensor(dtype: torch.dtype = torch.float64, derived: bool = False) -> Slot:
    """A slot with one number per weight tensor."""
    return Slot(dtype, scalar=True, derived=derived)


@dataclass(frozen=True)
class Moments:
    """What a transform does in a step, as rules. Each is optional.

    The names of a rule's arguments bind it: ``w``, ``g``, ``w0`` (the weight when the step began), a slot
    of the transform, a state tensor of the base (``exp_avg_sq``), a number computed by an earlier rule of
    the same transform, an option of the transform, or ``lr``, ``numel``, ``step`` (1 in the first step),
    ``beta1``, ``beta2``, ``eps``, ``weight_decay`` of the base's param group, and ``grad_sq``, the
    gradient's sum of squares at this place in the chain (one pass serves all that ask).

    Args:
        sums: per element; what it returns is summed over the tensor (in float64).
        scalars: per tensor, from sums, options and scalar slots. If it returns ``grad_sq``, it promises
            that this will be the sum of squares after its ``gradient`` rule, and saves later ones a pass.
        totals: names of scalars to be added over the whole optimizer; ``finish`` reads them as
            ``total_<name>``. ``numel`` may be among them.
        finish: per tensor, after the totals.
        gradient: per element, writes ``g`` (and own slots). All gradient rules run, in order, before
            any weight is touched.
        weight: per element, writes ``w`` (and own slots) before the base update.
        after: per element, writes ``w`` (and own slots) after the base update.
        observe: per element, after everything; what it returns is summed into scalar slots of that name.
    """

    sums: Rule | None = None
    scalars: Rule | None = None
    totals: tuple[str, ...] = ()
    finish: Rule | None = None
    gradient: Rule | None = None
    weight: Rule | None = None
    after: Rule | None = None
    observe: Rule | None = None


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

    Attributes:
        name: names the state (``optx.<name>.<slot>``), the group keys (``<name>`` = False leaves a group
            out, ``<name>_<option>`` overrides an option there) and the attribute on the wrapped optimizer.
        slots: state tensors per weight.
        options: numbers that param groups may override.
    """

    name: ClassVar[str]
    slots: Mapping[str, Slot] = {}
    options: Mapping[str, float] = {}
    rules: ClassVar[Mapping[str, Any]] = {}

    def moments(self, group: Group, base: torch.optim.Optimizer) -> Moments:
        """The rules for one param group; by default the same for all."""
        return Moments(**self.rules)

    def check(self, base: torch.optim.Optimizer) -> None:
        """Raise a clear error, at wrap time, if this base can't be served."""

    def bind(self, optimizer: Wrapped) -> None:
        """Called once at wrap time, after all checks; may look at the parameters."""

    def serves(self, group: Group) -> bool:
        """Whether a param group takes part; ``<name>=False`` in it leaves it out."""
        return bool(group.get(self.name, True))

    def init_slot(self, name: str, p: Tensor, optimizer: Wrapped) -> Tensor:
        """The first value of a slot for ``p``; zeros by default."""
        return self.slots[name].zeros(p)

    def unwrap(self, optimizer: Wrapped) -> None:
        """Undo what ``bind`` did outside the optimizer's state."""

    def before_step(self, optimizer: Wrapped) -> None:
        """Called once before each step, when nothing of it is measured yet."""

    def after_step(self, optimizer: Wrapped) -> None:
        """Called once after each step that was not skipped."""

    def after_load(self, optimizer: Wrapped) -> None:
        """Called after ``load_state_dict``."""

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
        inside = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{type(self).__name__}({inside})"
