"""Which axes of a parameter are fan-in and fan-out, from the module that has it.

Fan-in is what one output sums over, fan-out how many outputs there are. What is looked up (the rows of an
embedding) is not summed over, and so never counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from optx.inject._weights import is_conv, is_transposed
from optx.scaling._parameters import Found

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

Fans = tuple[int, int]


def is_lookup(one: Found) -> bool:
    """Whether some use of the tensor is to look rows up in it."""
    owners = [one.makes or (one.owner, one.leaf), *((o, n.rpartition(".")[2]) for n, o in one.tied.items())]
    return any(leaf == "weight" and len(one.shape) == 2 and _looks_up(owner) for owner, leaf in owners)


def is_transposed_conv(module: nn.Module) -> bool:
    """Whether its weight is (in, out / groups, ...)."""
    return isinstance(module, _TRANSPOSED)


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or "Embedding" in type(module).__name__


def fans_of(one: Found, grown: Sequence[int]) -> Fans:
    """(fan-in, fan-out) of a parameter.

    Args:
        one: the parameter.
        grown: the axes that are width, by which a parameter of no known module is read.
    """
    shape = one.shape
    owner, leaf = one.makes or (one.owner, one.leaf)
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    if is_lookup(one):
        return 1, shape[1]
    known = _by_module(owner, leaf, shape)
    return known or _by_axes(owner, leaf, shape, grown)


def _by_module(module: Any, leaf: str, shape: tuple[int, ...]) -> Fans | None:
    if leaf == "weight" and is_transposed_conv(module):
        return shape[0] // module.groups, shape[1] * module.groups
    if leaf == "weight" and isinstance(module, nn.Bilinear):
        return shape[1] * shape[2], shape[0]
    if leaf == "weight" and is_transposed(module):  # GPT-2's Conv1D
        return shape[0], shape[1]
    if leaf == "weight" and (is_conv(module) or len(shape) == 2):
        return shape[1], shape[0]
    rows = isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight")
    if rows or (isinstance(module, _RECURRENT) and leaf.startswith("weight")):
        return shape[1], shape[0]
    return None


def _by_axes(module: nn.Module, leaf: str, shape: tuple[int, ...], grown: Sequence[int]) -> Fans:
    """A parameter that no module is known to use: torch's order (out, in) where two axes are width."""
    if len(grown) == 2:
        first, last = grown
        return (shape[first], shape[last]) if _experts_turned(module) else (shape[last], shape[first])
    experts = _experts(module, leaf, shape)
    if experts:
        return experts
    return 1, shape[grown[0]] if grown else 1


def _experts(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> Fans | None:
    """Of experts in one parameter (expert, out, in), of which only one side may be width."""
    if len(shape) != 3 or not re.search(r"(gate|up|down)_proj$", leaf):
        return None
    return (shape[1], shape[2]) if _experts_turned(module) else (shape[2], shape[1])


def _experts_turned(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))
