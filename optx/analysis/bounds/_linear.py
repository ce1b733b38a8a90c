"""Which modules and calls are linear (but for a bias), and their matrices.

A matrix is read off by calling what it belongs to, in float64, with every unit vector: strides, padding and
groups of a convolution, or the order of a permutation, are nowhere written a second time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optx._errors import OptxError
from optx.lipschitz._slopes import own_type

LARGEST = 2**26  # numbers in a matrix; 512 MiB


def _weight(module: Any) -> Tensor:
    return module.weight.detach().to("cpu", torch.float64)


def _affine(module: Any) -> Callable[[Tensor], Tensor]:
    weight = _weight(module)
    return lambda x: F.linear(x, weight)


def _convolution(module: Any) -> Callable[[Tensor], Tensor]:
    weight = _weight(module)
    return lambda x: module._conv_forward(x, weight, None)


def _transposed(call: Callable[..., Tensor]) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    def made(module: Any) -> Callable[[Tensor], Tensor]:
        weight, m = _weight(module), module
        return lambda x: call(x, weight, None, m.stride, m.padding, m.output_padding, m.groups, m.dilation)

    return made


def _batch_norm(module: Any) -> Callable[[Tensor], Tensor]:
    if module.training or module.running_var is None:
        raise OptxError(
            f"{type(module).__name__} divides by the batch's own deviation in training mode, so that samples "
            "depend on each other; call model.eval()"
            if module.running_var is not None
            else f"{type(module).__name__} keeps no running statistics, so that samples depend on each other"
        )
    scale = (module.running_var.to("cpu", torch.float64) + module.eps).rsqrt()
    scale = scale * _weight(module) if module.weight is not None else scale
    return lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 2))


def _dropout(module: Any) -> Callable[[Tensor], Tensor]:
    if module.training and module.p > 0:
        raise OptxError(f"{type(module).__name__} drops units in training mode; call model.eval()")
    return lambda x: x


def _called(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x)


_MODULES: dict[type[nn.Module], Callable[[Any], Callable[[Tensor], Tensor]]] = {
    nn.Linear: _affine,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    nn.ConvTranspose1d: _transposed(F.conv_transpose1d),
    nn.ConvTranspose2d: _transposed(F.conv_transpose2d),
    nn.ConvTranspose3d: _transposed(F.conv_transpose3d),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys(
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Identity, nn.Flatten, nn.Unflatten), _called
    ),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _called),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.PixelShuffle, nn.PixelUnshuffle), _called),
    **dict.fromkeys(
        (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d), _called
    ),
}

# Calls that are linear in all their values together.
JOINTLY: set[Any] = {
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone"),
    *(
        torch.cat,
        torch.stack,
        torch.mean,
        torch.sum,
        "mean",
        "sum",
        operator.getitem,
        operator.neg,
        torch.neg,
    ),
    *(F.pad, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    *(operator.add, operator.sub, torch.add, torch.sub, "add", "sub", "neg"),
    *(operator.iadd, operator.isub, "add_", "sub_", "float", "double", "to"),
}
# Calls that are linear in each value while the others are constants.
SEPARATELY: set[Any] = {
    *(operator.mul, torch.mul, "mul", operator.matmul, torch.matmul, "matmul", torch.mm, "mm"),
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
}
# Calls that are linear in their first value while the others are constants.
FIRST: set[Any] = {operator.truediv, torch.div, "div", operator.imul, operator.itruediv, "mul_", "div_"}

# What is written into its first argument, and what may be called instead.
IN_PLACE: dict[Any, Any] = {
    **{operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul},
    **{operator.itruediv: operator.truediv, "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div"},
}


# Those that leave a value's numbers as they are, in their order.
RESHAPES: set[Any] = {
    *(
        torch.flatten,
        torch.reshape,
        "flatten",
        "reshape",
        "view",
        "contiguous",
        "clone",
        "float",
        "double",
        "to",
    ),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
}


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear module that is known."""
    return own_type(module, _MODULES) is not None


def linear_call(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a linear module computes of float64, without its bias; raises where its mode forbids."""
    kind = own_type(module, _MODULES)
    if kind is None:
        raise OptxError(f"{type(module).__name__} is not linear")
    return _MODULES[kind](module)


def matrices(call: Callable[..., Any], shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The matrix of a call for each of its values, and the shape of what it returns, without the batch.

    Args:
        call: takes float64 tensors (1, *shape).
        shapes: of the values.

    Raises:
        OptxError: it is not linear, or a matrix would be too large.
    """
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
    offset = call(*zeros)
    if not isinstance(offset, Tensor) or offset.ndim < 1 or offset.shape[0] != 1:
        raise OptxError("it does not return one tensor with the batch first")
    rows = offset.numel()
    made = list[Tensor]()
    for place, zero in enumerate(zeros):
        if rows * zero.numel() > LARGEST:
            raise OptxError(
                f"its matrix would be {rows} x {zero.numel()}; a convolution is unrolled for small inputs "
                "only"
            )

        def one(x: Tensor, place: int = place) -> Tensor:
            return call(*zeros[:place], x, *zeros[place + 1 :]) - offset

        units = torch.eye(zero.numel(), dtype=torch.float64).reshape(-1, *zero.shape)
        columns = torch.vmap(one, chunk_size=256)(units)
        made.append(columns.reshape(zero.numel(), rows).T.contiguous())
    _check_linear(call, zeros, offset, made)
    return made, tuple(offset.shape[1:])


def _check_linear(call: Callable[..., Any], zeros: list[Tensor], offset: Tensor, made: list[Tensor]) -> None:
    """At one point: a subclass or an argument may make it something else."""
    generator = torch.Generator().manual_seed(0)
    point = [torch.randn(zero.shape, generator=generator, dtype=torch.float64) for zero in zeros]
    wanted = sum((matrix @ x.flatten() for matrix, x in zip(made, point, strict=True)), torch.zeros(()))
    got = (call(*point) - offset).flatten()
    if not torch.allclose(got, wanted, rtol=1e-9, atol=1e-9 * float(got.abs().max()) + 1e-300):
        raise OptxError("it is not linear in what it is given")
