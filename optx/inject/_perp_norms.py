"""Which modules are norms with a scale to train, by what they are and not only by what they are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optx.inject._part import RESERVED, bare_forward


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a scale of its own: torch's, or one that computes as such.

    One of transformers' RMSNorm classes is known by its name or by what it does: a leaf whose only parameters
    are a vector ``weight`` and perhaps ``bias``, and whose output does not grow with its input.
    """
    weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    if weight is None or any(name != RESERVED for name, _ in module.named_children()):
        return False
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)  # pyright: ignore[reportPrivateUsage]
    if isinstance(module, kinds):
        return True
    vectors = set(module._parameters) <= {"weight", "bias"} and weight.ndim == 1  # pyright: ignore[reportPrivateUsage]
    return vectors and ("norm" in type(module).__name__.lower() or _normalises(module, weight))


def _normalises(module: nn.Module, weight: Tensor) -> bool:
    """Whether ten thousand times the input makes the same output, and the input matters."""
    if weight.is_meta or not weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, 3 * weight.numel(), device=weight.device).sin().view(3, -1)
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            one, same, other = (
                bare_forward(module)(y.to(weight.dtype)) for y in (16 * x, 4096 * x, 16 * x.flip(1))
            )
    except Exception:
        return False
    whole = isinstance(one, Tensor) and one.shape == x.shape
    return whole and torch.allclose(one, same, rtol=0.02, atol=0.02) and not torch.equal(one, other)
