"""Losses that are not reduced, of samples and of tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from optx._errors import OptxError, ShapeError


def per_sample(losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A number for each sample, at least float32; and with a mask, of how many it is the mean."""
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    if mask is None:
        return (losses if losses.ndim == 1 else losses.mean(tuple(range(1, losses.ndim)))), None
    counts = mask != 0
    total = torch.where(counts, losses, 0)
    if losses.ndim == 1:
        return total, counts.long()
    lengths, total = counts.flatten(1).sum(1), total.flatten(1).sum(1)
    return total / lengths.clamp_min(1), lengths


def plain_mean(each: Tensor, lengths: Tensor | None, by_length: bool) -> Tensor:
    """The mean of the samples that count, or of their tokens."""
    if lengths is None:
        return each.mean()
    if by_length:
        return (each * lengths).sum() / lengths.sum()
    return torch.where(lengths > 0, each, 0).sum() / (lengths > 0).sum()


def shares(lengths: Tensor) -> Tensor:
    """Each sequence's part of the tokens, 1 where all are of one length."""
    return lengths * (lengths > 0).sum() / lengths.sum().clamp_min(1)


def token_losses(
    owner: str, logits: Tensor, labels: Tensor, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropies in the labels' shape, and which count; logits are not copied, labels move instead."""
    if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape or labels.ndim == 0:
        raise ShapeError(
            f"{owner}: labels have shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; logits "
            "must have the labels' shape and one dimension more, of classes, at the end."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise OptxError(f"{owner}: labels have dtype {labels.dtype}; they must be class numbers.")
    if shift and labels.ndim > 1:
        if labels.shape[-1] < 2:
            raise ShapeError(
                f"{owner}: labels have shape {tuple(labels.shape)}, and with shift=True the first of each "
                "sequence is not predicted, so none counts; give shift=False if they are shifted already."
            )
        labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = labels.reshape(-1).long()
    rows = logits.reshape(-1, logits.shape[-1])
    if logits.requires_grad:
        rows = cast(Tensor, _Counted.apply(rows, flat != ignore_index))  # pyright: ignore[reportUnknownMemberType]
    logp = F.log_softmax(rows, -1, dtype=wide)
    tokens = F.nll_loss(logp, flat, ignore_index=ignore_index, reduction="none")
    return tokens.view(labels.shape), labels != ignore_index


class _Counted(torch.autograd.Function):
    """Rows as they are, with gradients of 0 for those that don't count, also where they have inf or nan."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(counts)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (counts,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return grad.masked_fill(~counts[:, None], 0), None
        # In place: it was made for these rows alone, by log_softmax, and is as large as the logits.
        return grad.masked_fill_(~counts[:, None], 0), None


def are_next_tokens(owner: str, outputs: Any, logits: Tensor) -> bool:
    """Whether labels are to be shifted, by the class of what a transformers model returned.

    Raises:
        OptxError: the class does not say it.
    """
    name = type(outputs).__name__
    if logits.ndim < 3 or "CausalLM" in name:
        return True  # one label a sample is not shifted in any case
    if any(kind in name for kind in ("MaskedLM", "Seq2SeqLM", "TokenClassifier")):
        return False
    raise OptxError(
        f"{owner}: {name} does not say whether labels are those of the next token; give compute_loss_func="
        "functools.partial(reweight.from_outputs, shift=True), or shift=False."
    )


def check_losses(owner: str, losses: Tensor, mask: Tensor | None, world: int) -> None:
    """Raise for losses that are reduced already or of nothing, and for a mask that does not fit."""
    given: Any = losses  # of any type, whatever is asked for
    if not isinstance(given, Tensor):
        raise OptxError(
            f"{owner}: losses are a {type(given).__name__}; they must be a tensor, of one loss per sample."
        )
    if not losses.is_floating_point():
        raise OptxError(f"{owner}: losses have dtype {losses.dtype}; they must be floating.")
    if losses.ndim == 0:
        raise OptxError(
            f"{owner}: the loss is reduced already, to one number; give one per sample, as "
            "cross_entropy(..., reduction='none') does."
        )
    if losses.numel() == 0 and (world == 1 or len(losses)):
        raise OptxError(f"{owner}: losses of shape {tuple(losses.shape)} are of no sample, or of no token.")
    if mask is None:
        return
    if mask.shape != losses.shape:
        raise ShapeError(
            f"{owner}: mask has shape {tuple(mask.shape)} and losses {tuple(losses.shape)}; they must be "
            "equal."
        )
    if mask.is_floating_point() or mask.is_complex():
        raise OptxError(f"{owner}: mask has dtype {mask.dtype}; it must be bool, or whole numbers.")
