"""Losses of optx as a Trainer's ``compute_loss_func``: batches that are accumulated count by their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, shown
from optx.integrations._trainer_optimizer import trainer_around
from optx.signal._sample_losses import are_next_tokens, token_losses
from optx.signal.loss_reweight import LossReweight
from optx.signal.mesa import MESA
from optx.signal.saf import SAF
from optx.signal.stablemax import StableMaxCrossEntropy, stablemax_cross_entropy
from optx.signal.z_loss import ZLoss

Loss = LossReweight | SAF | MESA | StableMaxCrossEntropy | ZLoss


class TrainerLoss:
    """What `optx.integrations.transformers.loss` returns.

    Attributes:
        loss: the loss of optx that it calls.
        index: under which a batch has the samples' places in the dataset.
        batch: what the model is called with, while a Trainer's `OptxCallback` tells it.
        average_tokens_across_devices: the Trainer's setting of this name.
    """

    def __init__(self, loss: Loss, index: str) -> None:
        known: Any = loss
        if not isinstance(known, Loss):
            raise OptxError(
                f"loss: {shown(loss)} is none of optx's losses; give LossReweight, SAF, MESA, "
                "StableMaxCrossEntropy or ZLoss. Other functions are a compute_loss_func by themselves."
            )
        if isinstance(loss, StableMaxCrossEntropy | ZLoss):
            _check_counted(loss)
        self.loss, self.index = loss, index
        self.batch: dict[str, Any] | None = None
        self.average_tokens_across_devices = True
        self._checked = False

    @property
    def needs_batch(self) -> bool:
        """Whether outputs and labels do not do."""
        return isinstance(self.loss, SAF | MESA)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a batch, as the Trainer asks for it.

        Args:
            outputs: what the model returned.
            labels: class numbers, shape (B, T) or (B,).
            num_items_in_batch: labels of all batches of this optimizer step; None in evaluation.
        """
        owner, loss = type(self.loss).__name__, self.loss
        if not self._checked:
            self._checked = True
            check_smoothing(trainer_around())
        if isinstance(loss, LossReweight):
            average = self.average_tokens_across_devices
            return loss.from_outputs(
                outputs, labels, num_items_in_batch, average_tokens_across_devices=average
            )
        if labels is None:
            raise OptxError(
                f"{owner}: the batch has no labels; a compute_loss_func needs those of the model."
            )
        items = _one_number(owner, num_items_in_batch)
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        shift = are_next_tokens(owner, outputs, logits)
        tokens, counts = token_losses(owner, logits, labels, shift, -100)
        share = counts.sum()
        whole = share.clamp_min(1) if items is None else items
        if isinstance(loss, StableMaxCrossEntropy | ZLoss):
            moved = labels if not (shift and labels.ndim > 1) else labels.roll(-1, -1)
            return _in_its_place(loss, logits, moved.masked_fill(~counts, -100)) / whole
        plain = torch.where(counts, tokens, 0).sum() / whole
        return plain + self._more(loss, logits, counts) * (share / whole)

    def _more(self, loss: SAF | MESA, logits: Tensor, counts: Tensor) -> Tensor:
        """What is added: the mean over this batch."""
        if not torch.is_grad_enabled():
            return logits.new_zeros(())
        owner = type(loss).__name__
        if self.batch is None:
            raise OptxError(
                f"{owner}: a compute_loss_func is given outputs and labels alone, and {owner} needs the "
                "batch. Give the Trainer callbacks=[optx.integrations.transformers.OptxCallback()]."
            )
        inputs = {name: value for name, value in self.batch.items() if name not in ("labels", self.index)}
        if isinstance(loss, MESA):
            return loss(logits, where=counts, **inputs)
        if self.index not in self.batch:
            raise OptxError(
                f"SAF: the batch has no {self.index!r}. Train on optx.with_index(dataset), with "
                "remove_unused_columns=False and a data collator that keeps it."
            )
        return loss(logits, self.batch[self.index], where=counts)


def check_smoothing(trainer: Any) -> None:
    """A Trainer leaves it to its own loss, so that it would be without effect on ours."""
    smoothing = 0.0 if trainer is None else trainer.args.label_smoothing_factor
    if smoothing:
        raise OptxError(
            f"compute_loss_func: label_smoothing_factor={smoothing} does not act on a compute_loss_func. "
            "Leave it 0 (StableMaxCrossEntropy has a label_smoothing of its own)."
        )


def _one_number(owner: str, items: Any) -> Any:
    if isinstance(items, Tensor) and items.numel() != 1:
        raise OptxError(
            f"{owner}: num_items_in_batch has {items.numel()} numbers, as under DataParallel, where one "
            "process has several losses; start a process for each GPU (torchrun)."
        )
    return items


def _check_counted(loss: StableMaxCrossEntropy | ZLoss) -> None:
    """A Trainer counts labels, each as one, that are not -100, and divides by their number."""
    for name, value, wanted in (
        ("reduction", loss.reduction, "mean"),
        ("ignore_index", loss.ignore_index, -100),
        ("weight", getattr(loss, "weight", None), None),
    ):
        if (value is not None) if wanted is None else value != wanted:
            raise OptxError(
                f"loss: this {type(loss).__name__} has {name}={shown(value)}; a Trainer divides by the "
                f"number of labels that are not -100, so {name} must be {wanted!r}."
            )


def _in_its_place(loss: StableMaxCrossEntropy | ZLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of a loss that takes the place of the model's."""
    rows, numbers = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    if isinstance(loss, ZLoss):
        arguments: dict[str, Any] = {**loss.arguments(), "reduction": "sum"}
        return ZLoss(**arguments)(rows, numbers)
    return stablemax_cross_entropy(rows, numbers, reduction="sum", label_smoothing=loss.label_smoothing)


def losses_of(function: Any) -> list[Any]:
    """The loss of optx behind a ``compute_loss_func`` that has a state to save."""
    function = getattr(function, "func", function)  # functools.partial
    loss = function.loss if isinstance(function, TrainerLoss) else getattr(function, "__self__", None)
    return [loss] if isinstance(loss, LossReweight | SAF | MESA) else []


def is_ours(function: Any) -> bool:
    """Whether a ``compute_loss_func`` is a loss of optx."""
    return isinstance(function, TrainerLoss) or bool(losses_of(function))
