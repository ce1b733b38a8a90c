"""What a layer is given in calibration, summed up: squares of each input (Wanda), products of every two
(SparseGPT).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from optx._errors import OptxError

_NUMBERS = 1 << 24  # that are widened to float32 together


class InputSums(ABC):
    """Sums over the tokens that one layer is given.

    Attributes:
        name: of the layer's weight, for messages.
        groups: of a grouped convolution, whose outputs see one group of inputs each; else 1.
        width: inputs of one output.
        tokens: how many were added.
    """

    def __init__(self, name: str, groups: int, width: int) -> None:
        self.name, self.groups, self.width, self.tokens = name, groups, width, 0
        self.total: Tensor | None = None

    @classmethod
    @abstractmethod
    def of(cls, x: Tensor) -> Tensor:
        """What tokens add: x is (tokens, groups, width), in float32 or wider."""

    def add(self, share: Tensor, tokens: int) -> None:
        """Add what `summed` made of some tokens."""
        self.total = share.clone() if self.total is None else self.total.add_(share)
        self.tokens += tokens

    @abstractmethod
    def alike(self) -> Tensor:
        """The mean of inputs that are all alike."""

    def mean(self) -> Tensor:
        """The mean over tokens; of a layer that saw none, that of inputs which are all alike.

        Raises:
            OptxError: it is inf or nan.
        """
        if self.total is None:
            return self.alike()
        if not bool(self.total.isfinite().all()):
            raise OptxError(
                f"prune: what {self.name!r} is given in calibration is inf or nan, so that its inputs can't "
                "be compared; look for where the model's activations overflow, or calibrate it in float32."
            )
        return self.total / self.tokens


def summed(kind: type[InputSums], x: Tensor) -> Tensor:
    """What tokens add to sums of a kind.

    Args:
        kind: of sums.
        x: (tokens, groups, width), any float dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces = x.split(max(1, _NUMBERS // max(1, x[0].numel())))
    total = kind.of(pieces[0].to(wide))
    for piece in pieces[1:]:
        total += kind.of(piece.to(wide))
    return total


class Squares(InputSums):
    """The sum of x_j^2 over tokens: (groups, width)."""

    @classmethod
    def of(cls, x: Tensor) -> Tensor:
        """The squares of each input; wide, as a long calibration must not lose small inputs."""
        return x.square().sum(0, dtype=x.dtype if x.device.type == "mps" else torch.float64)

    def alike(self) -> Tensor:
        """Ones."""
        return torch.ones(self.groups, self.width)


class Products(InputSums):
    """The sum of x x^T over tokens: (groups, width, width)."""

    @classmethod
    def of(cls, x: Tensor) -> Tensor:
        """The products of every two inputs."""
        return torch.bmm(x.permute(1, 2, 0), x.permute(1, 0, 2))

    def alike(self) -> Tensor:
        """Identities."""
        return torch.eye(self.width).expand(self.groups, -1, -1)
