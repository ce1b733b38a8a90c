"""Soft actor-critic for a mixture of policies: the losses of a step, and the critics' target.

Source: PMOE, arXiv 2104.09122, and its authors' rlkit-pmoe; SAC, arXiv 1801.01290 and 1812.05905.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_choice, check_range, shown
from optx.policy._checks import (
    check_alpha,
    check_critic,
    check_steps,
    check_target,
    check_tensor,
    free,
    where,
)
from optx.policy._estimates import (
    Backprop,
    Critic,
    Enumerated,
    Estimate,
    Frequency,
    Gumbel,
    Number,
    ScoreRatio,
    one_each,
    values,
)
from optx.policy._mixture import ActionMixture, checked_mixture
from optx.policy.estimators import BASELINES, Baseline
from optx.policy.frequency_loss import REDUCTIONS, Reduction

Estimator = Literal["freq", "gumbel", "score", "enumerate"]
Score = Literal["q", "q-alpha_logp"]
# The options that an estimator alone reads; given with another they would be ignored.
_OWN = {
    "score": ("freq", "q"),
    "backprop": ("freq", "max"),
    "reduction": ("freq", "mean"),
    "temperature": ("gumbel", 1.0),
    "hard": ("gumbel", False),
    "baseline": ("score", "value"),
}


class SACLosses(NamedTuple):
    """Three scalars; ``policy + freq`` is the policy's, ``alpha`` the temperature's.

    Attributes:
        policy: of actions (and of routing, where an estimator has them in one).
        freq: of routing; 0 where it is in ``policy``.
        alpha: of ln alpha; 0 for a given alpha, and stepped by already with ``alpha_optimizer``.
    """

    policy: Tensor
    freq: Tensor
    alpha: Tensor


def sac_pmoe_losses(
    mixture: ActionMixture,
    q_fn: Critic,
    alpha: Number | None = None,
    *,
    log_alpha: Tensor | None = None,
    alpha_optimizer: torch.optim.Optimizer | None = None,
    target_entropy: float | None = None,
    estimator: Estimator = "freq",
    score: Score = "q",
    backprop: Backprop = "max",
    reduction: Reduction = "mean",
    temperature: float = 1.0,
    hard: bool = False,
    baseline: Baseline = "value",
    generator: torch.Generator | None = None,
) -> SACLosses:
    """SAC's losses for a policy of several modes: the best primitive learns its action, routing how often.

    Every primitive proposes an action and the critic scores it. With ``estimator="freq"`` the policy's loss
    is mean(alpha ln pi_i - Q_i) of each state's best primitive i alone, and routing has the frequency loss.
    The others are what it is compared with: ``"gumbel"``, in which the critic is given actions summed by a
    smoothed draw; ``"score"``, the score-ratio estimator (REINFORCE) of a drawn primitive; ``"enumerate"``,
    sum_i w_i (alpha ln w_i + alpha ln pi_i - Q_i) exactly.

    Gradients of ``policy`` reach the critics' parameters too: call the critics' ``zero_grad()`` after this
    backward pass, before their own.

    Args:
        mixture: of a batch of states, as a policy with `optx.PMOEHead` gives it: means (..., K, n).
        q_fn: the critic on these states: actions (..., M, n) for any M to values (..., M); for twin critics
            the lesser, as `optx.policy.least_q` makes it.
        alpha: the temperature, if it is given; else ``log_alpha``.
        log_alpha: ln alpha, one number that is trained.
        alpha_optimizer: of ``log_alpha``: it steps at once, so that the policy's loss has the new alpha, as
            the authors' code does. None: ``losses.alpha`` is for the loop to step by, and all have the old.
        target_entropy: of ``log_alpha``; None: -n in units in which actions are (-1, 1), whatever the bounds.
        estimator: how routing is trained.
        score: freq: what is the highest of the best: ``"q"``, or ``"q-alpha_logp"``.
        backprop: freq: which primitives learn their actions: the best (``"max"``), or ``"all"``.
        reduction: freq: see `optx.FrequencyLoss`.
        temperature: gumbel: of the smoothed draw.
        hard: gumbel: one primitive's action, with the smoothed draw's gradient (straight-through).
        baseline: score: ``"value"`` or ``"none"``; see `optx.policy.score_ratio_loss`.
        generator: of all draws.

    Returns:
        ``policy``, ``freq`` and ``alpha``, scalars.

    Paper values:
        ``estimator="freq", score="q", backprop="max"``: the authors' code (the defaults).

    Limits: Of equally good modes the frequency loss may keep one: the primitive that is there first is the
        best nearly always, and the others hardly learn; with ``backprop="all"``, or the critic's value less
        alpha ln pi as ``score``, more stay (recipe ``modes``). alpha weighs each primitive's own entropy; the
        mixture's is larger, by up to ln K. With ``"gumbel"`` soft actions are averages of modes. The critic
        is evaluated K times a state.

    Keywords: soft actor-critic, mixture of experts, multimodal policy, Gumbel-softmax, REINFORCE,
        straight-through, reparametrisation, entropy regularisation.

    Evidence: ``optx run modes``; ``test_sac_pmoe.py``, ``test_estimators.py``.

    Raises:
        OptxError: an option out of range or of another estimator, a score of nan, a critic without gradient,
            or a policy's output that is no mixture.
        ShapeError: values of another shape, or no state.

    Example:
        >>> import torch, optx
        >>> policy = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> handle = optx.attach(policy, optx.PMOEHead(k=4), targets="2")
        >>> states, peak = torch.randn(16, 3), torch.tensor([0.3, -0.5])
        >>> q_fn = lambda actions: -(actions - peak).square().sum(-1)
        >>> losses = optx.sac_pmoe_losses(policy(states), q_fn, alpha=0.1)
        >>> (losses.policy + losses.freq).backward()

    Source: arXiv 2104.09122, and its authors' code for the order of a step.
    """
    own = {"score": score, "backprop": backprop, "reduction": reduction}
    _check_options(estimator, {**own, "temperature": temperature, "hard": hard, "baseline": baseline})
    mixture = checked_mixture("sac_pmoe_losses", mixture)
    check_critic("sac_pmoe_losses", q_fn)
    now = _alpha_now(alpha, log_alpha, alpha_optimizer)
    check_target(target_entropy, log_alpha)
    step: Estimate
    if estimator == "freq":
        with_entropy = score == "q-alpha_logp"
        step = Frequency.of(mixture, q_fn, now, with_entropy, backprop, reduction, generator)
    elif estimator == "gumbel":
        step = Gumbel.of(mixture, q_fn, temperature, hard, generator)
    elif estimator == "score":
        step = ScoreRatio.of(mixture, q_fn, baseline, generator)
    else:
        step = Enumerated.of(mixture, q_fn, generator)
    of_alpha = step.log_prob.new_zeros(())
    if log_alpha is not None:
        wanted = _target_entropy(mixture, target_entropy)
        of_alpha = -(log_alpha.reshape(()) * (step.log_prob.detach() + wanted).mean())
        if alpha_optimizer is not None:
            alpha_optimizer.zero_grad()
            of_alpha.backward()  # pyright: ignore[reportUnknownMemberType]
            alpha_optimizer.step()
            of_alpha = of_alpha.detach()
            now = log_alpha.detach().exp().reshape(())
    return SACLosses(step.policy(now), step.freq(now), of_alpha)


@torch.no_grad()
def sac_pmoe_target(
    mixture: ActionMixture,
    q_fn: Critic,
    alpha: Number,
    reward: Tensor,
    terminated: Tensor,
    gamma: float = 0.99,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The critics' target y = r + gamma (1 - terminated) (Q(s', a') - alpha ln pi_j(a'|s')), a' of a drawn j.

    Args:
        mixture: of the next states.
        q_fn: the target critics on the next states, as in `sac_pmoe_losses`.
        alpha: the temperature.
        reward: (...), one for each state.
        terminated: (...), 1 or True where nothing follows, else 0; not where time alone ran out.
        gamma: the discount.
        generator: of all draws.

    Returns:
        (...), without gradient.

    Raises:
        ShapeError: reward or terminated of another shape, as of (batch, 1), which would make a table of it.
        OptxError: an argument out of range.
    """
    mixture = checked_mixture("sac_pmoe_target", mixture, some=False)
    check_critic("sac_pmoe_target", q_fn)
    alpha = check_alpha("sac_pmoe_target", alpha, constant=False)
    check_range("sac_pmoe_target", "gamma", gamma, 0, 1)
    drawn = mixture.rsample(generator)
    for name, given in (("reward", reward), ("terminated", terminated)):
        check_tensor("sac_pmoe_target", name, given)
        if given.shape != drawn.log_prob.shape:
            raise ShapeError(
                f"sac_pmoe_target: {name} has shape {tuple(given.shape)}; it must be "
                f"{tuple(drawn.log_prob.shape)}, a number for each state."
            )
    if free(terminated) and bool((wrong := ~((terminated >= 0) & (terminated <= 1))).any()):
        raise OptxError(
            f"sac_pmoe_target: terminated[{where(wrong)}] is {terminated[wrong][0].item():g}; it must be 0 "
            "or 1."
        )
    value = values(q_fn, drawn.action.unsqueeze(-2)).squeeze(-1)
    follows = 1 - terminated.to(value.dtype)
    return reward + follows * gamma * (value - alpha * drawn.log_prob)


def least_q(states: Tensor, *critics: Callable[[Tensor, Tensor], Tensor]) -> Critic:
    """The lesser of several critics on given states, as `sac_pmoe_losses` and `sac_pmoe_target` ask it.

    Args:
        states: (..., s).
        critics: of (states, actions), each to (..., 1) or (...).

    Returns:
        A function of actions (..., M, n), which gives (..., M).

    Raises:
        OptxError: no critic, or what is none.

    The function raises ShapeError for actions of other states.
    """
    check_tensor("least_q", "states", states)
    if not critics:
        raise OptxError("least_q: there is no critic; give one, or SAC's two.")
    for critic in critics:
        if not callable(critic):
            raise OptxError(
                f"least_q: a critic is a {type(critic).__name__}; each must be called as critic(states, "
                "actions). Of a list: least_q(states, *critics)."
            )

    def q_fn(actions: Tensor) -> Tensor:
        own, lead = states.shape[:-1], actions.shape[:-2]
        if len(own) > len(lead) or any(
            a not in (1, b) for a, b in zip(reversed(own), reversed(lead), strict=False)
        ):
            raise ShapeError(
                f"least_q: actions have shape {tuple(actions.shape)}, (..., M, n), and states "
                f"{tuple(states.shape)}; they must be of the same states."
            )
        here = states.unsqueeze(-2).expand(*actions.shape[:-1], states.shape[-1])
        found = [one_each(critic(here, actions), actions) for critic in critics]
        least = found[0]
        for one in found[1:]:
            least = torch.minimum(least, one)
        return least

    return q_fn


def _alpha_now(
    alpha: Number | None, log_alpha: Tensor | None, optimizer: torch.optim.Optimizer | None
) -> Number:
    if (alpha is None) == (log_alpha is None):
        what = "neither" if alpha is None else "both"
        raise OptxError(
            f"sac_pmoe_losses: alpha and log_alpha are one temperature, and {what} is given. Pass alpha=0.2 "
            "for one that stays, or log_alpha=, a parameter, for one that is trained."
        )
    if log_alpha is not None:
        check_tensor("sac_pmoe_losses", "log_alpha", log_alpha)
        if log_alpha.numel() != 1 or not log_alpha.requires_grad:
            raise OptxError(
                f"sac_pmoe_losses: log_alpha has shape {tuple(log_alpha.shape)} and "
                f"requires_grad={log_alpha.requires_grad}; it must be one number that is trained."
            )
        if optimizer is not None:
            check_steps(log_alpha, optimizer)
        return log_alpha.detach().exp().reshape(())
    assert alpha is not None
    if optimizer is not None:
        raise OptxError("sac_pmoe_losses: alpha_optimizer trains log_alpha=, and alpha= is given. Drop one.")
    return check_alpha("sac_pmoe_losses", alpha)


def _target_entropy(mixture: ActionMixture, given: float | None) -> Number:
    return mixture.log_scale - mixture.means.shape[-1] if given is None else given


def _check_options(estimator: str, own: dict[str, object]) -> None:
    who = "sac_pmoe_losses"
    check_choice(who, "estimator", estimator, ("freq", "gumbel", "score", "enumerate"))
    check_choice(who, "score", own["score"], ("q", "q-alpha_logp"))
    check_choice(who, "backprop", own["backprop"], ("max", "all"))
    check_choice(who, "reduction", own["reduction"], REDUCTIONS)
    check_choice(who, "hard", own["hard"], (True, False))
    check_choice(who, "baseline", own["baseline"], BASELINES)
    for name, value in own.items():
        reader, usual = _OWN[name]
        if reader != estimator and value != usual:
            raise OptxError(
                f"{who}: {name}={shown(value)} is of estimator={reader!r}; estimator={estimator!r} has no "
                "use for it."
            )
