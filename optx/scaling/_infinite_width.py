"""Networks of infinite width that can be trained exactly, or whose kernel is known.

Source: Yang, Hu, "Feature Learning in Infinite-Width Neural Networks" (Tensor Programs IV), arXiv 2011.14522,
sections 6 and 7; the kernels are those of Cho and Saul (2009).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, check_choice, check_range, check_whole


class InfiniteWidthLinear(nn.Module):
    """The limit of ``alpha V U x`` at infinite width; made by `optx.scaling.infinite_width_linear`.

    Attributes:
        A: parameter of shape (d + o, d): what U is in coordinates of its random start.
        B: parameter of shape (o, d + o): the same of V.
        alpha: the output's multiplier.
    """

    def __init__(self, d: int, o: int, sigma1: float, sigma2: float, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        start = torch.eye(d + o)
        self.A = nn.Parameter(sigma1 * start[:, :d])
        self.B = nn.Parameter(sigma2 * start[d:])

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs (..., d), outputs (..., o)."""
        return self.alpha * nn.functional.linear(nn.functional.linear(x, self.A), self.B)

    def sample(self, width: int, generator: torch.Generator | None = None) -> FiniteLinear:
        """A network of finite width, whose entries U and V are drawn so that it is this one in the limit.

        Before training U ~ N(0, sigma1^2 / width) and V ~ N(0, sigma2^2 / width), independent; afterwards
        they have what A and B have learnt. It is trained with the same learning rate.

        Args:
            width: hidden neurons, at least 1.
            generator: of the draws, on the CPU; None: torch's own.

        Raises:
            OptxError: the width is no whole number above 0.
        """
        check_whole("InfiniteWidthLinear.sample", "width", width, 1)
        with torch.no_grad():
            shape = (width, self.A.shape[0])
            omega = torch.randn(shape, generator=generator, dtype=self.A.dtype).to(self.A.device)
            omega = omega / math.sqrt(width)
            return FiniteLinear(omega @ self.A, self.B @ omega.T, self.alpha)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"d={self.A.shape[1]}, o={self.B.shape[0]}, alpha={self.alpha:g}"


class FiniteLinear(nn.Module):
    """``alpha V U x``, by `InfiniteWidthLinear.sample`; parameters ``U.weight`` and ``V.weight``."""

    def __init__(self, u: Tensor, v: Tensor, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.U, self.V = _linear(u), _linear(v)

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs (..., d), outputs (..., o)."""
        return self.alpha * self.V(self.U(x))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def infinite_width_linear(
    d: int, o: int, sigma1: float = 1.0, sigma2: float = 1.0, alpha: float = 1.0
) -> InfiniteWidthLinear:
    """A linear network of one infinitely wide hidden layer in the maximal update parametrisation, to train.

    The network is ``alpha V U x`` with U of shape (n, d), V of shape (o, n) and entries of variance
    ``sigma^2 / n``. As n grows it becomes ``alpha B A x`` with A of d + o rows: a module of finite size that
    is trained by the same SGD at the same learning rate and learns features.

    Args:
        d: inputs.
        o: outputs.
        sigma1: of U, at least 0.
        sigma2: of V.
        alpha: multiplier of the output.

    Returns:
        An `InfiniteWidthLinear`, an `nn.Module` in torch's default dtype; its ``sample(width)`` is a network
        of finite width that comes the nearer to it the wider it is, by 1/sqrt(width).

    Paper values:
        None are common to its tasks: rate, alpha and both sigmas are tuned for each.

    Limits: SGD, with momentum, weight decay and clipping by the global norm, for any number of steps; Adam's
        steps depend on the coordinates and have another limit. Networks with an activation have a limit that
        grows with every step, which is not here.

    Keywords: infinite width, maximal update, muP, feature learning, NTK, mean field.

    Evidence: ``test_infinite_width.py``; no recipe.

    Source: "Feature Learning in Infinite-Width Neural Networks", Tensor Programs IV, arXiv 2011.14522.

    Raises:
        OptxError: a size is no whole number above 0, a sigma is below 0, alpha is not finite.

    Example:
        >>> import torch, optx
        >>> net = optx.scaling.infinite_width_linear(d=3, o=2)
        >>> net(torch.ones(1, 3)).tolist()  # a wide network's outputs start at 0
        [[0.0, 0.0]]
        >>> net.sample(width=64).U.weight.shape
        torch.Size([64, 3])
    """
    owner = "infinite_width_linear"
    for argument, size in (("d", d), ("o", o)):
        check_whole(owner, argument, size, 1)
    largest = torch.finfo(torch.get_default_dtype()).max
    for argument, sigma in (("sigma1", sigma1), ("sigma2", sigma2)):
        check_range(owner, argument, sigma, 0.0, largest)
    check_range(owner, "alpha", alpha, -largest, largest)
    return InfiniteWidthLinear(d, o, float(sigma1), float(sigma2), float(alpha))


# ---- kernels of one hidden layer of ReLU ----------------------------------------------------------------


def relu_kernel(correlation: Tensor) -> Tensor:
    """E[relu(u) relu(v)] of two normal variables of variance 1: ``(sqrt(1 - c^2) + c (pi - acos c)) / 2 pi``.

    Args:
        correlation: c in [-1, 1], any shape, floating; a rounding beyond is taken as the end.

    Returns:
        Of the same shape and dtype: 1/2 at c = 1, 1 / 2 pi at 0, 0 at -1. Its derivative is `step_kernel`.
    """
    c, inside = _inside("relu_kernel", correlation)
    value = (torch.sqrt((1 - c) * (1 + c)) + c * (math.pi - torch.acos(c))) / (2 * math.pi)
    return torch.where(inside, value, correlation.clamp_min(0) / 2)


def step_kernel(correlation: Tensor) -> Tensor:
    """E[step(u) step(v)] of two normal variables, the probability that both are above 0.

    Args:
        correlation: c in [-1, 1], any shape, floating; a rounding beyond is taken as the end.

    Returns:
        ``(pi - acos c) / 2 pi``, of the same shape and dtype: 1/2 at c = 1, 1/4 at 0, 0 at -1.
    """
    c, inside = _inside("step_kernel", correlation)
    value = (math.pi - torch.acos(c)) / (2 * math.pi)
    end = correlation.detach()
    return torch.where(inside, value, torch.where(end.isnan(), end, (end > 0).to(value.dtype) / 2))


def _check_floating(owner: str, argument: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise OptxError(f"{owner}: {argument} is a {type(given).__name__}; it must be a floating tensor.")
    if not given.is_floating_point():
        raise OptxError(f"{owner}: {argument} is {given.dtype}; it must be a floating tensor.")


def _inside(owner: str, correlation: Any) -> tuple[Tensor, Tensor]:
    """The correlation, 0 at and beyond the ends (there acos has no slope), and where it is within them."""
    _check_floating(owner, "correlation", correlation)
    slack = 64 * torch.finfo(correlation.dtype).eps
    if bool((correlation.abs() > 1 + slack).any()):
        raise OptxError(
            f"{owner}: a correlation is {float(correlation.abs().max())} in size; it must be within [-1, 1]."
        )
    inside = correlation.abs() < 1
    return torch.where(inside, correlation, torch.zeros_like(correlation)), inside


def relu_network_kernel(
    x: Tensor, y: Tensor | None = None, *, kind: str = "ntk", sigma: float = 1.0
) -> Tensor:
    """Kernel of an infinitely wide network ``v relu(W x) / sqrt(n)`` with v ~ N(0, 1), W ~ N(0, sigma^2).

    Args:
        x: inputs, (N, d), floating.
        y: others, (M, d); None: the same.
        kind: ``"gp"``: the covariance of its outputs at the start (and its kernel when the readout alone is
            trained); ``"ntk"``: the kernel by which SGD on ``W / sigma`` and v trains it.
        sigma: of W, at least 0.

    Returns:
        (N, M), in the dtype of x: ``relu_kernel`` times both norms and sigma^2, and for ``"ntk"`` sigma^2
        times the inner product times ``step_kernel`` besides.

    Raises:
        ShapeError: x and y are no rows of equal length.
        OptxError: x or y is no floating tensor, or they are of two dtypes; the kind is another, or sigma is
            below 0.
    """
    check_choice("relu_network_kernel", "kind", kind, ("gp", "ntk"))
    check_range("relu_network_kernel", "sigma", sigma, 0.0)
    other = x if y is None else y
    for argument, given in (("x", x), ("y", other)):
        _check_floating("relu_network_kernel", argument, given)
    if x.dtype != other.dtype:
        raise OptxError(
            f"relu_network_kernel: x is {x.dtype} and y {other.dtype}; they must be of one dtype."
        )
    if x.ndim != 2 or other.ndim != 2 or x.shape[1] != other.shape[1]:
        raise ShapeError(
            f"relu_network_kernel: x and y have shapes {tuple(x.shape)} and {tuple(other.shape)}; they must "
            "be (N, d) and (M, d)."
        )
    inner = x @ other.T
    norms = x.norm(dim=1)[:, None] * other.norm(dim=1)
    correlation = (inner / norms.clamp_min(torch.finfo(x.dtype).tiny)).clamp(-1, 1)
    gp = sigma**2 * norms * relu_kernel(correlation)
    return gp if kind == "gp" else gp + sigma**2 * inner * step_kernel(correlation)
