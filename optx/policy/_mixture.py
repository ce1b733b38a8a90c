"""A mixture of tanh-squashed Gaussians over actions: what a policy with `optx.PMOEHead` gives.

Source: PMOE, arXiv 2104.09122; squashed Gaussians, SAC, arXiv 1801.01290, appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

from optx._errors import OptxError, ShapeError
from optx.policy._checks import check_tensor, readable, where
from optx.policy._entropy import between_gaussians, squash_entropy

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Proposals(NamedTuple):
    """An action of every primitive.

    Attributes:
        actions: (..., K, n), with gradients to means and deviations.
        log_probs: log-density of each under its own primitive, (..., K).
    """

    actions: Tensor
    log_probs: Tensor


class Drawn(NamedTuple):
    """An action of one primitive.

    Attributes:
        action: (..., n), with gradients to its mean and deviation.
        log_prob: its log-density under that primitive, (...).
        primitive: which one, (...) int64.
    """

    action: Tensor
    log_prob: Tensor
    primitive: Tensor


@dataclass(frozen=True, eq=False)
class ActionMixture:
    """pi(a|s) = sum_i w_i(s) pi_i(a|s): each primitive a diagonal Gaussian, squashed by tanh into the bounds.

    All of it is per state: "..." stands for the states' own axes. Densities are in the units of the actions,
    so that of bounds (low, high) log-densities are lower by sum(log((high - low) / 2)) than of (-1, 1).

    Attributes:
        means: of the Gaussians, before the squashing, (..., K, n).
        log_stds: logarithms of their deviations, (..., K, n).
        logits: w is their softmax, (..., K).
        low: (n,), the least action that there is; None: -1, or without squashing none.
        high: (n,), the greatest.
        squash: whether tanh takes actions into the bounds; without it they are plain Gaussians, unbounded.

    Raises:
        OptxError: something that is no tensor of floating point numbers, or one bound alone.
        ShapeError: shapes that don't go together.

    Example:
        >>> import torch
        >>> from optx.policy import ActionMixture
        >>> means = torch.tensor([[[-1.0], [2.0]]])
        >>> mixture = ActionMixture(means, means * 0, torch.zeros(1, 2))
        >>> mixture.w, mixture.sample().shape
        (tensor([[0.5000, 0.5000]]), torch.Size([1, 1]))
        >>> mixture.log_prob(torch.tensor([[0.5]]))
        tensor([-1.7547])
    """

    means: Tensor
    log_stds: Tensor
    logits: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    squash: bool = True

    def __post_init__(self) -> None:
        for name, given in (("means", self.means), ("log_stds", self.log_stds), ("logits", self.logits)):
            _check_numbers(name, given)
        for name, given in (("low", self.low), ("high", self.high)):
            if given is not None:
                _check_numbers(name, given)
        shape = self.means.shape
        if (
            self.means.ndim < 2
            or not shape[-2]
            or self.log_stds.shape != shape
            or self.logits.shape != shape[:-1]
        ):
            raise ShapeError(
                f"ActionMixture: means have shape {tuple(shape)}, log_stds {tuple(self.log_stds.shape)} and "
                f"logits {tuple(self.logits.shape)}; they must be (..., K, n) twice, and (..., K)."
            )
        if (self.low is None) != (self.high is None) or (self.low is not None and not self.squash):
            raise OptxError(
                "ActionMixture: low and high go together, and with squash=True alone: plain Gaussians have "
                "no bounds."
            )
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and bound.shape != shape[-1:]:
                raise ShapeError(
                    f"ActionMixture: {name} has shape {tuple(bound.shape)}; it must be ({shape[-1]},), a "
                    "number for each of the actions."
                )

    def __getattr__(self, name: str) -> NoReturn:  # of what is not found otherwise
        raise AttributeError(
            f"an ActionMixture has no {name!r}. It is what the policy's output gives with optx.PMOEHead, in "
            "the place of a tensor: hand it on as it is, and take sample(), log_prob(a) or rsample_all()."
        )

    # ---- what it is made of -------------------------------------------------------------------------

    @property
    def k(self) -> int:
        """How many primitives."""
        return self.logits.shape[-1]

    @property
    def log_w(self) -> Tensor:
        """Logarithms of the weights, (..., K)."""
        return self.logits.log_softmax(-1)

    @property
    def w(self) -> Tensor:
        """The weight of each primitive, (..., K); they sum to 1."""
        return self.logits.softmax(-1)

    @property
    def centres(self) -> Tensor:
        """What each primitive does without noise, (..., K, n): its mean, squashed."""
        return self._squashed(self.means)

    @property
    def log_scale(self) -> float | Tensor:
        """sum(log((high - low) / 2)): what the log-density of actions in (-1, 1) is higher by."""
        return 0.0 if self.low is None or self.high is None else ((self.high - self.low) / 2).log().sum()

    def detach(self) -> ActionMixture:
        """The same, without gradients."""
        mine = self.means.detach(), self.log_stds.detach(), self.logits.detach()
        return ActionMixture(*mine, self.low, self.high, self.squash)

    # ---- actions ------------------------------------------------------------------------------------

    def rsample_all(self, generator: torch.Generator | None = None) -> Proposals:
        """An action of every primitive, by reparametrisation."""
        return Proposals(*self._rsample(self.means, self.log_stds, generator))

    def rsample(self, generator: torch.Generator | None = None) -> Drawn:
        """An action of one primitive, which is drawn by w; gradients go to its mean and deviation alone."""
        primitive = self.draw_primitive(generator)
        mean, log_std = self._of(self.means, primitive), self._of(self.log_stds, primitive)
        return Drawn(*self._rsample(mean, log_std, generator), primitive)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """An action to explore by, (..., n): i ~ w, a ~ pi_i; no gradient."""
        with torch.no_grad():  # torch.compile can't go into a method that this decorates
            return self.rsample(generator).action

    def evaluation_action(self, *, greedy: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """An action without noise of its own, (..., n): the mean of one primitive, squashed.

        Args:
            greedy: take the likeliest primitive; else one is drawn by w, as the authors evaluate.
            generator: of the draw.
        """
        with torch.no_grad():
            primitive = self.logits.argmax(-1) if greedy else self.draw_primitive(generator)
            return self._of(self.centres, primitive)

    def draw_primitive(self, generator: torch.Generator | None = None) -> Tensor:
        """i ~ w, (...) int64; of one primitive no random number is taken."""
        if self.k == 1:
            return self.logits.new_zeros(self.logits.shape[:-1], dtype=torch.int64)
        rows = torch.multinomial(self.w.detach().reshape(-1, self.k), 1, generator=generator)
        return rows.view(self.logits.shape[:-1])

    # ---- densities ----------------------------------------------------------------------------------

    def component_log_prob(self, actions: Tensor) -> Tensor:
        """ln pi_i(a|s) of every primitive, (..., K).

        Args:
            actions: (..., n), within the bounds. One at a bound counts as the last number inside of it. The
                axes before n must fit the states', as torch broadcasts.

        Raises:
            ShapeError: it has another n, or doesn't fit the states.
            OptxError: an action outside of the bounds, or nan; or no tensor.
        """
        check_tensor("log_prob", "actions", actions)
        if actions.shape[-1:] != self.means.shape[-1:]:
            raise ShapeError(
                f"log_prob: actions have shape {tuple(actions.shape)}; they must be "
                f"(..., {self.means.shape[-1]}), as the policy's."
            )
        states = self.logits.shape[:-1]
        pairs = zip(reversed(actions.shape[:-1]), reversed(states), strict=False)
        if any(one != other and 1 not in (one, other) for one, other in pairs):
            raise ShapeError(
                f"log_prob: actions have shape {tuple(actions.shape)}, for states of shape {tuple(states)}; "
                f"they must be {(*states, self.means.shape[-1])}, one for each."
            )
        before = self._unsquashed(actions).unsqueeze(-2)
        z = (before - self.means) * (-self.log_stds).exp()
        return self._log_density(z, self.log_stds, before)

    def log_prob(self, actions: Tensor) -> Tensor:
        """ln pi(a|s) of the mixture, (...); actions as in `component_log_prob`."""
        return (self.log_w + self.component_log_prob(actions)).logsumexp(-1)

    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        """Two numbers per state, (...), that the entropy of pi(.|s) is between; equal where K is 1.

        By distances between the Gaussians (Bhattacharyya's below, Kullback-Leibler's above): arXiv
        1706.02419, equations 10 and 11. They meet where primitives are the same or far apart.
        """
        own = (self.log_stds + 0.5 + _HALF_LOG_2PI).sum(-1)
        if self.squash:
            own = own + squash_entropy(self.means, self.log_stds).sum(-1) + self.log_scale
        within = (self.w * own).sum(-1)
        below, above = (
            within - (self.w * (self.log_w.unsqueeze(-2) - distance).logsumexp(-1)).sum(-1)
            for distance in between_gaussians(self.means, self.log_stds)
        )
        return below, above

    # ---- within -------------------------------------------------------------------------------------

    def _of(self, values: Tensor, primitive: Tensor) -> Tensor:
        index = primitive[..., None, None].expand(*primitive.shape, 1, values.shape[-1])
        return values.gather(-2, index).squeeze(-2)

    def _rsample(
        self, means: Tensor, log_stds: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        before = means + log_stds.exp() * noise
        return self._squashed(before), self._log_density(noise, log_stds, before)

    def _log_density(self, z: Tensor, log_stds: Tensor, before: Tensor) -> Tensor:
        """Of Gaussians at z deviations from their means; ``before`` is what is squashed then."""
        gaussian = (-0.5 * z * z - log_stds - _HALF_LOG_2PI).sum(-1)
        if not self.squash:
            return gaussian
        # log(1 - tanh(u)^2) without a difference that cancels (SAC's appendix C has the plain form)
        slopes = 2 * (math.log(2) - before - F.softplus(-2 * before))
        return gaussian - slopes.sum(-1) - self.log_scale

    def _squashed(self, before: Tensor) -> Tensor:
        if not self.squash:
            return before
        unit = before.tanh()
        if self.low is None or self.high is None:
            return unit
        return self._rescaled(unit).clamp(self.low, self.high)  # sums round to numbers beyond the bounds

    def _unsquashed(self, actions: Tensor) -> Tensor:
        actions = actions.to(self.means.dtype)
        if not self.squash:
            return actions
        unit, eps = actions, torch.finfo(actions.dtype).eps
        slack: float | Tensor = 32 * eps  # as much as bounds, and sums of them, are rounded by
        if self.low is not None and self.high is not None:
            half = (self.high - self.low) / 2
            unit = (actions - (self.high + self.low) / 2) / half
            slack = slack + 4 * eps * torch.maximum(self.low.abs(), self.high.abs()) / half
        self._check_inside(unit, slack)
        return unit.clamp(-1 + eps, 1 - eps).atanh()

    def _check_inside(self, unit: Tensor, slack: float | Tensor) -> None:
        if not readable(unit):
            return
        wrong = ~(unit.abs() <= 1 + slack)  # nan too
        if bool(wrong.any()):
            at = tuple(int(i) for i in wrong.nonzero()[0])
            value = float(self._rescaled(unit.detach())[at])
            raise OptxError(
                f"log_prob: actions[{where(wrong)}] is {value:g}, outside of the policy's bounds "
                f"{self._bounds_of(at[-1])}; a squashed policy never gives it. Give actions in the units of "
                "low and high."
            )

    def _rescaled(self, unit: Tensor) -> Tensor:
        if self.low is None or self.high is None:
            return unit
        return (self.high + self.low) / 2 + (self.high - self.low) / 2 * unit

    def _bounds_of(self, action: int) -> str:
        if self.low is None or self.high is None:
            return "-1 to 1"
        return f"{float(self.low[action]):g} to {float(self.high[action]):g}"


def _check_numbers(name: str, given: Any) -> None:
    check_tensor("ActionMixture", name, given)
    if not given.is_floating_point():
        raise OptxError(f"ActionMixture: {name} is of {given.dtype}; it takes floating point numbers.")


def checked_mixture(who: str, given: Any, some: bool = True) -> ActionMixture:
    """What a policy with `optx.PMOEHead` gives, or an error.

    Raises:
        OptxError: something else.
        ShapeError: one of no states, if there must be ``some``.
    """
    if not isinstance(given, ActionMixture):
        raise OptxError(
            f"{who}: mixture is a {type(given).__name__}; it must be the ActionMixture that a policy with "
            "optx.PMOEHead gives. Where the policy gives more, pick it out; with the head switched off or "
            "removed there is none."
        )
    if some and not given.logits.numel():
        raise ShapeError(f"{who}: mixture is of states of shape {tuple(given.logits.shape[:-1])}: of none.")
    return given


_NAMES = tuple(one.name for one in fields(ActionMixture) if one.name != "squash")


def _flatten(mixture: ActionMixture) -> tuple[list[Any], bool]:
    return [getattr(mixture, name) for name in _NAMES], mixture.squash


def _unflatten(leaves: Any, squash: Any) -> ActionMixture:
    made = object.__new__(ActionMixture)  # leaves may be anything: shapes, flags, None
    for name, leaf in zip(_NAMES, leaves, strict=True):
        object.__setattr__(made, name, leaf)
    object.__setattr__(made, "squash", squash)
    return made


# FSDP2 and torch.compile find the tensors in a module's output by its tree.
_pytree.register_pytree_node(ActionMixture, _flatten, _unflatten, serialized_type_name="optx.ActionMixture")
