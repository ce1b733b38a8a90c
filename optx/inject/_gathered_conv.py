"""A convolution of one sample that computes some of its filters, from some of its input channels.

Weights are gathered by two selections along one axis each: one of both axes is three to five times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx.inject._part import attached
from optx.inject._weights import conv_like


def can_gather(conv: Any) -> bool:
    """Whether it is a plain nn.Conv2d, depthwise or without groups, on which nothing else acts."""
    own = type(conv).forward is nn.Conv2d.forward and type(conv.weight) is nn.Parameter
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return own and (conv.groups == 1 or depthwise) and _alone(conv)


def can_fold(norm: Any) -> bool:
    """Whether a norm's output of a few channels can be had by those channels alone."""
    own = type(norm).forward is nn.BatchNorm2d.forward and type(norm) is not nn.SyncBatchNorm
    return own and not norm.training and norm.running_mean is not None and _alone(norm)


def _alone(module: nn.Module) -> bool:
    container = attached(module)
    return container is not None and len(container.parts) == 1


def output_size(conv: Any, size: Sequence[int]) -> list[int]:
    """Height and width of a convolution's output."""
    if conv.padding == "same":
        return list(size)
    pads = (0, 0) if conv.padding == "valid" else conv.padding
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, pads, spans, conv.stride, strict=True)]


def rows_of(conv: Any, x: Tensor, out: Tensor, into: Tensor | None) -> Tensor:
    """The filters ``out`` alone, (1, k, H', W').

    Args:
        conv: the module.
        x: (1, C_in, H, W).
        out: numbers of the filters, ascending.
        into: numbers of the input's channels that are not all 0, ascending; None: all.
    """
    both, where = (out, None) if conv.groups == 1 or into is None else _shared(out, into)
    if not len(both) or (into is not None and not len(into)):
        y = _zeros(conv, x, len(out))
    elif conv.groups == 1:
        weight = conv.weight.index_select(0, out)
        if into is not None:
            weight, x = weight.index_select(1, into), x.index_select(1, into)
        y = conv_like(conv, x, weight, 1)
    else:
        y = conv_like(conv, x.index_select(1, both), conv.weight.index_select(0, both), len(both))
        if where is not None and len(both) < len(out):
            y = _zeros(conv, x, len(out)).index_copy(1, where, y)
    return y if conv.bias is None else y + conv.bias.index_select(0, out).to(y.dtype).view(-1, 1, 1)


def _shared(out: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """The depthwise filters that have their channel, and where they are among all that are kept."""
    there = torch.isin(out, into, assume_unique=True)
    return out[there], there.nonzero().view(-1)


def _zeros(conv: Any, x: Tensor, filters: int) -> Tensor:
    """What filters without an input give, as autocast would have it."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.new_zeros(1, filters, *output_size(conv, x.shape[-2:]), dtype=dtype)


def normed(norm: Any, y: Tensor, out: Tensor) -> Tensor:
    """A batch norm's output of the channels ``out``, which is all that y has."""
    mean, variance = norm.running_mean.index_select(0, out), norm.running_var.index_select(0, out)
    weight, bias = (None if p is None else p.index_select(0, out) for p in (norm.weight, norm.bias))
    return F.batch_norm(y, mean, variance, weight, bias, False, 0.0, norm.eps)


def spread(y: Tensor, out: Tensor, channels: int) -> Tensor:
    """(1, C, H, W) with y in the channels ``out`` and 0 in the others."""
    last = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    shape = (1, channels, *y.shape[2:])
    layout = torch.channels_last if last else torch.contiguous_format
    whole = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout).zero_()
    return whole.index_copy_(1, out, y) if not y.requires_grad else whole.index_copy(1, out, y)
