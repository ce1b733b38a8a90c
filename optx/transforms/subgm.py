"""SubGM: sub-gradient steps whose length is a schedule's, for losses with a kink at their minimum.

Source: Ma, Fattahi, "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small
Initialization, Noisy Measurements, and Over-parameterization", arXiv 2202.08788. The form of the step sizes
was worked out, as the paper's text was not at hand.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from optx._errors import OptxError, TransformError, warn
from optx._rules import rule
from optx.ops import maximum, sqrt, where
from optx.step.numbers import as_float
from optx.step.scale_free import is_scale_free
from optx.step.step_moments import Moments
from optx.step.transform import Group, Host, Transform
from optx.transforms._common_scale import scaled, square_of

_TINY = 1e-30  # below, there is nothing to scale, and float32 has no room for the scale


@rule(writes="scale")
def by_norm(total_square: Any, step_size: Any) -> Any:
    """eta0 rho^t / norm; 0 where the norm is."""
    norm = sqrt(total_square)
    return where(norm < _TINY, 0.0 * step_size, step_size / maximum(norm, _TINY))


@rule(writes="scale")
def as_given(step_size: Any) -> Any:
    """The step size, of which Python knows all."""
    return step_size * 1.0


class SubGM(Transform):
    """Scale gradients so that steps shrink geometrically, or with the loss: the sub-gradient method.

    A sub-gradient of a loss like mean |residual| is as long beside the minimum as far from it, so that plain
    steps never settle. In step t = 0, 1, ... the gradient g of the base (SGD with ``lr=1``) becomes eta_t g:

    - ``mode="geometric"``: eta_t = eta0 rho^t / N, for data with outliers or noise. N is the norm of the
      matrix sub-gradient Q that `RobustRecoveryLoss` finds in its forward pass (``loss=``, the paper's), or
      else the norm of all gradients together: a variant, whose steps all have the length eta0 rho^t.
    - ``mode="polyak"``: eta_t = eta0 f, proportional to the loss f, which has to end at 0 (clean data).

    With weights that begin near 0 (`optx.scaling.small_init_`) a factored matrix finds its rank by itself:
    directions of the signal grow from there, the others stay small. So rho must not be too small: the sum of
    all eta0 rho^t has to reach log(1 / alpha) times a constant before steps are too short to grow on.

    Source: arXiv 2202.08788; the step sizes' form from memory of it, checked on its example.

    Args:
        eta0: the first step's size, above 0: in geometric mode about a quarter of what is sought (its
            spectral norm), in polyak mode a number below 1. A param group may have its own.
        rho: what a step's size is to that of the one before, in (0, 1]. Geometric mode alone.
        mode: ``"geometric"`` or ``"polyak"``.
        loss: what has the step's numbers: a `RobustRecoveryLoss`, or an object with ``q_norm`` and ``value``
            of its last forward. In polyak mode there may be none: then the loss is what the closure of
            ``opt.step(closure)`` returns, or what is given before each step: ``opt.subgm.loss =
            float(loss)``.

    Group keys:
        ``subgm=False`` leaves a param group out; ``subgm_eta0`` and ``subgm_rho``.

    Paper values:
        ``eta0=0.25, rho=0.98``: 400 steps from 1e-3, of a projector of rank 2 in 20 dimensions: the recipe's,
            as the paper's own were not at hand (the defaults).
        ``rho=0.99``: slower and safer, with twice the steps.

    Limits: Under an optimizer that divides by the gradient's size (Adam) a scale of gradients does nothing;
    it warns. A schedule of lr and weight decay come on top. The count t is in the param groups
    (``optx.subgm.t``), saved with them, and stays where a group's lr is 0.

    Keywords: sub-gradient method, subgradient, robust matrix recovery, robust PCA, Polyak step size,
    geometric decay, outliers.

    Evidence: ``optx run recover``; ``test_subgm.py``.

    Raises:
        TransformError: an option out of range, or another ``mode``.
        OptxError: in a step: there is no loss of this step, or it is negative or not finite.

    Example:
        >>> import torch, optx
        >>> U = torch.nn.Parameter(torch.tensor([[1.0], [0.0]]))
        >>> loss = optx.RobustRecoveryLoss(torch.eye(2)[None], torch.tensor([0.25]))
        >>> opt = optx.wrap(torch.optim.SGD([U], lr=1.0), optx.SubGM(eta0=0.1, rho=1.0, loss=loss))
        >>> loss(U).backward()
        >>> opt.step()
        >>> U.detach().flatten()
        tensor([0.8586, 0.0000])
    """

    name = "subgm"
    looks_at_gradients = False
    limits: ClassVar = {"rho": (0.0, 1.0), "step_size": (0.0, math.inf)}

    def __init__(
        self,
        eta0: float = 0.25,
        rho: float = 0.98,
        mode: Literal["geometric", "polyak"] = "geometric",
        loss: Any = None,
    ) -> None:
        self.options = {"eta0": eta0, "rho": rho, "step_size": 0.0}
        self.check_option("eta0", eta0, f"SubGM: eta0 is {eta0!r}")
        self.check_option("rho", rho, f"SubGM: rho is {rho!r}")
        if mode not in ("geometric", "polyak"):
            raise TransformError(f"SubGM: mode is {mode!r}; it must be 'geometric' or 'polyak'.")
        self.options = {"eta0": float(eta0), "rho": float(rho), "step_size": 0.0}
        self.mode = mode
        self.loss = loss

    def check_option(self, name: str, value: Any, given: str) -> None:
        """Raise unless eta0 and rho are above 0; the step size is what they make."""
        super().check_option(name, value, given)
        if name in ("eta0", "rho") and not (as_float(value) or 0.0) > 0.0:
            raise TransformError(f"{given}; it must be above 0.")

    @property
    def loss(self) -> Any:
        """What has the step's numbers, or the loss of the step to come; set it before each step."""
        return self._loss

    @loss.setter
    def loss(self, given: Any) -> None:
        has = [name for name in ("q_norm", "value") if hasattr(given, name)]
        self._source = given if len(has) == 2 else None
        self._value: float | None = None
        if given is not None and self._source is None:
            if self.mode == "geometric":
                raise TransformError(
                    f"SubGM: loss is {given!r}; in geometric mode it must be None or have q_norm and value, "
                    "as a RobustRecoveryLoss."
                )
            self._value = self._checked(as_float(given), given)
        self._loss = given

    def arguments(self) -> dict[str, Any]:
        """As it was made; a number was of one step."""
        numbers = {name: getattr(self, name) for name in ("eta0", "rho", "mode")}
        return {**numbers, "loss": self._source}

    def moments(self, group: Group, base: Any) -> Moments:
        """The norm of all gradients is a total; other sizes are known before the step."""
        if self._by_gradients:
            return Moments(scalars=square_of, totals=("square",), finish=by_norm, gradient=scaled)
        return Moments(scalars=as_given, gradient=scaled)

    @property
    def _by_gradients(self) -> bool:
        return self.mode == "geometric" and self._source is None

    def group_numbers(self) -> dict[str, float | int | bool]:
        """Steps so far."""
        return {"t": 0}

    def bind(self, optimizer: Host) -> None:
        """Warn where scaled gradients make the same steps."""
        self._seen = self._forwards()
        if is_scale_free(optimizer.base):
            warn(
                f"SubGM: {type(optimizer.base).__name__} divides gradients by their own size, so that scales "
                "of them hardly change its steps. Wrap torch.optim.SGD(..., lr=1.0)."
            )

    def before_step(self, optimizer: Host) -> None:
        """The step's size, once its loss is known."""
        if optimizer.closure_pending:
            return
        measured = self._measured(optimizer)
        for group in optimizer.param_groups:
            eta0, rho = group["subgm_eta0"], group["subgm_rho"]
            size = eta0 * measured if self.mode == "polyak" else eta0 * rho ** group["optx.subgm.t"]
            if self.mode == "geometric" and self._source is not None:
                size = size / measured if measured > _TINY else 0.0
            group["subgm_step_size"] = size

    def _measured(self, optimizer: Host) -> float:
        """The loss in polyak mode, the norm of Q in geometric mode."""
        if self._by_gradients:
            return math.nan
        if self._source is not None:
            self._check_fresh()
            number = self._source.value if self.mode == "polyak" else self._source.q_norm
            return self._checked(as_float(number), number)
        if self._value is None and optimizer.closure_loss is not None:
            number = optimizer.closure_loss
            return self._checked(as_float(number), number)
        if self._value is None:
            raise OptxError(
                "SubGM: mode='polyak' needs the loss of this step. Give it before (opt.subgm.loss = "
                "float(loss)), step with a closure, or make it with loss=, a RobustRecoveryLoss. Nothing was "
                "changed."
            )
        return self._value

    def _checked(self, value: float | None, given: Any) -> float:
        if value is None or not math.isfinite(value) or value < 0.0:
            raise OptxError(
                f"SubGM: the loss or norm of a step is {given!r}; it must be a number, 0 or more."
            )
        return value

    def _forwards(self) -> int | None:
        return getattr(self._source, "forwards", None)

    def _check_fresh(self) -> None:
        """Raise where the loss was not evaluated since the last step."""
        now, before = self._forwards(), self._seen
        if now is None or before is None:
            return
        if now == before:
            raise OptxError(
                "SubGM: its loss was not evaluated since the last step, so that its numbers are of other "
                "weights. Call loss(U).backward() before opt.step(). Nothing was changed."
            )

    def after_step(self, optimizer: Host) -> None:
        """One step more; of groups that could not move none was taken."""
        self._value, self._seen = None, self._forwards()
        for group in optimizer.param_groups:
            if self.serves(group) and float(group["lr"]) != 0.0:
                group["optx.subgm.t"] += 1

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """The step's size, of the first group: eta_t, or eta0 rho^t where the gradients' norm divides it."""
        served = [group for group in optimizer.param_groups if self.serves(group)]
        size = float(served[0]["subgm_step_size"]) if served else 0.0
        return {"step_size": size} if size else {}

    _loss: Any = None
    _source: Any = None
    _value: float | None = None
    _seen: int | None = None
