"""STABLE-RPS's gradient scaler: a slot's gradient is divided by how much a step on it moves the weights.

Source: arXiv 2310.11611, section 4.2; the modes are those of the authors' code (apd10/FakeRoast).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from optx._errors import TransformError, warn
from optx._names import placed_like
from optx._rules import rule
from optx.step.declared import like_weight
from optx.step.scale_free import is_scale_free
from optx.step.transform import Group, Host, Transform

MODES = ("v1", "v2", "v3", "v4", "v5")


@rule(writes="g")
def divided(g: Any, inverse: Any) -> Any:
    """The gradient of a slot over its Gamma; of other weights, whose inverse is 1, as it is."""
    return g * inverse


def gamma(mode: str, totals: Mapping[str, Tensor]) -> Tensor:
    """Gamma of each slot, (m,) float64: v1 is (sum of scales)^2 / (count + 1e-3).

    Args:
        mode: which.
        totals: ``count``, ``sum`` and ``squares`` of the scales on each slot.
    """
    count, total, squares = totals["count"], totals["sum"], totals["squares"]
    match mode:
        case "v1":
            return total.square() / (count + 1e-3)
        case "v2":
            return total
        case "v3":
            return total / count.clamp_min(1.0)
        case "v4":
            return squares.sqrt()
        case _:
            return squares


class Shares(Protocol):
    """The handle of a shared array."""

    @property
    def psi(self) -> nn.Parameter:
        """It."""
        ...

    @property
    def revision(self) -> int:
        """Another after places or scales were loaded."""
        ...

    def gamma(self, mode: str) -> Tensor:
        """Per slot, float64."""
        ...


class GradScale(Transform):
    """d psi becomes d psi / (Gamma + 1e-6), before the base's step; made by `SharedHandle.grad_scale`."""

    name = "grad_scale"
    rules: ClassVar = {"gradient": divided}

    def __init__(self, handle: Shares, mode: str) -> None:
        self.options = {}
        self.slots = {"inverse": like_weight(saved=False)}
        self.handle, self.mode = handle, mode
        self._revision = handle.revision

    @property
    def psi(self) -> nn.Parameter:
        """The array."""
        return self.handle.psi

    def arguments(self) -> dict[str, Any]:
        """What makes it again."""
        return {"handle": self.handle, "mode": self.mode}

    def __repr__(self) -> str:
        return f"handle.grad_scale({self.mode!r})"

    def serves(self, group: Group) -> bool:
        """The group that the array is in, alone."""
        return super().serves(group) and any(p is self.psi for p in group["params"])

    def check(self, base: torch.optim.Optimizer) -> None:
        """Raise unless the optimizer steps the array."""
        if not any(p is self.psi for group in base.param_groups for p in group["params"]):
            raise TransformError(
                "grad_scale: the shared array is not among the optimizer's parameters. Make the optimizer of "
                "model.parameters() after attaching, or use optx.wrap(optimizer, handle)."
            )
        if is_scale_free(base):
            warn(
                f"grad_scale: {type(base).__name__} divides gradients by their own size or takes their sign, "
                "so that a scaled gradient makes the same step, and how far weights move depends on init_std."
                ' Use SGD, or leave the scaler out and attach with optx.StableRPS(..., param_scale="unit").'
            )

    def bind(self, optimizer: Host) -> None:
        """Look at the order: clipping goes by the norm of what is stepped."""
        self._check_order(optimizer)

    def before_step(self, optimizer: Host) -> None:
        """Transforms that came since stand before this one; scales that were loaded make another Gamma."""
        self._check_order(optimizer)
        if self._revision != self.handle.revision:
            optimizer.slot(self.psi, self, "inverse").copy_(self._inverse(self.psi))
            self._revision = self.handle.revision

    def _inverse(self, p: Tensor) -> Tensor:
        inverse = 1.0 / (self.handle.gamma(self.mode) + 1e-6)
        return placed_like(inverse.to(torch.float32), p)

    def _check_order(self, optimizer: Host) -> None:
        names = [one.name for one in optimizer.transforms]
        if "clip" in names[: names.index(self.name)]:
            raise TransformError(
                "grad_scale: Clip comes before it, and would clip by the norm of gradients that are not "
                "scaled yet. Give grad_scale first: optx.wrap(optimizer, handle.grad_scale(), optx.Clip())."
            )

    def init_slot(self, name: str, p: Tensor, optimizer: Host) -> Tensor:
        """1 / (Gamma + 1e-6) of the array; 1 of the other parameters in its group."""
        if p is not self.psi:
            return self.slots[name].zeros(p).fill_(1.0)
        return self._inverse(p)
