"""torch's averaged SGD as rules."""

from __future__ import annotations

import functools
from typing import Any

import torch

from optx._rules import rule
from optx.bases._common import PLAIN, coupled_decay, start
from optx.ops import maximum, where
from optx.step.base_update import BaseRules
from optx.step.bases import register_base
from optx.step.declared import Slot
from optx.step.transform import Group

_NUMBER = Slot(torch.float32, scalar=True)


@rule(writes=("rate", "share", "keep_share", "eta", "mu"))
def asgd_scalars(lr: Any, lambd: Any, alpha: Any, t0: Any, step: Any, eta: Any, mu: Any) -> Any:
    """This step's rate and share of the average, which the step before has left, and the next one's."""
    next_eta = lr / (1.0 + lambd * lr * step) ** alpha
    return eta * 1.0, mu * 1.0, 1.0 - lambd * eta, next_eta, 1.0 / maximum(1.0, step - t0)


@rule(writes=("w", "ax"))
def asgd_update(w: Any, g: Any, ax: Any, rate: Any, share: Any, keep_share: Any) -> Any:
    """A step, and the average of the weights (Polyak & Juditsky 1992)."""
    new = w * keep_share - rate * g
    return new, where(share == 1.0, new, ax + (new - ax) * share)


def asgd(group: Group, _: Any) -> BaseRules:
    """ASGD's rules."""
    return _asgd(bool(group["maximize"]), coupled_decay(group))


@functools.cache
def _asgd(maximize: bool, decay: str) -> BaseRules:
    return BaseRules(
        (*start(maximize, decay), asgd_update),
        (asgd_scalars,),
        {"eta": _NUMBER, "mu": _NUMBER, "ax": PLAIN},
        {"eta": "lr", "mu": 1.0},
        counted=True,
    )


register_base(torch.optim.ASGD, asgd)
