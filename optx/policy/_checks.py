"""What the losses of `optx.policy` look at before they compute."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, check_range, shown


def readable(values: Tensor) -> bool:
    """Whether they can be looked at now: not if traced, captured, mapped over (vmap) or without data."""
    if torch.compiler.is_compiling() or values.is_meta or type(values) not in (Tensor, nn.Parameter):
        return False
    functorch: Any = vars(torch._C)["_functorch"]  # pyright: ignore[reportPrivateUsage]
    if functorch.is_batchedtensor(values):
        return False
    return not (values.is_cuda and torch.cuda.is_current_stream_capturing())


def free(values: Tensor) -> bool:
    """Whether a look at them holds nothing up: they can be read, and are no device's."""
    return values.device.type == "cpu" and readable(values)


def where(wrong: Tensor) -> str:
    """The first True, as an index is written."""
    return ", ".join(str(int(i)) for i in wrong.nonzero()[0])


def check_tensor(who: str, name: str, given: Any) -> None:
    """Raise unless it is a tensor.

    Raises:
        OptxError: it is not.
    """
    if not isinstance(given, Tensor):
        raise OptxError(f"{who}: {name} is a {type(given).__name__}; it must be a tensor.")


def check_scores(who: str, scores: Tensor) -> None:
    """Raise if one is nan.

    Raises:
        OptxError: one is.
    """
    if readable(scores) and bool((wrong := scores.detach().isnan()).any()):
        raise OptxError(
            f"{who}: scores[{where(wrong)}] is nan, so no primitive is the best. The critic, or the actions "
            "that it was given, have overflowed."
        )


def check_primitive(who: str, primitive: Any, states: torch.Size, k: int) -> Tensor:
    """Numbers of primitives, one for each state, as int64.

    Raises:
        OptxError: no tensor, or a number that no primitive has.
        ShapeError: no whole numbers, or another shape.
    """
    check_tensor(who, "primitive", primitive)
    dtype: torch.dtype = primitive.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or primitive.shape != states:
        raise ShapeError(
            f"{who}: primitive is {dtype} of shape {tuple(primitive.shape)}; it must be whole numbers of "
            f"shape {tuple(states)}, one for each state."
        )
    if free(primitive) and bool((wrong := (primitive < 0) | (primitive >= k)).any()):
        raise OptxError(
            f"{who}: primitive[{where(wrong)}] is {int(primitive[wrong][0])}; of {k} primitives it must be "
            f"0 to {k - 1}."
        )
    return primitive.long()


def check_alpha(who: str, alpha: Any, constant: bool = True) -> Any:
    """A temperature: a finite number from 0 on, or a tensor of one.

    Raises:
        OptxError: it is none; or, if it must be constant, one with a gradient.
    """
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1 or (constant and alpha.requires_grad):
            raise OptxError(
                f"{who}: alpha has shape {tuple(alpha.shape)} and requires_grad={alpha.requires_grad}; it "
                "must be one number. One that is trained is log_alpha=."
            )
        value, alpha = (float(alpha.detach()) if free(alpha) else 0.0), alpha.reshape(())
    else:
        array = hasattr(alpha, "item") and not getattr(alpha, "shape", ())  # NumPy's numbers
        plain = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        value = float(alpha) if plain or array else -1.0
    if not 0 <= value < math.inf:
        raise OptxError(f"{who}: alpha is {shown(alpha)}; it must be a finite number of at least 0.")
    return alpha


def check_steps(log_alpha: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless an optimizer trains the temperature's logarithm, and can now.

    Raises:
        OptxError: it doesn't.
    """
    if not any(p is log_alpha for group in optimizer.param_groups for p in group["params"]):
        raise OptxError(
            "sac_pmoe_losses: alpha_optimizer doesn't have log_alpha, which would stay as it is. Make it of "
            "that very tensor: torch.optim.Adam([log_alpha], lr=3e-4)."
        )
    if not torch.is_grad_enabled():
        raise OptxError(
            "sac_pmoe_losses: alpha_optimizer can't step where gradients are off. Leave torch.no_grad(), or "
            "leave it out."
        )


def check_target(target: object, log_alpha: Tensor | None) -> None:
    """Raise unless an entropy to be held is a number, and something is there to hold it.

    Raises:
        OptxError: one isn't.
    """
    if target is None:
        return
    if log_alpha is None:
        raise OptxError(
            f"sac_pmoe_losses: target_entropy={shown(target)} is what log_alpha= is trained by; a given "
            "alpha has no use for it."
        )
    check_range("sac_pmoe_losses", "target_entropy", target, -1e30, 1e30)


def check_critic(who: str, q_fn: object) -> None:
    """Raise unless it can be called.

    Raises:
        OptxError: it can't.
    """
    if not callable(q_fn):
        raise OptxError(
            f"{who}: q_fn is a {type(q_fn).__name__}; it must be called as q_fn(actions). Of critics "
            "of states and actions: optx.policy.least_q(states, *critics)."
        )
