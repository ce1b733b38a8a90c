"""The moments of an optimizer's state, brought into the format that is wanted of them, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._names import is_dtensor, placed_like, whole
from optx.kernels.step.layout import GROUP
from optx.step.formats import CODED, CODES, decode, encode
from optx.step.sharded import here, spread_as
from optx.step.state import SCALE, SlotStore, is_ours

FLOATS = {32: torch.float32, 16: torch.bfloat16}


def scale_key(key: str) -> str:
    """Where ``state[p]`` has the scales of a moment."""
    return SCALE + key.removeprefix("optx.")


def rows_of(shape: torch.Size) -> int:
    """How many numbers belong to one index of a weight's first dimension."""
    return math.prod(shape[1:])


def takes_codes(p: Tensor) -> bool:
    """Whether a weight's moments can have 8 bits.

    Its numbers must lie in their order, so that groups mean the same in every checkpoint; and of a sharded
    one groups must not reach across shards, however many there are.
    """
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not here(p).is_contiguous():
        return False
    if not is_dtensor(p):
        return True
    placed = [type(one).__name__ == "Replicate" or _by_rows(one) for one in p.placements]  # type: ignore[attr-defined]
    return all(placed) and p.ndim > 0 and rows_of(p.shape) % GROUP == 0


def _by_rows(placement: object) -> bool:
    return type(placement).__name__ == "Shard" and getattr(placement, "dim", None) == 0


def float_of(p: Tensor, bits: int | None) -> torch.dtype | None:
    """What a weight's moments are kept in where they have no codes; None: what the base takes.

    A float64 weight keeps its own, and where codes were asked for that can't be they have float32.
    """
    return None if bits is None or p.dtype == torch.float64 else FLOATS.get(bits, torch.float32)


def scale_shape(shape: torch.Size) -> tuple[int, ...]:
    """Of a weight's scales: by rows where no group reaches across two, so that they are sharded as it is."""
    rows = rows_of(shape) if shape else 1
    if shape and rows and rows % GROUP == 0:
        return (shape[0], rows // GROUP)
    return (-(-math.prod(shape) // GROUP),)


def find(store: SlotStore, p: Tensor, key: str) -> Any:
    """What is kept of a parameter under a key, or None."""
    state = store.base.state.get(p, {})
    return state[key] if key in state else store.pending.get(p, {}).get(key)


def _put(store: SlotStore, p: Tensor, key: str, value: Tensor) -> None:
    if is_ours(key):
        store.put(p, key, value)
    else:
        store.base.state[p][key] = value


def settle(store: SlotStore, p: Tensor, key: str, moment: str, bits: int | None) -> Any:
    """Bring a moment into the format that is wanted.

    Args:
        store: the optimizer's.
        p: the parameter.
        key: where ``state[p]`` has the moment.
        moment: ``signed`` or ``nonnegative``.
        bits: 32, 16 or 8; None for the weight's own dtype, where it has codes.

    Returns:
        What is there now; codes have their scales beside them.
    """
    t = find(store, p, key)
    if not isinstance(t, Tensor):
        return t
    coded = t.dtype in CODED
    if bits == 8 and takes_codes(p):
        scale = find(store, p, scale_key(key)) if coded else None
        if t.dtype == CODES[moment] and fits(t, scale, p):
            return t
        codes, scale = encoded(floats(store, p, key), p, moment)
        _put(store, p, scale_key(key), scale)
        _put(store, p, key, codes)
        return codes
    wanted = float_of(p, bits) or (p.dtype if coded else t.dtype)
    if t.dtype != wanted:
        t = floats(store, p, key).to(wanted)
        store.drop(p, [scale_key(key)])
        _put(store, p, key, t)
    return t


def fits(codes: Tensor, scale: Any, p: Tensor) -> bool:
    """Whether codes and scales are those of a weight, as it lies."""
    if not isinstance(scale, Tensor) or scale.dtype != torch.bfloat16 or codes.shape != p.shape:
        return False
    placed = is_dtensor(codes) == is_dtensor(scale) == is_dtensor(p)
    if not placed or scale.device != p.device or tuple(scale.shape) != scale_shape(p.shape):
        return False
    return here(codes).is_contiguous() and here(scale).is_contiguous()


def floats(store: SlotStore, p: Tensor, key: str) -> Tensor:
    """A moment in float32, or in the float dtype that it has."""
    t = find(store, p, key)
    if t.dtype not in CODED:
        return t
    scale = find(store, p, scale_key(key))
    if is_dtensor(t) != is_dtensor(scale):  # one process saved codes where shards have none: a bias's
        return placed_like(decoded(whole(t), whole(scale)), p)
    return decoded(t, scale)


def as_saved(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """A parameter's state as a checkpoint has it: codes with a dimension of 1 behind the weight's own.

    torch's distributed checkpoint copies into any dtype, a code becoming a moment in silence, and plain
    optimizers do as well; but neither into another shape.
    """
    return {key: t.unsqueeze(-1) if _is_coded(entry, key) else t for key, t in entry.items()}


def as_kept(entry: Mapping[Any, Any], shape: Sequence[int] | None = None) -> dict[Any, Any]:
    """What `as_saved` was given.

    Args:
        entry: a parameter's state; codes may be in the weight's shape too.
        shape: the weight's; if it isn't known, a last dimension of 1 is no weight's.
    """

    def kept(t: Tensor) -> Tensor:
        added = t.shape[-1:] == (1,) if shape is None else t.shape == (*shape, 1)
        return t.squeeze(-1) if added else t

    return {key: kept(t) if _is_coded(entry, key) else t for key, t in entry.items()}


def _is_coded(entry: Mapping[Any, Any], key: Any) -> bool:
    t = entry[key]
    return isinstance(key, str) and isinstance(t, Tensor) and t.dtype in CODED and scale_key(key) in entry


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 that codes stand for; of shards, shards."""
    values = decode(here(codes).contiguous(), here(scale))
    return _over(values, codes, codes.shape) if is_dtensor(codes) else values


def encoded(x: Tensor, p: Tensor, moment: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a moment, laid out and spread as its weight."""
    if is_dtensor(p) and not is_dtensor(x):
        x = spread_as(x, p, "", "a moment")
    codes, scale = encode(here(x).to(p.device).contiguous(), moment)
    shape = scale_shape(p.shape)
    if not is_dtensor(p):
        return codes, scale.view(shape)
    local = here(p)
    return _over(codes, p, p.shape), _over(scale.view(scale_shape(local.shape)), p, torch.Size(shape))


def _over(local: Tensor, like: Any, shape: torch.Size) -> Tensor:
    """A DTensor of what lies here, spread as another."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
