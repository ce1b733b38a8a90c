"""DSP-Reg: a decay that is strong where the domains' gradients disagree.

Source: "DSP-Reg: Domain-Sensitive Parameter Regularization for Robust Domain Generalization", arXiv
2601.19394. The paper's formulas were not at hand: what is here follows its abstract.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TransformError, check_choice, check_whole, warn
from optx._names import is_dtensor
from optx._rules import rule
from optx.ops import minimum, where
from optx.step.declared import Slot, like_weight, per_tensor
from optx.step.step_moments import Moments
from optx.step.transform import Group, Host, Transform, wrapped_by
from optx.transforms._domain_gradients import DomainGradients, declared, loss_scale, processes
from optx.transforms._repeated_domains import Measure, RepeatedDomains
from optx.transforms._sensitivity import (
    find_peak,
    keep_from_below_0,
    normalised,
    rescale,
    sensitivities,
    summary,
)


@rule(writes=("g", "sensitivity"))
def penalise(w: Any, g: Any, sensitivity: Any, spread: Any, keep: Any, rate: Any) -> Any:
    """S <- m S + (1 - m) s, and the gradient of lambda / 2 sum S^ w^2, S^ taken for a constant."""
    new = keep * sensitivity + (1.0 - keep) * spread
    return where(rate > 0.0, g + rate * new * w, g), new


@rule(writes=("g", "sensitivity"))
def penalise_from_anchor(
    w: Any, g: Any, anchor: Any, sensitivity: Any, spread: Any, keep: Any, rate: Any
) -> Any:
    """The same with w - w_0."""
    new = keep * sensitivity + (1.0 - keep) * spread
    return where(rate > 0.0, g + rate * new * (w - anchor), g), new


@rule(writes=("w", "sensitivity"))
def shrink(w: Any, sensitivity: Any, spread: Any, keep: Any, rate: Any, lr: Any) -> Any:
    """The decoupled form, which takes at most the whole weight."""
    new = keep * sensitivity + (1.0 - keep) * spread
    return where(rate > 0.0, w - minimum(lr * rate * new, 1.0) * w, w), new


@rule(writes=("w", "sensitivity"))
def shrink_to_anchor(
    w: Any, anchor: Any, sensitivity: Any, spread: Any, keep: Any, rate: Any, lr: Any
) -> Any:
    """The same towards w_0."""
    new = keep * sensitivity + (1.0 - keep) * spread
    return where(rate > 0.0, w - minimum(lr * rate * new, 1.0) * (w - anchor), w), new


class DSPReg(Transform):
    """Decay what the training domains' gradients disagree on, so that the model leans on what they share.

    Each domain's mini-batch gets a block of its own in the loop; what its backward leaves is its gradient
    g_d. The step's gradient is their mean, as with the mean of the domains' losses. S is a running average of
    their variance per weight, S^ = S / (mean S) over all that is regularised, and the penalty is
    weight / 2 * sum S^ w^2, S^ being taken for a constant: an L2 decay of that strength on average, moved to
    where domains disagree. No backward pass is added: one forward and one backward per domain, as many
    samples in all as before. With one domain, or equal ones, nothing is added.

    Source: "DSP-Reg: Domain-Sensitive Parameter Regularization for Robust Domain Generalization", arXiv
    2601.19394. Its formulas were not at hand; diagonal covariance, smoothing, normalisation and the quadratic
    penalty are optx's reading of its abstract.

    Args:
        domains: how many there are (they are called 0, 1, ...), or their labels. Every step has each once.
        weight: strength of the penalty, lambda. Coupled (on SGD), weights run off to nan where lr * weight *
            S^ stays above 2, and the largest S^ is easily 60 times the mean: begin at 0.01. With
            ``decoupled=True`` they can't, and end at 0.
        ema: how much of S stays at each step; the first step takes the variance as it is.
        norm: ``"mean"``: S^ has mean 1 over all; ``"layer"``: in each tensor; ``"max"``: its largest is 1;
            ``"none"``: S itself, which fades as the domains' gradients do.
        warmup: for so many steps S is collected, and nothing is added.
        decoupled: False adds the penalty to the gradient; True takes lr * weight * S^ of the weight (at most
            all) after the base's step, as AdamW decays. None: False on torch's SGD, True on every other base,
            most of which would rescale a penalty in the gradient.
        anchor: ``"init"`` pulls to the weights as they are at the first step instead of to zero: for
            fine-tuning.
        unbiased: the variance divides by one less than the number of domains.
        min_dim: weights of fewer dimensions are left out: biases and the norms' scales.
        eps: added to the mean (or the largest) S: where S is far below it nothing is added.
        model: leaves its embeddings out, and gives names to `sensitivity`.
        accumulate: domains may come again before a step, each equally often, as where a loop accumulates
            gradients with the domains in its inner loop. g_d is then the sum of a domain's blocks, kept for
            each domain. (Micro-batches within one block need no such thing.)
        measure: with ``accumulate``, and two blocks or more, what s is. ``"variance"``: that of the domains'
            gradients. ``"denoised"``: less the part that the blocks' differences say is the mini-batches'
            noise; S is kept from falling below 0. ``"disparity"``: how much the variance of a domain's
            blocks, not their sum, differs between the domains.

    Group keys:
        ``dsp_reg=False`` leaves a param group out (its gradients are still averaged over the domains);
        ``dsp_reg_weight``, ``dsp_reg_ema``, ``dsp_reg_warmup``, ``dsp_reg_eps`` override.

    Paper values:
        None at hand: its text was not. ``weight=1.0`` (the default) and ``ema=0.9`` (the default) are optx's,
            from spurious features made for it (test_dsp_reg_paper.py); to fine-tune, try ``weight=0.01`` with
            ``anchor="init"``.

    Limits: Memory per weight: 8 bytes of state (S and this step's variance, float32), 4 more while a domain
    is open (the mean, which is ``p.grad`` otherwise), and an anchor's. BatchNorm sees one domain at a time.
    The noise of mini-batches counts as disagreement, but for ``measure="denoised"``. With ``accumulate``,
    4 bytes more for each domain; for the other measures another 4 (``"disparity"``: for each domain), and one
    process. Under DDP every rank has every domain, with a forward
    pass in each block. Of a step that is not finished nothing is saved. A loss that is scaled by hand, not
    by torch's GradScaler, scales S with its square. A fused AdamW step moves 48 bytes per weight instead of
    28 (40 without a mean to divide by). Parameters of another optimizer get the sum over the domains, not
    the mean.

    Keywords: domain generalization, domain generalisation, DomainBed, out of distribution, OOD, spurious
    correlation, invariance, IRM, CORAL, Fishr.

    Evidence: ``optx run domains``; ``test_dsp_reg.py``, ``test_dsp_reg_paper.py``, ``test_dsp_reg_loops.py``.

    Raises:
        OptxError: an argument out of range; a domain that was never declared, came twice or is missing;
            step() without domains.
        TransformError: nothing to regularise; a base that maximises, with a coupled penalty.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), optx.DSPReg(domains=["a", "b"]))
        >>> for label, x in {"a": torch.ones(3, 4), "b": torch.zeros(3, 4)}.items():
        ...     with opt.dsp_reg.domain(label):
        ...         model(x).square().mean().backward()
        >>> opt.step()
        >>> round(float(opt.dsp_reg.sensitivity()["param_groups[0]['params'][0]"].mean()), 3)
        1.0
    """

    name = "dsp_reg"
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        "weight": (0.0, float("inf")),
        "ema": (0.0, 1.0),
        "warmup": (0.0, float("inf")),
        "eps": (1e-30, float("inf")),  # where S is 0 nothing else keeps it from 0 / 0
    }

    def __init__(
        self,
        domains: int | Sequence[Hashable],
        weight: float = 1.0,
        ema: float = 0.9,
        norm: Literal["mean", "layer", "max", "none"] = "mean",
        warmup: int = 0,
        *,
        decoupled: bool | None = None,
        anchor: Literal["init"] | None = None,
        unbiased: bool = False,
        min_dim: int = 2,
        eps: float = 1e-12,
        model: nn.Module | None = None,
        accumulate: bool = False,
        measure: Measure = "variance",
    ) -> None:
        options = {"weight": weight, "ema": ema, "warmup": warmup, "eps": eps}
        for option, value in options.items():
            self.check_option(option, value, f"DSPReg: {option} is {value!r}")
        self.options = options
        check_choice("DSPReg", "norm", norm, ("mean", "layer", "max", "none"))
        check_choice("DSPReg", "decoupled", decoupled, (True, False, None))
        check_choice("DSPReg", "anchor", anchor, ("init", None))
        check_choice("DSPReg", "unbiased", unbiased, (True, False))
        check_choice("DSPReg", "accumulate", accumulate, (True, False))
        check_choice("DSPReg", "measure", measure, ("variance", "denoised", "disparity"))
        if measure != "variance" and not accumulate:
            raise OptxError(
                f"DSPReg: measure={measure!r} compares several blocks of a domain; give accumulate=True too, "
                "and each domain two blocks or more in a step."
            )
        least_dim = check_whole("DSPReg", "min_dim", min_dim, 0)
        if not (model is None or isinstance(model, nn.Module)):  # pyright: ignore
            raise OptxError(f"DSPReg: model is a {type(model).__name__}; it must be the model, or None.")
        self.norm, self.decoupled, self.anchor, self.unbiased = norm, decoupled, anchor, unbiased
        self.min_dim, self.model = least_dim, model
        self.accumulate = accumulate
        self.measure: Measure = measure
        self._labels = declared("DSPReg", domains)
        self._gradients = self._new_gradients()
        self._anchors_open = anchor is not None  # until the first domain the weights may still be loaded
        slots: dict[str, Slot] = {
            "sensitivity": like_weight(),
            "spread": like_weight(saved=False),
            "count": per_tensor(),
            "chosen": Slot(torch.float64, scalar=True, saved=False),
        }
        if norm == "max":
            slots["peak"] = Slot(torch.float64, scalar=True, saved=False)
        if anchor is not None:
            slots["anchor"] = like_weight(dtype=None, lasting=True)
        self.slots = slots

    def arguments(self) -> dict[str, Any]:
        """With the domains' labels, or how many there are where those are their numbers."""
        numbered = self._labels == [*range(len(self._labels))]
        return {**super().arguments(), "domains": len(self._labels) if numbered else [*self._labels]}

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins its step anew: a copied model has no gradients either.
        return {**super().__getstate__(), "_gradients": self._new_gradients()}

    def _new_gradients(self) -> DomainGradients:
        if self.accumulate:
            return RepeatedDomains("DSPReg", self._labels, self.unbiased, self.measure)
        return DomainGradients("DSPReg", self._labels, self.unbiased)

    @property
    def domains(self) -> tuple[Hashable, ...]:
        """The domains' labels."""
        return tuple(self._labels)

    # ---- for the loop --------------------------------------------------------------------------------

    @contextmanager
    def domain(self, label: Hashable) -> Generator[None]:
        """What backward passes leave inside is one domain's gradient; several of them add up.

        After the last domain ``p.grad`` is the mean over all, for clipping and for ``opt.step()``.

        Raises:
            OptxError: the label was never declared or came already in this step; another block is open; no
                gradient was left; gradients were there before, or were changed between two blocks; another
                measure than ``"variance"`` with several processes.
        """
        optimizer = self._bound("domain")
        if self.measure != "variance" and processes() > 1:
            raise OptxError(
                f"DSPReg: measure={self.measure!r} compares blocks whose gradients DDP may not "
                "have exchanged (no_sync); with several processes use measure='variance'."
            )
        optimizer.follow_parameters()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._gradients.enter(label, parameters)
        try:
            if self._anchors_open:
                self._take_anchors(optimizer)
            yield
            self._gradients.take(label, parameters, self._spread_of(optimizer))
        except BaseException:
            self._gradients.give_up(parameters)
            raise

    def backward(self, losses: Mapping[Hashable, Tensor]) -> None:
        """For a loop whose forward pass takes all domains at once: the backward passes of each one's loss.

        The forward pass and its activations are shared; there is a backward pass over them for each domain,
        so that with D domains of equal size the backward passes take up to D times as long as one of the mean
        loss. `domain` with a forward pass for each domain takes no longer than that one.

        Args:
            losses: of each domain, by label; scaled already where a GradScaler is used.

        Raises:
            OptxError: as for `domain`; a loss is no single number; or there are several processes, between
                which DDP and FSDP would exchange the gradients of the first backward pass only.
        """
        if processes() > 1:
            raise OptxError(
                "DSPReg: backward(losses) makes several backward passes over one forward pass, and DDP and "
                "FSDP exchange the gradients of the first only; use domain(label) with a forward pass in "
                "each block."
            )
        self._gradients.check_losses(losses)
        for number, (label, loss) in enumerate(losses.items(), 1):
            with self.domain(label):
                loss.backward(retain_graph=number < len(losses))

    def sensitivity(self) -> dict[str, Tensor]:
        """S^ of each regularised weight by name, as the next penalty would have it if S stayed as it is."""
        optimizer = self._bound("sensitivity")
        chosen = [p for p in optimizer.served(self) if self._regularises(p, optimizer)]
        return sensitivities(self, optimizer, chosen)

    # ---- for the step --------------------------------------------------------------------------------

    def moments(self, group: Group, base: torch.optim.Optimizer) -> Moments:
        """The penalty in the gradient or after the base's step, and what it is divided by."""
        if self._decoupled(base):
            last = Moments(after=shrink if self.anchor is None else shrink_to_anchor)
        else:
            last = Moments(gradient=penalise if self.anchor is None else penalise_from_anchor)
            if group.get("maximize", False):
                raise TransformError(
                    "DSPReg: the base has maximize=True, and a penalty in its gradient would make weights "
                    "grow; use DSPReg(decoupled=True)."
                )
        return normalised(last, self.norm)

    def _decoupled(self, base: torch.optim.Optimizer) -> bool:
        return not isinstance(base, torch.optim.SGD) if self.decoupled is None else self.decoupled

    def bind(self, optimizer: Host) -> None:
        """See that there is something to regularise, and more than one domain."""
        served = [p for p in optimizer.served(self) if p.requires_grad]
        if not any(self._regularises(p, optimizer) for p in served):
            raise TransformError(
                f"DSPReg: there is nothing to regularise: no trainable parameter has {self.min_dim} "
                "dimensions or more and is no embedding. Lower min_dim, or serve the groups that have "
                "dsp_reg=False."
            )
        if self.model is not None and set(self.model.parameters()).isdisjoint(_parameters(optimizer)):
            raise TransformError(
                f"DSPReg: no parameter of model, a {type(self.model).__name__}, is in the "
                "optimizer; give the model that it trains."
            )
        if self.norm == "max" and any(map(is_dtensor, served)):
            raise TransformError("DSPReg: norm='max' does not serve sharded parameters; use norm='mean'.")
        if len(self._labels) == 1:
            warn(
                f"DSPReg: there is one domain, {self._labels[0]!r}, which agrees with itself: nothing is "
                "added to its gradients."
            )

    def unwrap(self, optimizer: Host) -> None:
        """Let the gradients go."""
        self._gradients.clear()

    def init_slot(self, name: str, p: Tensor, optimizer: Host) -> Tensor:
        """Whether a parameter is regularised; its anchor."""
        slot = self.slots[name]
        if name == "chosen":
            chosen = p.ndim >= self.min_dim and id(p) not in self._embeddings()
            return torch.full((), float(chosen), dtype=slot.dtype, device=p.device)
        if name == "anchor":
            return p.detach().clone(memory_format=torch.preserve_format)
        return slot.zeros(p)

    def before_step(self, optimizer: Host) -> None:
        """See that every domain is there; a GradScaler's scale leaves the variances as it left ``p.grad``."""
        if optimizer.closure_pending:
            return  # the domains are in it
        ready = any(p.grad is not None for p in _parameters(optimizer)) and not _rehearses(optimizer)
        self._gradients.check_step(ready)
        if not self._gradients.seen:
            return
        acting = [p for p in optimizer.served(self) if p.grad is not None]
        self._ready_spreads(optimizer, acting)

    def after_step(self, optimizer: Host) -> None:
        """The gradients are used up."""
        self._gradients.clear()

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """The mean S of what is regularised, as the last step left it, and the penalty's strength in it."""
        return summary(self, optimizer)

    def after_load(self, optimizer: Host) -> None:
        """A resumed run's anchors come from its checkpoint."""
        self._anchors_open = False
        self._gradients.clear()

    # ---- parts of it ---------------------------------------------------------------------------------

    def _bound(self, what: str) -> Host:
        optimizer = wrapped_by(self)
        if optimizer is None:
            raise OptxError(f"DSPReg: {what}() needs the optimizer that optx.wrap(optimizer, dsp) returns.")
        return optimizer

    def _embeddings(self) -> set[int]:
        modules = () if self.model is None else self.model.modules()
        return {id(m.weight) for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)}

    def _regularises(self, p: Tensor, optimizer: Host) -> bool:
        return float(optimizer.slot(p, self, "chosen")) > 0.0

    def _spread_of(self, optimizer: Host) -> Any:
        """Where the variances are written."""
        served = set(optimizer.served(self))
        return lambda p: optimizer.slot(p, self, "spread") if p in served and p.ndim >= self.min_dim else None

    def _take_anchors(self, optimizer: Host) -> None:
        """The weights as training starts, whatever was loaded since `wrap`."""
        self._anchors_open = False
        for p in optimizer.served(self):
            if p.requires_grad:
                optimizer.slot(p, self, "anchor").copy_(p.detach())

    def _ready_spreads(self, optimizer: Host, acting: Sequence[Tensor]) -> None:
        spreads = [optimizer.slot(p, self, "spread") for p in acting]
        for p, spread in zip(acting, spreads, strict=True):
            if not self._gradients.has(p):  # its gradient came outside of every domain
                spread.zero_()
        if not self._gradients.unscaled:
            rescale(spreads, loss_scale())
        self._gradients.unscaled = True
        if self.measure == "denoised":
            keep_from_below_0(self, optimizer, acting)
        if self.norm == "max":
            find_peak(self, optimizer, acting)


def _parameters(optimizer: Host) -> chain[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _rehearses(optimizer: Host) -> bool:
    """Whether this step moves nothing: torch's distributed checkpoint steps with lr 0."""
    return all(float(group.get("lr", 1.0)) == 0.0 for group in optimizer.param_groups)
