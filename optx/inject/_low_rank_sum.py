"""W + L R without making it: stands for a stack of weights while the module that owns them computes.

Experts live in one tensor (experts, rows, columns), which their module indexes, multiplies or hands to a
grouped product. On each of those W and the two factors act one after the other on the few tokens that go
there; on anything else the sum is made, so that what is computed is right whatever it is.
"""

# L, R and W are matrices.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def made(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """W + L R as a tensor of W's dtype, also under autocast."""
    with torch.autocast(weight.device.type, enabled=False):
        if weight.ndim == 3:
            return torch.baddbmm(weight, left, right)
        return weight + left @ right


class LowRankSum:
    """W + L R, where W is (..., rows, columns), L (..., rows, rank) and R (..., rank, columns).

    No tensor: what does not know ``__torch_function__`` fails on it, and never takes W alone for the sum.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self._weight, self._left, self._right = weight, left, right

    def made(self) -> Tensor:
        """The sum as a tensor."""
        return made(self._weight, self._left, self._right)

    def plus(self, left: Tensor, right: Tensor) -> LowRankSum:
        """The sum with one more product."""
        both = torch.cat([self._left, left], -1), torch.cat([self._right, right], -2)
        return LowRankSum(self._weight, *both)

    # ---- what is the weight's alone -----------------------------------------------------------------

    shape = property(lambda self: self._weight.shape)
    dtype = property(lambda self: self._weight.dtype)
    device = property(lambda self: self._weight.device)
    ndim = property(lambda self: self._weight.ndim)
    is_cuda = property(lambda self: self._weight.is_cuda)

    def size(self, *dim: int) -> Any:
        """As of the weight."""
        return self._weight.size(*dim)

    def dim(self) -> int:
        """As of the weight."""
        return self._weight.ndim

    def data_ptr(self) -> int:
        """Where the weight is; kernels ask for its alignment."""
        return self._weight.data_ptr()

    def __len__(self) -> int:
        return len(self._weight)

    # ---- what stays a sum ---------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        """Some of the matrices of a stack; a part of a matrix is made."""
        whole = isinstance(index, int) or (isinstance(index, Tensor) and index.dtype != torch.bool)
        if self._weight.ndim != 3 or not whole or (isinstance(index, Tensor) and index.ndim > 1):
            return self.made()[index]
        return LowRankSum(self._weight[index], self._left[index], self._right[index])

    def transpose(self, dim0: int, dim1: int) -> Any:
        """(L R)^T is R^T L^T."""
        ndim = self._weight.ndim
        if {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
            return self.made().transpose(dim0, dim1)
        return LowRankSum(self._weight.mT, self._right.mT, self._left.mT)

    mT = property(lambda self: self.transpose(-2, -1))
    T = property(lambda self: self.t())

    def t(self) -> Any:
        """The transpose of one matrix."""
        return self.transpose(0, 1) if self._weight.ndim == 2 else self.made().t()

    # ---- what multiplies, and all else --------------------------------------------------------------

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.before(torch.matmul, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return self.behind(torch.matmul, other)

    def before(self, multiply: Callable[..., Tensor], x: Tensor) -> Tensor:
        """(W + L R) x."""
        return multiply(self._weight, x) + multiply(self._left, multiply(self._right, x))

    def behind(self, multiply: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (W + L R)."""
        low = multiply(multiply(x, self._left, *args, **kwargs), self._right, *args, **kwargs)
        return multiply(x, self._weight, *args, **kwargs) + low

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (W + L R)^T + b."""
        return F.linear(x, self._weight, bias) + F.linear(F.linear(x, self._right), self._left)

    def aligned(self) -> LowRankSum:
        """The same with a rank whose rows are whole 16 bytes, which grouped products ask for."""
        lack = -self._left.shape[-1] % (16 // self._left.element_size())
        if not lack:
            return self
        return LowRankSum(self._weight, F.pad(self._left, (0, lack)), F.pad(self._right, (0, 0, 0, lack)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.made(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A product with it, in two steps; anything else with the sum."""
        named = dict(kwargs or {})
        own = [isinstance(value, cls) for value in args]
        if own == [False, True] or (own == [False, True, False] and not named):
            found = _multiplied(func, args, named)
            if found is not None:
                return found
        if own == [True, False] and func in _PRODUCTS:
            return args[0].before(_PRODUCTS[func], args[1])
        return func(*map(_plain, args), **{key: _plain(value) for key, value in named.items()})


def _plain(value: Any) -> Any:
    return value.made() if isinstance(value, LowRankSum) else value


def _multiplied(func: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]) -> Tensor | None:
    """x times the sum, if this function is a product that is known."""
    x, total = args[0], args[1]
    if func is F.linear:
        return total.linear(x, *args[2:], **named)
    if func in _PRODUCTS and not named and len(args) == 2:
        return total.behind(_PRODUCTS[func], x)
    if func in _grouped() and not any(value is not None for key, value in named.items() if key != "offs"):
        return total.aligned().behind(func, x, *args[2:], **named)
    return None


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.matmul: torch.matmul,
    Tensor.matmul: torch.matmul,
    Tensor.__matmul__: torch.matmul,
    torch.mm: torch.mm,
    Tensor.mm: torch.mm,
    torch.bmm: torch.bmm,
    Tensor.bmm: torch.bmm,
}


def _grouped() -> list[Any]:
    """Products of groups of rows with one matrix each: torch's, and transformers' for where it has none."""
    found = [getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return [one for one in [*found, fallback, getattr(fallback, "default", None)] if one is not None]
