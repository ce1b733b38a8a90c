"""The handle of `optx.FTWT`: its loss, what its predictors keep, and what that saves.

Source: FTWT, arXiv 2110.08232, section 3.2, equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_choice, warn
from optx.inject._conv_chains import Chain
from optx.inject._ftwt_layer import Layer
from optx.inject._ftwt_parts import End, Predictor, Whole
from optx.inject._own_loss import LossHandle
from optx.inject._report import Report, Row
from optx.inject._served import Served
from optx.inject._trained_whole import Saved


@dataclass(frozen=True)
class LayerWork:
    """Multiply-adds of one convolution, the mean over the samples counted.

    Attributes:
        module: its path.
        kept: of the kept filters, from the kept channels of the input.
        total: of all filters from all channels.
        predictor: of its predictor, which is in neither: its product, and one addition per number pooled.
    """

    module: str
    kept: float
    total: int
    predictor: int


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a model's convolutions; ``print`` shows it as a table.

    Attributes:
        layers: one per convolution, also those without a predictor.
        samples: how many were counted.
    """

    layers: Sequence[LayerWork]
    samples: int

    @property
    def kept(self) -> float:
        """Of a sample, in all."""
        return sum(one.kept for one in self.layers)

    @property
    def total(self) -> int:
        """Of the dense model."""
        return sum(one.total for one in self.layers)

    @property
    def predictor(self) -> int:
        """Of all predictors, beside it."""
        return sum(one.predictor for one in self.layers)

    @property
    def share(self) -> float:
        """What is kept, of the dense model's."""
        return self.kept / self.total

    def __str__(self) -> str:
        rows = [*self.layers, LayerWork("in all", self.kept, self.total, self.predictor)]
        width = max(len(one.module) for one in rows)
        lines = [f"{'multiply-adds of a sample':<{width}}  {'kept':>14}  {'of':>14}  {'share':>7}  predictor"]
        for one in rows:
            share = f"{100 * one.kept / one.total:.1f} %"
            lines.append(
                f"{one.module:<{width}}  {one.kept:>14,.0f}  {one.total:>14,}  {share:>7}  {one.predictor:,}"
            )
        return "\n".join([*lines, f"mean of {self.samples:,} samples in evaluation mode"])


class FilterPruning(LossHandle):
    """What `optx.attach` returns for `optx.FTWT`: a handle that also has a loss, and counts work."""

    injection: Any  # `optx.FTWT`, which this module does not know
    group: ClassVar[Mapping[str, float]] = {"lr": 0.1, "weight_decay": 0.0}

    def __init__(
        self,
        model: nn.Module,
        injection: Any,
        served: Sequence[Served],
        saved: Sequence[Saved],
        chains: Mapping[str, Chain],
    ) -> None:
        super().__init__(model, injection, served, saved)
        modules: dict[str, Any] = dict(model.named_modules())
        ends = {chain.end: path for path, chain in chains.items()}
        self.layers: dict[str, Layer] = {}
        for path, chain in chains.items():
            norm = modules[chain.end] if chain.end != path else None
            layer = Layer(chain, modules[path], norm, self.collected, injection.target)
            self.layers[path] = layer
        for path, chain in chains.items():
            self.layers[path].source = self.layers.get(chain.source or "")
        for one in served:
            part: Any = one.part
            if isinstance(part, Predictor | End | Whole):
                path = ends[one.path] if isinstance(part, End) else one.path
                part.layer = self.layers[path]
            if isinstance(part, Predictor):
                part.ends = chains[one.path].end == one.path
        uncalled = (
            path for path, one in modules.items() if isinstance(one, nn.Conv2d) and path not in chains
        )
        self.uncalled = list(uncalled)
        self._told = False

    def loss(self) -> Tensor:
        """What the predictors of the last training forward lack: the mean over layers of their cross-entropy.

        Of a layer it is the mean over the batch and the sum over filters. Frozen or disabled it is 0.

        Raises:
            OptxError: no training forward has been since it was taken last.
        """
        values = self._take()
        if values and not self._told:
            self._warn_of_zeros()
        return self._mean(values)

    def _warn_of_zeros(self) -> None:
        flags = {path: layer.all_zero for path, layer in self.layers.items() if layer.all_zero is not None}
        if not flags or not bool(torch.stack([flag.cpu() for flag in flags.values()]).any()):
            return
        self._told = True
        path = next(path for path, flag in flags.items() if bool(flag))
        if getattr(self.injection, "criterion", "") == "uniform":
            return
        warn(
            f"FTWT: a sample's target of {path!r} has no filter at all: the strongest alone has more than "
            f"r={self.injection.r} of the mass, and what crosses r is dropped, as in the official code. "
            "optx.FTWT(..., crossing='keep') keeps it."
        )

    def agreement(self) -> float:
        """Share of the last training forward's bits, mean over layers, that were predicted as their targets.

        Raises:
            OptxError: there has been none.
        """
        found = [layer.agreement for layer in self.layers.values() if layer.agreement is not None]
        if not found:
            raise OptxError("agreement: no training forward has been. Call the model in training mode.")
        return torch.stack([one.cpu() for one in found]).mean().item()

    def numbers(self) -> dict[str, float | Tensor]:
        """For `Handle.metrics`: what the last calls had."""
        found: dict[str, float | Tensor] = {} if self.last_loss is None else {"loss": self.last_loss}
        masks = list(self.masks().values())
        if masks:
            kept = torch.stack([mask.sum().to(masks[0].device) for mask in masks]).sum()
            found["kept"] = kept / sum(mask.numel() for mask in masks)
        agreed = [layer.agreement for layer in self.layers.values() if layer.agreement is not None]
        if agreed:
            found["agreement"] = torch.stack([one.to(agreed[0].device) for one in agreed]).mean()
        return found

    def masks(self) -> dict[str, Tensor]:
        """(B, C) bool by layer: the filters kept in the last call."""
        return {path: layer.mask for path, layer in self.layers.items() if layer.mask is not None}

    def force(self, masks: Literal["all", "random"] | None = None, *, keep_all: bool = False) -> None:
        """Let other masks act than the predicted ones, until it is called with nothing.

        Args:
            masks: ``"all"``: every filter is kept; ``"random"``: of each sample as many as predicted, any of
                them.
            keep_all: the same as ``"all"``.
        """
        check_choice("force", "masks", masks, ("all", "random", None))
        for layer in self.layers.values():
            layer.force = "all" if keep_all else masks

    def flops(self, *, reset: bool = False) -> Work:
        """Multiply-adds kept and in all, by layer: the mean over all samples computed in evaluation mode.

        Print it, or read ``kept``, ``total`` (the dense model's), ``share`` and ``predictor`` (beside them).

        Of a layer: positions x K^2 x the sum over groups of (kept filters x kept channels of the input).
        Channels of an input are masked where it comes from one served layer by pools and activations that are
        0 at 0. This is what masks let be skipped: layers that are computed whole save nothing of it.

        Args:
            reset: whether to begin anew after this.

        Raises:
            OptxError: nothing has been computed in evaluation mode.
        """
        rows: list[LayerWork] = []
        samples = max((layer.samples for layer in self.layers.values()), default=0)
        if not samples:
            raise OptxError(
                "flops: nothing has been counted. Call the model in evaluation mode first (compiled calls "
                "are not counted)."
            )
        sizes = {one.path: one.part for one in self.served if isinstance(one.part, Predictor)}
        for path, layer in self.layers.items():
            if layer.samples:
                own = sizes[path].work() if path in sizes else 0
                kept = float(layer.kept) / layer.samples
                rows.append(LayerWork(path, kept, layer.total // layer.samples, own))
            if reset:
                layer.forget()
        return Work(rows, samples)

    def report(self) -> Report:
        """As of every handle, with the convolutions that are not served, and why."""
        found = super().report()
        why = "not served: the model does not call it in evaluation mode"
        rows = [Row(path, str(self.injection), why, 0, 0) for path in self.uncalled]
        return Report([*found.rows, *rows], found.total)
