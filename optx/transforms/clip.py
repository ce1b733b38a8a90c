"""Clip: gradients scaled down where their common norm is too large, in the pass that reads them anyway.

Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", arXiv 1211.5063,
algorithm 1; the numbers are `torch.nn.utils.clip_grad_norm_`'s.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from optx._errors import OptxError, TransformError
from optx._rules import rule
from optx.ops import minimum, sqrt
from optx.step.numbers import as_float
from optx.step.transform import Group, Host, Transform
from optx.transforms._common_scale import scaled, square_of


@rule(writes=("norm", "scale"))
def factor(total_square: Any, max_norm: Any) -> Any:
    """The norm of all gradients, and max_norm / (norm + 1e-6), at most 1."""
    norm = sqrt(total_square)
    # minimum gives its second argument where the two don't compare: a nan stays one, as in torch's clamp.
    return norm, minimum(1.0 + 0.0 * norm, max_norm / (norm + 1e-6))


class Clip(Transform):
    """Scale all gradients down together where their norm exceeds a limit (gradient clipping).

    g becomes g * min(1, max_norm / (norm + 1e-6)), where the norm is that of all gradients together: what
    `torch.nn.utils.clip_grad_norm_` does, without passes of its own. The sum of squares is taken where the
    step reads gradients anyway, or in the one reading pass that others need too (`PerpGrad` before it,
    ``skip_nonfinite``), and the scaling happens in registers: ``p.grad`` keeps what backward left.

    Sums end in float64: the norm of bfloat16 gradients is not rounded to three digits, and none overflows
    float32; a scaled gradient is not rounded to bfloat16 again. Sharded weights (DTensors) count whole.

    The norm is of the gradient as the transforms before it left it: ``PerpGrad(), Clip()`` clips what was
    projected, ``Clip(), PerpGrad()`` projects what was clipped. `KeepMask`, wherever it stands, comes first.
    After a step ``opt.totals["clip.norm"]`` has the norm before clipping, on the gradients' device
    (nan if it was skipped or found no gradient), and ``opt.metrics()`` has ``clip/norm`` and ``clip/scale``.

    Source: "On the difficulty of training recurrent neural networks", arXiv 1211.5063, algorithm 1.

    Args:
        max_norm: the largest l2 norm, above 0. One for the whole optimizer: a schedule sets
            ``opt.clip.max_norm``, and param groups that disagree are refused.
        error_if_nonfinite: raise before anything is changed where the norm is infinite or nan. Else nan goes
            into all weights, and an infinite one makes nan of infinite elements and 0 of the others, as in
            torch; ``wrap(skip_nonfinite=True)`` skips such steps, and comes first. On a GPU each step then
            waits for the norm.

    Group keys:
        ``clip=False`` leaves a param group out: it is neither counted nor scaled.

    Paper values:
        ``max_norm=1.0``: GPT-3 (arXiv 2005.14165, appendix B), and what transformers' Trainer takes (the
            default).
        None in the source: half to ten times the average norm of a run, it says.

    Limits: The l2 norm alone. Each element of a list of optimizers clips by its own norm: give all parameters
    to one. Beside other clipping (the Trainer's ``max_grad_norm``, which is 1 unless set to 0; Lightning's
    ``gradient_clip_val``) gradients are clipped twice. Gradients in float64 whose squares overflow have an
    infinite norm.

    Keywords: gradient clipping, clip_grad_norm_, max_grad_norm, global norm, exploding gradients.

    Evidence: no recipe; ``optx bench step``, ``test_clip.py``.

    Raises:
        TransformError: ``max_norm`` is no finite number above 0, or differs between param groups.
        OptxError: in a step: the norm is not finite, with ``error_if_nonfinite=True``.

    Example:
        >>> import torch, optx
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), optx.Clip(max_norm=1.0))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> opt.step()
        >>> w.detach()
        tensor([-0.6000, -0.8000])
        >>> float(opt.totals["clip.norm"])
        5.0
    """

    name = "clip"
    looks_at_gradients = False
    rules: ClassVar = {
        **{"scalars": square_of, "totals": ("square",), "finish": factor, "gradient": scaled},
    }

    def __init__(self, max_norm: float = 1.0, error_if_nonfinite: bool = False) -> None:
        self.check_option("max_norm", max_norm, f"Clip: max_norm is {max_norm!r}")
        if not isinstance(error_if_nonfinite, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"Clip: error_if_nonfinite is {error_if_nonfinite!r}; it must be True or False.")
        number: Any = max_norm.detach() if isinstance(max_norm, Tensor) else float(max_norm)
        self.options = {"max_norm": number}
        self.error_if_nonfinite = error_if_nonfinite

    def check_option(self, name: str, value: Any, given: str) -> None:
        """Raise unless ``max_norm`` is a finite number above 0."""
        super().check_option(name, value, given)
        if name == "max_norm" and not (as_float(value) or 0.0) > 0.0:
            raise TransformError(
                f"{given}; it must be above 0 (at 0 every gradient would be 0). To clip nothing, leave Clip "
                "out, or param groups by clip=False."
            )

    def bind(self, optimizer: Host) -> None:
        """Refuse groups that disagree."""
        self._check_one(optimizer)

    def groups_changed(self, optimizer: Host) -> None:
        """Refuse groups that disagree."""
        self._check_one(optimizer)

    def before_step(self, optimizer: Host) -> None:
        """Refuse groups that disagree: a schedule may have set some. The last step's norm is forgotten."""
        self._check_one(optimizer)
        optimizer.totals.pop("clip.square", None)
        optimizer.totals["clip.norm"] = torch.tensor(math.nan, dtype=torch.float64)

    def after_totals(self, optimizer: Host) -> None:
        """Leave the norm among the totals, and raise for one that is not finite, where that was asked for."""
        total = optimizer.totals.get("clip.square")
        if total is not None:  # without waiting for a GPU
            optimizer.totals["clip.norm"] = torch.as_tensor(total).sqrt()
        if self.error_if_nonfinite and total is not None and not math.isfinite(float(total)):
            raise OptxError(
                f"Clip: the gradients' norm is {math.sqrt(total)}, and error_if_nonfinite=True. Nothing was "
                "changed; wrap(skip_nonfinite=True) skips such steps and counts them."
            )

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """The norm before clipping, and what gradients were multiplied by."""
        measured, served = optimizer.measured, optimizer.served(self)
        found = {what: measured.first(f"{self.name}.{what}", served) for what in ("norm", "scale")}
        return {what: value for what, value in found.items() if value is not None}

    def _check_one(self, optimizer: Host) -> None:
        first: tuple[int, Any] | None = None
        for number, group in enumerate(optimizer.param_groups):
            if not self.serves(group):
                continue
            value = self._limit(group)
            first = first or (number, value)
            if value is not first[1] and not _same(value, first[1]):
                raise TransformError(
                    f"Clip: max_norm is {first[1]!r} in param group {first[0]} and {value!r} in group "
                    f"{number}, and there is one norm, of all groups together. Set opt.clip.max_norm, which "
                    "is for all; clip=False leaves a group out; an optimizer each has norms of their own."
                )

    def _limit(self, group: Group) -> Any:
        return group.get("clip_max_norm", self.options["max_norm"])


def _same(a: Any, b: Any) -> bool:
    """Whether two limits are one number; of one on a GPU, which would have to be waited for, it is taken."""
    if any(isinstance(v, Tensor) and v.device.type != "cpu" for v in (a, b)):
        return True
    return as_float(a) == as_float(b)
