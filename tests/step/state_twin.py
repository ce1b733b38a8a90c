"""What the state machine compares with: torch's own loops on copies, and every difference that is right.

A twin is made anew from what can be seen of an optimizer (weights, gradients, groups, ``state``) before each
step. So it has had every edit, its numbers never drift away, and what optx keeps out of sight (tables of
addresses, sums from the step before) can only make a difference.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.two_tensor import TwoTensor

import optx

Make = Callable[..., torch.optim.Optimizer]
Chain = Callable[[Any], list[optx.Transform]]
LOOPS = {"foreach": False, "fused": False}  # torch's fused kernels crash on some of what is tried here
ANCHOR = "optx.adamr.anchor"


def readable(t: Tensor) -> bool:
    """Whether there is memory behind every element; torch itself crashes on reading one that has none."""
    if isinstance(t, FakeTensor) or t.is_meta:
        return False
    if isinstance(t, TwoTensor):
        return readable(t.a) and readable(t.b)
    if t._is_zerotensor():  # pyright: ignore[reportAttributeAccessIssue]
        return True
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return not t.numel() or t.untyped_storage().nbytes() >= (last + 1) * t.element_size()


def numbers(t: Tensor) -> Tensor:
    """The elements of any readable tensor, in float64."""
    t = t.detach()
    if isinstance(t, TwoTensor):
        return torch.cat([numbers(t.a).flatten(), numbers(t.b).flatten()])
    return t.clone().to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def copied(t: Tensor, wide: bool = False) -> Tensor:
    """A tensor of its own with the same elements; in float64 if ``wide``."""
    t = t.detach()
    if not readable(t) and not t.is_meta and not isinstance(t, FakeTensor | TwoTensor):
        return torch.zeros(t.shape, dtype=t.dtype)  # of a parameter without a gradient: no step reads it
    if isinstance(t, FakeTensor):
        return t
    new = t
    if (
        not isinstance(t, TwoTensor) and 0 in t.stride()
    ):  # an expanded one stays so: torch refuses to write it
        new = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())]
    new = new.clone().double() if wide and new.dtype != torch.bool else new.clone()
    return new.expand(t.shape) if new.shape != t.shape else new


def value_copied(value: Any, wide: bool = False) -> Any:
    """A copy of an entry of ``state[p]``.

    optx lays an expanded moment out anew, torch refuses to write it: in float64 they are compared.
    """
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    new = copied(value, wide)
    return new.contiguous() if wide and type(new) is Tensor else new


def anchors_of(opt: optx.Wrapped, p: Tensor) -> Tensor | None:
    """The anchor of a parameter, whether ``state`` shows it yet or not."""
    return opt.slot_store.of(p).get(ANCHOR)


@dataclass
class Outcome:
    """What a twin's step gave: weights and state, or the error."""

    error: Exception | None
    weights: list[Tensor]
    states: list[dict[str, Any]]


def twin_step(opt: optx.Wrapped, make: Make, chain: Chain, scale: float, wide: bool) -> Outcome:
    """Step a twin of an optimizer: torch's loop on its own, or optx's transforms around that.

    Args:
        opt: what it is a twin of; it is not touched.
        make: the base's class.
        chain: makes the transforms, of the anchors by name.
        scale: what a hook multiplies the gradients with.
        wide: whether everything is float64, so that dtypes can't matter.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    twins = {id(p): nn.Parameter(copied(p, wide), requires_grad=p.requires_grad) for p in params}
    groups = [
        {"params": [(f"{i}.{j}", twins[id(p)]) for j, p in enumerate(group["params"])]}
        for i, group in enumerate(opt.param_groups)
    ]
    try:
        twin = make(groups, lr=0.1, **LOOPS)
        for group, original in zip(twin.param_groups, opt.param_groups, strict=True):
            known = {k: copy.deepcopy(v) for k, v in original.items() if k not in ("params", "param_names")}
            group.update({k: v for k, v in known.items() if not k.startswith("optx.")}, **LOOPS)
        anchors: dict[str, Tensor] = {}
        for i, group in enumerate(opt.param_groups):
            for j, p in enumerate(group["params"]):
                q = twins[id(p)]
                if p.grad is not None:
                    q.grad_dtype = torch.float64 if wide else p.grad.dtype
                    g = copied(p.grad, wide)
                    q.grad = g if scale == 1.0 else g * scale
                own = {k: value_copied(v, wide) for k, v in opt.state.get(p, {}).items() if "optx." not in k}
                if wide and "betas" in original_of(opt, p):
                    complete(own, q, original_of(opt, p))
                own = {k: alias_of(opt.state[p].get(k), p, q, v) for k, v in own.items()}
                if own:
                    twin.state[q] = own
                anchor = anchors_of(opt, p)
                # One that isn't used may be anything; where there is none it is taken from the weight.
                # So is one that no state shows and that has another shape (optx warns).
                fits = anchor is not None and (anchor.shape == p.shape or ANCHOR in opt.state.get(p, {}))
                used = anchor if anchor is not None and fits and p.grad is not None else p
                anchors[f"{i}.{j}"] = copied(used, wide)
        transforms = chain(anchors)
        stepped = optx.wrap(twin, *transforms, fused=False) if transforms else twin
        stepped.step()
    except Exception as error:
        return Outcome(error, [], [])
    order = [twins[id(p)] for p in params]
    return Outcome(None, [q.detach() for q in order], [dict(twin.state.get(q, {})) for q in order])


def shares_memory(a: Any, p: Tensor) -> bool:
    """Whether a state tensor is a view of its weight."""
    if not isinstance(a, Tensor) or not readable(a) or isinstance(a, TwoTensor) or isinstance(p, TwoTensor):
        return False
    return a.numel() > 0 and a.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()


def original_of(opt: optx.Wrapped, p: Tensor) -> dict[str, Any]:
    """The group of a parameter."""
    return next(group for group in opt.param_groups if any(p is q for q in group["params"]))


def complete(own: dict[str, Any], q: Tensor, group: dict[str, Any]) -> None:
    """Zeros for the moments of Adam that are missing (amsgrad was switched on), as optx makes them."""
    for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group.get("amsgrad") else ())):
        if own and own.get(name) is None:
            own[name] = torch.zeros_like(q.detach())
    if own:  # optx counts in a tensor whatever a person put there
        step = own.get("step", 0.0)
        own["step"] = step if isinstance(step, Tensor) else torch.tensor(float(step))


def alias_of(value: Any, p: Tensor, q: Tensor, own: Any) -> Any:
    """What is a view of the weight is one in the twin."""
    return q.detach() if shares_memory(value, p) else own


# ---- nothing may have changed -----------------------------------------------------------------------


class Snapshot:
    """Weights, gradients, state and groups as they are now."""

    def __init__(self, opt: optx.Wrapped) -> None:
        self._opt = opt
        self._now = self._take()

    def _take(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for i, group in enumerate(self._opt.param_groups):
            seen[f"group {i}"] = {
                k: copy.deepcopy(v)
                for k, v in group.items()
                if k != "params" and not k.startswith("optx.") and not isinstance(v, Tensor)
            }
            for j, p in enumerate(group["params"]):
                seen[f"weight {i}.{j}"] = _seen(p)
                seen[f"gradient {i}.{j}"] = _seen(p.grad)
                for key, value in self._opt.state.get(p, {}).items():
                    seen[f"state {i}.{j} {key}"] = _seen(value)
        return seen

    def changes(self) -> list[str]:
        """What is not as it was, in words."""
        now = self._take()
        return [k for k in {**self._now, **now} if not _same(self._now.get(k), now.get(k))]


def _seen(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    return (value.dtype, tuple(value.shape), numbers(value) if readable(value) else None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 3:
        if isinstance(a[2], Tensor) and isinstance(b[2], Tensor):
            # A count may be kept in another dtype, and be the same number.
            return a[1] == b[1] and torch.equal(a[2].nan_to_num(7e77), b[2].nan_to_num(7e77))
        return a[:2] == b[:2] and (a[2] is None) == (b[2] is None)
    if isinstance(a, tuple) or isinstance(b, tuple):
        return not isinstance(a, tuple) and _same_number(a, b[2] if isinstance(b, tuple) else b)
    return bool(a == b) or (a is not None and b is not None and repr(a) == repr(b))


def _same_number(a: Any, b: Any) -> bool:
    """A count that was a number may be a tensor now."""
    return isinstance(a, int | float) and isinstance(b, Tensor) and b.numel() == 1 and float(b) == float(a)


# ---- agreement ---------------------------------------------------------------------------------------

# In epsilons of the coarsest dtype around: float32 loops differ in the order of operations; a bfloat16 weight
# is rounded once.
_EPSILONS = {torch.float64: 1e5, torch.float32: 200.0, torch.float16: 3.0, torch.bfloat16: 2.0}


def coarsest(tensors: list[Any]) -> torch.dtype:
    """The floating dtype of fewest bits."""
    dtypes = [t.dtype for t in tensors if isinstance(t, Tensor) and t.dtype in _EPSILONS]
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def agree(got: Tensor, wanted: Tensor, before: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is what a twin has, within the rounding of a dtype."""
    if got.is_meta and wanted.is_meta:  # torch leaves a weight as it is for a moment without memory
        return got.shape == wanted.shape
    if not (readable(got) and readable(wanted)) or (got.shape != wanted.shape):
        return False
    if got.dtype != wanted.dtype and not wanted.is_floating_point():
        return False
    a, b = numbers(got), numbers(wanted)
    if not isinstance(got, TwoTensor):
        b = b.to(got.dtype).double() if got.is_floating_point() else b
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not finite.any():
        return bool(torch.equal(torch.isfinite(a), finite))
    a, b = a[finite], b[finite]
    start = numbers(before).abs() if readable(before) else torch.zeros(1)
    start = start[torch.isfinite(start)]
    scale = max(float(b.abs().max()), float(start.max()) if start.numel() else 0.0)
    return float((a - b).abs().max()) <= _EPSILONS[dtype] * torch.finfo(dtype).eps * scale + 1e-30


# ---- what is right though torch does something else ---------------------------------------------------


@dataclass(frozen=True)
class Allowance:
    """A refusal by optx where torch steps.

    Attributes:
        name: as it is counted.
        says: what its sentence is like.
        why: the reason.
    """

    name: str
    says: str
    why: str


REFUSALS = (
    Allowance(
        "a number per tensor of a TwoTensor",
        r"is not supported for tensor subclasses, got TwoTensor",
        "PerpGrad and AdamR need a weight's sum; a TwoTensor's is two numbers, and torch refuses that.",
    ),
    Allowance(
        "a FakeTensor as a slot",
        r"convert all Tensors to FakeTensors first",
        "torch has no slots; a FakeTensor has no numbers, and says so where it meets a tensor that has some.",
    ),
    Allowance(
        "a slot on the meta device",
        r"is not on the expected device",
        "torch has no slots; one without memory says so where it meets one that has some.",
    ),
    Allowance(
        "no number",
        r"^optx: a param group has .*; (it|they) must be (one number|numbers)\.",
        "a str or None as lr; torch takes some of them until it computes with them.",
    ),
    Allowance(
        "moment that is no tensor",
        r"^optx: (its|the) state '.*' of parameter .* is a .*; it must be a tensor\.",
        "a kernel is pointed at memory; torch raises too.",
    ),
    Allowance(
        "moment that is no float",
        r"^optx: (its state '.*'|the gradient) of parameter .* is .*, which no kernel reads\.",
        "moments kept as integers lose what they are for; torch raises where it computes with them.",
    ),
    Allowance(
        "a number of ours that is none",
        r"^optx: its state 'optx\..*' of parameter .* has shape .*; it must be one number\.",
        "torch has no sum of the second moment that could have been given a shape.",
    ),
    Allowance(
        "option out of range",
        r"(adamr_weight|perp_grad_rescale)",
        "a negative pull pushes away.",
    ),
    Allowance(
        "state of another shape",
        r"^optx: parameter .* has shape .*, its state '.*' has .*",
        "torch broadcasts what fits (a ZeroTensor gradient fits all), which is another weight's moment.",
    ),
    Allowance(
        "gradient of another shape",
        r"^optx: parameter .* has shape .*, its gradient has .*",
        "the weight was replaced after backward(); torch broadcasts what happens to fit.",
    ),
)


def refusal(error: Exception) -> Allowance | None:
    """The allowance under which an error falls."""
    text = str(error)
    return next((a for a in REFUSALS if re.search(a.says, text, re.DOTALL)), None)
