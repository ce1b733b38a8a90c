"""The state that a transform or a base declares: slots, one tensor per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optx._errors import TransformError
from optx.kernels.step.tiles import matrix

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

    @property
    def kind(self) -> Literal["slot", "cell", "rows", "columns"]:
        """What rules read where they name it, see `optx.kernels.step.program.Ref`."""
        if self.axis:
            return "rows" if self.axis == "row" else "columns"
        return "cell" if self.scalar else "slot"

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
