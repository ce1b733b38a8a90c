"""PPO for a mixture of policies: the clipped loss of its density, and routing by advantages.

Source: PMOE, arXiv 2104.09122, whose authors' code has SAC alone: what is here follows the paper's
description, see `ppo_pmoe_losses`; PPO, arXiv 1707.06347.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_above_0, check_choice
from optx._policy_loss import check_clips, ppo_clip_loss
from optx.policy._checks import check_primitive, check_tensor, readable, where
from optx.policy._estimates import picked
from optx.policy._mixture import ActionMixture, checked_mixture
from optx.policy.frequency_loss import REDUCTIONS, Reduction, best, frequency_loss


class PPOLosses(NamedTuple):
    """Two scalars, to be added.

    Attributes:
        policy: the clipped loss; its gradient goes to the primitives.
        freq: routing's.
    """

    policy: Tensor
    freq: Tensor


def ppo_pmoe_losses(
    mixture: ActionMixture,
    actions: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    primitive: Tensor | None = None,
    scores: Tensor | None = None,
    even: bool = True,
    reduction: Reduction = "mean",
) -> PPOLosses:
    """PPO's losses for a policy of several modes: primitives by the mixture's density, routing by advantages.

    The ratio is pi(a|s) / pi_old(a|s) of the whole mixture, whichever primitive acted, with w a constant in
    it: each primitive learns from an action as far as it is likely to have been its own. Routing has the
    frequency loss: the primitive that acted counts as the best wherever its advantage is above 0; where it is
    not, nothing is said of which would have been better, and the state doesn't count. With ``scores`` the
    caller says which primitive is the best, in every state.

    Args:
        mixture: of the states now, as a policy with `optx.PMOEHead` gives it.
        actions: taken, (..., n), as `ActionMixture.sample` gave them.
        old_log_prob: ``mixture.log_prob(actions)`` of when they were taken, (...).
        advantages: (...).
        clip: how far from 1 a ratio counts, at most 1. The ratio's logarithm is cut at 20 either way.
        primitive: which one acted (`ActionMixture.rsample` tells), (...) int64; None: the one that the action
            is likeliest to be of.
        scores: of each primitive, (..., K), the higher the better; in the place of advantages, for routing.
        even: count a primitive's advantages above 0 the more, the rarer it acts (by 1 / w), so that w goes by
            the share of its actions that are better than expected. False: those that act more often are
            reinforced more often, until one is left.
        reduction: see `optx.FrequencyLoss`.

    Returns:
        ``policy`` and ``freq``, scalars. An entropy bonus is the loop's: `ActionMixture.entropy_bounds`.

    Paper values:
        ``clip=0.2``: PPO's (the default).

    Limits: From the paper's description alone, as its code has no PPO; ``even`` is optx's. Advantages say
        nothing of primitives that did not act, and one that hardly acts hardly learns: on a bandit of two
        equal peaks K=8 kept both in use in 7 of 8 seeds (with ``even=False`` in 2), K=2 in none of 3.

    Keywords: proximal policy optimisation, mixture of experts, multimodal policy, on-policy, importance
        ratio, clipped surrogate.

    Evidence: ``test_ppo_pmoe.py``, a bandit of two peaks; no recipe.

    Raises:
        OptxError: an option out of range, both ``primitive`` and ``scores``, an action out of bounds, an
            advantage or a density of nan, a primitive that there isn't, or what is no mixture.
        ShapeError: shapes that don't go together, as (batch, 1) with (batch,), or no state.

    Example:
        >>> import torch, optx
        >>> policy = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> handle = optx.attach(policy, optx.PMOEHead(k=4), targets="2")
        >>> states = torch.randn(16, 3)
        >>> with torch.no_grad():
        ...     actions, _, primitive = policy(states).rsample()
        ...     old = policy(states).log_prob(actions)
        >>> losses = optx.ppo_pmoe_losses(policy(states), actions, old, torch.randn(16), primitive=primitive)
        >>> (losses.policy + losses.freq).backward()

    Source: arXiv 2104.09122; PPO, arXiv 1707.06347.
    """
    mixture = checked_mixture("ppo_pmoe_losses", mixture)
    check_above_0("ppo_pmoe_losses", "clip", clip)
    check_clips("ppo_pmoe_losses", clip, None)
    check_choice("ppo_pmoe_losses", "reduction", reduction, REDUCTIONS)
    check_choice("ppo_pmoe_losses", "even", even, (True, False))
    if primitive is not None and scores is not None:
        raise OptxError(
            "ppo_pmoe_losses: primitive and scores both say which primitive routing is to learn. Drop one."
        )
    states = mixture.logits.shape[:-1]
    _check("actions", actions, mixture.means.shape[:-2] + mixture.means.shape[-1:])
    own = mixture.component_log_prob(actions)
    _check("old_log_prob", old_log_prob, states)
    _check("advantages", advantages, states)
    log_prob = (mixture.log_w.detach() + own).logsumexp(-1)
    gain = advantages.detach().to(own.dtype)
    policy = ppo_clip_loss(log_prob, old_log_prob.detach(), gain, clip=float(clip), dual_clip=None)
    if scores is not None:
        check_tensor("ppo_pmoe_losses", "scores", scores)
        _check("scores", scores, own.shape)
        return PPOLosses(policy, frequency_loss(mixture.w, best(scores, "ppo_pmoe_losses"), reduction))
    if primitive is None:
        primitive = best(mixture.log_w + own, "ppo_pmoe_losses")
    primitive = check_primitive("ppo_pmoe_losses", primitive, states, mixture.k)
    better = gain > 0
    counts = better.to(own.dtype)
    if even:  # by 1 / w, of which only the proportions count: the largest is 1, so that none overflows
        rare = -picked(mixture.log_w.detach(), primitive)
        counts = counts * (rare - rare.masked_fill(~better, -torch.inf).max()).clamp_max(0).exp()
    return PPOLosses(policy, frequency_loss(mixture.w, primitive, reduction, counts))


def _check(name: str, given: Tensor, wanted: torch.Size) -> None:
    check_tensor("ppo_pmoe_losses", name, given)
    if given.shape != wanted:
        raise ShapeError(
            f"ppo_pmoe_losses: {name} has shape {tuple(given.shape)}; it must be {tuple(wanted)}, that of "
            "the states."
        )
    if name in ("old_log_prob", "advantages") and readable(given) and bool((wrong := given.isnan()).any()):
        raise OptxError(f"ppo_pmoe_losses: {name}[{where(wrong)}] is nan; it must be a number.")
