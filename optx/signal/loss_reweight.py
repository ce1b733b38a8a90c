"""Samples weighted by their losses in the batch at hand: what is learnt already counts less.

Source: Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic Loss-Based Sample Reweighting for
Improved Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from optx._errors import OptxError, check_choice, check_range, check_whole, warn
from optx.signal._all_ranks import NO_SAMPLE, AllRanks, Gathered
from optx.signal._batch_warnings import BatchWarnings
from optx.signal._left_out import leave_out
from optx.signal._places import places
from optx.signal._sample_losses import (
    are_next_tokens,
    check_losses,
    per_sample,
    plain_mean,
    shares,
    token_losses,
)
from optx.signal._softmax_weights import softmax_weights
from optx.signal._temperature import Schedule, Temperature, check_positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        r: temperature, above 0; at inf, weights are uniform. Or a function of the step, from 0. It may be set
            later, too.
        warmup: for how many steps, first, weights are uniform.
        warmup_r: temperature of these steps, in the place of uniform weights.
        anneal: over how many steps after these r goes linearly from ``r_start`` to ``r``.
        r_start: where that begins.
        delta: half the range of h.
        alpha: where linupper stops to grow; 2 is never.
        max_weight: the largest weight, in units of 1 / M for M samples, at least 1; what is above goes to the
            others in proportion. None: no limit.
        length_weighting: weights multiply a sequence's share of all processes' tokens; uniform ones then are
            the mean per token, and they do not sum to 1. Needs a mask, which says the lengths.
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

    Evidence: ``optx run reweight``; ``test_loss_reweight.py``, ``test_loss_reweight_loops.py``,
    ``test_loss_reweight_trainer.py``, ``test_loss_reweight_processes.py``.

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
        most = 0 if max_batch is None else check_whole(_OWNER, "max_batch", max_batch, 1)
        self._r = Temperature(_OWNER, r, warmup, warmup_r, anneal, r_start)
        self._ranks = AllRanks(_OWNER, process_group, most)
        self.strategy, self.delta, self.alpha = strategy, float(delta), float(alpha)
        self.max_weight, self.length_weighting = max_weight, length_weighting
        self.skip_nonfinite = skip_nonfinite
        self.accumulate = check_whole(_OWNER, "accumulate", accumulate, 1)
        self.step, self.skipped = 0, 0
        self._calls = 0  # of the step that is not yet whole
        self._warnings = BatchWarnings(_OWNER, strategy)
        self.last_weights: Tensor | None = None
        self._mean: tuple[Tensor, Tensor | None] | Tensor | None = None

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
            return plain_mean(each, lengths, self.length_weighting)
        if losses.ndim > 1 and mask is None:
            self._warnings.of_zeros(losses)
        return self._called(each, lengths, None)

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
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        shift: bool | None = None,
        average_tokens_across_devices: bool = True,
    ) -> Tensor:
        """A model's loss in transformers: ``Trainer(..., compute_loss_func=reweight.from_outputs)``.

        The Trainer does not divide such a loss by the batches that it accumulates: it gives the number of
        their labels, and multiplies by the number of processes. Each batch then counts by its share of these
        labels; in evaluation, each token. Give ``accumulate`` if steps are to be the optimizer's; the Trainer
        doesn't save a loss, so keep `state_dict` beside its checkpoints. Its ``label_smoothing_factor`` does
        not act on such a loss.

        Args:
            outputs: what the model returned: its ``logits`` are taken.
            labels: class numbers, shape (B, T) or (B,).
            num_items_in_batch: labels of all batches of this optimizer step.
            shift: as in `from_logits`; None for what the class of ``outputs`` says.
            average_tokens_across_devices: the Trainer's setting of this name.
        """
        if labels is None:
            raise OptxError(f"{_OWNER}: the batch has no labels; from_outputs needs those of the model.")
        items = num_items_in_batch
        if isinstance(items, Tensor) and items.numel() != 1:
            raise OptxError(
                f"{_OWNER}: num_items_in_batch has {items.numel()} numbers, as under DataParallel, where one "
                "process has several losses; start a process for each GPU (torchrun)."
            )
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        shift = are_next_tokens(_OWNER, outputs, logits) if shift is None else shift
        tokens, counts = token_losses(_OWNER, logits, labels, shift, -100)
        if items is None:
            return self(tokens, counts)
        if not torch.is_grad_enabled():
            return torch.where(counts, tokens, 0).sum() / items
        each, lengths = per_sample(tokens, counts)
        if average_tokens_across_devices:
            return self._called(each, lengths, items)
        return self._called(each, lengths, None) * (counts.sum() / items)

    def weights(self, losses: Tensor) -> Tensor:
        """The weights that samples with these losses would have in this step; nothing is gathered or counted.

        Args:
            losses: all of a batch, shape (B,).
        """
        check_losses(_OWNER, losses, None, 1)
        each, _ = per_sample(losses.detach(), None)
        counts = each.isfinite() if self.skip_nonfinite else None
        return self._weights(each.where(each.isfinite(), math.nan), counts, self.temperature())

    @property
    def r(self) -> float | Schedule:
        """The temperature as it was given; another may be set, for the steps to come."""
        return self._r.r

    @r.setter
    def r(self, value: float | Schedule) -> None:
        self._r = replace(self._r, r=value)

    @property
    def last_mean(self) -> Tensor | None:
        """The mean loss of all samples in the last call, not weighted; worked out when it is asked for."""
        if isinstance(self._mean, tuple):
            values, counts = self._mean
            total = values if counts is None else torch.where(counts, values, 0)
            self._mean = total.sum() / (len(values) if counts is None else counts.sum())
        return self._mean

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
        found = {name: check_whole(_OWNER, f"the state's {name}", state_dict[name], 0) for name in wanted}
        calls = found["calls"]
        if calls >= self.accumulate:
            raise OptxError(
                f"{_OWNER}: the state was saved after {calls} calls of a step and accumulate is "
                f"{self.accumulate}; give the accumulate that it was saved with."
            )
        self.step, self.skipped, self._calls = found["step"], found["skipped"], calls

    def __repr__(self) -> str:
        return f"LossReweight({self.strategy!r}, r={self._r.r!r}, step {self.step})"

    # ---- one call -----------------------------------------------------------------------------------------

    def _called(self, each: Tensor, lengths: Tensor | None, items: Tensor | int | None) -> Tensor:
        if torch.compiler.is_compiling():
            return _not_traced(self, each, lengths, items)
        return self._weigh(each, lengths, items)

    def _weigh(self, each: Tensor, lengths: Tensor | None, items: Tensor | int | None) -> Tensor:
        if lengths is None and not self.skip_nonfinite and len(each) and self._ranks.world() == 1:
            return self._of_whole_batch(each)
        return self._weighted(each, lengths, items)

    def _of_whole_batch(self, each: Tensor) -> Tensor:
        """The same where all there is counts and is here: a third of the operations."""
        r, values = self.temperature(), each.detach()
        with torch.no_grad():
            self.last_weights = self._weights(values, None, r)
        self._mean = values, None
        uniform = self._is_uniform(r)
        self._warnings.of_one_sample(len(each), uniform)
        self._count()
        return each.mean() if uniform else torch.dot(self.last_weights, each)

    def _weighted(self, each: Tensor, lengths: Tensor | None, items: Tensor | int | None) -> Tensor:
        r = self.temperature()
        own = each.detach().where(each.detach().isfinite(), math.nan)
        sent = lengths if items is not None or self.length_weighting else None
        if lengths is not None:
            own = own.where(lengths > 0, NO_SAMPLE)
        everyone = self._ranks.gather(own, None if sent is None else sent.to(own.dtype))
        counts = everyone.values != NO_SAMPLE
        if self.skip_nonfinite:
            counts = self._without_bad(each, everyone, counts)
        with torch.no_grad():
            weights = self._weights(everyone.values, counts, r)
            self.last_weights = weights[everyone.own]
        self._mean = everyone.values, counts
        loss = self._sum(each, lengths, everyone, counts, uniform=self._is_uniform(r))
        self._warnings.of_one_sample(len(everyone.values), self._is_uniform(r))
        self._count()
        if items is None or everyone.lengths is None:
            return loss
        return loss * (everyone.lengths.where(counts, 0).sum() / (items * everyone.world))

    def _is_uniform(self, r: float) -> bool:
        return self.strategy == "uniform" or r == math.inf

    def _weights(self, losses: Tensor, counts: Tensor | None, r: float) -> Tensor:
        """Of all samples of all processes; all count if it is not said which."""
        if self._is_uniform(r):
            if counts is None:
                return torch.full_like(losses, 1 / len(losses))
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
        if self.length_weighting and everyone.lengths is not None:
            weights = weights * shares(everyone.lengths.where(counts, 0))[everyone.own]
        return (weights * each).sum() * world

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


@torch._disable_dynamo  # pyright: ignore  # torch.compiler.disable would load the compiler with optx
def _not_traced(
    self: LossReweight, each: Tensor, lengths: Tensor | None, items: Tensor | int | None
) -> Tensor:
    """A call from each sample's loss on; torch.compile does not trace it: to it, each step is another."""
    return self._weigh(each, lengths, items)  # pyright: ignore[reportPrivateUsage]
