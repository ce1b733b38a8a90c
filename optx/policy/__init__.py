"""Policies of several modes: mixtures of experts, and the losses that train them."""

from optx.policy._mixture import ActionMixture as ActionMixture
from optx.policy.estimators import enumerated_loss as enumerated_loss
from optx.policy.estimators import gumbel_weights as gumbel_weights
from optx.policy.estimators import score_ratio_loss as score_ratio_loss
from optx.policy.sac import least_q as least_q

__all__ = ["ActionMixture", "enumerated_loss", "gumbel_weights", "least_q", "score_ratio_loss"]
