"""Sums and differences of weights, in float32 at least and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError
from optx._safetensors import Entry

# A float of 8 bits without infinities is given its largest number by torch where there is none: what lies
# beyond this, half a step above, has overflowed.
_SATURATES = {torch.float8_e4m3fn: 464.0}


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds all of these, float32 at least: what sums are computed in.

    torch promotes no floats of 8 bits; float32 holds each of them.
    """
    within = torch.float32
    for dtype in dtypes:
        if dtype.itemsize > 1 or not dtype.is_floating_point:
            within = torch.promote_types(within, dtype)
    return within


def narrow(summed: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype; what is too large for it is not finite afterwards, in any dtype."""
    made = summed.to(dtype)
    if dtype in _SATURATES:
        over = summed.abs() > _SATURATES[dtype]
        if bool(over.any()):
            made = torch.where(over, torch.full_like(made, torch.nan), made)
    return made


def add(tensor: Tensor, change: Tensor, scale: float = 1.0) -> Tensor:
    """tensor + scale * change, summed in the wider precision and rounded once to the tensor's dtype."""
    within = wide(tensor.dtype, change.dtype)
    summed = tensor.to(within, copy=True).add_(change.to(tensor.device, within), alpha=scale)
    return narrow(summed, tensor.dtype)


def difference(before: Tensor, after: Tensor) -> Tensor:
    """after - before in the wider of both precisions, float32 at least.

    Numbers that are equal have a change of 0, infinite ones (the -inf of a mask) and NaN among them.
    """
    within = wide(after.dtype, before.dtype)
    old = before.to(after.device, within)
    made = after - old if after.dtype == within else after.to(within).sub_(old)
    if finite(made):
        return made
    new = after.to(within)
    return made.masked_fill_((new == old) | (new.isnan() & old.isnan()), 0)


def total(tensors: list[Tensor]) -> Tensor:
    """Of one change or two, on the first one's device."""
    return tensors[0] if len(tensors) == 1 else tensors[0] + tensors[1].to(tensors[0].device)


def difference_dtype(dtype: torch.dtype) -> torch.dtype:
    """What differences of a dtype are computed in; integers have none."""
    return wide(dtype) if dtype.is_floating_point else dtype


def change_of(entry: Entry) -> Entry:
    """What a tensor's difference is."""
    return Entry(entry.shape, difference_dtype(entry.dtype))


def finite(tensor: Tensor) -> bool:
    """Whether every number is."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    # The sum of finite numbers is nearly always finite, and costs no memory.
    within = torch.float32 if tensor.dtype == torch.float16 else None
    return bool(tensor.sum(dtype=within).isfinite()) or bool(tensor.isfinite().all())


def check_overflow(who: str, name: str, made: Tensor, *of: Tensor) -> None:
    """Raise if numbers became too large for their dtype: not finite, though all that they are made of is.

    Args:
        who: the function, for messages.
        name: of the tensor.
        made: a result that is not `finite`.
        of: what it was made of, of as many numbers.

    Raises:
        OptxError: says how many.
    """
    flat = made.reshape(-1).to(torch.float32 if made.dtype.itemsize < 4 else made.dtype)
    bad, known = ~flat.isfinite(), torch.ones_like(flat, dtype=torch.bool)
    for tensor in of:
        one = tensor.reshape(-1).to(flat.device, wide(tensor.dtype))
        known &= one.isfinite()
        bad &= ~one.isnan()
    # Infinities that cancel, such as a mask's, make NaN of what was a number on either side.
    count = int((bad & (known | flat.isnan())).sum())
    if count:
        dtype = str(made.dtype).removeprefix("torch.")
        raise OptxError(
            f"{who}: {count} number{'s' * (count > 1)} of {name!r} or more would be beyond the largest "
            f"{dtype}, {torch.finfo(made.dtype).max:g}, or no number at all. Drop or scale less, or have a "
            "wider dtype (a base in float32)."
        )
