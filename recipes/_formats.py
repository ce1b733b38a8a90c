"""Options of recipes that say in how many bits the fused step keeps moments and weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import optx
from optx import OptxError

from ._run import SettingsError, gradient_bytes, state_bytes

STATE: dict[str, Any] = {
    "choices": ["float32", "bfloat16", "8bit"],
    "help": "how the fused step keeps moments (default: as each arm does)",
}
MASTER: dict[str, Any] = {
    "choices": ["none", "split", "split16"],
    "help": "split, split16: bfloat16 weights, and 8 or 16 of the bits they lose as state (with --state)",
}


def settle(args: Namespace) -> None:
    """Raise for a --master that lacks its --state; none is the same as not given."""
    if args.master == "none":
        args.master = None
    if args.master and not args.state:
        raise SettingsError(
            f"--master {args.master}: its weights are bfloat16, and without --state moments would be too. "
            "Say which they are: --state float32, bfloat16 or 8bit."
        )


def cast(model: nn.Module, master: str | None) -> nn.Module:
    """The model in the dtype of its weights under this master."""
    return model.bfloat16() if master else model


def kept(optimizer: Optimizer, state: str | None, master: str | None) -> Optimizer:
    """The optimizer with its moments and weights in these formats; itself where none is asked for."""
    if state is None:
        return optimizer
    try:
        given: Any = {"state": state, "master": master}
        return optx.wrap(optimizer, **given)
    except OptxError as error:
        raise SettingsError(f"--state {state}: {error}") from None


def words(settings: Mapping[str, Any]) -> str:
    """What a run's settings say of formats; nothing of one without."""
    found = [f"{name} {settings[name]}" for name in ("state", "master") if settings.get(name)]
    return ", ".join(found)


def resident_bytes(model: nn.Module, optimizer: Optimizer) -> float:
    """Bytes a parameter of weights, gradients and state, summed from the tensors that there are."""
    weights: list[torch.Tensor] = list(model.parameters())
    held = sum(p.numel() * p.element_size() for p in weights)
    return (held + gradient_bytes(optimizer) + state_bytes(optimizer)) / sum(p.numel() for p in weights)
