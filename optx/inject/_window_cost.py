"""What blocks of windows cost, in multiply-adds that are counted and not worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class WindowCost:
    """Multiply-adds of the last forward in the served blocks, all images together.

    Attributes:
        active: attention and MLP of the windows that are kept, as gathered inference computes them.
        predictor: of all predictors; the same however many windows are kept.
        dense: attention and MLP of all windows, without predictors.
    """

    active: int
    predictor: int
    dense: int

    @property
    def share(self) -> float:
        """What is computed, predictors included, as a share of the dense blocks."""
        return (self.active + self.predictor) / self.dense

    def __str__(self) -> str:
        return (
            f"{self.active:,} multiply-adds in kept windows + {self.predictor:,} in predictors of "
            f"{self.dense:,} dense ({self.share:.1%})"
        )


def macs(call: Callable[[Tensor], Any], x: Tensor) -> int:
    """The multiply-adds of a call; it is made."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention on a CPU is not counted; what it is made of is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(x)
    return counter.get_total_flops() // 2
