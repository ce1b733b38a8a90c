"""Samples weighted by their losses in the batch at hand: what is learnt already counts less.

Source: Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic Loss-Based Sample Reweighting for
Improved Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from optx._errors import OptxError, check_choice, check_range, warn
from optx.signal._all_ranks import NO_SAMPLE, AllRanks, Gathered
from optx.signal._left_out import leave_out
from optx.signal._sample_losses import check_losses, per_sample, token_losses
from optx.signal._temperature import Schedule, Temperature, check_positive, check_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LossReweight"]

_OWNER = "LossReweight"

# ---- the rules: losses of all samples to weights ----------------------------------------------------------

# What a sample's place h in the batch's range of losses, from -delta (least) to delta (most), is worth.
STRATEGIES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "linupper": lambda h, delta, alpha: (h + delta).clamp_max(alpha * delta),
    "quadratic": lambda h, delta, alpha: 1 - (h / delta).square(),
    "extremes": lambda h, delta, alpha: h.abs(),
    "upper": lambda h, delta, alpha: (h + delta) / 2,
    "uniform": lambda h, delta, alpha: torch.zeros_like(h),
}


def places(losses: Tensor, counts: Tensor, delta: float) -> Tensor:
    """Where each loss lies between the least and the most of those that count: in [-delta, delta].

    Losses that differ by less than 1e-6, as the authors' code has it, hardly count as different; if they are
    equal, all are at 0 exactly, whatever the strategy and the dtype.
    """
    low = torch.where(counts, losses, math.inf).amin()
    high = torch.where(counts, losses, -math.inf).amax()
    return delta * ((losses - low) + (losses - high)) / (high - low).clamp_min(1e-6)


def softmax_weights(worth: Tensor, counts: Tensor, r: float, max_weight: float | None) -> Tensor:
    """exp(worth / r), summing to 1 over those that count; 0 for the others."""
    top = torch.where(counts, worth, -math.inf).amax()
    score = torch.where(counts, (worth - top) / r, -math.inf)
    if max_weight is None:
        return torch.where(counts, score.softmax(0), 0.0)
    return _capped(score, counts, max_weight)


def _capped(score: Tensor, counts: Tensor, limit: float) -> Tensor:
    """Softmax with no weight above limit / M: the rest goes to the others, in proportion.

    This is what maximises the same objective (mean worth less r times the divergence from uniform weights)
    under the limit. Sorted, the k highest are at the limit and the others share 1 - k limit / M; k is the
    first for which the highest of the others then stays below it. No rounds, and nothing is read from the
    device.
    """
    many = counts.sum().to(score.dtype)
    ordered, order = score.sort(descending=True)
    below = ordered.flip(0).logcumsumexp(0).flip(0)  # of each and all after it
    rank = torch.arange(len(score), device=score.device).to(score.dtype)
    fits = ((many - rank * limit) * (ordered - below).exp() <= limit) | (rank >= many - 1)
    at_limit = fits.int().argmax().to(score.dtype)
    clipped = torch.empty_like(rank).scatter_(0, order, rank) < at_limit
    share = ((many - at_limit * limit) / many).clamp_min(0)
    rest = torch.where(clipped, -math.inf, score).softmax(0) * share
    return torch.where(counts, torch.where(clipped, limit / many, rest), 0.0)


# ---- the method -------------------------------------------------------------------------------------------


class LossReweight:
    """Weight each sample by its loss among those of its batch, so that what is learnt already counts less.

    Call it on losses that are not reduced: it returns their weighted sum, in the place of their mean. Weights
    are softmax(f(h) / r) over the batches of all processes, h being a loss's place between the least (-delta)
    and the most (delta). Nothing is stored per sample, nothing is drawn, and weights carry no gradient.

    Args:
        strategy: f. ``"linupper"``: min(h + delta, alpha delta), growing with the loss up to the middle of
            the range. ``"quadratic"``: 1 - h^2 / delta^2, the middle. ``"extremes"``: |h|. ``"upper"``:
            (h + delta) / 2. ``"uniform"``: the plain mean.
        r: temperature, above 0; at inf, weights are uniform. Or a function of the step, from 0.
        warmup: for how many steps, first, weights are uniform.
        warmup_r: temperature of these steps, in the place of uniform weights.
        anneal: over how many steps after these r goes linearly from ``r_start`` to ``r``.
        r_start: where that begins.
        delta: half the range of h.
        alpha: where linupper stops to grow; 2 is never.
        max_weight: the largest weight, in units of 1 / M for M samples, at least 1; what is above goes to the
            others in proportion. None: no limit.
        length_weighting: weights multiply a sequence's share of the tokens on its process; uniform ones then
            are the mean per token, and they do not sum to 1. Needs a mask, which says the lengths.
        skip_nonfinite: a sample whose loss is nan or infinite gets weight 0 and no gradient, is counted
            (``skipped``) and warned of at the 1st, 10th, 100th ... Each call then waits for the device.
            Without it, such a loss makes the result nan, as it makes the mean.
        accumulate: calls per optimizer step, by which steps are counted; divide the loss by it yourself.
        max_batch: the most samples that a process will have, where its first batch is not the largest.
        process_group: the processes that share a batch; all if None.

    Attributes:
        last_weights: this process's weights in the last call, shape (B,); over all processes they sum to 1.
        last_mean: the mean loss of all samples in the last call, not weighted: the one to log.
        step: optimizer steps so far.
        skipped: samples left out so far.

    Paper values:
        ``"linupper"``, ``r=0.4`` (the defaults): its 210M and 684M models.
        ``"extremes"`` with ``r=0.4`` (the default) there too; ``"quadratic"`` with ``r=1.0`` in its 82M one.
        ``warmup=1000``: of 20,000 steps, GPT-2.
        ``warmup=2000, warmup_r=100.0``: models of 1.4B and 7B.
        ``max_weight=2.0``: what its theory assumes; the authors' code has no limit.

    Limits: What can't be learnt has a high loss for ever: linupper prefers noise. Weights are those of one
    call, also when gradients are accumulated, as in the authors' code. Without gradients (evaluation) it is
    the plain mean of this process, and no step. Within torch.compile it breaks the graph. With
    ``skip_nonfinite``, a sample that makes activations inside the model nan still makes gradients nan: a
    weight's gradient is their product.

    Keywords: loss reweighting, sample weighting, LinUpper, importance weighting, curriculum, data selection,
    pretraining, noisy data, duplicates.

    Evidence: no recipe; ``test_loss_reweight.py``, ``test_loss_reweight_loops.py``,
    ``test_loss_reweight_processes.py``.

    Raises:
        OptxError: an option out of range, or losses that are reduced already.
        ShapeError: a mask or labels that do not fit.

    Example:
        >>> import torch, optx
        >>> reweight = optx.LossReweight("linupper", r=1.0)
        >>> reweight(torch.tensor([1.0, 2.0, 3.0, 5.0]))
        tensor(3.2211)
        >>> reweight.last_weights, reweight.last_mean
        (tensor([0.1237, 0.2039, 0.3362, 0.3362]), tensor(2.7500))

    Source: "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
    arXiv 2502.06733; https://github.com/sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025.
    """

    def __init__(
        self,
        strategy: str = "linupper",
        r: float | Schedule = 0.4,
        warmup: int = 0,
        warmup_r: float | None = None,
        anneal: int = 0,
        r_start: float | None = None,
        delta: float = 1.0,
        alpha: float = 1.0,
        max_weight: float | None = None,
        length_weighting: bool = False,
        skip_nonfinite: bool = False,
        accumulate: int = 1,
        max_batch: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_choice(_OWNER, "strategy", strategy, STRATEGIES)
        for name, value in (("delta", delta), ("alpha", alpha)):
            check_positive(_OWNER, name, value, math.nextafter(math.inf, 0))
        if alpha != 1.0 and strategy != "linupper":
            raise OptxError(f"{_OWNER}: alpha is {alpha!r}; only 'linupper' has one, not {strategy!r}.")
        if max_weight is not None:
            check_range(_OWNER, "max_weight", max_weight, 1.0)
        check_whole(_OWNER, "accumulate", accumulate, 1)
        check_whole(_OWNER, "max_batch", 1 if max_batch is None else max_batch, 1)
        self._r = Temperature(_OWNER, r, warmup, warmup_r, anneal, r_start)
        self._ranks = AllRanks(_OWNER, process_group, max_batch or 0)
        self.strategy, self.delta, self.alpha = strategy, float(delta), float(alpha)
        self.max_weight, self.length_weighting = max_weight, length_weighting
        self.skip_nonfinite, self.accumulate = skip_nonfinite, accumulate
        self.step, self.skipped = 0, 0
        self._calls = 0  # of the step that is not yet whole
        self.last_weights: Tensor | None = None
        self.last_mean: Tensor | None = None
        global _apart
        _apart = _apart or torch.compiler.disable(_weigh)

    def __call__(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weighted sum of a batch's losses; of several processes, times their number.

        The factor is for gradients that are averaged over processes, as DDP and FSDP do.

        Args:
            losses: floating, shape (B,), or (B, T, ...), of which each sample's mean is taken first.
            mask: what counts of them, bool or whole numbers, in their shape. A sample of which nothing counts
                has weight 0; a batch of such ones has a loss of 0.

        Returns:
            A scalar, float32; float64 of float64 losses.
        """
        check_losses(_OWNER, losses, mask, self._ranks.world())
        if self.length_weighting and mask is None:
            raise OptxError(f"{_OWNER}: length_weighting needs a mask, which says how long each sequence is.")
        each, lengths = per_sample(losses, mask)
        if not torch.is_grad_enabled():
            return self._plain(each, lengths)
        return (_apart or _weigh)(self, each, lengths)

    def from_logits(
        self, logits: Tensor, labels: Tensor, shift: bool = True, ignore_index: int = -100
    ) -> Tensor:
        """The weighted cross-entropy of a batch, in float32 whatever the logits' dtype.

        Args:
            logits: shape (B, T, C), or (B, C); classes last.
            labels: class numbers, shape (B, T) or (B,).
            shift: whether label t + 1 is what logits t are to say, as in a language model; of sequences only.
            ignore_index: labels that count for nothing.

        Returns:
            A scalar; see `__call__`.
        """
        return self(*token_losses(_OWNER, logits, labels, shift, ignore_index))

    def from_outputs(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A language model's loss in transformers: ``Trainer(..., compute_loss_func=reweight.from_outputs)``.

        The Trainer does not divide such a loss by the batches that it accumulates: it gives the number of
        their labels. Each batch then counts by its share of these. Give ``accumulate`` if steps are to be the
        optimizer's; the Trainer doesn't save a loss, so keep `state_dict` beside its checkpoints.

        Args:
            outputs: what the model returned: its ``logits`` are taken.
            labels: class numbers, shape (B, T).
            num_items_in_batch: labels of all batches of this optimizer step.
        """
        if labels is None:
            raise OptxError(
                f"{_OWNER}: the batch has no labels; from_outputs needs those of a language model."
            )
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        tokens, counts = token_losses(_OWNER, logits, labels, True, -100)
        loss = self(tokens, counts)
        return loss if num_items_in_batch is None else loss * (counts.sum() / num_items_in_batch)

    def weights(self, losses: Tensor) -> Tensor:
        """The weights that samples with these losses would have in this step; nothing is gathered or counted.

        Args:
            losses: all of a batch, shape (B,).
        """
        check_losses(_OWNER, losses, None, 1)
        each, _ = per_sample(losses.detach(), None)
        counts = each.isfinite() if self.skip_nonfinite else torch.ones_like(each, dtype=torch.bool)
        return self._weights(each.where(each.isfinite(), math.nan), counts, self.temperature())

    def temperature(self) -> float:
        """r of the present step; inf where weights are uniform."""
        return self._r.at(self.step)

    def state_dict(self) -> dict[str, int]:
        """Where it is: plain numbers, the same on every process. Options are not part of it."""
        return {"step": self.step, "calls": self._calls, "skipped": self.skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there; a function given as ``r`` is called with the same steps as before.

        Raises:
            OptxError: this is no state of a `LossReweight`.
        """
        wanted = set(self.state_dict())
        if set(state_dict) != wanted:
            raise OptxError(
                f"{_OWNER}: the state has {', '.join(sorted(map(str, state_dict))) or 'nothing'}; it must "
                f"have {', '.join(sorted(wanted))}, as state_dict() gives them."
            )
        for name in wanted:
            check_whole(_OWNER, f"the state's {name}", state_dict[name], 0)
        calls = int(state_dict["calls"])
        if calls >= self.accumulate:
            raise OptxError(
                f"{_OWNER}: the state was saved after {calls} calls of a step and accumulate is "
                f"{self.accumulate}; give the accumulate that it was saved with."
            )
        self.step, self.skipped, self._calls = int(state_dict["step"]), int(state_dict["skipped"]), calls

    def __repr__(self) -> str:
        return f"LossReweight({self.strategy!r}, r={self._r.r!r}, step {self.step})"

    # ---- one call -----------------------------------------------------------------------------------------

    def _weighted(self, each: Tensor, lengths: Tensor | None) -> Tensor:
        r = self.temperature()
        own = each.detach().where(each.detach().isfinite(), math.nan)
        if lengths is not None:
            own = own.where(lengths > 0, NO_SAMPLE)
        everyone = self._ranks.gather(own)
        counts = everyone.values != NO_SAMPLE
        if self.skip_nonfinite:
            counts = self._without_bad(each, everyone, counts)
        with torch.no_grad():
            weights = self._weights(everyone.values, counts, r)
            self.last_weights = weights[everyone.own]
            self.last_mean = torch.where(counts, everyone.values, 0).sum() / counts.sum()
        loss = self._sum(each, lengths, everyone, counts, uniform=self._is_uniform(r))
        self._count()
        return loss

    def _is_uniform(self, r: float) -> bool:
        return self.strategy == "uniform" or r == math.inf

    def _weights(self, losses: Tensor, counts: Tensor, r: float) -> Tensor:
        """Of all samples of all processes."""
        if self._is_uniform(r):
            return counts.to(losses.dtype) / counts.sum()
        worth = STRATEGIES[self.strategy](places(losses, counts, self.delta), self.delta, self.alpha)
        return softmax_weights(worth, counts, r, self.max_weight)

    def _sum(
        self, each: Tensor, lengths: Tensor | None, everyone: Gathered, counts: Tensor, uniform: bool
    ) -> Tensor:
        """This process's part of the weighted sum, times the number of processes."""
        world, whole = everyone.world, lengths is None and not self.skip_nonfinite
        if uniform and whole and len(each):  # to the bit what a loop without this has
            mean = each.mean()
            return mean if world == 1 else mean * (world * len(each) / counts.sum())
        weights = cast(Tensor, self.last_weights)
        if not whole:
            each = torch.where(counts[everyone.own], each, 0)  # 0 times nan would be nan
        if self.length_weighting and lengths is not None:
            weights = weights * _shares(lengths.where(counts[everyone.own], 0)).to(weights.dtype)
        return (weights * each).sum() * world

    def _plain(self, each: Tensor, lengths: Tensor | None) -> Tensor:
        """The mean, of this process alone."""
        if lengths is None:
            return each.mean()
        if self.length_weighting:
            return (each * lengths).sum() / lengths.sum()
        return torch.where(lengths > 0, each, 0).sum() / (lengths > 0).sum()

    def _without_bad(self, each: Tensor, everyone: Gathered, counts: Tensor) -> Tensor:
        """Who counts but for the samples whose loss is not finite; counts, warns of and cuts those out."""
        bad = everyone.values.isnan()
        if found := int(bad.sum()):
            before, self.skipped = self.skipped, self.skipped + found
            if before == 0 or len(str(before)) < len(str(self.skipped)):
                warn(
                    f"{_OWNER}: the loss of {found} of {int(counts.sum())} samples is not finite; left out, "
                    f"{self.skipped} so far."
                )
            if each.requires_grad:
                leave_out(each, bad[everyone.own])
        return counts & ~bad

    def _count(self) -> None:
        self._calls += 1
        if self._calls == self.accumulate:
            self.step, self._calls = self.step + 1, 0


def _shares(lengths: Tensor) -> Tensor:
    """Each sequence's part of the tokens, 1 where all are of one length."""
    return lengths * (lengths > 0).sum() / lengths.sum().clamp_min(1)


def _weigh(self: LossReweight, each: Tensor, lengths: Tensor | None) -> Tensor:
    """A call from each sample's loss on; torch.compile does not trace it: to it, each step is another."""
    return self._weighted(each, lengths)  # pyright: ignore[reportPrivateUsage]


_apart: Callable[[LossReweight, Tensor, Tensor | None], Tensor] | None = None
"""The same with that said to the compiler, whose import is not optx's but that of the first object here."""
