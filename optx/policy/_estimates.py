"""What an estimator makes of a batch: losses that know the temperature yet to come, and the entropy there is.

SAC steps its temperature between the critics' scores and the policy's loss, so that these are two moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError
from optx.policy._checks import check_scores, check_tensor
from optx.policy._mixture import ActionMixture
from optx.policy.estimators import Baseline, enumerated_loss, gumbel_weights, score_ratio_loss
from optx.policy.frequency_loss import Reduction, best, frequency_loss

Critic = Callable[[Tensor], Tensor]
Number = float | Tensor
Backprop = Literal["max", "all"]


class Estimate(Protocol):
    """A batch that has been scored.

    Attributes:
        log_prob: of what acted, (...): minus its mean is the entropy that the temperature is steered by.
    """

    @property
    def log_prob(self) -> Tensor:
        """See above."""
        ...

    def policy(self, alpha: Number) -> Tensor:
        """The loss of actions."""
        ...

    def freq(self, alpha: Number) -> Tensor:
        """The loss of routing, if it is not in the other."""
        ...


@dataclass
class Frequency:
    """The best primitive of each state is what routing is to say, and what learns."""

    w: Tensor
    q: Tensor
    log_probs: Tensor
    chosen: Tensor
    backprop: Backprop
    reduction: Reduction

    @classmethod
    def of(
        cls,
        mixture: ActionMixture,
        q_fn: Critic,
        alpha: Number,
        with_entropy: bool,
        backprop: Backprop,
        reduction: Reduction,
        generator: torch.Generator | None,
    ) -> Frequency:
        """Scored by the critic; ``with_entropy``: less alpha ln pi_i."""
        actions, log_probs = mixture.rsample_all(generator)
        q = values(q_fn, actions)
        chosen = best(q - alpha * log_probs if with_entropy else q, "sac_pmoe_losses")
        return cls(mixture.w, q, log_probs, chosen, backprop, reduction)

    @property
    def log_prob(self) -> Tensor:
        """Of the best, under its own primitive."""
        return picked(self.log_probs, self.chosen)

    def policy(self, alpha: Number) -> Tensor:
        """mean(alpha ln pi_i - Q_i) of the best, or of all."""
        if self.backprop == "all":
            return (alpha * self.log_probs - self.q).sum(-1).mean()
        return (alpha * self.log_prob - picked(self.q, self.chosen)).mean()

    def freq(self, alpha: Number) -> Tensor:
        """See `optx.FrequencyLoss`."""
        return frequency_loss(self.w, self.chosen, self.reduction)


@dataclass
class Gumbel:
    """The critic is given actions summed by a smoothed draw, whose entropy is that of what is in the sum."""

    q: Tensor
    log_prob: Tensor

    @classmethod
    def of(
        cls,
        mixture: ActionMixture,
        q_fn: Critic,
        temperature: float,
        hard: bool,
        generator: torch.Generator | None,
    ) -> Gumbel:
        """Scored by the critic, one action a state."""
        actions, log_probs = mixture.rsample_all(generator)
        y = gumbel_weights(mixture.log_w, temperature, hard=hard, generator=generator)
        q = values(q_fn, (y.unsqueeze(-1) * actions).sum(-2, keepdim=True)).squeeze(-1)
        check_scores("sac_pmoe_losses", q)
        return cls(q, (y * log_probs).sum(-1))

    def policy(self, alpha: Number) -> Tensor:
        """Of actions and routing."""
        return (alpha * self.log_prob - self.q).mean()

    def freq(self, alpha: Number) -> Tensor:
        """Nothing more."""
        return self.q.new_zeros(())


@dataclass
class ScoreRatio:
    """A drawn primitive learns its action; routing has J = Q - alpha ln(w pi), as the exact sum does."""

    q: Tensor
    log_probs: Tensor
    log_w: Tensor
    drawn: Tensor
    baseline: Baseline

    @classmethod
    def of(
        cls, mixture: ActionMixture, q_fn: Critic, baseline: Baseline, generator: torch.Generator | None
    ) -> ScoreRatio:
        """Scored by the critic, all primitives."""
        actions, log_probs = mixture.rsample_all(generator)
        drawn = mixture.draw_primitive(generator)
        q = values(q_fn, actions)
        check_scores("sac_pmoe_losses", q)
        return cls(q, log_probs, mixture.log_w, drawn, baseline)

    @property
    def log_prob(self) -> Tensor:
        """Of the draw and its action."""
        return picked(self.log_probs + self.log_w, self.drawn)

    def policy(self, alpha: Number) -> Tensor:
        """mean(alpha ln pi_i - Q_i) of the drawn."""
        return (alpha * picked(self.log_probs, self.drawn) - picked(self.q, self.drawn)).mean()

    def freq(self, alpha: Number) -> Tensor:
        """See `score_ratio_loss`."""
        scores = self.q - alpha * (self.log_probs + self.log_w)
        return score_ratio_loss(self.log_w, scores, self.drawn, self.baseline)


@dataclass
class Enumerated:
    """The sum over all primitives."""

    q: Tensor
    log_probs: Tensor
    log_w: Tensor

    @classmethod
    def of(cls, mixture: ActionMixture, q_fn: Critic, generator: torch.Generator | None) -> Enumerated:
        """Scored by the critic."""
        actions, log_probs = mixture.rsample_all(generator)
        q = values(q_fn, actions)
        check_scores("sac_pmoe_losses", q)
        return cls(q, log_probs, mixture.log_w)

    @property
    def log_prob(self) -> Tensor:
        """Of a draw and its action, on average over the draw."""
        return (self.log_w.exp() * (self.log_w + self.log_probs)).sum(-1)

    def policy(self, alpha: Number) -> Tensor:
        """Of actions and routing."""
        return enumerated_loss(self.log_w, alpha * self.log_probs - self.q, alpha)

    def freq(self, alpha: Number) -> Tensor:
        """Nothing more."""
        return self.q.new_zeros(())


def picked(given: Tensor, index: Tensor) -> Tensor:
    """One of the last axis each."""
    return given.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def values(q_fn: Critic, actions: Tensor) -> Tensor:
    """What a critic says of actions, (..., M, n) to (..., M).

    Raises:
        ShapeError: another shape.
        OptxError: no tensor, or one that has no gradient to the actions.
    """
    q = one_each(q_fn(actions), actions)
    if actions.requires_grad and torch.is_grad_enabled() and not q.requires_grad:
        raise OptxError(
            "sac_pmoe_losses: q_fn's values have no gradient to the actions, so the policy would not learn "
            "from them. Leave torch.no_grad() and detach() out of q_fn; its parameters may be frozen."
        )
    return q


def one_each(q: Tensor, actions: Tensor) -> Tensor:
    """A critic's values without the last axis of 1 that many have.

    Raises:
        ShapeError: another shape than one value an action.
        OptxError: no tensor.
    """
    check_tensor("sac_pmoe", "what q_fn gave", q)
    wanted = actions.shape[:-1]
    if q.shape == (*wanted, 1):
        q = q.squeeze(-1)
    if q.shape != wanted:
        raise ShapeError(
            f"sac_pmoe: q_fn gave values of shape {tuple(q.shape)} for actions of shape "
            f"{tuple(actions.shape)}; they must be {tuple(wanted)}, one for each action."
        )
    return q
