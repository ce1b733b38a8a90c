"""What must hold before anything is wrapped; each failure is one sentence that names what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import OptxError, ShapeError, TransformError, near
from optx._masks import Masks
from optx._names import is_dtensor, parameter_names
from optx._pieces import pieces_of
from optx.step.bases import base_rules
from optx.step.kept import MASTER, MASTERS, STATE, STATES, check_setting
from optx.step.memory import LOST, lost_memory, why_not_plain
from optx.step.numbers import as_number
from optx.step.step_moments import Moments
from optx.step.transform import Group, Host, Transform, wrapped_by


def check_base(base: Any) -> None:
    """Raise unless it is a torch optimizer."""
    if not isinstance(base, Optimizer):
        raise TransformError(
            f"wrap: optimizer is a {type(base).__name__}; it must be a torch.optim.Optimizer, as "
            "torch.optim.AdamW(model.parameters())."
        )
    if not hasattr(base, "_optimizer_step_pre_hooks"):
        raise TransformError(
            f"wrap: {type(base).__name__} is no whole torch optimizer (it never called Optimizer.__init__), "
            "so hooks and state have no place in it. Wrap the optimizer that it holds."
        )


def check_wrap(wrapped: Host, groups: Sequence[Group] | None = None) -> None:
    """Raise unless the base, its groups (or only the new ones) and the transforms go together."""
    base: Any = wrapped.base
    check_base(base)
    _check_options(wrapped)
    _check_transforms(wrapped.transforms, type(wrapped))
    _check_free(wrapped)
    check_whole_tensors(wrapped)
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
        acting = check_group(group, wrapped.transforms, base)
        for p in group["params"]:
            if acting is not None:
                _check_parameter(p, names[id(p)], acting)


def _check_options(wrapped: Host) -> None:
    if wrapped.fused not in (True, False, "auto", "cpu", "triton"):
        raise OptxError(
            f"wrap: fused is {wrapped.fused!r}; it must be 'auto', True, False, 'cpu' or 'triton'."
        )
    for name, value in (("skip_nonfinite", wrapped.skip_nonfinite), ("metrics", wrapped.metrics_asked)):
        if value not in (True, False):
            raise OptxError(f"wrap: {name} is {value!r}; it must be True or False.")
    check_setting("state", wrapped.state_format, STATES)
    check_setting("master", wrapped.master, MASTERS)
    if wrapped.rounding not in ("stochastic", "kahan", "nearest"):
        raise OptxError(
            f"wrap: rounding is {wrapped.rounding!r}; it must be 'stochastic', 'kahan' or 'nearest'."
        )


def _hint(given: Any) -> str:
    """What was probably meant by something that is no transform."""
    if isinstance(given, type):
        return " Call it, as optx.PerpGrad()."
    if isinstance(given, Sequence):
        return " Pass them one by one: wrap(opt, *them)."
    if isinstance(given, Masks):
        return " Pass optx.KeepMask(masks)."
    if callable(getattr(given, "part", None)):  # an injection, which this package does not know of
        return f" It goes into the model: optx.attach(model, optx.{type(given).__name__}(...))."
    return ""


def _check_transforms(transforms: Sequence[Any], wrapped_type: type) -> None:
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TransformError(f"wrap: {transform!r} is not a transform.{_hint(transform)}")
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


def _check_free(wrapped: Host) -> None:
    """A transform's options, anchors and flags are those of one optimizer."""
    for transform in wrapped.transforms:
        if wrapped_by(transform) in (None, wrapped):
            continue
        gc.collect()  # a scheduler makes a cycle of its optimizer
        if wrapped_by(transform) is not None:
            raise TransformError(
                f"wrap: this {transform!r} serves another optimizer already, and would take its options and "
                f"state for its own. Make a new {type(transform).__name__}, or call remove() on that "
                "optimizer first."
            )


def check_group(group: Group, transforms: Sequence[Transform], base: Optimizer) -> Transform | None:
    """Raise for a key or value that no transform knows; the first transform that acts on the group."""
    known = [key for t in transforms for key in t.group_keys()]
    for key, value in group.items():
        _check_setting(key, value, base)
        _check_key(key, known, transforms, base)
    for transform in transforms:
        if isinstance(group.get(transform.name, True), str):
            raise TransformError(
                f"wrap: a param group has {transform.name}={group[transform.name]!r}; it must be True or "
                "False."
            )
        for option in transform.options:
            key = f"{transform.name}_{option}"
            if key in group:
                transform.check_option(option, group[key], f"wrap: a param group has {key}={group[key]!r}")
    enabled = [t for t in transforms if t.serves(group)]
    acting = next((t for t in enabled if t.slots or t.moments(group, base) != Moments()), None)
    if acting and group.get("differentiable", False):
        raise TransformError(
            f"{type(acting).__name__}: the base has differentiable=True, and autograd cannot follow a "
            f"transform. Set it to False, or leave the group out with {acting.name}=False."
        )
    return acting


def _check_setting(key: str, value: Any, base: Optimizer) -> None:
    """A misspelt ``optx.state`` or ``optx.master``, or one by the name that `wrap` has for it."""
    if key in _SETTINGS or key in base.defaults:
        return
    if key.startswith("optx."):
        meant = difflib.get_close_matches(key, (STATE, MASTER), n=1, cutoff=0.85)
    else:
        named = isinstance(value, str) and value in {"state": STATES, "master": MASTERS}.get(key, ())
        meant = [f"optx.{key}"] if named else []
    if meant:
        raise OptxError(
            f"wrap: a param group has {key}={value!r}, which nothing reads. Is {meant[0]!r} meant?"
        )


def _check_key(key: str, known: Sequence[str], transforms: Sequence[Transform], base: Optimizer) -> None:
    """A key of somebody else's is none of our business, unless it reads like a misspelt one of ours."""
    if key in known or key in base.defaults or key in TORCH_KEYS or key.startswith("optx."):
        return
    owner = next((t for t in transforms if key.startswith(f"{t.name}_")), None)
    if owner is not None:
        raise TransformError(
            f"wrap: a param group has {key!r}, which is no option of {type(owner).__name__}. "
            f"{near(key, known)}"
        )
    plain = {_plain(k): k for k in known if not k.startswith("optx.")}
    like = difflib.get_close_matches(_plain(key), plain, n=1, cutoff=0.8)
    if like:
        raise TransformError(
            f"wrap: a param group has {key!r}, which no transform reads. Is {plain[like[0]]!r} meant?"
        )


_SETTINGS = frozenset((STATE, MASTER, "optx.seed", "optx.step"))
# What torch itself puts into param groups, besides a base's defaults.
TORCH_KEYS = frozenset(
    ("params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
)


def _plain(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()


def check_state_shapes(base: Optimizer, group: Group, parameters: Iterable[Tensor]) -> None:
    """Raise where the base's state has another shape than its weight: torch's own kernels don't look."""
    rules = base_rules(base, group)
    for p in parameters if rules else ():
        state = base.state.get(p, {})
        for name in rules.elements if rules else ():
            value = state.get(name)
            if value is not None and not isinstance(value, Tensor):
                raise OptxError(
                    f"optx: the state {name!r} of parameter {parameter_names(base)[id(p)]!r} is a "
                    f"{type(value).__name__}; it must be a tensor."
                )
            if isinstance(value, Tensor) and value.shape != p.shape:
                raise ShapeError(shapes_differ(parameter_names(base)[id(p)], p, f"its state {name!r}", value))
        if rules and rules.counts_states and "step" in state:
            check_count(state["step"], base, p)


def check_count(value: Any, base: Optimizer, p: Tensor) -> Any:
    """The base's step count of a parameter, if it is one number in plain memory."""
    plain = isinstance(value, Tensor) and why_not_plain(value) is None
    number = as_number(value) if plain or not isinstance(value, Tensor) else None
    if number is None:
        what = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if plain else repr(value)
        name = parameter_names(base)[id(p)]
        raise ShapeError(f"optx: the state 'step' of parameter {name!r} is {what}; it must be one number.")
    return number


def check_memory(base: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise where a weight's, its gradient's or its state's memory was freed: torch's own loops crash."""
    for p in parameters:
        state = base.state.get(p, {})
        for what, t in (
            ("its weight", p),
            ("its gradient", p.grad),
            *((f"its state {k!r}", state[k]) for k in state),
        ):
            if isinstance(t, Tensor):
                check_has_memory(base, p, what, t)


def check_has_memory(base: Optimizer, p: Tensor, what: str, t: Tensor) -> None:
    """The same for one tensor that goes with a parameter."""
    if lost_memory(t):
        name = parameter_names(base).get(id(p), "of no group")
        raise OptxError(
            f"optx: parameter {name!r}: {what} {LOST}. Give it memory again (untyped_storage().resize_, or "
            "another tensor) before the step."
        )


def shapes_differ(name: str, p: Tensor, what: str, t: Tensor) -> str:
    """The sentence that says so, and what helps: a slot of ours may be one that can't be made again."""
    way_out = "give its state the new shape, or delete optimizer.state[p] to begin anew"
    if (at := what.find("'optx.")) >= 0:
        key = what[at + 1 :].rstrip("'")
        way_out = f"set optimizer.state[p][{key!r}] to one of its shape"
        way_out += f", or leave it out with {key.split('.')[1]}=False" if key.count(".") == 2 else ""
    return (
        f"optx: parameter {name!r} has shape {tuple(p.shape)}, {what} has {tuple(t.shape)}. Where a weight "
        f"was grown or replaced, {way_out}."
    )


def check_whole_tensors(wrapped: Host, known: Sequence[tuple[Group, Sequence[Tensor]]] = ()) -> None:
    """Raise where an engine that came after `wrap` has put pieces in the place of parameters.

    Args:
        wrapped: what is about to step.
        known: what each group had before, where that has changed.
    """
    base = wrapped.base
    names = parameter_names(base)
    for index, group in enumerate(base.param_groups):
        acting = next((t for t in wrapped.transforms if t.serves(group)), None)
        if acting is None:
            continue
        for p in group["params"]:
            if (pieces := pieces_of(p)) is not None:
                raise TransformError(
                    f"{type(acting).__name__}: parameter {names[id(p)]!r} is {pieces.what}, so the method "
                    f"would act on other numbers than a tensor's. {pieces.way_out}."
                )
        before = known[index][1] if index < len(known) else ()
        if _is_flat_buffer(before, group["params"]):
            raise TransformError(
                f"optx: the {len(before)} parameters of group {index} were replaced by one flat tensor of "
                f"{group['params'][0].numel():,} numbers, as DeepSpeed's ZeRO-1 and ZeRO-2 do, and "
                f"{type(acting).__name__} acts on each tensor by itself. Use DDP with torch's "
                "ZeroRedundancyOptimizer, or fully_shard (FSDP2); what optx.attach adds, and losses, train "
                "under ZeRO-1 and ZeRO-2 with an optimizer that isn't wrapped."
            )


def _is_flat_buffer(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether one new vector has taken the place of all that a group had."""
    if len(now) != 1 or now[0].ndim != 1 or is_dtensor(now[0]) or any(p is now[0] for p in before):
        return False
    return len(before) > 1 or (len(before) == 1 and before[0].ndim > 1)


def _check_parameter(p: Tensor, name: str, first: Transform) -> None:
    if p.is_complex():
        raise TransformError(
            f"{type(first).__name__}: parameter {name!r} is complex ({p.dtype}). Train "
            f"torch.view_as_real of it, or put it in a param group with {first.name}=False."
        )
    if lost_memory(p):
        raise TransformError(
            f"{type(first).__name__}: parameter {name!r} {LOST}. Give it memory before wrapping."
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
