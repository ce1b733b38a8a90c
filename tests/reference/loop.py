"""A whole step over several tensors: perpGrad, then AdamR, then the base, in that order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.adamr import gradient_scale, pull
from reference.perpgrad import perp, perp_reach
from reference.torch_bases import adam_moments, adam_move, sgd


class Reference:
    """An optimizer with transforms, in float64.

    Args:
        weights: copied.
        base: ``sgd``, ``adam`` or ``adamw``.
        numbers: options of the base, for all tensors or one mapping per tensor.
        perp: None, or perpGrad's ``rescale``.
        adamr: None, or AdamR's ``weight``, ``norm``, ``normalize``.
        anchors: one per weight, for AdamR.

    Attributes:
        reach: per weight, the sum of the magnitudes that the last step added up: each rounding error of a
            step in another precision is an epsilon of a part of it.
        state_reach: the same of the base's state.
        scale: AdamR's r in the last step.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        base: str,
        numbers: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        perp: bool | None = None,
        adamr: Mapping[str, Any] | None = None,
        anchors: Sequence[Tensor] | None = None,
    ) -> None:
        self.weights = [w.detach().double().clone() for w in weights]
        self.states: list[dict[str, Any]] = [{} for _ in weights]
        self.base, self.perp, self.adamr = base, perp, adamr
        each = [numbers] * len(weights) if isinstance(numbers, Mapping) else numbers
        self.numbers = [dict(n, decoupled=base == "adamw") for n in each]
        self.anchors = [a.detach().double() for a in anchors or self.weights]
        self.reach = [w.abs() for w in self.weights]
        self.state_reach: list[dict[str, Any]] = [{} for _ in weights]
        self.scale = 1.0

    def load(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        """Take weights and base state as they are in an optimizer."""
        for i, p in enumerate(parameters):
            state = optimizer.state.get(p, {})
            kahan = state.get("optx.kahan", torch.zeros_like(p)).double()
            self.weights[i] = p.detach().double() + kahan
            ours = {k: v for k, v in state.items() if not k.startswith("optx.") and v is not None}
            self.states[i] = {k: float(v) if k == "step" else v.double().clone() for k, v in ours.items()}

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step; tensors without a gradient are left alone."""
        active = [i for i, g in enumerate(gradients) if g is not None]
        grads = {i: gradients[i].detach().double() for i in active}  # type: ignore[union-attr]
        sizes = {i: g.abs() for i, g in grads.items()}
        if self.perp is not None:
            sizes = {i: perp_reach(self.weights[i], grads[i], self.perp) for i in active}
            grads = {i: perp(self.weights[i], grads[i], self.perp) for i in active}
        self.scale = self._gradient_scale(grads)
        for i in active:
            n = self.numbers[i]
            a, w = self.anchors[i], self.weights[i]
            size = self._pull(w.abs(), -a.abs(), dict(n, lr=-n["lr"]))
            w = self._pull(w, a, n)
            before = {k: v.abs() if isinstance(v, Tensor) else v for k, v in self.states[i].items()}
            self.weights[i], v_hat = self._base(w, grads[i], self.states[i], n, None)
            upwards = dict(n, lr=-n["lr"], maximize=False)
            self.reach[i], _ = self._base(size, sizes[i], before, upwards, v_hat)
            self.state_reach[i] = before

    def _base(self, w: Tensor, g: Tensor, state: dict[str, Any], n: Any, v_hat: Any) -> tuple[Tensor, Any]:
        if self.base == "sgd":
            return sgd(w, g, state, n), None
        own = adam_moments(w, g, state, n)
        v_hat = own if v_hat is None else v_hat
        return adam_move(w, v_hat, state, n), v_hat

    def _gradient_scale(self, grads: Mapping[int, Tensor]) -> float:
        """From every v-hat as it will be after this step, weights as they are now."""
        if self.base == "sgd" or self.adamr is None or not self.adamr.get("normalize", True):
            return 1.0
        looks = [
            adam_moments(self.weights[i], g, dict(self.states[i]), self.numbers[i]) for i, g in grads.items()
        ]
        return gradient_scale(looks)

    def _pull(self, w: Tensor, anchor: Tensor, n: Mapping[str, Any]) -> Tensor:
        if self.adamr is None:
            return w
        weight = n.get("adamr_weight", self.adamr["weight"])
        return pull(w, anchor, n["lr"] * weight / self.scale, self.adamr.get("norm", "l2"))
