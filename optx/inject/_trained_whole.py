"""Modules that are trained whole beside adapters: whose values they have now, and everyone else's.

Adapters may share such a module (a classifier), each with values of its own, of which one acts. Values change
places by their storage and not by copying: what autograd has saved of a forward stays right if they are back
in place before its backward, as after ``with handle.disable():``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optx._errors import warn
from optx._names import RESERVED, is_dtensor, placed_like

_MARK = "_optx_trained_whole"


@dataclass(eq=False)
class Values:
    """One adapter's values of a module.

    Attributes:
        adapter: its name.
        resting: the values while another's act; None while they are in the module.
    """

    adapter: str
    resting: dict[str, Tensor] | None = None


@dataclass(eq=False)
class Whole:
    """What is noted on such a module.

    Attributes:
        base: its own values; stale while they are in the module.
        users: of all adapters that it is trained with, in the order in which they came.
        acting: whose values are in the module; None: its own.
    """

    base: dict[str, Tensor]
    users: list[Values] = field(default_factory=list[Values])
    acting: Values | None = None


@dataclass(eq=False)
class Saved:
    """A module that is trained whole beside an adapter, and the adapter's values of it."""

    path: str
    module: nn.Module
    values: Values

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's values by name, wherever they are; live, or of no use to autograd if they rest."""
        if self.values.resting is not None:
            return self.values.resting
        return own_tensors(self.module)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name, live; without those of what is attached to it, whose handles have them."""
    every: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in every.items() if RESERVED not in name.split(".")}


def whole_of(module: nn.Module) -> Whole | None:
    """What is noted on a module, if it is trained whole with an adapter."""
    return module.__dict__.get(_MARK)


def begin(saved: Saved) -> None:
    """Let an adapter train a module, from the values that it has now."""
    module, own = saved.module, saved.values
    whole = whole_of(module)
    if whole is None:
        whole = module.__dict__[_MARK] = Whole(_copy(module))
    elif whole.acting is not None:
        whole.acting.resting = _copy(module)
    else:
        whole.base = _copy(module)
    whole.users.append(own)
    whole.acting = own


def act(module: nn.Module, own: Values) -> bool:
    """Put one adapter's values into the module; whether others were there."""
    whole = whole_of(module)
    if whole is None or own.resting is None:  # it acts
        return False
    rest(module)
    whole.base = _swap(module, own.resting)
    own.resting, whole.acting = None, own
    return True


def rest(module: nn.Module) -> bool:
    """Give the module its own values, and keep the adapter's that were in it; whether there were any."""
    whole = whole_of(module)
    if whole is None or whole.acting is None:
        return False
    whole.acting.resting = _swap(module, whole.base)
    whole.acting = None
    return True


def end(saved: Saved, *, restore: bool) -> None:
    """Forget one adapter's values; if they acted, those of the one before act again, or the module's own.

    Args:
        saved: the adapter's.
        restore: False: the module keeps the values that it has, for good.
    """
    module, own = saved.module, saved.values
    whole = whole_of(module)
    if whole is None or own not in whole.users:
        return
    whole.users.remove(own)
    if whole.acting is own and restore and not whole.users:
        _write(saved, whole.base)
    elif whole.acting is own and restore:
        whole.acting = None
        earlier = whole.users[-1]
        assert earlier.resting is not None
        _swap(module, earlier.resting)
        earlier.resting, whole.acting = None, earlier
    elif whole.acting is own:
        whole.acting = None
    if not whole.users:
        del module.__dict__[_MARK]


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in own_tensors(module).items()}


def _write(saved: Saved, values: Mapping[str, Tensor]) -> None:
    resized: list[str] = []
    with torch.no_grad():
        for name, tensor in own_tensors(saved.module).items():
            if tensor.shape == values[name].shape:
                tensor.copy_(placed_like(values[name], tensor))
            else:
                resized.append(f"{saved.path}.{name}")
    if resized:
        warn(
            f"optx: {', '.join(resized)} was resized while it was trained whole, so remove() leaves its "
            "trained values in it."
        )


def _swap(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exchange the module's values for others; what they were."""
    old: dict[str, Tensor] = {}
    for name, tensor in own_tensors(module).items():
        if is_dtensor(tensor):  # fully_shard gathers from the memory that it knows, which must be written to
            old[name] = tensor.detach().clone()
            if tensor.shape == values[name].shape:
                tensor.data.copy_(placed_like(values[name].to(tensor.dtype), tensor))
            continue
        old[name] = tensor.data
        if tensor.shape == values[name].shape:  # or it was resized since, and what it is now stays
            tensor.data = placed_like(values[name].to(tensor.dtype), tensor)
    torch.clear_autocast_cache()  # it keeps halves of weights by their object, which is the same
    return old
