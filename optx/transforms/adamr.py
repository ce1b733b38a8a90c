"""AdamR: a decoupled pull towards the pretrained weights, normalised by one global gradient scale.

Source: "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models", arXiv 2410.09344,
and its official code (AdamR.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TransformError, check_range
from optx._names import whole
from optx._rules import rule
from optx._transform import Group, Moments, Slot, Transform, like_weight, per_tensor
from optx.ops import maximum, sign, sqrt, where
from optx.transforms._anchors import Anchors

if TYPE_CHECKING:
    from optx._wrap import Wrapped


@rule(writes="w")
def pull_l2(w: Any, anchor: Any, rate: Any) -> Any:
    """Towards the anchor, in proportion to the distance."""
    return w - rate * (w - anchor)


@rule(writes="w")
def pull_l1(w: Any, anchor: Any, rate: Any) -> Any:
    """Towards the anchor, by the same amount everywhere."""
    return w - rate * sign(w - anchor)


@rule(writes="w")
def to_zero_l2(w: Any, rate: Any) -> Any:
    """The pull to an anchor of zero, which needs no anchor in memory."""
    return w - rate * w


@rule(writes="w")
def to_zero_l1(w: Any, rate: Any) -> Any:
    """The same, by a constant amount."""
    return w - rate * sign(w)


@rule(writes="second")
def predict_second(v_sum: Any, grad_sq: Any, beta2: Any, step: Any) -> Any:
    """Sum of v-hat after this step's gradient: linear in v, so the last step's sum and |g|^2 suffice."""
    return (beta2 * v_sum + (1.0 - beta2) * grad_sq) / (1.0 - beta2**step)


@rule(writes=("v_before", "decayed_sq"))
def second_and_l2(w: Any, g: Any, exp_avg_sq: Any, weight_decay: Any) -> Any:
    """Summed: the second moment, and the squared gradient where the base couples weight decay with it."""
    d = g + weight_decay * w
    return exp_avg_sq, d * d


@rule(writes="second")
def next_second_l2(v_before: Any, decayed_sq: Any, beta2: Any, step: Any) -> Any:
    """The sum of v-hat after this step."""
    return (beta2 * v_before + (1.0 - beta2) * decayed_sq) / (1.0 - beta2**step)


@rule(writes="v_now")
def next_largest(g: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, beta2: Any) -> Any:
    """Summed: amsgrad's second moment after this step, the largest so far."""
    return maximum(max_exp_avg_sq, beta2 * exp_avg_sq + (1.0 - beta2) * g * g)


@rule(writes="v_now")
def next_largest_l2(
    w: Any, g: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, beta2: Any, weight_decay: Any
) -> Any:
    """Both."""
    d = g + weight_decay * w
    return maximum(max_exp_avg_sq, beta2 * exp_avg_sq + (1.0 - beta2) * d * d)


@rule(writes="second")
def correct(v_now: Any, beta2: Any, step: Any) -> Any:
    """Bias correction."""
    return v_now / (1.0 - beta2**step)


@rule(writes="rate")
def normalised_rate(total_second: Any, total_numel: Any, lr: Any, weight: Any) -> Any:
    """lr * weight / r with r = sqrt(mean of v-hat over the whole optimizer); r = 1 if that is 0."""
    r = sqrt(total_second / total_numel)
    return lr * weight / where(r > 0.0, r, 1.0 + r)


@rule(writes="rate")
def plain_rate(lr: Any, weight: Any) -> Any:
    """lr * weight."""
    return lr * weight


@rule(writes="v_sum")
def second_sum(exp_avg_sq: Any) -> Any:
    """Summed, and kept for the next step."""
    return exp_avg_sq


# Bases whose state has Adam's second moment under these names, with betas in the param group.
_WITH_SECOND_MOMENT = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


class AdamR(Transform):
    """Pull every weight towards its pretrained value (AdamR).

    Adam with a decoupled decay towards the weights it started from, divided by one gradient scale of the
    whole optimizer. What fine-tuning changes stays small, so that it survives extreme pruning (DARE).
    Use a base with ``weight_decay=0``, or both pulls act.

    Source: "DARE the Extreme", arXiv 2410.09344, AdamR-L2 and AdamR-L1.

    Args:
        weight: strength of the pull. The effective rate is ``lr * weight / r``, with r the root mean
            square of the bias-corrected second moment; it must stay below 1 (a warning tells once).
        norm: ``"l2"`` pulls in proportion to the distance, ``"l1"`` by the same amount everywhere.
        anchor: what to pull to: None, the weights as they are now; another model; a state dict; the path
            of a safetensors file (memory-mapped); or ``"zero"``.
        normalize: divide by r (needs torch's Adam, AdamW, NAdam or RAdam). False is a decoupled L2-SP
            pull that works with any base.
        model: gives the parameters' names where anchors are found by name and the optimizer was not
            built from ``named_parameters()``.
        save_anchor: keep the anchors in ``state_dict``. False saves a copy of the weights on disk, and
            needs an ``anchor`` that can be found again.

    Group keys:
        ``adamr=False`` leaves a param group out (a new head has no anchor); ``adamr_weight`` overrides
        ``weight``.

    Raises:
        OptxError: an argument out of range.
        TransformError: the base has no second moment, or an anchor is missing.
        ShapeError: an anchor has another shape than its weight.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        >>> opt = optx.wrap(opt, optx.AdamR(weight=0.05))
    """

    name = "adamr"

    def __init__(
        self,
        weight: float = 0.05,
        norm: Literal["l2", "l1"] = "l2",
        anchor: nn.Module | Mapping[str, Tensor] | str | PathLike[str] | None = None,
        normalize: bool = True,
        *,
        model: nn.Module | None = None,
        save_anchor: bool = True,
    ) -> None:
        check_range("AdamR", "weight", weight, 0.0)
        if norm not in ("l2", "l1"):
            raise OptxError(f"AdamR: norm is {norm!r}; it must be 'l2' or 'l1'.")
        if anchor is None and not save_anchor:
            raise OptxError(
                "AdamR: save_anchor=False needs an anchor that can be found again (a model, a state dict or "
                "a file); with anchor=None a resumed run would be pulled to the resumed weights."
            )
        self.options = {"weight": weight}
        self.norm, self.normalize = norm, normalize
        self._to_zero = isinstance(anchor, str) and anchor == "zero"
        self._anchors = Anchors("AdamR", anchor, model)
        self._warned = False
        slots: dict[str, Slot] = {}
        if not self._to_zero:
            slots["anchor"] = like_weight(dtype=None, saved=save_anchor, lasting=True)
        if normalize:
            slots["v_sum"] = per_tensor(torch.float64, derived="exp_avg_sq")
        self.slots = slots

    def check(self, base: torch.optim.Optimizer) -> None:
        """Refuse a base without a second moment."""
        if self.normalize and not isinstance(base, _WITH_SECOND_MOMENT):
            raise TransformError(
                f"AdamR: normalize=True needs Adam's second moment, and {type(base).__name__} has none. Use "
                "torch's Adam, AdamW, NAdam or RAdam, or AdamR(normalize=False)."
            )

    def moments(self, group: Group, base: torch.optim.Optimizer) -> Moments:
        """The pull, and how r is had with the fewest passes over memory."""
        pull = pull_l2 if self.norm == "l2" else pull_l1
        if self._to_zero:
            pull = to_zero_l2 if self.norm == "l2" else to_zero_l1
        if not self.normalize:
            return Moments(scalars=plain_rate, weight=pull)
        totals = ("second", "numel")
        coupled = _couples_decay(base, group)
        if not coupled and not group.get("amsgrad", False):
            return Moments(
                scalars=predict_second, totals=totals, finish=normalised_rate, weight=pull, observe=second_sum
            )
        if coupled and group.get("maximize", False):
            raise TransformError(
                "AdamR: maximize=True with a coupled weight_decay is not served; use AdamW, or "
                "weight_decay=0."
            )
        # The second moment is not linear in what is known: look at it, in a pass of its own.
        look, then = second_and_l2, next_second_l2
        if group.get("amsgrad", False):
            look, then = next_largest_l2 if coupled else next_largest, correct
        return Moments(sums=look, scalars=then, totals=totals, finish=normalised_rate, weight=pull)

    def bind(self, optimizer: Wrapped) -> None:
        """Take the anchors now: later the weights have moved."""
        if not self._to_zero:
            served = [p for p in optimizer.served(self) if p.requires_grad or self._anchors.source is None]
            for p, anchor in self._anchors.bind(optimizer, served).items():
                optimizer.slot(p, self, "anchor", lambda anchor=anchor: anchor)

    def init_slot(self, name: str, p: Tensor, optimizer: Wrapped) -> Tensor:
        """An anchor for a parameter that came later; the sum of a second moment that is there already."""
        if name == "anchor":
            return self._anchors.of(p, optimizer)
        state = optimizer.state.get(p, {})
        total = self.slots[name].zeros(p) if p.device.type != "mps" else torch.zeros(())
        if "exp_avg_sq" in state:
            total.copy_(whole(state["exp_avg_sq"].sum(dtype=total.dtype)))
        return total

    def after_step(self, optimizer: Wrapped) -> None:
        """Warn once when the pull overshoots."""
        if self._warned or not self.normalize:
            return
        second, numel = optimizer.totals.get("adamr.second"), optimizer.totals.get("numel")
        if second is None or numel is None or (isinstance(second, Tensor) and second.device.type != "cpu"):
            return  # on a GPU the question would cost a wait in every step
        r = (float(second) / max(float(numel), 1.0)) ** 0.5 or 1.0
        for group in optimizer.param_groups:
            rate = float(group["lr"]) * group["adamr_weight"] / r
            if group["adamr"] and rate > 1.0:
                self._warned = True
                warnings.warn(
                    f"AdamR: lr * weight / r is {rate:.3g}, so each step overshoots the anchor (above 2 it "
                    "diverges). Lower weight; gradients are small (r = "
                    f"{r:.3g}).",
                    stacklevel=4,
                )
                return


def _couples_decay(base: torch.optim.Optimizer, group: Group) -> bool:
    """Whether the base adds weight decay to the gradient before its moments."""
    decoupled = isinstance(base, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    return group.get("weight_decay", 0) != 0 and not decoupled
