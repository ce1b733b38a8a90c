"""PMOEHead: a policy's output as a mixture of K policies, routed by weights that are trained apart.

Source: PMOE, arXiv 2104.09122; its authors' rlkit-pmoe for what the paper leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from optx._errors import OptxError, TargetError, check_choice, check_range, check_whole, shown
from optx.inject._injection import Injection
from optx.inject._low_rank_start import from_file
from optx.inject._part import Part, new_tensor
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.policy._pmoe_handle import PMOEHandle
from optx.policy._pmoe_part import Primitives

Outputs = Literal["mean_log_std", "mean"]


@dataclass(frozen=True)
class PMOEHead(Injection):
    """Let a policy propose K actions in each state, each by a Gaussian of its own, and route between them.

    The Linear that gives the policy's mean (and log-deviation) rests; in its place are heads for K means and
    log-deviations, and one for the routing weights w, on the same input. The policy then gives an
    `optx.policy.ActionMixture`, in the place of a tensor: ``sample()`` acts, ``evaluation_action()`` acts
    without noise, ``log_prob(a)`` is the mixture's density. `optx.sac_pmoe_losses` and
    `optx.ppo_pmoe_losses` train it: only a state's best primitive learns its action, and w learns how often
    each is the best (`optx.FrequencyLoss`), from an input that it sends no gradient to.

    Args:
        k: primitives.
        outputs: what the Linear's outputs are: ``"mean_log_std"``: n means and behind them n log-deviations,
            2 n in all; ``"mean"``: n means, where log-deviations came from another module, which then takes
            no part. It tells n, and what `PMOEHandle.materialize` gives back.
        low: the least action, a number or one for each; None: -1.
        high: the greatest; None: 1.
        squash: take actions into the bounds by tanh, as SAC does. False: plain Gaussians without bounds, as
            PPO's often are.
        log_std_min: what log-deviations are clamped to.
        log_std_max: and above.
        init: means' and log-deviations' heads begin as U(-init, init); routing as a new nn.Linear.
        detach: whether the routing's gradient stays out of what is below the head.

    Serves one nn.Linear, which must be named. Everything in the head is float32 (float64 in such a policy),
    also under autocast. Nothing else can be attached to the same Linear.

    Paper values:
        ``k=4``: the default of the authors' code (the default); 2 to 16 are compared.
        ``log_std_min=-20.0, log_std_max=2.0``: as SAC's (the defaults).
        ``init=1e-3``: the authors' code (the default).
        ``detach=True``: the authors' code (the default); the paper doesn't say it.

    Limits: The policy's forward must hand the mixture on as it is: code that splits or clamps a tensor fails
        there, by name. K evaluations of the critic a state. A primitive that is never the best learns no
        action. No K-policy fits in one Linear: merging needs a choice of one.

    Keywords: mixture of experts, multimodal policy, Gaussian mixture policy, mixture density, option, SAC,
        PPO, reinforcement learning, continuous control, routing.

    Evidence: ``optx run modes``; ``test_pmoe_head.py``, ``test_action_mixture.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, several Linears, none, or something attached to it already.

    Example:
        >>> import torch, optx
        >>> policy = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> handle = optx.attach(policy, optx.PMOEHead(k=4, low=-2.0, high=2.0), targets="2")
        >>> mixture = policy(torch.randn(16, 3))
        >>> mixture.sample().shape, mixture.w.shape, mixture.rsample_all().actions.shape
        (torch.Size([16, 2]), torch.Size([16, 4]), torch.Size([16, 4, 2]))

    Source: arXiv 2104.09122.
    """

    name: ClassVar[str] = "pmoe_head"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "the Linear that gives a policy's means"
    serves_one: ClassVar[str] = "Linear"

    k: int = 4
    outputs: Outputs = "mean_log_std"
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    squash: bool = True
    log_std_min: float = -20.0
    log_std_max: float = 2.0
    init: float = 1e-3
    detach: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_whole("PMOEHead", "k", self.k, 1))
        check_choice("PMOEHead", "outputs", self.outputs, ("mean_log_std", "mean"))
        for name in ("squash", "detach"):
            check_choice("PMOEHead", name, getattr(self, name), (True, False))
        check_range("PMOEHead", "init", self.init, 0.0, 1000.0)
        check_range("PMOEHead", "log_std_max", self.log_std_max, -20.0, 20.0)
        check_range("PMOEHead", "log_std_min", self.log_std_min, -50.0, self.log_std_max)
        for name in ("low", "high"):
            object.__setattr__(self, name, _bound(name, getattr(self, name)))
        if not self.squash and (self.low is not None or self.high is not None):
            raise OptxError(
                "PMOEHead: low and high are what tanh takes actions into; with squash=False there are none. "
                "Leave them out, and clip what is given to the environment."
            )
        _check_order(*_even(self.low, self.high, None))

    @property
    def needs_weight(self) -> bool:
        """It takes its place."""
        return True

    def places(self, model: nn.Module) -> list[str]:
        """None that is known.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            "attach: PMOEHead can't know which Linear gives the policy's means. Name it: "
            'attach(policy, optx.PMOEHead(), targets="out").'
        )

    def part(self, module: nn.Module, path: str) -> Part:
        """The heads of one policy."""
        if not isinstance(module, nn.Linear):
            raise TargetError(
                f"attach: PMOEHead serves {self.serves}; {path!r} is a {type(module).__name__}."
            )
        made = Primitives(
            module,
            self.k,
            n := self._actions(module.out_features, path),
            self._bounds(n, path, new_tensor(module, 0).dtype),
            self.squash,
            (self.log_std_min, self.log_std_max),
            self.detach,
        )
        if not from_file():  # which says the values
            made.begin(self.init)
        return made

    def _actions(self, outputs: int, path: str) -> int:
        if self.outputs == "mean":
            return outputs
        if outputs % 2:
            raise TargetError(
                f"attach: {path!r} has {outputs} outputs, which can't be n means and n log-deviations. Where "
                "they are means alone: PMOEHead(outputs='mean')."
            )
        return outputs // 2

    def _bounds(self, n: int, path: str, dtype: torch.dtype) -> tuple[list[float], list[float]] | None:
        for name in ("low", "high"):
            value: float | tuple[float, ...] | None = getattr(self, name)
            if isinstance(value, tuple) and len(value) != n:
                raise TargetError(
                    f"attach: PMOEHead has {name} of {len(value)} numbers, and {path!r} gives {n} actions "
                    f"(outputs={self.outputs!r}). Give one for each, or one number for all."
                )
        if self.low is None and self.high is None:
            return None
        low, high = _even(self.low, self.high, n)
        least, most = torch.tensor([low, high], dtype=torch.float64).to(dtype)
        for i, one in enumerate(((most - least) > 0) & (most - least).isfinite() & (most + least).isfinite()):
            if not one:
                raise TargetError(
                    f"attach: PMOEHead has low[{i}]={low[i]!r} and high[{i}]={high[i]!r}, between which "
                    f"{dtype}, in which {path!r} computes, has no actions: they are too close or too far."
                )
        return list(low), list(high)

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> PMOEHandle:
        """What `optx.attach` returns."""
        return PMOEHandle(model, injection, served, saved)


def _bound(name: str, given: Any) -> float | tuple[float, ...] | None:
    """A bound as plain numbers, whatever row of numbers it came as (a gymnasium space has arrays)."""
    if given is None:
        return None
    try:
        found = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(math.nan)
    if found.ndim > 1 or not found.numel() or not bool(found.isfinite().all()):
        raise OptxError(f"PMOEHead: {name} is {shown(given)}; it must be a finite number, or a row of them.")
    return tuple(float(one) for one in found) if found.ndim else float(found)


Bound = float | tuple[float, ...] | None


def _even(low: Bound, high: Bound, n: int | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both bounds as rows of one length."""
    length = n or max(len(one) if isinstance(one, tuple) else 1 for one in (low, high))

    def row(bound: Bound, usual: float) -> tuple[float, ...]:
        return bound if isinstance(bound, tuple) else (usual if bound is None else bound,) * length

    return row(low, -1.0), row(high, 1.0)


def _check_order(low: tuple[float, ...], high: tuple[float, ...]) -> None:
    if len(low) != len(high):
        raise OptxError(f"PMOEHead: low has {len(low)} numbers and high {len(high)}; give as many of each.")
    for i, (least, most) in enumerate(zip(low, high, strict=True)):
        if not least < most:
            raise OptxError(
                f"PMOEHead: low[{i}] is {least:g} and high[{i}] is {most:g}; low must be below high."
            )
