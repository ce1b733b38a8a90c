"""One pass of a model forward and backward, which several diagnostics read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from optx._batches import on_device_of
from optx._errors import OptxError, check_whole
from optx.delta._input_stats import call
from optx.scaling._coordinate_probe import main_tensor

Loss = Callable[[Any, Any], Tensor]
OWNER = "report"


@dataclass(frozen=True, eq=False)
class Pass:
    """What a batch gave.

    Attributes:
        batch: it.
        logits: (N, C), of those samples that have a label; None with a reason in ``no_logits``.
        target: (N,) class numbers.
        no_logits: why there are none.
        loss: the loss, or None with a reason in ``no_loss``; gradients are in the parameters.
        no_loss: why there is none.
    """

    batch: Any
    logits: Tensor | None
    target: Tensor | None
    no_logits: str
    loss: float | None
    no_loss: str


def batches_of(data: Any, limit: int) -> list[Any]:
    """The first batches of what was given; a tensor, a mapping or a pair is one.

    Raises:
        OptxError: it is nothing of the kind, or empty.
    """
    count = check_whole(OWNER, "batches", limit, 1)
    if isinstance(data, Tensor | Mapping | tuple):
        return [data]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(data, Iterable):
        raise OptxError(
            f"report: data is a {type(data).__name__}; it must be a batch (a tensor, a mapping of keyword "
            "arguments or a pair of inputs and labels), a list of batches or a DataLoader."
        )
    found = list[Any]()
    for batch in cast("Iterable[Any]", data):
        found.append(batch)
        if len(found) == count:
            break
    if not found:
        raise OptxError("report: data has no batch.")
    return found


def inputs_of(batch: Any) -> Any:
    """A batch without the labels of a pair."""
    return batch[0] if isinstance(batch, tuple | list) and _is_pair(batch) else batch  # pyright: ignore


def _is_pair(batch: Any) -> bool:
    return len(batch) == 2


def run(model: nn.Module, batch: Any, loss_fn: Loss | None) -> Pass:
    """Forward and backward, in the mode that the model is in; its gradients must be none before."""
    given = on_device_of(model, batch)
    with torch.enable_grad():
        output = call(model, inputs_of(given))
        loss, why = _loss(output, given, loss_fn)
        logits, target, no_logits = _classes(output, given)
        if loss is not None:
            cast("Any", loss).backward()
    logits = None if logits is None else logits.detach()
    return Pass(given, logits, target, no_logits, None if loss is None else float(loss.detach()), why)


def _loss(output: Any, batch: Any, loss_fn: Loss | None) -> tuple[Tensor | None, str]:
    if loss_fn is not None:
        loss = loss_fn(output, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:  # pyright: ignore
            said = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__  # pyright: ignore
            raise OptxError(f"report: loss_fn gave {said}; it must give one number with a gradient.")
        return loss.reshape(()), ""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)  # pyright: ignore
    if isinstance(own, Tensor) and own.numel() == 1 and own.requires_grad:
        return own.reshape(()), ""
    logits, target, why = _classes(output, batch)
    if logits is None or target is None:
        return None, f"there is no loss ({why}): pass labels, or loss_fn(output, batch)"
    if not logits.requires_grad:
        return None, "the loss has no gradient: all parameters are frozen"
    return nn.functional.cross_entropy(logits, target), ""


def _classes(output: Any, batch: Any) -> tuple[Tensor | None, Tensor | None, str]:
    """Logits (N, C) and labels (N,), without ignored ones; or why not."""
    main = main_tensor(output)
    if isinstance(batch, Mapping):
        labels: Any = cast("Mapping[str, Any]", batch).get("labels")
        named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)  # pyright: ignore
        main = named if isinstance(named, Tensor) else main
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and _is_pair(batch) else None  # pyright: ignore
    if not isinstance(labels, Tensor) or main is None:
        return None, None, "the batch has no labels" if main is not None else "the model gives no tensor"
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return None, None, f"labels are {labels.dtype}, no class numbers"
    if main.shape[:-1] != labels.shape:
        shapes = f"{tuple(main.shape)} and {tuple(labels.shape)}"
        return None, None, f"output and labels have shapes {shapes}, and classes must be the last dimension"
    if _is_shifted(output, main, labels):
        main, labels = main[:, :-1], labels[:, 1:]
    kept = labels.flatten() != -100
    logits, target = main.reshape(-1, main.shape[-1])[kept], labels.flatten()[kept]
    if not len(target):
        return None, None, "no sample of the batch has a label"
    if int(target.min()) < 0 or int(target.max()) >= logits.shape[-1]:
        return None, None, f"labels are not class numbers below {logits.shape[-1]}"
    return logits, target, ""


def _is_shifted(output: Any, logits: Tensor, labels: Tensor) -> bool:
    """Whether a model's own loss is of each next label, as causal language models have it: by its value."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)  # pyright: ignore
    if not isinstance(own, Tensor) or logits.ndim != 3 or logits.shape[1] < 2:
        return False
    with torch.no_grad():
        own = own.detach().float()
        wide = logits.detach().float()
        values = [
            nn.functional.cross_entropy(x.flatten(0, 1), y.flatten())
            for x, y in ((wide, labels), (wide[:, :-1], labels[:, 1:]))
        ]
    same, shifted = (abs(float(value - own)) for value in values)
    return shifted < same
