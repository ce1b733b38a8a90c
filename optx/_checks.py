"""What must hold before anything is wrapped; each failure is one sentence that names what is wrong."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import OptxError, TransformError, near
from optx._names import parameter_names
from optx._transform import Group, Moments, Transform

if TYPE_CHECKING:
    from optx._wrap import Wrapped


def check_wrap(wrapped: Wrapped, groups: Sequence[Group] | None = None) -> None:
    """Raise unless the base, its groups (or only the new ones) and the transforms go together."""
    base: Any = wrapped.base
    if not isinstance(base, Optimizer):
        raise TransformError(
            f"wrap: optimizer is a {type(base).__name__}; it must be a torch.optim.Optimizer, as "
            "torch.optim.AdamW(model.parameters())."
        )
    _check_options(wrapped)
    _check_transforms(wrapped.transforms, type(wrapped))
    for transform in wrapped.transforms:
        transform.check(base)
    new = base.param_groups if groups is None else groups
    if groups is None and not any(p.requires_grad for group in new for p in group["params"]):
        raise TransformError(
            "wrap: the optimizer has no trainable parameter (requires_grad is False for all). Unfreeze some "
            "before wrapping."
        )
    names = parameter_names(base)
    for group in new:
        acting = _check_group(group, wrapped.transforms, base)
        for p in group["params"]:
            if acting is not None:
                _check_parameter(p, names[id(p)], acting)


def _check_options(wrapped: Wrapped) -> None:
    if wrapped.fused not in (True, False, "auto", "cpu", "triton"):
        raise OptxError(
            f"wrap: fused is {wrapped.fused!r}; it must be 'auto', True, False, 'cpu' or 'triton'."
        )
    if wrapped.skip_nonfinite not in (True, False):
        raise OptxError(f"wrap: skip_nonfinite is {wrapped.skip_nonfinite!r}; it must be True or False.")
    if wrapped.rounding not in ("stochastic", "kahan", "nearest"):
        raise OptxError(
            f"wrap: rounding is {wrapped.rounding!r}; it must be 'stochastic', 'kahan' or 'nearest'."
        )


def _check_transforms(transforms: Sequence[Any], wrapped_type: type) -> None:
    for transform in transforms:
        if not isinstance(transform, Transform):
            hint = " Call it, as optx.PerpGrad()." if isinstance(transform, type) else ""
            hint = " Pass them one by one: wrap(opt, *them)." if isinstance(transform, Sequence) else hint
            raise TransformError(f"wrap: {transform!r} is not a transform.{hint}")
        name: Any = getattr(transform, "name", None)
        if not isinstance(name, str) or not name.isidentifier() or hasattr(wrapped_type, name):
            raise TransformError(
                f"wrap: {type(transform).__name__}.name is {name!r}; it must be an identifier that no "
                "attribute of an optimizer has, as it names the transform's state."
            )
        known = [f.name for f in dataclasses.fields(Moments)]
        for moment in transform.rules:
            if moment not in known:
                raise TransformError(
                    f"wrap: {type(transform).__name__}.rules has {moment!r}, which is no moment of a step. "
                    f"{near(moment, known)}"
                )
    counts = Counter(t.name for t in transforms)
    for name, count in counts.items():
        if count > 1:
            raise TransformError(
                f"wrap: {name!r} is given {count} times; a transform acts once per step. Use param-group "
                "keys for other settings in some groups."
            )


def _check_group(group: Group, transforms: Sequence[Transform], base: Optimizer) -> Transform | None:
    """The first transform that acts on the group's tensors, if any does."""
    known = [key for t in transforms for key in t.group_keys()]
    for transform in transforms:
        for key, value in group.items():
            option = key.removeprefix(f"{transform.name}_")
            if option != key and key not in known:
                raise TransformError(
                    f"wrap: a param group has {key!r}, which is no option of {type(transform).__name__}. "
                    f"{near(key, known)}"
                )
            if option != key and option in transform.options and not isinstance(value, int | float | Tensor):
                raise TransformError(f"wrap: a param group has {key}={value!r}; it must be a number.")
    enabled = [t for t in transforms if t.serves(group)]
    acting = next((t for t in enabled if t.slots or t.moments(group, base) != Moments()), None)
    if acting and group.get("differentiable", False):
        raise TransformError(
            f"{type(acting).__name__}: the base has differentiable=True, and autograd cannot follow a "
            f"transform. Set it to False, or leave the group out with {acting.name}=False."
        )
    return acting


def _check_parameter(p: Tensor, name: str, first: Transform) -> None:
    if p.is_complex():
        raise TransformError(
            f"{type(first).__name__}: parameter {name!r} is complex ({p.dtype}). Train "
            f"torch.view_as_real of it, or put it in a param group with {first.name}=False."
        )
    if p.layout != torch.strided:
        raise TransformError(
            f"{type(first).__name__}: parameter {name!r} is sparse ({p.layout}). Put it in a param group "
            f"with {first.name}=False."
        )
    if p.grad is not None and p.grad.layout != torch.strided:
        raise TransformError(
            f"{type(first).__name__}: the gradient of {name!r} is sparse. Use sparse=False in the embedding, "
            f"or put it in a param group with {first.name}=False."
        )
