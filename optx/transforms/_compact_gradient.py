"""A weight's gradient at some of its entries only: what ``p.grad`` is while no dense one is kept.

To whoever reads it, it is a tensor of the weight's shape with zeros elsewhere: norms, sums and comparisons
are right. What is written into it in place, by clipping, a GradScaler or autograd's accumulation, is written
at the kept entries; elsewhere it is dropped, as a gradient there moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.transforms._gather import Selection

# What acts on each element alone, written into the first argument.
_IN_PLACE = {
    *("mul_", "div_", "add_", "sub_", "neg_", "zero_", "fill_", "copy_", "sign_", "lerp_", "addcmul_"),
    *("addcdiv_", "clamp_", "clamp_min_", "clamp_max_", "nan_to_num_", "masked_fill_"),
}
# What gives the same kind of gradient again.
_SAME = frozenset(("detach", "alias", "clone", "_to_copy", "lift_fresh"))
_AMP = "_amp_foreach_non_finite_check_and_unscale_"


class CompactGradient(Tensor):
    """The gradient of a weight at the entries that a mask has.

    Attributes:
        kept: its numbers at those entries, in the order of the weight's rows.
        selection: the entries.
    """

    kept: Tensor
    selection: Selection

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls: Any, kept: Tensor, selection: Selection) -> Any:
        """A gradient of so many numbers, and of the selection's shape."""
        made: Any = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, selection.shape, dtype=kept.dtype, device=kept.device
        )
        made.kept, made.selection = kept, selection
        return made

    def goes_with(self, selection: Selection) -> bool:
        """Whether its entries are these: of the same mask, not of an equal one."""
        return self.selection.kept is selection.kept

    def dense(self) -> Tensor:
        """All of it, zeros among them."""
        out = torch.zeros(self.shape, dtype=self.kept.dtype, device=self.kept.device)
        return self.selection.put(out, self.kept)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # pyright: ignore
        return f"<CompactGradient: {self.kept.numel():,} of {self.numel():,} numbers, {self.kept.dtype}>"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one of torch's operations on it."""
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        first = args[0] if args else None
        if isinstance(first, CompactGradient):
            if name in _IN_PLACE:
                func(first.kept, *(first._at(a) for a in args[1:]), **kwargs)
                return first
            if name in _SAME:
                kept = func(first.kept, **{k: v for k, v in kwargs.items() if k != "memory_format"})
                return CompactGradient(kept, first.selection)
            if name == "linalg_vector_norm" and not kwargs and _counts_no_zeros(args[1:]):
                # Of no number at all the largest is not defined; the gradient's is 0.
                kept = first.kept if first.kept.numel() else first.kept.new_zeros(1)
                return func(kept, *args[1:])
        if name == _AMP or (name.startswith("_foreach_") and (name.endswith("_") or name == "_foreach_norm")):
            return _each(func, args, kwargs)
        _check_not_written(func, args)
        return func(*_dense(args), **_dense(kwargs))

    def _at(self, value: Any) -> Any:
        """What an argument is at the kept entries."""
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if isinstance(value, CompactGradient) and value.goes_with(self.selection):
            return value.kept
        return self.selection.gathered(_dense(value).expand(self.shape))


def _counts_no_zeros(args: Sequence[Any]) -> bool:
    """Whether a norm over all of a tensor is the same without its zeros."""
    return len(args) < 2 and (not args or float(args[0]) > 0)


def _each(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation on lists, each tensor's numbers beside its own."""
    leads: Sequence[Any] = args[0]

    def at(i: int, value: Any) -> Any:
        lead = leads[i]
        return lead._at(value) if isinstance(lead, CompactGradient) else _dense(value)  # pyright: ignore

    def of(value: Any) -> Any:
        several = isinstance(value, list | tuple) and len(value) == len(leads)
        return [at(i, one) for i, one in enumerate(value)] if several else _dense(value)

    kept = [lead.kept if isinstance(lead, CompactGradient) else lead for lead in leads]
    if func.overloadpacket.__name__ == "_foreach_norm":  # of no number at all, the largest is not defined
        kept = [k if k.numel() else k.new_zeros(1) for k in kept]
    return func(kept, *map(of, args[1:]), **{k: of(v) for k, v in kwargs.items()})


def _check_not_written(func: Any, args: Sequence[Any]) -> None:
    """Raise where an unknown operation would write into one; a dense copy would be written, and lost."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        inside = value if isinstance(value, list | tuple) else [value]
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(isinstance(v, CompactGradient) for v in inside):
            raise OptxError(
                f"SaRA: {func} can't write into a gradient of compact=True, which has the selected entries "
                "only. Compute out of place and assign p.grad, or use compact=False."
            )


def _dense(value: Any) -> Any:
    """With plain tensors in the place of compact ones."""
    if isinstance(value, CompactGradient):
        return value.dense()
    if isinstance(value, list | tuple):
        return type(value)(_dense(v) for v in value)  # pyright: ignore
    return {k: _dense(v) for k, v in value.items()} if isinstance(value, dict) else value
