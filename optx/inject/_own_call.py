"""Modules whose class has a forward of its own: what it makes of the weight is seen by calling it.

A subclass of nn.Linear may scale, mask, standardise or round its weight at every call, pad its input, or hand
out more than one tensor. What optx adds knows the module's weight, input and output as torch's own class uses
them; where they are used in another way, a merge would go into a tensor that means something else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from optx._errors import MergeError, TargetError
from optx._names import is_dtensor
from optx.inject import _quantised
from optx.inject._offload import HOOK, kept_elsewhere
from optx.inject._part import bare_forward
from optx.inject._weights import (
    channel_axes,
    conv_like,
    features,
    is_biased,
    is_conv,
    is_linear,
    is_transposed,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm)
_TORCHS = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS, *_NORMS)}
_TORCHS_INNER = {kind._conv_forward for kind in _CONVOLUTIONS}  # pyright: ignore[reportPrivateUsage]


def check_attach(module: nn.Module, path: str, *, needs_weight: bool) -> None:
    """Raise if what is added would not know what a module's own forward hands out.

    Args:
        module: a matched one.
        path: of it, for errors.
        needs_weight: whether the weight is worked with, and not only added to what the module computes.

    Raises:
        TargetError: it hands out no tensor, one of another shape, or makes something else of its weight.
    """
    seen = _seen(module)
    if seen is None or isinstance(seen, Exception):
        return
    got, want, size = seen
    kind = type(module).__name__
    if not isinstance(got, Tensor):
        raise TargetError(
            f"attach: {path!r} is a {kind} whose forward hands out a {type(got).__name__} and no tensor, so "
            "what is added would not know which of them is its output. Leave it out of targets."
        )
    if got.shape != want.shape:
        raise TargetError(
            f"attach: {path!r} is a {kind} whose forward makes {tuple(got.shape)} where its widths say "
            f"{tuple(want.shape)}, so what is added would not fit. Leave it out of targets."
        )
    if needs_weight and not _agree(got, want, size):
        raise TargetError(
            f"attach: {path!r} is a {kind} whose forward makes something else of its weight than a "
            f"{_torchs(module)} does, and this method works with the weight itself. Use one that only adds "
            "to the output, as optx.LoRA() without dora=True."
        )


def check_values(module: nn.Module, path: str) -> None:
    """Raise if there is nothing yet for a method that works with the weight itself.

    Raises:
        TargetError: it is on the meta device, and nothing brings it from elsewhere.
    """
    weight: Any = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    if isinstance(weight, Tensor) and weight.is_meta and kept_elsewhere(module, "weight") is None:
        raise TargetError(
            f"attach: {path}.weight is on the meta device and has no values yet, and this method works with "
            "them. Load them first, and attach then."
        )


def check_merge(module: nn.Module, path: str) -> None:
    """Raise if a merged weight would mean something else in a module's own forward.

    Raises:
        MergeError: the module's call is not that of torch's class, or can't be made here to be looked at.
    """
    seen = _seen(module)
    if seen is None:
        return
    kind = type(module).__name__
    if isinstance(seen, Exception):
        raise MergeError(
            f"merge: {path!r} is a {kind} with a forward of its own, and a call of it to see what that makes "
            f"of its weight failed ({type(seen).__name__}: {seen}). Keep the adapter attached."
        )
    if not isinstance(seen[0], Tensor) or not _agree(*seen):
        raise MergeError(
            f"merge: {path!r} is a {kind} whose forward makes something else of its weight or input than a "
            f"{_torchs(module)} does, so a merged weight would not be what is attached. Keep it attached."
        )


def adds_bias(module: nn.Module) -> bool:
    """Whether a module has a bias that comes on top of all else it computes, as far as can be seen here.

    A norm with its activation in it (BiT's, timm's) has more behind its bias.
    """
    return is_biased(module) and bias_axes(module) is not None


def bias_axes(module: nn.Module) -> int | None:
    """Whether a bias is added along the second axis of the output (1) or the last (-1); None if it is not the
    last that is done.

    A LayerNorm of images (ConvNeXt's) has its channels second, as a convolution has.
    """
    usual = 1 if channel_axes(module, torch.empty(1, 1, 1)) else -1
    if not has_own_call(module) or parametrize.is_parametrized(module):
        return usual
    bias: Any = module.bias
    if bias.is_meta or is_dtensor(bias) or isinstance(bias, nn.UninitializedParameter):
        return usual
    probes = [_probe(module, bias)]
    if isinstance(module, nn.LayerNorm):
        probes.append(_numbers((3, *module.normalized_shape, 5, 7), bias))
    changes = [change for x in probes if (change := _change(module, bias, x)) is not None]
    along = [axis for change in changes for axis in (usual, -usual) if _is_along(change, _step(bias), axis)]
    return along[0] if along else None if changes else usual


def _change(module: nn.Module, bias: Any, x: Tensor) -> Tensor | None:
    """What a step of the bias changes; None if no such call can be made."""
    before = _called(module, x)
    module._parameters["bias"] = nn.Parameter(bias.detach() + _step(bias), requires_grad=False)  # pyright: ignore[reportPrivateUsage]
    try:
        after = _called(module, x)
    finally:
        module._parameters["bias"] = bias  # pyright: ignore[reportPrivateUsage]
    both = isinstance(before, Tensor) and isinstance(after, Tensor)
    return after.double() - before.double() if both else None


def _step(bias: Tensor) -> Tensor:
    return torch.arange(bias.numel(), device=bias.device, dtype=bias.dtype).cos().view_as(bias)


def _is_along(change: Tensor, step: Tensor, axis: int) -> bool:
    shaped = step.view(*step.shape, *(1 for _ in range(change.ndim - 2 if axis == 1 else 0)))
    fits = change.ndim >= shaped.ndim and change.shape[axis] == step.shape[-1]
    return fits and _agree(change, shaped.expand_as(change), change.norm())


def has_own_call(module: nn.Module) -> bool:
    """Whether a linear module, convolution or norm computes by code that is not torch's."""
    kind: Any = type(module)
    if is_conv(module) and kind._conv_forward not in _TORCHS_INNER:
        return True
    if HOOK in module.__dict__:  # accelerate's wrapper of the class's forward
        return not _is_torchs(kind.forward)
    return not _is_torchs(bare_forward(module))


def _is_torchs(forward: Any) -> bool:
    while isinstance(forward, functools.partial):
        forward = forward.func
    forward = getattr(forward, "__func__", forward)
    return forward in _TORCHS or getattr(forward, "__module__", "") == "transformers.pytorch_utils"


def _seen(module: nn.Module) -> tuple[Any, Tensor, Tensor] | Exception | None:
    """What a module makes of a small input, what torch's class would, and how large that is without the bias;
    None where nobody need ask."""
    if not (is_linear(module) or is_conv(module)) or not has_own_call(module):
        return None
    if parametrize.is_parametrized(module) or _quantised.kind_of(module):
        return None  # merged into by other rules; and looking at a parametrized weight may have effects
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return None
    if weight.is_meta or is_dtensor(weight):
        return None
    got = _called(module, x := _probe(module, weight))
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        want, shift = _as_torchs(module, x, weight)
        return got if isinstance(got, Exception) else (got, want + shift, want.double().norm())


def _called(module: nn.Module, x: Tensor) -> Any:
    """What the module alone makes of an input; the error, where it makes none."""
    training = module.training
    try:
        module.training = False
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return bare_forward(module)(x)
    except Exception as error:
        return error
    finally:
        module.training = training


def _probe(module: Any, like: Tensor) -> Tensor:
    """A small input of the shape that a module takes."""
    shape: tuple[int, ...]
    if is_linear(module):
        shape = (3, features(module)[0])
    elif is_conv(module):
        sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        shape = (1, module.in_channels, *((size - 1) * wide + 2 * step + 1 for size, wide, step in sizes))
    elif isinstance(module, nn.LayerNorm):
        shape = (3, *module.normalized_shape)
    else:
        names = " ".join(kind.__name__ for kind in type(module).__mro__)
        space = next((n for n in (1, 2, 3) if f"Norm{n}d" in names), 2)
        shape = (2, module.bias.numel(), *(3 for _ in range(space)))
    return _numbers(shape, like)


def _numbers(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Of both signs, the same at every look; they take none from a generator."""
    count = torch.Size(shape).numel()
    return torch.arange(count, device=like.device, dtype=torch.float32).sin().view(shape).to(like.dtype)


def _as_torchs(module: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What torch's class makes of an input, and the bias that it adds."""
    bias: Tensor | None = getattr(module, "bias", None)
    bias = x.new_zeros(()) if bias is None else bias
    if is_linear(module):
        return F.linear(x, weight.t() if is_transposed(module) else weight), bias
    return conv_like(module, x, weight, module.groups), bias.view(-1, *(1 for _ in module.kernel_size))


def _agree(got: Tensor, want: Tensor, size: Tensor) -> bool:
    """Up to rounding, as a share of what is to be seen."""
    off = 0.01 if got.dtype.itemsize < 4 else 0.001
    return got.shape == want.shape and bool((got.double() - want.double()).norm() <= off * size + 1e-6)


def _torchs(module: nn.Module) -> str:
    return next((kind.__name__ for kind in (nn.Linear, *_CONVOLUTIONS) if isinstance(module, kind)), "Linear")
