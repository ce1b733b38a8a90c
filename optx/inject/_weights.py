"""How modules use their weights: which are matrices, which convolutions, and on which axis the output is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is (in, out): transformers' Conv1D, and embeddings."""
    return isinstance(module, nn.Embedding) or _is_conv1d_of_transformers(module)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, transformers' Conv1D, or a linear module that holds its weight as packed codes alone."""
    return isinstance(module, nn.Linear) or _is_conv1d_of_transformers(module) or _is_packed_linear(module)


def _is_packed_linear(module: nn.Module) -> bool:
    """As those of GPTQ, AWQ, HQQ and BitNet: they know their widths, and have integers for a weight."""
    if not all(_width(module, side) for side in ("in", "out")) or isinstance(module, nn.Bilinear):
        return False
    held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool for t in held)


def _width(module: nn.Module, side: str) -> int:
    values = (getattr(module, name, None) for name in (f"{side}_features", f"{side}features"))
    return next((value for value in values if type(value) is int and value > 0), 0)


def is_conv(module: nn.Module) -> bool:
    """nn.Conv1d, nn.Conv2d or nn.Conv3d."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_biased(module: nn.Module) -> bool:
    """Whether a linear module, a convolution or a norm adds a bias to its output."""
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # pyright: ignore[reportPrivateUsage]
    known = is_linear(module) or is_conv(module) or isinstance(module, norms)
    return known and isinstance(getattr(module, "bias", None), nn.Parameter)


def channel_axes(module: nn.Module, output: Tensor) -> int:
    """How many axes follow the one that the bias lies along."""
    first = is_conv(module) or isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)  # pyright: ignore[reportPrivateUsage]
    return output.ndim - 2 if first else 0


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    # By name, so that transformers need not be imported.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def add_product(
    output: Tensor, low: Tensor, up: Tensor, scale: float = 1.0, *, owned: bool = False
) -> Tensor:
    """output + scale low up^T, in one pass over the output.

    Args:
        output: (..., out).
        low: (..., r), with the same leading axes.
        up: (out, r).
        scale: of the product.
        owned: nobody else holds the output, so that it may be written to: that saves one more pass, and the
            memory of a second output.
    """
    if owned and output.ndim == 3 and _may_write(output, low, up):
        return output.baddbmm_(low, up.t().expand(len(output), -1, -1), alpha=scale)
    out, rank = up.shape
    flat = torch.addmm(output.reshape(-1, out), low.reshape(-1, rank), up.t(), alpha=scale)
    return flat.view(output.shape)


def _may_write(output: Tensor, *others: Tensor) -> bool:
    """Not a view (autograd would copy it), nothing that rewrites operations, and one dtype."""
    return (
        not torch.compiler.is_compiling()
        and not output._is_view()  # pyright: ignore[reportPrivateUsage]
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        and all(other.dtype == output.dtype for other in others)
        and not (output.requires_grad and output.is_leaf)
    )


def in_sum_precision(tensor: Tensor) -> Tensor:
    """In the precision of sums: float32, or float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def conv_like(module: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """``weight`` convolved over ``x`` with the stride, padding and dilation of a convolution module."""
    conv = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return conv(x, weight, None, module.stride, padding, module.dilation, groups)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear module or an embedding, which may hold its weight in another shape."""
    known: Any = module
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if _is_conv1d_of_transformers(module):
        return known.weight.shape
    return _width(module, "in"), _width(module, "out")


def shape_of(module: Any) -> torch.Size:
    """The shape of the weight that a module computes with, whatever it holds."""
    if is_conv(module):
        return torch.Size((module.out_channels, module.in_channels // module.groups, *module.kernel_size))
    into, out = features(module)
    return torch.Size((into, out) if is_transposed(module) else (out, into))
