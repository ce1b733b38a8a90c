"""NormalizedGrad: gradients of length 1, frozen where only rounding is left of them.

Source: Tarzanagh, Li, Thrampoulidis, Oymak, "Transformers as Support Vector Machines", arXiv 2308.16898,
section 3 (normalised gradient descent); the floor is worked out.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch

from optx._errors import TransformError, check_choice
from optx._rules import rule
from optx.ops import sqrt, where
from optx.step.numbers import as_float
from optx.step.step_moments import Moments
from optx.step.transform import Group, Host, Transform
from optx.transforms._common_scale import scaled, square_of

_BY_DTYPE = -1.0  # the floor's number where it is the dtype's
_WIDE, _NARROW = 1e-12, 1e-6  # of float64, and of all else


@rule(writes=("scale", "frozen", "norm"))
def to_length_1(square: Any, eps: Any, floor: Any, floor_of_dtype: Any) -> Any:
    """1 / (norm + eps), and 0 below the floor and for zeros; whether that is so, and the norm."""
    norm = sqrt(square)
    least = where(floor < 0.0, floor_of_dtype, floor)
    # A norm that is nan is not below: nan stays one, in all weights, as without this.
    frozen = (norm < least) | (norm == 0.0)
    scale = where(frozen, 0.0 * least, 1.0 / where(frozen, 1.0 + 0.0 * least, norm + eps))
    return scale, where(frozen, 1.0 + 0.0 * least, 0.0 * least), norm


@rule(writes=("scale", "frozen", "norm", "grad_sq"))
def tensor_in_float64(grad_sq: Any, eps: Any, floor: Any) -> Any:
    """Of one gradient, and its squared norm once it is scaled."""
    scale, frozen, norm = to_length_1(grad_sq, eps, floor, _WIDE)
    return scale, frozen, norm, grad_sq * scale * scale


@rule(writes=("scale", "frozen", "norm", "grad_sq"))
def tensor_in_float32(grad_sq: Any, eps: Any, floor: Any) -> Any:
    """Of one gradient in float32 or less."""
    scale, frozen, norm = to_length_1(grad_sq, eps, floor, _NARROW)
    return scale, frozen, norm, grad_sq * scale * scale


@rule(writes=("scale", "frozen", "norm"))
def global_in_float64(total_square: Any, eps: Any, floor: Any) -> Any:
    """Of all gradients together."""
    return to_length_1(total_square, eps, floor, _WIDE)


@rule(writes=("scale", "frozen", "norm"))
def global_in_float32(total_square: Any, eps: Any, floor: Any) -> Any:
    """Of all gradients together, in float32 or less."""
    return to_length_1(total_square, eps, floor, _NARROW)


class NormalizedGrad(Transform):
    """Make every gradient 1 long, whatever the loss's scale: normalised gradient descent.

    g becomes g / (‖g‖ + eps), where the norm is the tensor's own, or that of all gradients together. With
    SGD each step is then lr long. Once data are separated, a loss's gradient falls exponentially in the
    weights' size and plain gradient descent all but stops; normalised, it goes on at the same pace, and
    attention's weights come close to the direction of `optx.analysis.attention_svm` in a thousand steps.

    Below a floor a gradient becomes 0 instead. When softmax has saturated there is nothing in it but rounding
    errors, and scaled up to length 1 these walk the weights away from where they had come: the paper's
    direction is lost again in a hundred steps. A gradient of zeros stays zeros.

    Sums end in float64, and sharded weights (DTensors) count whole. ``p.grad`` keeps what backward left.

    Source: arXiv 2308.16898, section 3.

    Args:
        per: ``"tensor"``: each by its own norm (in the paper K and Q); ``"global"``: all by their
            common norm, which keeps the gradient's direction.
        eps: added to norms, at least 0.
        floor: the least norm that is scaled up; below it the gradient becomes 0. None: 1e-12 for float64
            weights, 1e-6 for others (a param group with both has 1e-6). Schedules and param groups may set
            it; -1 stands for None there.

    Group keys:
        ``normalized_grad=False`` leaves a param group out: it is neither counted nor scaled;
        ``normalized_grad_eps`` and ``normalized_grad_floor``.

    Paper values:
        ``eps=2.2e-16``: authors' code, which has no floor; at a norm of 1e-12 it shortens steps by 2e-4.
        ``per="tensor"``: W, or K and Q each (the default), with SGD, lr 0.1, all data at once, 2000 steps.

    Limits: A gradient with inf or nan makes all weights of its norm nan; ``wrap(..., skip_nonfinite=True)``
    leaves such steps out. What the base adds is not normalised: weight decay and momentum act on where
    gradients are frozen. An optimizer that divides by the gradient's usual size (Adam) makes steps of its own
    length; there this but lets each batch weigh the same. In mini-batch training steps do not shrink as the
    gradient does: use a schedule.

    Keywords: normalised gradient descent, NGD, gradient normalization, unit gradient, layer-wise, implicit
    bias, max-margin, saturation.

    Evidence: ``optx run explain``; ``test_normalized_grad.py``,
    ``test_attention_svm_training.py``.

    Raises:
        TransformError: another ``per``, ``eps`` below 0, or a floor that is neither None nor at least 0.

    Example:
        >>> import torch, optx
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), optx.NormalizedGrad())
        >>> w.grad = torch.tensor([0.003, 0.004])
        >>> opt.step()
        >>> w.detach()
        tensor([-0.6000, -0.8000])
        >>> w.grad = torch.tensor([3e-9, 4e-9])  # rounding errors, in float32
        >>> opt.step()
        >>> w.detach()
        tensor([-0.6000, -0.8000])
    """

    name = "normalized_grad"
    looks_at_gradients = False
    limits: ClassVar = {"eps": (0.0, math.inf)}

    def __init__(
        self, per: Literal["tensor", "global"] = "tensor", eps: float = 0.0, floor: float | None = None
    ) -> None:
        try:
            check_choice("NormalizedGrad", "per", per, ("tensor", "global"))
        except ValueError as e:
            raise TransformError(str(e)) from None
        number = _BY_DTYPE if floor is None else floor
        self.options = {"eps": eps, "floor": number}
        self.check_option("eps", eps, f"NormalizedGrad: eps is {eps!r}")
        self.check_option("floor", number, f"NormalizedGrad: floor is {floor!r}")
        if floor is not None and as_float(floor) == _BY_DTYPE:
            raise TransformError(f"NormalizedGrad: floor is {floor!r}; it must be None or at least 0.")
        self.per = per

    def check_option(self, name: str, value: Any, given: str) -> None:
        """Raise unless ``floor`` is at least 0, or -1 for the dtype's."""
        super().check_option(name, value, given)
        if name == "floor" and not ((number := as_float(value) or 0.0) >= 0.0 or number == _BY_DTYPE):
            raise TransformError(f"{given}; it must be None (-1 in a param group) or at least 0.")

    def arguments(self) -> dict[str, Any]:
        """As it was made, with the numbers in force."""
        floor = as_float(self.options["floor"])
        return {
            "per": self.per,
            "eps": self.options["eps"],
            "floor": None if floor == _BY_DTYPE else self.options["floor"],
        }

    def describe(self, group: Group) -> str:
        """With the floor that a param group has."""
        floor = as_float(group.get("normalized_grad_floor", self.options["floor"]))
        eps = group.get("normalized_grad_eps", self.options["eps"])
        least = (_WIDE if _is_wide(group) else _NARROW) if floor == _BY_DTYPE else floor
        return f"NormalizedGrad(per={self.per!r}, eps={eps}, floor={least:g})"

    def moments(self, group: Group, base: torch.optim.Optimizer) -> Moments:
        """The common norm is a total; a tensor's own is known without another pass."""
        wide = _is_wide(group)
        if self.per == "global":
            finish = global_in_float64 if wide else global_in_float32
            return Moments(scalars=square_of, totals=("square",), finish=finish, gradient=scaled)
        return Moments(scalars=tensor_in_float64 if wide else tensor_in_float32, gradient=scaled)

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """How many tensors' gradients were below the floor, and the common norm if there is one."""
        measured, served = optimizer.measured, optimizer.served(self)
        found = {"frozen": measured.sum(f"{self.name}.frozen")}
        if self.per == "global":
            found["norm"] = measured.first(f"{self.name}.norm", served)
        return {what: value for what, value in found.items() if value is not None}


def _is_wide(group: Group) -> bool:
    """Whether all weights of a param group are in float64."""
    return all(p.dtype == torch.float64 for p in group["params"])
