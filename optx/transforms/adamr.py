"""AdamR: a decoupled pull towards the pretrained weights, normalised by one global gradient scale.

Source: "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models", arXiv 2410.09344,
and its official code (AdamR.py).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from optx._errors import OptxError, TransformError, check_range, warn
from optx._names import is_dtensor, parameter_names, whole
from optx._rules import rule
from optx.ops import maximum, sign, sqrt, where
from optx.step.declared import Slot, like_weight, per_tensor
from optx.step.memory import lost_memory
from optx.step.moments import floats
from optx.step.step_moments import Moments
from optx.step.transform import Group, Host, Transform
from optx.transforms._anchors import Anchors
from optx.transforms._pull_metrics import Distances, pull


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


@rule(writes="distance_sq")
def from_anchor(w: Any, anchor: Any) -> Any:
    """Metered: the squared distance."""
    d = w - anchor
    return d * d


@rule(writes="distance_sq")
def from_zero(w: Any) -> Any:
    """The same from an anchor of zero."""
    return w * w


# Bases whose state has Adam's second moment under these names, with betas in the param group.
_WITH_SECOND_MOMENT = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


class AdamR(Transform):
    """Pull every weight towards its pretrained value (AdamR).

    Mind the strength: the default ``weight=0.05`` is optx's choice, 500 times the 1e-4 that the authors' code
    takes (see Paper values). Before Adam's own step, w becomes w - lr * weight / r * (w - anchor); L1 has the
    sign of w - anchor. r is the square root of the mean of Adam's bias-corrected second moment, over all
    numbers that the optimizer trains: about the root mean square of a gradient.

    It is Adam with a decoupled decay towards the weights it started from. What fine-tuning changes stays
    small, so that it survives extreme pruning (DARE). Use a base with ``weight_decay=0``, or both pulls act
    (a warning tells once).

    Source: "DARE the Extreme", arXiv 2410.09344, AdamR-L2 and AdamR-L1.

    Args:
        weight: strength of the pull. The effective rate is ``lr * weight / r``: with gradients of about
            1e-3 in root mean square, 0.05 pulls by 50 lr of the distance at each step. It must stay below 1
            (a warning tells once).
        norm: ``"l2"`` pulls in proportion to the distance, ``"l1"`` by the same amount everywhere.
        anchor: what to pull to: None, the weights as they are now, so load them before `wrap` (a warning
            tells if they changed before the first step); another model; a state dict; a file: safetensors, a
            folder or a list of shards or their index file, or a torch file (``.pt``, ``.bin``, read with
            ``weights_only=True``); or ``"zero"``. Each weight is paired with the tensor of its name, never
            by order. Anchors keep their dtype: those of a float16 or bfloat16 checkpoint are what float32
            weights are then pulled to, rounded as they are. A model's or state dict's tensors are copied, so
            that training, moving or averaging that model does not move the anchors; where that memory
            matters give the file, which stays memory-mapped for weights on the CPU and must not be
            written to then (saving to its path ends in an error).
        normalize: divide by r (needs torch's Adam, AdamW, NAdam or RAdam). False is a decoupled L2-SP
            pull that works with any base.
        model: gives the parameters' names where anchors are found by name and the optimizer was not
            built from ``named_parameters()``.
        save_anchor: keep the anchors in ``state_dict``. False saves a copy of the weights on disk, and
            needs an ``anchor`` that can be found again.

    Group keys:
        ``adamr=False`` leaves a param group out (a new head has no anchor); ``adamr_weight`` overrides
        ``weight``.

    Paper values:
        ``weight=0.05``: no paper's, but what ``optx run finetune`` and ``optx run merge`` were run with
            (the default).
        ``weight=1e-4, norm="l2"``: the authors' code, with betas (0.9, 0.999), eps 1e-8. What was tuned for
            each model is not in it. The gradient's scale divides the pull, so that 1e-3 to 1 is worth a
            search.
        ``norm="l1"``: AdamR-L1.

    Limits: The anchors take a copy of the weights, or a file. With ``normalize=True`` only on bases that keep
    a second moment. A pull that overshoots its anchor is warned of, not clipped.

    Keywords: forgetting, drift, weight decay, L2-SP, AdamS, anchor, regularisation, continual learning.

    Evidence: ``optx run finetune``, ``optx run merge``; ``test_adamr.py``, ``test_paper_values.py``.

    Raises:
        OptxError: an argument out of range.
        TransformError: the base has no second moment, an anchor is missing or no floating-point tensor, the
            parameters' names are not known, or a file can't be read.
        ShapeError: an anchor has another shape than its weight.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        >>> opt = optx.wrap(opt, optx.AdamR(weight=0.05))
    """

    name = "adamr"
    looks_at_gradients = False
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"weight": (0.0, math.inf)}

    def __init__(
        self,
        weight: float = 0.05,
        norm: Literal["l2", "l1"] = "l2",
        anchor: nn.Module
        | Mapping[str, Tensor]
        | str
        | PathLike[str]
        | Sequence[str | PathLike[str]]
        | None = None,
        normalize: bool = True,
        *,
        model: nn.Module | None = None,
        save_anchor: bool = True,
    ) -> None:
        number = _checked_weight(weight)
        if norm not in ("l2", "l1"):
            raise OptxError(f"AdamR: norm is {norm!r}; it must be 'l2' or 'l1'.")
        for argument, value in (("normalize", normalize), ("save_anchor", save_anchor)):
            if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"AdamR: {argument} is {value!r}; it must be True or False.")
        if anchor is None and not save_anchor:
            raise OptxError(
                "AdamR: save_anchor=False needs an anchor that can be found again (a model, a state dict or "
                "a file); with anchor=None a resumed run would be pulled to the resumed weights."
            )
        self.options = {"weight": number}
        self.norm, self.normalize, self.save_anchor = norm, normalize, save_anchor
        self.anchor, self.model = anchor, model
        self._to_zero = isinstance(anchor, str) and anchor == "zero"
        self._anchors = Anchors("AdamR", anchor, model)
        self._warned_decay = False
        # Anchors that are copies of the weights themselves, until the first step has looked at both.
        self._taken: dict[Tensor, Tensor] = {}
        self._last_second: Any = None  # the total that was there before this step
        self._distances = Distances()
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
        pull, meter = pull_l2 if self.norm == "l2" else pull_l1, from_anchor
        if self._to_zero:
            pull, meter = to_zero_l2 if self.norm == "l2" else to_zero_l1, from_zero
        if not self.normalize:
            return Moments(scalars=plain_rate, weight=pull, meter=meter)
        totals = ("second", "numel")
        coupled = _couples_decay(base, group)
        if not coupled and not group.get("amsgrad", False):
            return Moments(
                scalars=predict_second,
                totals=totals,
                finish=normalised_rate,
                weight=pull,
                observe=second_sum,
                meter=meter,
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
        return Moments(
            sums=look, scalars=then, totals=totals, finish=normalised_rate, weight=pull, meter=meter
        )

    def bind(self, optimizer: Host) -> None:
        """Take the anchors now: later the weights have moved."""
        if not self._to_zero:
            served = [p for p in optimizer.served(self) if p.requires_grad or self._anchors.source is None]
            anchors, live = self._anchors.bind(optimizer, served)
            if live and not self.slots["anchor"].saved:
                raise OptxError(
                    "AdamR: save_anchor=False needs an anchor that can be found again, and anchor= is the "
                    "model that is trained. Pass the pretrained file or a copy of the model."
                )
            for p, anchor in anchors.items():
                optimizer.slot(p, self, "anchor", lambda anchor=anchor: anchor)
            self._taken = {p: anchors[p] for p in live}
        self._tell_decay(optimizer)

    def unwrap(self, optimizer: Host) -> None:
        """Let the weights go."""
        self._taken = {}

    def before_step(self, optimizer: Host) -> None:
        """Look for what would make the pull another one than the person thinks."""
        self._last_second = optimizer.totals.get("adamr.second")
        self._anchors.check_files(self._present(optimizer))
        if not self._warned_decay:
            self._tell_decay(optimizer)
        if self._taken and not _rehearses(optimizer):
            taken, self._taken = self._taken, {}
            self._tell_moved(optimizer, taken)

    def after_load(self, optimizer: Host) -> None:
        """A resumed run's weights differ from its anchors, which the checkpoint brings."""
        self._taken, self._distances = {}, Distances()

    def _present(self, optimizer: Host) -> Iterator[Tensor]:
        """The anchors of the weights that are trained."""
        if not self._to_zero:
            yield from (optimizer.slot(p, self, "anchor") for p in optimizer.served(self) if p.requires_grad)

    def _tell_decay(self, optimizer: Host) -> None:
        """Warn once of a base that pulls the weights to zero besides."""
        for number, group in enumerate(optimizer.param_groups):
            decay = _number(group.get("weight_decay", 0.0))
            if decay and self.serves(group) and _number(group.get("adamr_weight", 1.0)) != 0.0:
                self._warned_decay = True
                warn(
                    f"AdamR: param group {number} has weight_decay={decay:.6g} in the base, so both pulls "
                    "act: to zero and to the anchors. Set weight_decay=0 there, or adamr=False."
                )
                return

    def _tell_moved(self, optimizer: Host, taken: Mapping[Tensor, Tensor]) -> None:
        """Warn of weights that are not the ones the anchors were taken from."""
        pulling = [
            g for g in optimizer.param_groups if self.serves(g) and _number(g.get("adamr_weight")) != 0.0
        ]
        for p in (p for group in pulling for p in group["params"]):
            # Another object than at wrap has its anchor from there; another anchor is a checkpoint's.
            if p in taken or (self._anchors.source is None and p.requires_grad):
                anchor = optimizer.slot(p, self, "anchor")
                if taken.get(p, anchor) is not anchor or not _moved(p, anchor):
                    continue
                name = parameter_names(optimizer.base, self._anchors.model).get(id(p), "a parameter")
                warn(
                    f"AdamR: {name!r} changed between optx.wrap and the first step, so training is pulled "
                    "away from the weights that it starts at. Load pretrained weights before optx.wrap, or "
                    "pass their file or state dict as anchor=."
                )
                return

    def init_slot(self, name: str, p: Tensor, optimizer: Host) -> Tensor:
        """An anchor for a parameter that came later; the sum of a second moment that is there already."""
        if name == "anchor":
            return self._anchors.of(p, optimizer)
        state = optimizer.state.get(p, {})
        total = self.slots[name].zeros(p) if p.device.type != "mps" else torch.zeros(())
        if state.get("exp_avg_sq") is not None:
            second = floats(optimizer.slot_store, p, "exp_avg_sq")
            total.copy_(whole(second.sum(dtype=total.dtype)))
        return total

    def after_step(self, optimizer: Host) -> None:
        """Warn once when the pull overshoots."""
        if optimizer.metering and optimizer.sharded:
            self._distances.complete(self._anchors_beside(optimizer))
        if self._warned:
            return
        r = self._scale(optimizer)
        for number, group in enumerate(optimizer.param_groups):
            lr = _number(group.get("lr", 0.0))
            weight = _number(group.get("adamr_weight", self.options["weight"]))
            if r is None or lr is None or weight is None or not self.serves(group):
                continue
            if (rate := lr * weight / r) > 1.0:
                self._warned = True
                what = "overshoots the anchor (above 2 it diverges)"
                if self.norm == "l1":
                    what = f"moves each weight by {rate:.3g} and overshoots the anchor where it is nearer"
                why = f" Gradients are small (r = {r:.3g})." if self.normalize else ""
                warn(
                    f"AdamR: lr * weight / r is {rate:.3g} in param group {number} (lr {lr:.3g}, weight "
                    f"{weight:.3g}, r {r:.3g}), so each step {what}. Lower weight.{why}"
                )
                return

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """Distance from the anchors after the last step, and the rate of its pull, with r in it."""
        measured = optimizer.measured
        if not measured:
            return {}
        found = pull(measured, filter(self.serves, optimizer.param_groups))
        distance = self._distances.total(measured, self._anchors_beside(optimizer))
        return found if distance is None else {"distance": distance, **found}

    def _anchors_beside(self, optimizer: Host) -> list[tuple[Tensor, Tensor | None]]:
        """The weights that the last step left alone, with their anchors; None is zero."""
        moved, key = optimizer.measured.having("adamr.distance_sq"), "optx.adamr.anchor"
        beside = [p for p in optimizer.served(self) if id(p) not in moved]
        anchors = [(p, None if self._to_zero else optimizer.slot_store.of(p).get(key)) for p in beside]
        return [(p, anchor) for p, anchor in anchors if self._to_zero or anchor is not None]

    def _scale(self, optimizer: Host) -> float | None:
        """This step's r; None where there is none, or where asking for it would wait for a GPU."""
        if not self.normalize:
            return 1.0
        last, self._last_second = self._last_second, None
        second = optimizer.totals.get("adamr.second")
        if second is None or second is last:  # of an earlier step
            return None
        total, numel = _number(second), _number(optimizer.totals.get("numel"))
        if total is None or not numel or total < 0.0:
            return None
        return math.sqrt(total / numel) or 1.0


def _checked_weight(weight: Any) -> Any:
    """A finite number, as a float; or a tensor with one, which a schedule on the device may change."""
    if isinstance(weight, np.ndarray) and weight.ndim == 0:
        weight = weight[()]
    number = isinstance(weight, numbers.Real) and not isinstance(weight, bool | np.bool_)
    if isinstance(weight, Tensor):
        weight = weight.detach()
        number = weight.numel() == 1 and weight.dtype.is_floating_point and not weight.is_meta
    if not number or not math.isfinite(weight):
        raise OptxError(f"AdamR: weight is {weight!r}; it must be at least 0.0, and a finite number.")
    check_range("AdamR", "weight", weight if isinstance(weight, Tensor) else float(weight), 0.0)
    return weight if isinstance(weight, Tensor) else float(weight)


def _number(value: Any) -> float | None:
    """A plain number of a group; None where reading it would wait for a GPU, or it is none."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and (value.device.type != "cpu" or value.numel() != 1):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _rehearses(optimizer: Host) -> bool:
    """Whether this step moves nothing: torch's distributed checkpoint steps with lr 0; so do warm-ups."""
    return all(_number(group.get("lr", 1.0)) == 0.0 for group in optimizer.param_groups)


def _moved(p: Tensor, anchor: Tensor) -> bool:
    """Whether a weight has other numbers than its anchor; of a sharded one, those that lie here."""
    here: list[Any] = [t.to_local() if is_dtensor(t) else t for t in (p.detach(), anchor)]  # type: ignore[attr-defined]
    now, then = here
    if now.is_meta or now.shape != then.shape or (now.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if any(map(lost_memory, here)):
        return False  # the step says so
    # A model that was moved or cast has not changed.
    then = then.to(now.device, now.dtype)
    return not torch.equal(now, then) and not torch.allclose(now, then, 0.0, 0.0, equal_nan=True)


def _couples_decay(base: torch.optim.Optimizer, group: Group) -> bool:
    """Whether the base adds weight decay to the gradient before its moments."""
    decoupled = isinstance(base, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    return group.get("weight_decay", 0) != 0 and not decoupled
