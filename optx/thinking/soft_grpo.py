"""SofT-GRPO: the policy gradient of models that think in mixtures of tokens, by groups of samples.

Source: "SofT-GRPO: Surpassing Discrete-Token LLM Reinforcement Learning via Gumbel-Reparameterized
Soft-Thinking Policy Optimization", arXiv 2511.06411, and its authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_above_0, check_choice, check_range, check_whole, shown, warn
from optx._policy_loss import check_clips, counted, grpo_advantage, k3_divergence, ppo_clip_loss
from optx._soft_density import REDUCTIONS, Steps, check_clamp
from optx.inject._handle import Handle
from optx.thinking._record import Rollout, fingerprint
from optx.thinking._recorded import Recorded
from optx.thinking._reference import reference
from optx.thinking._scored import Density, at_rest, scored, unwrapped


class _Known(NamedTuple):
    """What is kept of a rollout that was given as it is."""

    logp: Tensor
    mask: Tensor
    reference: Tensor | None


class SofTGRPO:
    """GRPO for rollouts of `optx.SoftThinking`: a step is the Gumbel noise that mixed its tokens.

    The ratio of two policies at a step is that of the densities of its perturbed log-probabilities
    (`optx.functional.soft_logprob`), so that all tokens of a mixture have their share of the credit; steps of
    one token have the ordinary ratio, and a rollout of them alone makes this GRPO. Advantages are a group's
    rewards, standardised; the loss is PPO's clipped one with a second bound (`ppo_clip_loss`) and ``kl``
    times the k3 divergence from the reference, a mean over the steps that a draw decided.

    Inputs are made of the record anew and detached: what is trained is what leads from them to the logits.
    The first loss of a rollout takes its own log-probabilities for the old ones, so all ratios are 1; later
    ones have these. For several updates of mini-batches first ``steps = obj.record(model, rollout)``, then
    ``obj(model, steps.rows(i), rewards[i])``.

    Args:
        tau: of the Gumbel softmax that the rollout was made with; another raises.
        clip: how far a ratio may go from 1 and still be followed.
        kl: beta, the weight of the divergence from the reference. 0: there is none.
        reduce: a step's log-density: ``"masked_mean"`` over the tokens whose share is above e^-3, or
            ``"sum"`` over all, the paper's.
        dual_clip: the loss of a bad step is at most this times its advantage's size. None: no such bound.
        freeze_mask: the mean is over the tokens that counted when the rollout was recorded, and so the same
            for both policies, whose ratio is then one of densities.
        noise_clamp: least and largest noise that a token has a gradient at. None: the noise as it is.

    Paper values:
        ``tau=0.1, clip=0.2, kl=1e-3, dual_clip=3.0, reduce="masked_mean"``: all runs (the defaults).
        With ``optx.SoftThinking(record=True, tau=0.1, temperature=1.0, top_k=5, max_topk=5)``, groups of 8,
        AdamW at a learning rate of 1e-6, 64 prompts a rollout and 32 an update.

    Limits: A token below the mask (5 % of its step) gets no gradient there, and a step with none above it
        counts as 0: K even shares need K < 20. A rollout is scored by the whole softmax in steps of one
        token, whatever filter they were drawn through. With kl and no ``ref_model`` all trained weights must
        be adapters'. The mean is over the steps of a call, so of processes with rollouts of unequal length
        each has the same weight. DDP needs an embedding that is tied, frozen, or of unused parameters known:
        it gets no gradient as an input. Sequences stand one a row, not packed.

    Keywords: GRPO, PPO, RLVR, reinforcement learning, soft thinking, Gumbel-Softmax, reparameterization,
        latent reasoning, policy gradient, TRL.

    Evidence: ``optx run think``; ``test_soft_grpo.py``, ``test_trl_soft_grpo.py``.

    Raises:
        OptxError: an option out of range; when called: rewards of another number or not finite, a rollout of
            other weights, another model or another tau, or without the noise that has a density.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> thinking = optx.attach(model, optx.SoftThinking(record=True, tau=0.1, top_k=5, end_id=7))
        >>> objective, opt = optx.SofTGRPO(kl=0.0), torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for step in range(2):
        ...     rollout = thinking.rollout(torch.tensor([[3], [4]]), group=4, max_new_tokens=6, seed=step)
        ...     rewards = (rollout.tokens == 9).any(1).float()
        ...     loss = objective(model, rollout, rewards)
        ...     loss.backward()
        ...     opt.step()
        ...     opt.zero_grad()

    Source: arXiv 2511.06411; masked mean, clamp and dual clip from the authors' code.
    """

    def __init__(
        self,
        tau: float = 0.1,
        clip: float = 0.2,
        kl: float = 1e-3,
        reduce: str = "masked_mean",
        *,
        dual_clip: float | None = 3.0,
        freeze_mask: bool = False,
        noise_clamp: tuple[float, float] | None = (-1.5, 3.0),
    ) -> None:
        self.tau = check_above_0("SofTGRPO", "tau", tau)
        check_clips("SofTGRPO", clip, dual_clip)
        check_range("SofTGRPO", "kl", kl, 0.0)
        check_choice("SofTGRPO", "reduce", reduce, REDUCTIONS)
        check_choice("SofTGRPO", "freeze_mask", freeze_mask, (True, False))
        check_clamp("SofTGRPO", noise_clamp)
        self.clip, self.kl, self.reduce, self.dual_clip = clip, kl, reduce, dual_clip
        self.freeze_mask, self.noise_clamp = freeze_mask, noise_clamp
        self._known: WeakKeyDictionary[Rollout, _Known] = WeakKeyDictionary()
        self._last: dict[str, Tensor] = {}
        self._told: set[str] = set()

    def __call__(
        self,
        model: nn.Module,
        rollout: Rollout | Recorded,
        rewards: Tensor | Sequence[float] | None = None,
        ref_model: nn.Module | Handle | None = None,
        *,
        advantages: Tensor | None = None,
    ) -> Tensor:
        """The loss of a rollout, a scalar.

        Args:
            model: the policy, also in DDP's or torch.compile's wrapper.
            rollout: of `ThinkingHandle.rollout`, or some rows of what `record` gave.
            rewards: (B,), one a row; groups stand side by side.
            ref_model: the reference: a model; a handle of adapters, which rest for that; None: all adapters
                of ``model`` rest. It scores a rollout once, the first time; a record has it already.
            advantages: (B,) or (B, T), in the place of rewards.
        """
        plain = rollout.rollout if isinstance(rollout, Recorded) else rollout
        _check_kinds(model, plain)
        if isinstance(rollout, Recorded) and ref_model is not None:
            raise OptxError(
                "SofTGRPO: ref_model was given with a record, which has its reference's log-probabilities "
                "already. Give it to record(model, rollout, ref_model)."
            )
        weights = self._advantages(rollout, rewards, advantages).to(plain.ids.device)
        known = rollout if isinstance(rollout, Recorded) else self._known.get(rollout)
        if known is None:
            self._check(model, plain)
        frozen = known.mask if known is not None and self.freeze_mask else None
        steps = scored(model, plain, self._density, frozen)
        if torch.is_grad_enabled() and not steps.logp.requires_grad:
            raise OptxError(
                "SofTGRPO: no gradient leads from the loss to the model; are all of its weights frozen, or "
                "its adapters merged?"
            )
        if known is None:
            known = _Known(
                steps.logp.detach(), steps.mask, self._reference(model, plain, ref_model, steps.mask)
            )
            self._known[plain] = known
        return self._loss(plain, steps, known, weights)

    def record(
        self,
        model: nn.Module,
        rollout: Rollout,
        ref_model: nn.Module | Handle | None = None,
        *,
        batch_size: int | None = None,
    ) -> Recorded:
        """Score a rollout by the policy that made it, before the first step, and by the reference.

        Both are in evaluation mode for it and without gradients.

        Args:
            model: the policy as it was when it made the rollout.
            rollout: all of its rows.
            ref_model: the reference, as `__call__` has it.
            batch_size: rows at a time. None: all.
        """
        _check_kinds(model, rollout)
        self._check(model, rollout)
        size = len(rollout) if batch_size is None else check_whole("record", "batch_size", batch_size, 1)
        each: list[_Known] = []
        for start in range(0, len(rollout), size):
            part = rollout.rows(slice(start, start + size))
            with at_rest(model):
                steps = scored(unwrapped(model), part, self._density)
            each.append(_Known(*steps, self._reference(model, part, ref_model, steps.mask)))
        logp, mask, refs = zip(*each, strict=True)
        old = _Known(torch.cat(logp), torch.cat(mask), torch.cat(refs) if self.kl else None)
        self._known[rollout] = old
        return Recorded(rollout, *old, rollout.group)

    def report(self) -> dict[str, float]:
        """Of the last call, means over the steps that count.

        ``ratio``: the policies' mean ratio, and ``ratio_max`` its largest; ``clipped``: the share of steps
        that the clip has taken the gradient from; ``kl``: the divergence; ``empty``: the share of mixtures
        none of whose tokens counts.
        """
        return {name: float(value) for name, value in self._last.items()}

    # ---- parts of a call ----------------------------------------------------------------------------

    @property
    def _density(self) -> Density:
        return Density(self.reduce, self.noise_clamp)

    def _loss(self, rollout: Rollout, steps: Steps, known: _Known | Recorded, advantages: Tensor) -> Tensor:
        counts = rollout.actions
        wide = advantages if advantages.ndim == 2 else advantages[:, None].expand(steps.logp.shape)
        losses = ppo_clip_loss(
            steps.logp, known.logp, wide, clip=self.clip, dual_clip=self.dual_clip, reduction="none"
        )
        divergence = torch.zeros_like(losses)
        if self.kl:
            if known.reference is None:
                raise OptxError(
                    f"SofTGRPO: kl is {self.kl}, and the rollout was recorded without it; record it again."
                )
            divergence = k3_divergence(steps.logp, known.reference)
        loss = counted(losses + self.kl * divergence if self.kl else losses, counts)
        with torch.no_grad():
            self._measure(rollout, steps, known, wide, divergence)
        return loss

    def _measure(
        self, rollout: Rollout, steps: Steps, known: _Known | Recorded, advantages: Tensor, divergence: Tensor
    ) -> None:
        counts = rollout.actions
        ratio = (steps.logp - known.logp).exp()[counts]
        up = advantages[counts] > 0
        clipped = torch.where(up, ratio > 1 + self.clip, ratio < 1 - self.clip) & (advantages[counts] != 0)
        soft = rollout.soft & counts
        empty = (soft & ~steps.mask.any(-1)).sum() / soft.sum().clamp_min(1)
        self._last = {
            "ratio": ratio.mean(),
            "ratio_max": ratio.amax(),
            "clipped": clipped.float().mean(),
            "kl": divergence[counts].mean(),
            "empty": empty,
        }
        if "empty" not in self._told and bool(empty > 0.5):
            self._told.add("empty")
            warn(
                f"SofTGRPO: in {float(empty):.0%} of the mixtures no token has a share above e^-3 = 0.05, so "
                "they teach nothing. Use a smaller K (max_topk), a lower temperature, or reduce='sum'."
            )

    def _advantages(
        self,
        rollout: Rollout | Recorded,
        rewards: Tensor | Sequence[float] | None,
        advantages: Tensor | None,
    ) -> Tensor:
        B = len(rollout)
        if (rewards is None) == (advantages is None):
            raise OptxError("SofTGRPO: give rewards or advantages, one of them.")
        if advantages is not None:
            advantages = _numbers("advantages", advantages)
            T = (rollout.rollout if isinstance(rollout, Recorded) else rollout).ids.shape[1]
            if tuple(advantages.shape) not in ((B,), (B, T)) or not bool(advantages.isfinite().all()):
                raise OptxError(
                    f"SofTGRPO: advantages have shape {tuple(advantages.shape)}; they must be finite, "
                    f"{(B,)} or {(B, T)}."
                )
            return advantages.detach().clone() if advantages.is_inference() else advantages.detach()
        found = _numbers("rewards", rewards)
        if tuple(found.shape) != (B,):
            raise OptxError(
                f"SofTGRPO: rewards have shape {tuple(found.shape)}; the rollout has {B} rows, which need "
                f"({B},)."
            )
        own = rollout.rollout.group if isinstance(rollout, Recorded) else rollout.group
        if own != rollout.group:
            raise OptxError(
                f"SofTGRPO: these {B} rows are not whole groups of {rollout.group}, so their rewards give no "
                "advantages. Pass advantages= of the whole rollout: optx.functional.grpo_advantage(rewards, "
                "group)[rows]."
            )
        if own == 1 and "alone" not in self._told:
            self._told.add("alone")
            warn(
                "SofTGRPO: group is 1, so each row's advantage is its reward itself. Rollouts of groups: "
                "handle.rollout(prompts, group=8)."
            )
        return grpo_advantage(found, own)

    def _reference(
        self, model: nn.Module, rollout: Rollout, given: nn.Module | Handle | None, mask: Tensor
    ) -> Tensor | None:
        if not self.kl:
            return None
        inner = unwrapped(model)
        with reference(inner, given) as other, at_rest(other):
            return scored(other, rollout, self._density, mask if self.freeze_mask else None).logp

    def _check(self, model: nn.Module, rollout: Rollout) -> None:
        """Raise unless the rollout is one of this policy, as it is, with this noise."""
        options = rollout.options or {}
        if bool(rollout.soft.any()):
            if options.get("noise", "gumbel") != "gumbel":
                raise OptxError(
                    f"SofTGRPO: the rollout was made with noise={options['noise']!r}, which has no such "
                    "density. Roll out with optx.SoftThinking(noise='gumbel', record=True)."
                )
            if (tau := options.get("tau", self.tau)) != self.tau:
                raise OptxError(
                    f"SofTGRPO: tau is {self.tau}, and the rollout was made with tau={shown(tau)}; they must "
                    "be one."
                )
        if rollout.policy and rollout.policy != fingerprint(unwrapped(model)):
            raise OptxError(
                "SofTGRPO: the rollout was made by other weights than the model has now. Score it before the "
                "first step, steps = objective.record(model, rollout), and pass steps; or roll out again."
            )


def _numbers(name: str, given: Any) -> Tensor:
    """A row of real numbers, as a tensor."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        raise OptxError(f"SofTGRPO: {name} are {shown(given)}; they must be numbers, one a row.")
    return found


def _check_kinds(model: Any, rollout: Any) -> None:
    """Raise unless these are a model and a rollout of something."""
    if not isinstance(model, nn.Module) or isinstance(model, Handle):
        raise OptxError(f"SofTGRPO: model is a {type(model).__name__}; it must be the policy, an nn.Module.")
    if not isinstance(rollout, Rollout):
        raise OptxError(
            f"SofTGRPO: rollout is a {type(rollout).__name__}; it must be what handle.rollout or "
            "objective.record gave."
        )
    if not rollout.ids.numel():
        raise OptxError(
            f"SofTGRPO: the rollout has no steps; its ids are of shape {tuple(rollout.ids.shape)}."
        )
