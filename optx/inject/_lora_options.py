"""What the parts of LoRA have to know of `optx.LoRA`, which makes them."""

from __future__ import annotations

from typing import Protocol


class Options(Protocol):
    """Its options, and what they come to at one module."""

    @property
    def dropout(self) -> float:
        """On the update's input, while training."""
        ...

    @property
    def dora(self) -> bool:
        """Whether a magnitude per output is trained."""
        ...

    @property
    def bias(self) -> str:
        """Which biases are trained besides."""
        ...

    @property
    def lora_bias(self) -> bool:
        """Whether B has a bias."""
        ...

    @property
    def init(self) -> str:
        """Where the factors start."""
        ...

    def checked_rank(self, path: str, out: int, into: int) -> int:
        """The rank at a path, for a matrix of this size."""
        ...

    def scale_at(self, path: str, rank: int) -> float:
        """What the product is multiplied by."""
        ...
