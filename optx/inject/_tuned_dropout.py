"""Dropout with a rate of its own for each example: the one of a tuned hyperparameter.

Source: STN, arXiv 1903.03088, section 4: rates are perturbed per example. Masks know nothing of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, TargetError
from optx.inject._draw import ORDER
from optx.inject._hparams import HParams
from optx.inject._injection import Injection
from optx.inject._part import Part, hidden_of

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def dropout(x: Tensor, hparams: HParams, name: str, where: str, axes: int = 0) -> Tensor:
    """Dropout at the rate of a hyperparameter, one for each example while it is perturbed.

    It draws from torch's own stream, and where the rate is a single number, the mask is
    `torch.nn.functional.dropout`'s.

    Args:
        x: (B, ...), or (T, B, ...) with ``batch_axis=1``.
        hparams: where the rate is.
        name: of the hyperparameter.
        where: of what x is the input, for an error.
        axes: how many of the last axes are dropped as a whole: 2 for nn.Dropout2d.

    Raises:
        OptxError: the batch has another number of examples than it was drawn for, or they may be along
            two of its axes.
    """
    index = hparams.place(name)
    rate = hparams.perturbed(index)
    if rate is None:
        spec = hparams.specs[name]
        rate = spec.constrained(hparams.raw.detach()[index])
        if not spec.tuned:
            return _plain(x, spec.value, axes)
        if not torch.compiler.is_compiling():
            return _plain(x, rate.item(), axes)
    rows, axis = hparams.rows, 0
    if rows is not None and not hparams.specs[name].shared:
        axis = 0 if axes else hparams.axis(x, where)
        if x.ndim <= axis or x.shape[axis] != rows:
            raise OptxError(
                f"STN: dropout at the rate {name!r} has an input of shape {tuple(x.shape)}, and the batch "
                f"has {rows} examples, each with a rate of its own, along the {ORDER[axis]} axis. Give all "
                "the same with optx.hp(..., shared=True)."
            )
    ones = (1,) * (x.ndim - 1 - axis)
    keep = (1 - rate.to(x.device, torch.promote_types(x.dtype, torch.float32))).view(*(1,) * axis, -1, *ones)
    shape = x.shape[: x.ndim - axes] + (1,) * axes
    return (x * (torch.bernoulli(keep.expand(shape)) / keep)).to(x.dtype)


def _plain(x: Tensor, rate: float, axes: int) -> Tensor:
    kinds = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
    return kinds[axes](x, rate, training=True)


class TunedDropout(Part):
    """A dropout module at the rate of a hyperparameter instead of its own ``p``."""

    weightless: ClassVar[bool] = True

    def __init__(self, module: nn.Module, path: str, hparams: HParams, tuned: str) -> None:
        super().__init__()
        self.path, self.hparams, self.tuned = path, hparams, tuned
        self.axes = DROPOUTS.index(type(module))
        self.called = False
        """Whether a training batch went through it: a module whose ``p`` is read elsewhere is not called."""

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Drop while training."""
        if not module.training:
            return call(*args, **kwargs)
        self.called = True
        return dropout(hidden_of(args, kwargs), self.hparams, self.tuned, repr(self.path), self.axes)

    def note(self) -> str:
        """Which hyperparameter."""
        return f"drops at the rate {self.tuned!r}"


@dataclass(frozen=True)
class AtRate(Injection):
    """Give dropout modules the rate of a hyperparameter; `optx.STN` brings it along."""

    name: ClassVar[str] = "stn_dropout"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "Dropout and Dropout1d/2d/3d modules"

    hparams: HParams
    tuned: str

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's."""
        if type(module) not in DROPOUTS:
            raise TargetError(f"STN: dropout serves {self.serves}; {path!r} is a {type(module).__name__}.")
        return TunedDropout(module, path, self.hparams, self.tuned)
