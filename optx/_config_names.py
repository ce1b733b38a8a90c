"""Names in a config: the classes that they stand for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from optx import _everything
from optx._config_values import dotted
from optx._errors import OptxError, near
from optx._spherical import SphericalLoss
from optx.inject._injection import Injection
from optx.signal.loss_reweight import LossReweight
from optx.signal.mesa import MESA
from optx.signal.saf import SAF
from optx.signal.stablemax import StableMaxCrossEntropy
from optx.signal.z_loss import ZLoss
from optx.step.transform import Transform

_CALLED: dict[type, str] = {
    Transform: "transform",
    Injection: "injection",
    Optimizer: "optimizer of torch.optim",
    nn.Module: "loss",
    SphericalLoss: "loss of the spherical family",
}


def known(kind: type) -> dict[str, type]:
    """The classes that an entry of a kind may name: those that are public in optx, or torch's optimizers."""
    if kind is nn.Module:
        return {one.__name__: one for one in (StableMaxCrossEntropy, ZLoss, LossReweight, SAF, MESA)}
    if kind is Optimizer:
        there = [one for one in vars(torch.optim).values() if isinstance(one, type)]
        return {one.__name__: one for one in there if issubclass(one, kind) and one is not kind}
    _everything.load()
    return {one.__name__: one for one in _below(kind) if _is_public(one)}


def _below(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


def _is_public(kind: type) -> bool:
    """Whether it is a finished class of one of optx's public modules."""
    room, _, module = kind.__module__.rpartition(".")
    named = not module.startswith("_") and not kind.__name__.startswith("_")
    return room.startswith("optx.") and named and not inspect.isabstract(kind)


def name_of(kind: type) -> str:
    """What a config calls a class: optx's by its name alone, others by their path."""
    base = next((one for one in (Transform, SphericalLoss) if issubclass(kind, one)), Injection)
    name = kind.__name__
    return name if known(base).get(name) is kind else f"{kind.__module__}.{name}"


def find(name: str, where: str, kind: type) -> Any:
    """The class that a name stands for."""
    there = known(kind)
    if name in there:
        return there[name]
    who = f"from_config: {where}"
    if "." in name:
        try:
            found = dotted(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise OptxError(f"{who}: {name!r} can't be imported ({error}).") from None
        ours = isinstance(found, type) and issubclass(found, kind)
        if not (ours if kind in (Transform, Injection) else callable(found)):
            raise OptxError(f"{who}: {name!r} is no {_CALLED[kind]}.")
        return found
    for other, section in ((Transform, "transforms"), (Injection, "attach"), (nn.Module, "loss")):
        if other is not kind and name in known(other):
            raise OptxError(f"{who}: {name} is no {_CALLED[kind]}; it goes into {section!r}.")
    folded = [one for one in there if one.casefold() == name.casefold().replace("_", "")]
    like = f"Is {folded[0]!r} meant?" if folded else near(name, there)
    raise OptxError(f"{who}: there is no {_CALLED[kind]} {name!r}. {like}")
