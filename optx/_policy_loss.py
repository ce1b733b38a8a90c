"""What a policy gradient makes of rewards and log-probabilities: advantages, the clipped loss, a divergence.

Source: GRPO, arXiv 2402.03300; PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_above_0, check_choice, check_range, check_whole, shown

__all__ = ["grpo_advantage", "k3_divergence", "ppo_clip_loss"]

_FAR = 20.0
"""Log ratios beyond this are cut, before an exponential overflows."""


def grpo_advantage(rewards: Tensor, group: int) -> Tensor:
    """How much better each sample of a group was than the group: (R - mean) / (std + 1e-6).

    The deviation is the unbiased one. A group whose rewards are all equal has advantages of 0, exactly; a
    group of one has mean 0 and deviation 1.

    Args:
        rewards: (B,), finite; the samples of a group stand side by side.
        group: samples in a group, of which B is a multiple.

    Returns:
        (B,), float32 (float64 for float64 rewards).

    Raises:
        OptxError: rewards that are not finite; B is no multiple of ``group``.
        ShapeError: rewards of another shape than (B,).

    Example:
        >>> import torch, optx
        >>> optx.functional.grpo_advantage(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]), 8)[:2]
        tensor([ 1.6202, -0.5401])

    Source: arXiv 2402.03300 (GRPO), section 4.1.
    """
    group = check_whole("grpo_advantage", "group", group, 1)
    if rewards.ndim != 1:
        raise ShapeError(
            f"grpo_advantage: rewards have shape {tuple(rewards.shape)}; they must be (B,), one a sample."
        )
    if len(rewards) % group:
        raise OptxError(
            f"grpo_advantage: {len(rewards)} rewards are no multiple of group={group}; a batch holds whole "
            "groups."
        )
    R = rewards.detach().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    if not bool(R.isfinite().all()):
        worst = int((~R.isfinite()).nonzero()[0])
        raise OptxError(f"grpo_advantage: rewards[{worst}] is {float(R[worst])}; all must be finite.")
    if group == 1 or not len(R):
        return R / (1 + 1e-6)
    grouped = R.reshape(-1, group)
    grouped = grouped - grouped[:, :1]  # a large number that is in all of them costs the mean its digits
    # A mean of equal numbers may be off by its rounding.
    apart = (grouped != 0).any(1, keepdim=True)
    found = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
    return torch.where(apart, found, 0.0).flatten()


def ppo_clip_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    dual_clip: float | None = 3.0,
    reduction: str = "mean",
) -> Tensor:
    """The clipped policy loss of steps: -min(r A, clip(r, 1 - c, 1 + c) A), at most 3 |A| where A < 0.

    r is exp(logp - logp_old). The last bound (dual clip) holds where a policy has made likely what was bad.

    Args:
        logp: (..., T), log-probabilities of the steps under the policy that is trained.
        logp_old: alike, under the policy that drew them.
        advantages: alike, or (...,): one a sample.
        mask: bool or 0/1, alike: the steps that count; None: all.
        clip: how far a ratio may go from 1 and still be followed.
        dual_clip: the bound for A < 0, above 1; None: none.
        reduction: ``"mean"`` over the steps that count, ``"sum"`` or ``"none"``.

    Returns:
        The loss, a scalar, or of the shape of ``logp`` for ``"none"`` (0 where a step does not count).

    Raises:
        OptxError: an option out of range; no step counts.
        ShapeError: shapes do not fit.

    Example:
        >>> import torch, optx
        >>> ratio, advantages = torch.tensor([1.5, 0.5, 4.0, 1.1]), torch.tensor([1.0, 1.0, -1.0, -1.0])
        >>> zeros = torch.zeros(4)
        >>> optx.functional.ppo_clip_loss(ratio.log(), zeros, advantages, reduction="none")
        tensor([-1.2000, -0.5000,  3.0000,  1.1000])

    Source: arXiv 1707.06347, equation 7; dual clip, arXiv 1912.09729, equation 5.
    """
    check_choice("ppo_clip_loss", "reduction", reduction, ("mean", "sum", "none"))
    check_clips("ppo_clip_loss", clip, dual_clip)
    if advantages.shape == logp.shape[:-1] and logp.ndim:
        advantages = advantages[..., None].expand(logp.shape)
    for name, given in (("logp_old", logp_old), ("advantages", advantages), ("mask", mask)):
        if given is not None and given.shape != logp.shape:
            raise ShapeError(
                f"ppo_clip_loss: {name} has shape {tuple(given.shape)}; it must have that of logp, "
                f"{tuple(logp.shape)}."
            )
    ratio = (logp - logp_old).clamp(-_FAR, _FAR).exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, losses.minimum(-dual_clip * advantages), losses)
    return losses if mask is None and reduction == "none" else counted(losses, mask, reduction)


def k3_divergence(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from each step that the policy drew: exp(d) - d - 1.

    d is logp_ref - logp, cut at 20 either way; the estimate is cut at 10, beyond which it has no gradient.

    Args:
        logp: log-probabilities under the policy, any shape.
        logp_ref: alike, under the reference.

    Example:
        >>> import torch, optx
        >>> optx.functional.k3_divergence(torch.zeros(2), torch.tensor([0.3, -0.2]))
        tensor([0.0499, 0.0187])

    Source: J. Schulman, "Approximating KL divergence", 2020; the cuts from the authors' code.
    """
    d = (logp_ref - logp).clamp(-_FAR, _FAR)
    return (torch.expm1(d) - d).clamp_max(10.0)


def counted(losses: Tensor, mask: Tensor | None, reduction: str = "mean") -> Tensor:
    """The mean or sum of the steps that count, or all with 0 for the others."""
    if mask is None:
        return losses.mean() if reduction == "mean" else losses.sum()
    counts = mask.bool()
    kept = torch.where(counts, losses, 0.0)
    if reduction != "mean":
        return kept if reduction == "none" else kept.sum()
    number = counts.sum()
    if not bool(number):
        raise OptxError("ppo_clip_loss: mask has no True: no step counts, so there is no mean over them.")
    return kept.sum() / number


# ---- what is refused ------------------------------------------------------------------------------------


def check_clips(owner: str, clip: object, dual_clip: object) -> None:
    """Raise unless both are in range."""
    check_range(owner, "clip", clip, 0.0, 1.0)
    if dual_clip is not None and check_above_0(owner, "dual_clip", dual_clip) <= 1:
        raise OptxError(f"{owner}: dual_clip is {shown(dual_clip)}; it must be above 1, or None.")
