"""Losses of the spherical family: of a row's outputs they know the sum, the sum of squares and the target's.

Source: "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
arXiv 1604.08859; the family, arXiv 1511.05042.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, check_above_0, check_choice, check_whole, shown
from optx._expression import expression

Form = Literal["z", "mse", "spherical", "taylor"]
_DEFAULTS: dict[str, dict[str, float]] = {
    "z": {"a": 0.1, "b": 10.0, "eps": 1e-12},
    "mse": {},
    "spherical": {"eps": 1e-2},
    "taylor": {},
}
_USED_BY = {"a": "the Z-loss alone (form='z')", "b": "the Z-loss alone (form='z')"}
_USED_BY["eps"] = "the Z-loss and spherical softmax alone (form='z' or 'spherical')"
_LINEAR_FROM = 45.0  # exp(-45) is below float64's last digit, where softplus is its argument


class Slopes(NamedTuple):
    """Rows of losses, and what they are by the rows' sums."""

    losses: Tensor
    by_mean: Tensor
    by_variance: Tensor
    by_above: Tensor


class SphericalLoss(nn.Module):
    """One loss of the family, on a row's sums; arguments are those of `optx.ZLoss`, which has logits.

    Args:
        a: sharpness of the Z-loss.
        b: where its softplus bends.
        form: which loss.
        eps: what keeps it from dividing by 0.
        ignore_index: the label that counts for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    def __init__(
        self,
        a: float | None = None,
        b: float | None = None,
        form: Form = "z",
        eps: float | None = None,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_choice("ZLoss", "form", form, tuple(_DEFAULTS))
        numbers = dict(_DEFAULTS[form])
        for name, value in (("a", a), ("b", b), ("eps", eps)):
            if value is None:
                continue
            if name not in numbers:
                raise OptxError(
                    f"ZLoss: {name}={shown(value)} is of {_USED_BY[name]}; form={form!r} has no use for it."
                )
            numbers[name] = _finite(value) if name == "b" else check_above_0("ZLoss", name, value)
        check_choice("ZLoss", "reduction", reduction, ("mean", "sum", "none"))
        self.a, self.b, self.eps = (numbers.get(name) for name in ("a", "b", "eps"))
        self.form: Form = form
        self.ignore_index = check_whole("ZLoss", "ignore_index", ignore_index)
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes, by name; None for a number that is its form's own default."""
        usual = _DEFAULTS[self.form]
        numbers = {name: getattr(self, name) for name in ("a", "b", "eps")}
        own = {name: None if value == usual.get(name) else value for name, value in numbers.items()}
        return {**own, "form": self.form, "ignore_index": self.ignore_index, "reduction": self.reduction}

    def __repr__(self) -> str:
        return expression(type(self), self.arguments())

    def rows(self, mean: Tensor, variance: Tensor, above: Tensor, classes: int, floor: Tensor) -> Tensor:
        """The loss of each row.

        Args:
            mean: of its outputs, (R,).
            variance: of them, over all classes (population), (R,).
            above: the target's output less the mean, (R,).
            classes: how many outputs a row has.
            floor: variances up to this are rounding, and the row is flat: all its outputs are one number.
        """
        target = mean + above
        if self.form == "z":
            return self._z_rows(variance, above, floor)
        squares = classes * (variance + mean * mean)
        if self.form == "mse":
            return squares - 2 * target + 1
        if self.form == "spherical":
            assert self.eps is not None
            return ((squares + classes * self.eps) / (target * target + self.eps)).log()
        mass = classes * (1 + mean) + squares / 2
        return mass.log() - torch.log1p(target + target * target / 2)

    def _z_rows(self, variance: Tensor, above: Tensor, floor: Tensor) -> Tensor:
        """softplus(a (b - z)) / a; a flat row has no direction to be pulled in: its z is 0, and constant."""
        assert self.a is not None
        assert self.b is not None
        assert self.eps is not None
        flat = variance <= floor
        sigma = torch.where(flat, 1.0, variance).sqrt() + self.eps
        z = torch.where(flat, 0.0, above / sigma)
        return F.softplus(self.a * (self.b - z), threshold=_LINEAR_FROM) / self.a

    def slopes(self, mean: Tensor, variance: Tensor, above: Tensor, classes: int, floor: Tensor) -> Slopes:
        """The loss of each row and its derivatives; arguments are those of `rows`, and no graph is kept."""
        with torch.enable_grad():
            inputs = [one.detach().requires_grad_() for one in (mean, variance, above)]
            losses = self.rows(*inputs, classes=classes, floor=floor.detach())
            found = torch.autograd.grad(losses.sum(), inputs, materialize_grads=True)
        return Slopes(losses.detach(), *found)

    def reduced(self, losses: Tensor, counted: Tensor | int) -> Tensor:
        """The rows' losses, those that count for nothing being 0, as ``reduction`` says."""
        if self.reduction == "none":
            return losses
        return losses.sum() / counted if self.reduction == "mean" else losses.sum()


def _finite(b: Any) -> float:
    number = float(b) if isinstance(b, int | float) and not isinstance(b, bool) else math.nan
    if not math.isfinite(number):
        raise OptxError(f"ZLoss: b is {shown(b)}; it must be a finite number, of the size of a z, as 10.")
    return number
