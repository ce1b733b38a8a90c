"""Chains of a convolution, its batch norm and its activation, found by what a model computes, not by names.

A filter can be left out where its channel is 0 behind the chain, whatever follows. What can't, and what
should not (shortcuts, classifiers), is told with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optx.inject._conv_trace import OUTPUT, Op, is_norm, operations

_ACTIVATIONS = frozenset(
    """relu relu_ relu6 silu silu_ gelu hardswish leaky_relu leaky_relu_ elu elu_ selu celu mish tanh tanh_
    clamp clamp_ clamp_min clamp_min_ hardtanh prelu hardshrink softshrink tanhshrink threshold softplus
    softsign sigmoid sigmoid_ hardsigmoid logsigmoid exp softmax log_softmax""".split()  # noqa: SIM905
)
_POOLS = frozenset(("max_pool2d", "avg_pool2d", "lp_pool2d"))
_GLOBAL = frozenset(("adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax", "max"))
_SAME = frozenset(("dropout", "dropout2d", "contiguous", "detach", "clone", "to", "float"))
_FLAT = frozenset(("flatten", "reshape", "view", "squeeze"))
_OTHER_NORMS = frozenset(("layer_norm", "group_norm", "instance_norm", "local_response_norm"))
_ADDS = frozenset(["add", "add_", "iadd"])


@dataclass(eq=False)
class Chain:
    """A convolution with what belongs to it.

    Attributes:
        path: of the convolution.
        end: path of the module whose output is masked: the norm, or the convolution itself.
        activation: what follows it, applied to one tensor; None: nothing does.
        said: the activation's name.
        source: the convolution whose masked channels its input has, if it is one's alone.
        refused: why it can't be served.
        left: why it is not served unless it is asked for.
    """

    path: str
    end: str
    activation: Callable[[Tensor], Tensor] | None = None
    said: str = ""
    source: str | None = None
    refused: str = ""
    left: str = ""


def chains_of(model: nn.Module, shape: Sequence[int] | None = None) -> dict[str, Chain]:
    """All nn.Conv2d that the model calls, by their paths in the order of the calls.

    Args:
        model: what is traced.
        shape: of a batch to call it with, where it has to be called.

    Raises:
        OptxError: the model can't be traced.
    """
    ops = operations(model, shape)
    calls = Counter(op.path for op in ops if op.module is not None)
    found: dict[str, Chain] = {}
    ends: dict[Op, str] = {}
    for op in ops:
        if isinstance(op.module, nn.Conv2d):
            chain, end = _chain(op, op.module, calls)
            chain.source = _source(op, op.module, ends)
            found[op.path], ends[end] = chain, op.path
    return found


def _chain(op: Op, conv: nn.Conv2d, calls: Counter[str]) -> tuple[Chain, Op]:
    """One convolution's, and the operation whose output is masked."""
    norms = [user for user in op.users if user.module is not None and is_norm(user.module)]
    alone = len(op.users) == 1 and len(norms) == 1
    end = norms[0] if alone else op
    chain = Chain(op.path, end.path)
    if norms and not alone:
        chain.refused = "its output goes to a norm and elsewhere"
    elif any(_is_other_norm(user) for user in op.users):
        chain.refused = "what follows is a norm that mixes channels"
    elif calls[op.path] > 1 or calls[end.path] > 1:
        chain.refused = "it, or its norm, is called more than once"
    after = end.users[0] if len(end.users) == 1 else None
    act = None if after is None else activation_of(after)
    kept = None if act is None else _keeps_zero(act, conv, conv.out_channels)
    if after is not None and kept is not None:
        chain.activation, chain.said = act, _said(after)
        if not kept:
            chain.refused = f"{_said(after)} of 0 is not 0"
    if _is_classifier(end):
        chain.left = "its output is the model's"
    elif _is_pooled(op):
        chain.left = "its input is pooled to one position"
    elif _is_shortcut(op, end):
        chain.left = "it is a shortcut beside other convolutions"
    return chain, end


def _is_other_norm(op: Op) -> bool:
    other = nn.LayerNorm | nn.GroupNorm | nn.LocalResponseNorm
    return isinstance(op.module, other) or op.path in _OTHER_NORMS


def _said(op: Op) -> str:
    return type(op.module).__name__ if op.module is not None else op.path


def activation_of(op: Op) -> Callable[[Tensor], Tensor] | None:
    """An elementwise function of one tensor, which does not write to it; None: it is none that is known."""
    module = op.module
    if module is not None:
        known = type(module).__module__ == nn.ReLU.__module__ and not isinstance(
            module, nn.MultiheadAttention
        )
        return _Module(module) if known else None
    return op.call if op.path in _ACTIVATIONS else None


class _Module:
    """An activation module's function: no hooks of it run."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, t: Tensor) -> Tensor:
        return self.module.forward(t.clone() if getattr(self.module, "inplace", False) else t)


def _keeps_zero(act: Callable[[Tensor], Tensor], conv: nn.Conv2d, channels: int) -> bool | None:
    """Whether it gives 0 for 0; None: it has other channels than it was given (GLU)."""
    if conv.weight.is_meta:
        return True
    with torch.no_grad():
        zeros = torch.zeros(1, channels, 1, 1, dtype=conv.weight.dtype, device=conv.weight.device)
        try:
            y = act(zeros)
        except RuntimeError:  # of a number of channels that can't be halved
            return None
        return not y.count_nonzero() if y.shape == zeros.shape else None


# ---- where a chain lies in the model -------------------------------------------------------------------


def _keeps_channels(op: Op) -> bool:
    """Whether a channel of zeros is one behind it."""
    if len(op.inputs) != 1:
        return False
    if op.module is not None:
        kind = type(op.module).__module__
        pools = kind == nn.MaxPool2d.__module__ or kind == nn.Dropout.__module__
        same = pools or isinstance(op.module, nn.Identity | nn.ZeroPad2d)
        return same or activation_of(op) is not None
    if op.path == "pad":
        return op.options.get("mode", "constant") == "constant" and not op.options.get("value")
    return op.path in _POOLS | _GLOBAL | _SAME or activation_of(op) is not None


def _source(op: Op, conv: nn.Conv2d, ends: dict[Op, str]) -> str | None:
    """The convolution whose chain ends in what this one reads, if only such operations are between them."""

    def zeros_stay(one: Op) -> bool:
        act = activation_of(one)
        return _keeps_channels(one) and (act is None or _keeps_zero(act, conv, conv.in_channels) is True)

    now = op.inputs[0] if len(op.inputs) == 1 else None
    while now is not None and now not in ends:
        now = now.inputs[0] if zeros_stay(now) else None
    return ends[now] if now is not None else None


def _is_pooled(op: Op) -> bool:
    now = op.inputs[0] if op.inputs else None
    while now is not None and _keeps_channels(now):
        if now.path in _GLOBAL or isinstance(now.module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            return True
        now = now.inputs[0]
    return False


def _is_classifier(end: Op) -> bool:
    """Whether the model returns it after no more than activations, pools and views."""
    todo, seen = list(end.users), set[Op]()
    while todo:
        op = todo.pop()
        if op.path == OUTPUT and op.module is None:
            return True
        flat = op.path in _FLAT or isinstance(op.module, nn.Flatten)
        if op not in seen and (flat or _keeps_channels(op)):
            seen.add(op)
            todo.extend(op.users)
    return False


def _is_shortcut(op: Op, end: Op) -> bool:
    """Whether it is added to the output of several convolutions that start where it does."""
    for user in _through_same(end):
        if user.path in _ADDS and user.module is None and len(user.inputs) == 2:
            others = [one for one in user.inputs if end not in (one, *_behind(one, ()))]
            if any(_convolutions(other, op.inputs) > 1 for other in others):
                return True
    return False


def _through_same(end: Op) -> Iterator[Op]:
    for user in end.users:
        if _keeps_channels(user):
            yield from _through_same(user)
        yield user


def _behind(op: Op, stop: Sequence[Op]) -> Iterator[Op]:
    """What it is computed from, up to some operations, each once."""
    todo, seen = list(op.inputs), set[Op]()
    while todo:
        one = todo.pop()
        if one not in seen and one not in stop:
            seen.add(one)
            yield one
            todo.extend(one.inputs)


def _convolutions(op: Op, start: Sequence[Op]) -> int:
    """How many convolutions lie between, if it is computed from there; else 0."""
    between = [op, *_behind(op, start)]
    if not any(one in start for way in between for one in way.inputs):
        return 0
    return sum(isinstance(way.module, nn.Conv2d) for way in between)
