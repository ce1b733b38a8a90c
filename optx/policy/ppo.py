"""PPO for a mixture of policies: the clipped loss of its density, and routing by advantages.

Source: PMOE, arXiv 2104.09122, whose authors' code has SAC alone: what is here follows the paper's
description, see `ppo_pmoe_losses`; PPO, arXiv 1707.06347.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_above_0, check_choice
from optx.policy._estimates import picked
from optx.policy._mixture import ActionMixture
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
        clip: how far from 1 a ratio counts.
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
        OptxError: an option out of range, both ``primitive`` and ``scores``, or an action out of bounds.
        ShapeError: shapes that don't go together, as (batch, 1) with (batch,).

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
    check_above_0("ppo_pmoe_losses", "clip", clip)
    check_choice("ppo_pmoe_losses", "reduction", reduction, REDUCTIONS)
    check_choice("ppo_pmoe_losses", "even", even, (True, False))
    if primitive is not None and scores is not None:
        raise OptxError(
            "ppo_pmoe_losses: primitive and scores both say which primitive routing is to learn. Drop one."
        )
    own = mixture.component_log_prob(actions)
    states = own.shape[:-1]
    _check("old_log_prob", old_log_prob, states)
    _check("advantages", advantages, states)
    log_prob = (mixture.log_w.detach() + own).logsumexp(-1)
    ratio = (log_prob - old_log_prob.detach()).exp()
    gain = advantages.detach()
    policy = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).mean()
    if scores is not None:
        _check("scores", scores, own.shape)
        return PPOLosses(policy, frequency_loss(mixture.w, best(scores, "ppo_pmoe_losses"), reduction))
    if primitive is None:
        primitive = best(mixture.log_w + own, "ppo_pmoe_losses")
    _check("primitive", primitive, states)
    if primitive.is_floating_point():
        raise ShapeError(f"ppo_pmoe_losses: primitive has dtype {primitive.dtype}; it takes whole numbers.")
    counts = (gain > 0).to(own.dtype)
    if even:
        counts = counts * (-picked(mixture.log_w.detach(), primitive)).exp()
    return PPOLosses(policy, frequency_loss(mixture.w, primitive, reduction, counts))


def _check(name: str, given: Tensor, wanted: torch.Size) -> None:
    if given.shape != wanted:
        raise ShapeError(
            f"ppo_pmoe_losses: {name} has shape {tuple(given.shape)}; it must be {tuple(wanted)}, that of "
            "the states."
        )
