"""Weights that are codes of fewer bits: reading them as numbers, and writing numbers as codes again.

Kinds are known by the names of their classes, so that no library is imported for a weight that isn't its own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optx._errors import TargetError, warn
from optx.inject._part import bare_forward

Undo = Callable[[], None]


@dataclass(frozen=True)
class Rounding:
    """What one weight lost when a merge rounded it to its codes again.

    Attributes:
        kind: the codes, as ``"bitsandbytes nf4"``.
        relative: norm of the error, as a share of the norm of the exact merged weight.
        of_change: the same, as a share of the norm of the change that was merged.
        largest: the largest error of one element.
    """

    kind: str
    relative: float
    of_change: float
    largest: float


def warn_of_rounding(found: Mapping[str, Rounding]) -> None:
    """Say what a merge has lost: the rounding may be larger than what was merged."""
    if found:
        worst = max(found, key=lambda path: found[path].of_change)
        one = found[worst]
        warn(
            f"merge: {len(found)} quantised weights were rounded to their codes again. The worst, {worst!r} "
            f"({one.kind}), is off by {one.relative:.2%} of the merged weight and {one.of_change:.0%} of the "
            "change; handle.rounding has them all, and handle.unmerge() undoes it."
        )


def numbers(p: Tensor) -> int:
    """How many numbers a parameter stands for: bitsandbytes packs two codes into a byte."""
    shape: Any = getattr(getattr(p, "quant_state", None), "shape", None)
    return p.numel() if shape is None else torch.Size(shape).numel()


def kind_of(module: nn.Module) -> str:
    """What a linear module or embedding keeps its weight as, in words; empty: floating point."""
    if parametrize.is_parametrized(module, "weight"):
        return ""  # and looking at it may have effects
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        packed = any(not t.is_floating_point() and t.dtype != torch.bool for t in _own(module))
        return f"the codes of a {type(module).__name__}" if packed else ""
    name = type(weight).__name__
    if name == "Params4bit":
        known: Any = weight
        return f"bitsandbytes {known.quant_type}" if known.bnb_quantized else ""
    if name == "Int8Params":
        return "bitsandbytes int8" if weight.dtype == torch.int8 else ""
    if _reads_itself(weight):
        return f"{_library(weight)} {name}".strip()
    if weight.is_floating_point() and weight.dtype.itemsize > 1:
        return ""
    return f"{str(weight.dtype).removeprefix('torch.')} codes of a {type(module).__name__}"


def read(module: nn.Module, weight: Any, path: str) -> Tensor:
    """A quantised weight as float32 (float64 where it was that), of the shape that its module computes with.

    Args:
        module: whose it is.
        weight: the module's ``weight``, or the one that it had before a merge; None for a module without.
        path: for errors.

    Raises:
        TargetError: nothing that is known reads it, and neither does a call of the module.
    """
    found: Any
    name = type(weight).__name__
    with torch.no_grad():
        if name == "Params4bit":
            found = _read_4bit(weight)
        elif name == "Int8Params":
            scale = _scale_8bit(module, weight)
            found = weight.data.float() * (scale.float().view(-1, 1) / 127)
        elif isinstance(weight, Tensor) and _reads_itself(weight):
            try:
                found = weight.dequantize()
            except (NotImplementedError, RuntimeError, AttributeError, TypeError):
                found = by_calling(module, path)
        elif isinstance(weight, Tensor) and isinstance(
            scale := getattr(module, "weight_scale_inv", None), Tensor
        ):
            found = weight.float() * _spread(scale.float(), weight.shape)
        elif hasattr(module, "W_q") and callable(own := getattr(module, "dequantize", None)):  # HQQ
            found = own()
        else:
            found = by_calling(module, path)
        return found.to(torch.promote_types(found.dtype, torch.float32))


def write(module: nn.Module, weight: Any, new: Tensor) -> Undo | None:
    """Give a module codes of other numbers, rounded as its own were; the old weight is not written to.

    Args:
        module: whose weight it is.
        weight: its own, which says how it was rounded.
        new: what it is to be.

    Returns:
        What gives it back its own, bit for bit; None if nothing here writes this kind.
    """
    writer = _WRITERS.get(type(weight).__name__)
    return None if writer is None else writer(module, weight, new)


def can_write(module: nn.Module) -> bool:
    """Whether `write` knows this kind."""
    return type(getattr(module, "weight", None)).__name__ in _WRITERS


def by_calling(module: nn.Module, path: str) -> Tensor:
    """The weight of a linear module of any kind: what it makes of the identity, less what it makes of zero.

    Raises:
        TargetError: its call can't be made, or isn't linear.
    """
    into: int = getattr(module, "in_features", 0) or getattr(module, "infeatures", 0)
    like = next((t for t in _own(module)), torch.empty(0))
    half = next(
        (t.dtype for t in _own(module) if t.is_floating_point() and t.dtype.itemsize >= 2), torch.float32
    )
    forward = bare_forward(module)
    training = module.training
    try:
        module.training = False
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            zero = forward(torch.zeros(1, into, device=like.device, dtype=half)).float()
            eye = torch.eye(into, device=like.device, dtype=half)
            rows = torch.cat([forward(piece).float() - zero for piece in eye.split(1024)])
            probe = torch.linspace(-1, 1, into, device=like.device, dtype=half)[None]
            off = (forward(probe).float() - zero) - probe.float() @ rows
    except Exception as error:
        raise TargetError(
            f"attach: the weight of {path!r} is {kind_of(module)}, which optx can't read, and a call of the "
            f"module with the identity failed ({type(error).__name__}: {error}). Use an injection that "
            "doesn't need the weight, as optx.LoRA() without dora=True."
        ) from error
    finally:
        module.training = training
    if not off.norm() <= 0.05 * (probe.float() @ rows).norm() + 1e-3:
        raise TargetError(
            f"attach: the weight of {path!r} is {kind_of(module)}, which optx can't read, and the module is "
            "not linear in its input. Use an injection that doesn't need the weight."
        )
    return rows.t()


def _own(module: nn.Module) -> list[Tensor]:
    buffers = [b for b in module._buffers.values() if b is not None]  # pyright: ignore[reportPrivateUsage]
    return [p for p in module._parameters.values() if p is not None] + buffers  # pyright: ignore[reportPrivateUsage]


def _reads_itself(weight: Tensor) -> bool:
    """A subclass with a dequantize() of its own (torchao, quanto), or torch's own quantised tensors."""
    return type(weight).dequantize is not Tensor.dequantize or weight.is_quantized


def _library(weight: Tensor) -> str:
    return type(weight).__module__.partition(".")[0].replace("torch_", "")


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale per tensor, row or block, as one per element."""
    for axis, length in enumerate(shape):
        if scale.ndim > axis and scale.shape[axis] not in (1, length):
            scale = scale.repeat_interleave(-(-length // scale.shape[axis]), dim=axis).narrow(axis, 0, length)
    return scale


# ---- bitsandbytes ----------------------------------------------------------------------------------------


def _read_4bit(weight: Any) -> Tensor:
    functional: Any = sys.modules["bitsandbytes.functional"]
    state, data = weight.quant_state, weight.data
    if getattr(state, "packing_format_for_cpu", False):
        # A call in eval mode has packed it for the processor, in place. bitsandbytes' way back would round
        # the scales to 8 bits once more.
        state = copy.copy(state)
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    return functional.dequantize_4bit(data, state)


def _write_4bit(module: Any, weight: Any, new: Tensor) -> Undo:
    state = weight.quant_state
    made = type(weight)(
        new.contiguous(),
        requires_grad=False,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=module,
    ).to(weight.device)
    made.quant_state.dtype = getattr(state, "original_dtype", state.dtype)
    module.weight = made

    def undo() -> None:
        module.weight = weight
        module.quant_state = state

    return undo


def _scale_8bit(module: Any, weight: Any) -> Tensor:
    own = getattr(weight, "SCB", None)
    return module.state.SCB if own is None else own


def _write_8bit(module: Any, weight: Any, new: Tensor) -> Undo:
    state: Any = getattr(module, "state", None)
    held = (state.CB, state.SCB) if state is not None else None
    made = type(weight)(new.to("cpu"), requires_grad=False, has_fp16_weights=False).to(weight.device)
    module.weight = made

    def undo() -> None:
        module.weight = weight
        if state is not None and held is not None:
            state.CB, state.SCB = held

    return undo


# ---- torchao ---------------------------------------------------------------------------------------------


def _mapping(weight: Any) -> Any:
    types: Any = sys.modules["torchao.quantization.quant_primitives"].MappingType
    point = weight.zero_point
    return types.SYMMETRIC if point is None or not bool(point.any()) else types.ASYMMETRIC


def _write_int8(module: Any, weight: Any, new: Tensor) -> Undo | None:
    granularity: Any = sys.modules["torchao.quantization.granularity"]
    block, shape = list(weight.block_size), list(weight.shape)
    if block == shape:
        each = granularity.PerTensor()
    elif block[:-1] == [1] * (len(shape) - 1):
        each = granularity.PerRow() if block[-1] == shape[-1] else granularity.PerGroup(block[-1])
    else:
        return None
    options = {name: getattr(weight, name) for name in _INT8 if getattr(weight, name, None) is not None}
    made = type(weight).from_hp(new.to(weight.dtype), each, mapping_type=_mapping(weight), **options)
    return _exchange(module, weight, made)


_INT8 = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")


def _write_intx(module: Any, weight: Any, new: Tensor) -> Undo:
    made = type(weight).from_hp(
        new.to(weight.dtype),
        tuple(weight.block_size),
        weight.target_dtype,
        mapping_type=_mapping(weight),
        activation_quantization=weight.activation_quantization,
    )
    return _exchange(module, weight, made)


def _exchange(module: Any, weight: Any, made: Tensor) -> Undo:
    module.weight = nn.Parameter(made, requires_grad=False)

    def undo() -> None:
        module.weight = weight

    return undo


_WRITERS: dict[str, Callable[[Any, Any, Tensor], Undo | None]] = {
    "Params4bit": _write_4bit,
    "Int8Params": _write_8bit,
    "Int8Tensor": _write_int8,
    "IntxUnpackedToInt8Tensor": _write_intx,
}
