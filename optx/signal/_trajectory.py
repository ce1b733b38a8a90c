"""The trajectory loss that SAF and MESA share, and the epochs in which it acts.

Source: "Sharpness-Aware Training for Free", arXiv 2205.14083, equations 8 and 12.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_range, check_whole
from optx.kernels.available import why_unavailable
from optx.kernels.loss.trajectory_rows import sums


class _WithGradient(torch.autograd.Function):
    """A number that was computed together with its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor, scale: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gradient)
        ctx.scale = scale
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * (outer[0] * ctx.scale), None, None, None


def with_gradient(logits: Tensor, total: Any, gradient: Tensor, tau: float, share: Any) -> Tensor:
    """The loss of a sum of divergences and the gradient p - q of its rows.

    Args:
        logits: what the gradient is for.
        total: the sum, a scalar tensor or a number.
        gradient: in the logits' shape and dtype.
        tau: the temperature.
        share: what the sum counts: the weight, by the number of positions.
    """
    loss = total * (tau**2 * share)
    if not isinstance(loss, Tensor):
        loss = torch.tensor(loss, dtype=torch.promote_types(logits.dtype, torch.float32))
    return cast("Tensor", _WithGradient.apply(logits, loss, gradient, tau * share))


def few(logits: Tensor, past: Tensor | None = None) -> Any:
    """The compiled pass over a small batch on the CPU, if it serves such logits, or None."""
    if logits.device.type != "cpu" or why_unavailable("numba") is not None:
        return None
    if not _loaded:
        from optx.kernels.loss import trajectory_cpu  # loads Numba

        _loaded.append(trajectory_cpu)
    serves = _loaded[0].serves
    return _loaded[0] if serves(logits) and (past is None or serves(past)) else None


_loaded: list[Any] = []


def mean_loss(
    logits: Tensor,
    z: Tensor,
    past: Tensor,
    tau: float,
    serves: Tensor | None,
    where: Tensor | None,
    weight: float = 1.0,
) -> Tensor:
    """The divergence's mean over all positions that count, of which some may have no past and add 0.

    A position without a finite divergence (NaN logits, now or then) is left out as one without a past is.

    Args:
        logits: what the gradient is for, (B, C) or (B, T, C).
        z: these logits, without gradient.
        past: the reference, as large; where it does not serve, anything.
        tau: the temperature.
        serves: which positions have a past, (B,) or (B, T); None: all.
        where: which positions count, (B,) or (B, T); None: all.
        weight: the mean is multiplied by it.
    """
    if where is None:
        count: Any = max(1, z.shape[:-1].numel())
    else:
        count = where.sum().clamp_min(1)
        count = int(count) if count.device.type == "cpu" else count
        serves = where if serves is None else serves & where
    if (compiled := few(z, past)) is not None and z.shape == past.shape:
        flags = None if serves is None else serves.reshape(-1).contiguous()
        made = compiled.divergence(_rows(z), _rows(past), tau, flags)
        total, gradient = made.total, cast("Tensor", made.gradient).view(z.shape)
    else:
        total, gradient = sums(z, past, tau, serves)
    return with_gradient(logits, total, gradient.to(logits.dtype), tau, weight / count)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.ndim == 2 else logits.reshape(-1, logits.shape[-1])


def no_loss(owner: str, logits: Any) -> Tensor:
    """The loss where there is none: 0, in the dtype that it would have."""
    _check_tensor(owner, logits)
    return torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)


def _check_tensor(owner: str, logits: Any) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise OptxError(f"{owner}: logits are {found}; give the tensor of unnormalised scores.")


def check_logits(owner: str, logits: Any) -> None:
    """Raise unless logits are classes last, and able to learn from a loss."""
    _check_tensor(owner, logits)
    if logits.ndim not in (2, 3) or not logits.shape[-1]:
        raise ShapeError(
            f"{owner}: logits have shape {tuple(logits.shape)}; it must be (B, C), or (B, T, V) of a "
            "sequence, classes last."
        )
    if logits.shape[-1] == 1:
        raise ShapeError(
            f"{owner}: logits have shape {tuple(logits.shape)}, and of one class softmax says 1 whatever "
            "they are; of a binary model give both: torch.cat([torch.zeros_like(z), z], -1)."
        )
    if not logits.requires_grad:
        raise OptxError(
            f"{owner}: these logits need no gradient, so the loss could change nothing; give the model's "
            "own, not detached ones. (In validation call it under torch.no_grad(), where it is 0.)"
        )


def check_where(owner: str, where: Any, logits: Tensor) -> None:
    """Raise unless ``where`` is a bool for each position on the logits' device."""
    if not isinstance(where, Tensor) or where.dtype != torch.bool or where.shape != logits.shape[:-1]:
        found = (
            f"{where.dtype} in shape {tuple(where.shape)}"
            if isinstance(where, Tensor)
            else f"a {type(where)}"
        )
        raise ShapeError(
            f"{owner}: where is {found}; it must be torch.bool in shape {tuple(logits.shape[:-1])}, as "
            "logits have positions (labels != -100, for example)."
        )
    if where.device != logits.device:
        raise OptxError(f"{owner}: where is on {where.device} and logits are on {logits.device}.")


class Trajectory:
    """When a trajectory loss acts, and how strongly.

    Attributes:
        start_epoch: the last epoch without the loss.
        end_epoch: the first epoch without it again; None: there is none.
        epoch: as told by `set_epoch`; None before.
    """

    _owner = ""

    def __init__(self, weight: float, tau: float, start_epoch: int, end_epoch: int | None) -> None:
        self.weight, self.tau = weight, tau
        self.start_epoch = count_from(self._owner, "start_epoch", start_epoch, 0)
        self.end_epoch = None if end_epoch is None else count_from(self._owner, "end_epoch", end_epoch, 0)
        if self.end_epoch is not None and self.end_epoch <= self.start_epoch + 1:
            raise OptxError(
                f"{self._owner}: end_epoch is {end_epoch}, so no epoch has the loss; the first one is "
                f"{self.start_epoch + 1}."
            )
        self.epoch: int | None = None
        self._seen_scores = False

    @property
    def weight(self) -> float:
        """Lambda; may be set at any time."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = self._finite("weight", value, 0.0)

    @property
    def tau(self) -> float:
        """The temperature."""
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        self._tau = float(self._finite("tau", value, 1e-3))

    def _finite(self, name: str, value: float, low: float) -> float:
        check_range(self._owner, name, value, low)
        if value == float("inf"):
            raise OptxError(f"{self._owner}: {name} is inf; it must be finite.")
        return value

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0; call it at the start of each, as for a sampler."""
        self.epoch = count_from(self._owner, "epoch", epoch, 0)

    @property
    def active(self) -> bool:
        """Whether this epoch has the loss: after ``start_epoch``, before ``end_epoch``, weight above 0."""
        epoch = self.epoch
        if epoch is None or epoch <= self.start_epoch or not self.weight:
            return False
        return self.end_epoch is None or epoch < self.end_epoch

    def _check_scores(self, logits: Tensor) -> None:
        """Once: raise for probabilities, which have the shape of logits, and of which softmax is flat."""
        if self._seen_scores:
            return
        rows = logits.detach().float()
        if bool(((rows > 0).all(-1) & ((rows.sum(-1) - 1).abs() < 1e-3)).all()):
            raise OptxError(
                f"{self._owner}: every row of logits is above 0 and sums to 1, as probabilities are and do; "
                "give what softmax was taken of."
            )
        self._seen_scores = True

    def _now(self) -> int:
        if self.epoch is None:
            raise OptxError(
                f"{self._owner}: no epoch was set; call set_epoch(epoch) at the start of each epoch, from 0 "
                "on."
            )
        return self.epoch


def count_from(owner: str, argument: str, value: Any, least: int) -> int:
    """A number of epochs, samples or steps, from ``least`` on."""
    return check_whole(owner, argument, value, least, f"a whole number from {least} on")
