"""Copies of a feed-forward module as experts: what can be copied, how they start, and their mean."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optx._errors import TargetError
from optx._names import is_dtensor
from optx.inject._anatomy import has_experts
from optx.inject._offload import HOOK
from optx.inject._part import RESERVED
from optx.inject._quantised import kind_of
from optx.inject._weights import in_sum_precision

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_copyable(method: str, module: nn.Module, path: str) -> None:
    """Raise if experts can't be copies of a module.

    Raises:
        TargetError: says why, and names what is in the way.
    """
    why = _obstacle(module)
    if why:
        raise TargetError(
            f"attach: {method} can't make experts of {path!r}, a {type(module).__name__}: {why}. Leave it "
            "out by exclude=, or pass other targets."
        )


def _obstacle(module: nn.Module) -> str:
    for path, inner in module.named_modules():
        what = repr(path) if path else "it"
        if RESERVED in path.split("."):
            return "something is attached in it already; attach this first"
        if HOOK in inner.__dict__:
            return f"accelerate keeps the weights of {what} elsewhere"
        if kind := kind_of(inner):
            return f"the weight of {what} is {kind}, which is not trained"
        saved = {*inner._buffers} - inner._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        if held := sorted(name for name in saved if inner._buffers[name] is not None):  # pyright: ignore[reportPrivateUsage]
            return f"{what} has the buffer {held[0]!r}, whose mean over experts has no meaning"
        if isinstance(inner, nn.MultiheadAttention):
            return f"{what} is attention, whose tokens look at each other"
    if has_experts(module):
        return "it is a mixture of experts itself"
    parameters = dict(module.named_parameters())
    if not parameters:
        return "it has no parameters"
    if not any(p.requires_grad for p in parameters.values()):
        return "all its parameters are frozen, so experts would learn nothing (requires_grad is False)"
    for name, p in parameters.items():
        if p.is_meta:
            return f"{name!r} is on the meta device and has no values yet; load them first"
        if not p.is_floating_point():
            return f"{name!r} is of {p.dtype}"
    return ""


def check_untied(method: str, model: nn.Module, served: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise if a parameter belongs to a served module and to something outside of it.

    Raises:
        TargetError: names the parameter by both of its names.
    """
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for path, module in served:
        for name, p in module.named_parameters():
            outside = [one for one in owners.get(id(p), []) if not one.startswith(f"{path}.")]
            if outside and not _same_module(model, path, module, outside):
                raise TargetError(
                    f"attach: {method} can't make experts of {path!r}: its {name!r} is tied to "
                    f"{outside[0]!r}, which would go on with other values. Untie them first, or leave it out "
                    "by exclude=."
                )


def _same_module(model: nn.Module, path: str, module: nn.Module, names: Sequence[str]) -> bool:
    """Whether other names of a parameter are of the same module, by another path (a shared layer)."""
    paths = [other for other, one in model.named_modules(remove_duplicate=False) if one is module]
    return all(any(name.startswith(f"{other}.") for other in paths) for name in names)


def copies(module: nn.Module, count: int) -> nn.ModuleList:
    """Experts with the values that a module has; hooks on the module itself stay with it alone."""
    made = nn.ModuleList()
    for _ in range(count):
        expert = copy.deepcopy(module)
        for name in _HOOKS:
            getattr(expert, name).clear()
        made.append(expert)
    return made


@torch.no_grad()
def draw_anew(method: str, expert: nn.Module, path: str) -> None:
    """Give an expert the values of a new module, from the global random numbers.

    Raises:
        TargetError: a module in it can't say how it begins.
    """
    for inner_path, inner in expert.named_modules():
        own = [name for name, _ in inner.named_parameters(recurse=False)]
        reset = getattr(inner, "reset_parameters", None)
        if reset is not None and own:
            reset()
        elif own:
            where = ".".join(filter(None, (path, inner_path)))
            raise TargetError(
                f"attach: {method} can't draw {where!r} anew: {type(inner).__name__} has no "
                "reset_parameters(). Use init='copy', or give it one."
            )


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean in the precision of sums, of tensors of one shape: exact where all are the same."""
    first = in_sum_precision(tensors[0])
    if len(tensors) == 1:
        return first
    rest = in_sum_precision(tensors[1]) - first
    for one in tensors[2:]:
        rest = rest + (in_sum_precision(one) - first)
    return first + rest / len(tensors)


def local(tensor: Tensor) -> Tensor:
    """What lies here of a tensor that may be sharded."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
