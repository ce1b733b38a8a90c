"""MuAdamW: muP's learning rates and the weight decay that goes with width, within a wrapped AdamW.

Source: "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning", arXiv 2510.15262; "Tensor Programs V",
arXiv 2203.03466, table 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optx._errors import TransformError
from optx.scaling._families import kind_of
from optx.scaling._multipliers import Multipliers, describe
from optx.scaling._mup import begin, make_rules
from optx.scaling._rules_of_width import Parametrization
from optx.scaling._shapes import Shapes
from optx.scaling._watch import unwatch, watch, watched_by
from optx.step.transform import Group, Host, Transform


class MuAdamW(Transform):
    """Train a wide model with the learning rate and weight decay of a narrow one (muP for AdamW).

    Matrices get lr / m and weight_decay * sqrt(m), m being how much wider their fan-in is than the base
    model's; all else keeps lr and does not decay. In AdamW's steady state the singular values of a matrix go
    as sqrt(lr / weight_decay) * width**0.75, which this keeps; with muP's learning rates alone they drift.

    The param groups are split by what they are multiplied by, as `optx.scaling.mup` does it; the step is the
    base's, fused as without. `Wrapped.remove` puts them together again. Make schedulers after `optx.wrap`.

    Source: "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning", arXiv 2510.15262; "Tensor Programs
    V", arXiv 2203.03466, table 8.

    Args:
        shapes: of the model (`optx.scaling.shapes`).
        decay: ``"sqrt"``, ``"linear"`` (keeps lr * weight_decay, as the peer package mup) or ``"none"``.
        decay_exponent: another exponent than the square root's 0.5.
        parametrization: as in `optx.scaling.mup`.
        eps: ``"scale"``: Adam's eps follows the gradients, which fall as 1 / width; ``"keep"`` leaves it.
        optimizer: how the base steps, where its class is not known: ``"adamw"``, ``"adam"`` or ``"lion"``.
        model: where the base was not made of ``named_parameters()``: whose parameters these are.

    Group keys:
        ``mu=False`` leaves a param group out: what has no width, as an adapter.

    Paper values:
        ``decay="sqrt"``: LLaMA-style models, tuned at width 256 and used up to 2048 (the default).
        ``decay_exponent=0.5``: follows from the measured power 0.75 of width in the singular values.
        ``decay="linear"``: muP's authors; drifts there.

    Limits: The rest of muP is the model's: `optx.scaling.init_`, then ``optx.attach(model,
    optx.MuReadout(shapes))`` and ``optx.MuAttention(shapes)``; what of it is found to be missing at the first
    step, a warning names. Tune the narrow model without decay of what is no matrix. Checkpoints load where
    shapes and options are the same, and not from or into the plain optimizer. A base whose decay is part of
    the gradient (`torch.optim.Adam`) is refused with ``"sqrt"``; SGD goes with `optx.scaling.mup`.

    Keywords: muP, maximal update parametrization, muTransfer, width, weight decay scaling, hyperparameter
    transfer, AdamW, layerwise learning rate.

    Evidence: ``test_mu_adamw.py``, ``test_mup_schedules.py``, ``test_mup_trainer.py``; ``optx run transfer``,
        by `optx.scaling.mup`, which splits the same groups.

    Raises:
        OptxError: as `optx.scaling.mup`.
        TransformError: the base is one of SGD's family.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     sizes = (8, width), (width, width), (width, 3)
        ...     return torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
        >>> model = make(64)
        >>> shapes = optx.scaling.shapes(model, base=make(16))
        >>> opt = torch.optim.AdamW(model.named_parameters(), lr=3e-3, weight_decay=0.1)
        >>> opt = optx.wrap(opt, optx.MuAdamW(shapes))
        >>> opt.param_groups[1]["lr"], opt.param_groups[1]["weight_decay"]
        (0.00075, 0.2)
    """

    name = "mu"

    def __init__(
        self,
        shapes: Shapes,
        decay: str = "sqrt",
        *,
        decay_exponent: float | None = None,
        parametrization: str | Parametrization = "mup",
        eps: str = "scale",
        optimizer: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        rules = make_rules("MuAdamW", shapes, parametrization, decay, decay_exponent, eps, optimizer)
        self._multipliers = Multipliers(rules, model)
        self._bound = False
        self.shapes, self.decay, self.decay_exponent = shapes, decay, decay_exponent
        self.parametrization, self.eps, self.optimizer, self.model = parametrization, eps, optimizer, model

    def check(self, base: torch.optim.Optimizer) -> None:
        """Refuse what does not step as Adam does."""
        rules = self._multipliers.rules
        if kind_of("MuAdamW", base, rules.optimizer).family != "adam":
            raise TransformError(
                f"MuAdamW: {type(base).__name__} does not step as AdamW does. Its own rules are in "
                "optx.scaling.mup(optimizer, shapes, decay='linear')."
            )

    def bind(self, optimizer: Host) -> None:
        """Split the groups."""
        begin(optimizer.base, self._multipliers)
        self._bound = True

    def set_owner(self, optimizer: Host | None) -> None:
        """A copy of an optimizer has lost the hooks of its base."""
        super().set_owner(optimizer)
        if optimizer is not None and self._bound and watched_by(optimizer.base) is None:
            watch(optimizer.base, self._multipliers)

    def before_load(self, optimizer: Host, state_dict: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose groups are not these, before shapes are compared group by group."""
        if "param_groups" in state_dict:
            self._multipliers.check_load(optimizer.base, state_dict)

    def groups_changed(self, optimizer: Host) -> None:
        """Multiply what came."""
        self._multipliers.follow(optimizer.base)

    def unwrap(self, optimizer: Host) -> None:
        """Put the groups together again."""
        unwatch(optimizer.base)
        self._multipliers.undo(optimizer.base)
        self._bound = False

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """The range of the groups' learning rates, which are muP's."""
        rates = [float(group["lr"]) for group in optimizer.param_groups if self.serves(group)]
        return {"lr_min": min(rates), "lr_max": max(rates)} if rates else {}

    def describe(self, group: Group) -> str:
        """With the factors that are in a group's numbers."""
        return f"MuAdamW({describe(group)})"
