"""Activations that keep norms: within small groups of units they permute or reflect.

Where a ReLU loses the gradient of half its units, the Jacobians of these are orthogonal everywhere, so that
networks of bounded Lipschitz constant use what they are allowed.

Sources: MaxMin and GroupSort: Anil, Lucas, Grosse, "Sorting out Lipschitz function approximation", ICML 2019,
arXiv 1811.05381; Householder: Singla, Singla, Feizi, "Improved deterministic l2 robustness on CIFAR-10 and
CIFAR-100", ICLR 2022, arXiv 2108.04062.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optx._errors import ShapeError, check_whole


class GroupSort(nn.Module):
    """Sort neighbouring units in groups, in ascending order.

    The Jacobian is a permutation everywhere; equal values keep their places.

    Args:
        group_size: g, how many units are sorted together; None: all of ``dim`` (FullSort).
        dim: along which groups lie; 1 for channels of images.

    Paper values:
        ``group_size=2`` (MaxMin's), ``group_size=4``, ``group_size=None``: those compared in its figures;
        none is said to be best.

    Limits: ``dim`` must be a multiple of ``group_size``. After it, weights that are to bound the network
        must be bounded themselves.

    Keywords: MaxMin, FullSort, OPLU, 1-Lipschitz, gradient norm preservation, certified robustness.

    Evidence: ``test_lipschitz_activations.py``; no recipe.

    Source: arXiv 1811.05381, section 4.1.

    Raises:
        ShapeError: ``dim`` is no multiple of ``group_size``.
        OptxError: group_size is below 2, or dim is no whole number.

    Example:
        >>> import torch, optx
        >>> optx.GroupSort(group_size=3)(torch.tensor([[3.0, 1.0, 2.0, 9.0, 8.0, 7.0]]))
        tensor([[1., 2., 3., 7., 8., 9.]])
    """

    def __init__(self, group_size: int | None, dim: int = -1) -> None:
        super().__init__()
        self.group_size = (
            None if group_size is None else check_whole("GroupSort", "group_size", group_size, 2)
        )
        self.dim = check_whole("GroupSort", "dim", dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape and float dtype, sorted."""
        size = x.shape[self.dim] if self.group_size is None else self.group_size
        groups = in_groups("GroupSort", x, size, self.dim)
        return torch.sort(groups, dim=-1, stable=True).values.flatten(-2).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"group_size={self.group_size}, dim={self.dim}"


class MaxMin(nn.Module):
    """Put the larger of every two neighbouring units first.

    `GroupSort` of two, in descending order. The Jacobian is a permutation everywhere, at ties the identity.

    Args:
        dim: along which pairs lie; 1 for channels of images.

    Paper values:
        None to set.

    Limits: ``dim`` must be even.

    Keywords: GroupSort, OPLU, 1-Lipschitz, gradient norm preservation, certified robustness.

    Evidence: ``optx run certify``; ``test_lipschitz_activations.py``.

    Source: arXiv 1811.05381, section 4.1.

    Raises:
        ShapeError: ``dim`` is odd.
        OptxError: dim is no whole number.

    Example:
        >>> import torch, optx
        >>> optx.MaxMin()(torch.tensor([[1.0, 2.0, 4.0, 3.0]]))
        tensor([[2., 1., 4., 3.]])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = check_whole("MaxMin", "dim", dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape and float dtype, in order."""
        first, second = in_groups("MaxMin", x, 2, self.dim).unbind(-1)
        # Not maximum and minimum, which halve the gradient at ties.
        ordered = first >= second
        pairs = torch.stack([first.where(ordered, second), second.where(ordered, first)], -1)
        return pairs.flatten(-2).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        """Its argument."""
        return f"dim={self.dim}"


class Householder(nn.Module):
    """Reflect each group of units at a learned hyperplane, if it lies on its negative side.

    phi(x) = x if v^T x >= 0, else (I - 2 v v^T) x, with a unit vector v for each group. It begins as
    `MaxMin`, with v = (1, -1)/sqrt 2 (of larger groups, the first and last unit). The Jacobian is orthogonal
    everywhere, on the hyperplane the identity.

    Args:
        channels: the size of ``dim``.
        group_size: units of a group.
        dim: along which groups lie; 1 for channels of images.

    Paper values:
        ``group_size=2`` (the default).

    Limits: ``channels`` must be a multiple of ``group_size``. ``weight`` (groups, group_size) is divided by
        its norm in float32 at every call; a row of zeros has none, and gives nan.

    Keywords: reflection, MaxMin, 1-Lipschitz, gradient norm preservation, certified robustness.

    Evidence: ``test_lipschitz_activations.py``; no recipe.

    Source: arXiv 2108.04062, section 5.

    Raises:
        ShapeError: ``dim`` is not of size channels, or channels no multiple of ``group_size``.
        OptxError: an argument out of range.

    Example:
        >>> import torch, optx
        >>> optx.Householder(4)(torch.tensor([[1.0, 2.0, 4.0, 3.0]])).round(decimals=4)
        tensor([[2., 1., 4., 3.]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, channels: int, group_size: int = 2, dim: int = -1) -> None:
        super().__init__()
        self.channels = check_whole("Householder", "channels", channels, 2)
        self.group_size = check_whole("Householder", "group_size", group_size, 2)
        self.dim = check_whole("Householder", "dim", dim)
        if self.channels % self.group_size:
            raise ShapeError(_odd("Householder", "channels", self.channels, self.group_size))
        self.weight = nn.Parameter(torch.empty(self.channels // self.group_size, self.group_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """v = (1, 0, ..., 0, -1)/sqrt 2."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, 0], self.weight[:, -1] = 0.5**0.5, -(0.5**0.5)

    def normals(self) -> Tensor:
        """The unit vectors, (groups, group_size), float32 or float64."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return weight / weight.norm(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape and float dtype, reflected where it has to be."""
        groups = in_groups("Householder", x, self.group_size, self.dim)
        if x.shape[self.dim] != self.channels:
            raise ShapeError(
                f"Householder: dimension {self.dim} of x is {x.shape[self.dim]}; channels is {self.channels}."
            )
        v = self.normals()
        wide = groups.to(torch.promote_types(groups.dtype, v.dtype))
        below = torch.relu(-(wide * v).sum(-1, keepdim=True))
        return (wide + 2 * below * v).to(x.dtype).flatten(-2).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"channels={self.channels}, group_size={self.group_size}, dim={self.dim}"


def in_groups(owner: str, x: Tensor, size: int, dim: int) -> Tensor:
    """``x`` with ``dim`` last, and in groups: (..., groups, size)."""
    if not -x.ndim <= dim < x.ndim:
        raise ShapeError(f"{owner}: dim is {dim}; x has {x.ndim} dimensions, of shape {tuple(x.shape)}.")
    if size < 1 or x.shape[dim] % size:
        raise ShapeError(_odd(owner, f"dimension {dim} of x", x.shape[dim], size))
    return x.movedim(dim, -1).unflatten(-1, (-1, size))


def _odd(owner: str, what: str, have: int, size: int) -> str:
    return f"{owner}: {what} is {have}; it must be a multiple of the group's size, {size}."
