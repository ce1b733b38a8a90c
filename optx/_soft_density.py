"""The log-density of steps that are mixtures of tokens, which a policy gradient differentiates.

Source: "SofT-GRPO: Surpassing Discrete-Token LLM Reinforcement Learning via Gumbel-Reparameterized
Soft-Thinking Policy Optimization", arXiv 2511.06411, and its authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_above_0, check_choice, shown
from optx.kernels.softmax.rows import math_dtype

__all__ = ["soft_logprob"]

REDUCTIONS = ("masked_mean", "sum")
FLOOR = 1e-6
"""Added to a share before its logarithm is taken (the authors' code)."""
LEAST = -3.0
"""Tokens whose log share is above this count in the masked mean (the authors' code)."""
_CHUNK = 1 << 22
"""Entries of logits that are widened at a time."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def soft_logprob(
    logits: Tensor,
    ids: Tensor,
    gprime: Tensor,
    discrete: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    noise_factor: float = 1.0,
    reduce: str = "masked_mean",
    mask: Tensor | None = None,
    noise_clamp: tuple[float, float] | None = (-1.5, 3.0),
) -> Tensor:
    """Log-density of steps that mixed K tokens by Gumbel noise: what the policy's ratio is made of.

    A step had perturbed log shares g'_i = l_i + e_i: l the log shares of its K tokens, e Gumbel noise. Under
    other logits the same g' took other noise e_i = g'_i - l_i, whose log-density is -e_i - exp(-e_i). Its
    derivative by l_i is 1 - exp(-e_i), so that tokens whose noise was above 0 are those that are credited.
    The shares are softmax(logits[ids] / temperature) + 1e-6, of the K tokens alone.

    Rows of ``discrete`` are ordinary tokens, ids[..., 0], of which the log-probability among all is taken.
    Arithmetic is in float32 (float64 for float64 logits); beside the logits no tensor of their size is made
    but their gradient. It is differentiable once.

    Args:
        logits: (..., V), which the step was drawn from: those of the position before it.
        ids: int64 (..., K), the tokens that were mixed, K at least 2.
        gprime: (..., K), float32 or float64, in the order of ``ids``; -inf where a step mixed fewer than K:
            such a slot takes no part.
        discrete: bool (...), which rows are ordinary tokens; None: none.
        temperature: that logits were divided by, one number or one for each row.
        noise_factor: that the noise was multiplied by.
        reduce: ``"masked_mean"``: over the tokens whose log share is above -3 (0 where there is none);
            ``"sum"`` over all K, the density itself.
        mask: bool (..., K), which tokens the masked mean is over, to keep those of an earlier policy.
        noise_clamp: least and largest noise; beyond, a token has no gradient. None: the noise as it is.

    Returns:
        (...), float32 or float64.

    Raises:
        OptxError: an option out of range; K of 1 in a row that is not discrete.
        ShapeError: shapes do not fit.
        TypeError: dtypes: g' in half precision has lost the noise's digits.

    Example:
        >>> import torch, optx
        >>> shares = torch.tensor([0.6, 0.3, 0.08, 0.02])
        >>> noise = torch.tensor([0.5, -0.3, 1.2, 0.4])
        >>> optx.functional.soft_logprob(shares.log(), torch.arange(4), shares.log() + noise)
        tensor(-1.2192)

    Source: arXiv 2511.06411; the masked mean, the clamp and 1e-6 from the authors' code.
    """
    return soft_steps(
        logits,
        ids,
        gprime,
        discrete,
        temperature=temperature,
        noise_factor=noise_factor,
        reduce=reduce,
        mask=mask,
        noise_clamp=noise_clamp,
    ).logp


class Steps(NamedTuple):
    """Log-densities of steps, (...), and which of their tokens the masked mean was over, (..., K)."""

    logp: Tensor
    mask: Tensor


def soft_steps(
    logits: Tensor,
    ids: Tensor,
    gprime: Tensor,
    discrete: Tensor | None,
    *,
    temperature: float | Tensor,
    noise_factor: float,
    reduce: str,
    mask: Tensor | None,
    noise_clamp: tuple[float, float] | None,
) -> Steps:
    """See `soft_logprob`."""
    check_choice("soft_logprob", "reduce", reduce, REDUCTIONS)
    check_clamp("soft_logprob", noise_clamp)
    kappa = check_above_0("soft_logprob", "noise_factor", noise_factor)
    _check_steps(logits, ids, gprime, discrete, mask)
    shape, (V, K) = ids.shape[:-1], (logits.shape[-1], ids.shape[-1])
    plain = (ids.new_zeros(shape, dtype=torch.bool) if discrete is None else discrete).reshape(-1)
    heat = _temperatures(temperature, shape, math_dtype(logits.dtype), logits.device)
    rows = ids.reshape(-1, K)
    flat = logits.reshape(-1, V)
    scores, whole = cast(
        "tuple[Tensor, Tensor]",
        _Scores.apply(flat, rows, plain, heat),  # pyright: ignore[reportUnknownMemberType]
    )
    g = gprime.reshape(-1, K).to(scores.dtype)
    used = g != -torch.inf  # nan is no gap: it is to be seen in the result
    present = used | ~used.any(1, keepdim=True)  # a row of padding has no slot, and no nan
    share = torch.where(present, scores, -torch.inf).softmax(1)
    log_share = (share + FLOOR).log()
    # A slot that takes no part has finite numbers, so that what it is multiplied by 0 with is no nan.
    noise = (torch.where(used, g, log_share.detach()) - log_share) / kappa
    noise = noise if noise_clamp is None else noise.clamp(*noise_clamp)
    density = -noise - (-noise).clamp_max(80.0).exp()  # beyond 80 it is 0, and its logarithm stays finite
    if reduce == "sum":
        counts = used
    else:
        counts = (log_share.detach() > LEAST if mask is None else mask.reshape(-1, K)) & used
    total = torch.where(counts, density, 0.0).sum(1)
    soft = total if reduce == "sum" else total / counts.sum(1).clamp_min(1)
    logp = torch.where(plain, scores[:, 0] - whole, soft)
    return Steps(logp.reshape(shape), counts.reshape(ids.shape))


class _Scores(torch.autograd.Function):
    """Scores at given tokens and, of discrete rows, the log of the sum of all exponentials.

    Logits (N, V) stay as they are, and only discrete rows are read, a few at a time.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, logits: Tensor, ids: Tensor, discrete: Tensor, heat: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = logits.gather(1, ids).to(heat.dtype) / heat
        whole = scores.new_zeros(len(scores))
        for rows in _few(discrete, logits.shape[1]):
            whole[rows] = (logits[rows].to(heat.dtype) / heat[rows]).logsumexp(1)
        ctx.save_for_backward(logits, ids, discrete, heat, whole)
        return scores, whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_score: Tensor, by_whole: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, ids, discrete, heat, whole = ctx.saved_tensors
        by_score, by_whole = by_score / heat, by_whole[:, None] / heat
        grad = torch.zeros_like(logits)
        grad.scatter_add_(1, ids, by_score.masked_fill(discrete[:, None], 0.0).to(grad.dtype))
        for rows in _few(discrete, logits.shape[1]):
            share = (logits[rows].to(heat.dtype) / heat[rows] - whole[rows, None]).exp_()
            wide = share.mul_(by_whole[rows]).scatter_add_(1, ids[rows], by_score[rows])
            grad[rows] = wide.to(grad.dtype)
        return grad, None, None, None


def _few(discrete: Tensor, V: int) -> Iterator[Tensor]:
    """The numbers of discrete rows, some at a time."""
    rows = discrete.nonzero().squeeze(1)
    size = max(1, _CHUNK // max(1, V))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# ---- what is refused ------------------------------------------------------------------------------------


def check_clamp(owner: str, clamp: Any) -> None:
    """Raise unless it is None or two numbers with 0 in between."""
    if clamp is None:
        return
    try:
        low, high = map(float, clamp)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < 0 < high:
        raise OptxError(
            f"{owner}: noise_clamp is {shown(clamp)}; it must be None or two numbers, below and above 0."
        )


def _check_steps(
    logits: Tensor, ids: Tensor, gprime: Tensor, discrete: Tensor | None, mask: Tensor | None
) -> None:
    owner = "soft_logprob"
    if logits.dtype not in _FLOATS:
        raise TypeError(
            f"{owner}: logits have dtype {logits.dtype}; use float16, bfloat16, float32, float64."
        )
    if gprime.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{owner}: gprime has dtype {gprime.dtype}; keep it in float32: its rounding would be taken for "
            "noise."
        )
    if ids.dtype != torch.int64:
        raise TypeError(f"{owner}: ids have dtype {ids.dtype}; they must be int64.")
    lead = tuple(logits.shape[:-1])
    if logits.ndim == 0 or ids.ndim == 0 or tuple(ids.shape[:-1]) != lead or ids.shape != gprime.shape:
        raise ShapeError(
            f"{owner}: logits have shape {tuple(logits.shape)}, ids {tuple(ids.shape)} and gprime "
            f"{tuple(gprime.shape)}; they must be (..., V), (..., K) and (..., K)."
        )
    for name, given, wanted in (("discrete", discrete, lead), ("mask", mask, tuple(ids.shape))):
        if given is not None and (tuple(given.shape) != wanted or given.dtype != torch.bool):
            raise ShapeError(
                f"{owner}: {name} has shape {tuple(given.shape)} and dtype {given.dtype}; it must be bool of "
                f"shape {wanted}."
            )
    if ids.shape[-1] < 2 and ids.numel() and (discrete is None or not bool(discrete.all())):
        raise OptxError(
            f"{owner}: ids have K={ids.shape[-1]} tokens a step; a mixture has at least 2. Mark rows of one "
            "token in `discrete`."
        )


def _temperatures(
    given: float | Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One for each row, (N, 1)."""
    if isinstance(given, Tensor) and given.ndim:
        if given.shape != shape:
            raise ShapeError(
                f"soft_logprob: temperature has shape {tuple(given.shape)}; it must be one number or "
                f"{tuple(shape)}, one a row."
            )
        if not bool((given > 0).all() & given.isfinite().all()):
            raise OptxError("soft_logprob: temperature has entries that are not finite numbers above 0.")
        return given.detach().reshape(-1, 1).to(device, dtype)
    heat = check_above_0("soft_logprob", "temperature", given)
    return torch.full((1, 1), heat, dtype=dtype, device=device).expand(shape.numel(), 1)
