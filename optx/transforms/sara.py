"""SaRA: the smallest weights of a pretrained model, which hardly act, are trained, and all others stay.

Source: "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", arXiv
2409.06633 (ICLR 2025). Where the paper's code differs between its two optimizers, this is its ``adamw2.py``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TransformError, check_range, check_whole, warn
from optx._names import has_names, parameter_names, whole
from optx._rules import rule
from optx.ops import where
from optx.step import bits
from optx.step.base_step import has_modes
from optx.step.declared import Slot, like_weight
from optx.step.rehearsal import is_rehearsal
from optx.step.step_moments import Moments
from optx.step.transform import Host, Transform, wrapped_by
from optx.transforms._compact_gradient import CompactGradient
from optx.transforms._compact_step import CompactStep
from optx.transforms._frozen_half import FirstState
from optx.transforms._gather import Selection
from optx.transforms._nuclear_norm import Pull
from optx.transforms._sara_checks import check_company, check_load, check_weights
from optx.transforms._small_entries import Density, Row, small, threshold_of_share

if TYPE_CHECKING:
    from optx.delta._checkpoint_source import Checkpoint
    from optx.delta._delta import Delta


@rule(writes="g")
def select(g: Any, mask: Any) -> Any:
    """The gradient of the selected entries; whatever it is elsewhere (nan too) does not count."""
    return where(mask > 0.5, g, 0.0)


@rule(writes="w")
def keep_rest(w: Any, w0: Any, mask: Any) -> Any:
    """What the base made of the selected entries; the others bit for bit as they were."""
    return where(mask > 0.5, w, w0)


class SaRA(Transform):
    """Train only the entries of the weights that are small in size, in place (progressive sparse adaptation).

    Entries below a threshold hardly act in a pretrained model. They are selected once, when the optimizer is
    wrapped, from the weights as they are then; they alone get gradient, decay and update, and all others stay
    bit-identical. All trainable tensors take part, biases and norms too (a norm's gains, near 1, are never
    selected). `delta` is what was trained, for a sparse file.

    Args:
        threshold: entries with ``|w| < threshold`` are selected, entries that are 0 among them.
        fraction: in its place, the share of all entries of all served weights together, above 0: the
            threshold is what that share is below (and what ties with it, so rather more than fewer). Exactly
            one of the two must be given.
        reselect_at: after so many steps, entries that are no longer below the threshold leave the selection,
            and stay at what they learned; none enters. -1: never by itself, see `reselect`.
        rank_weight: of the nuclear norm of the selected part of a matrix, one at random a step, of at least
            65 rows and columns and 101 selected entries; added to its gradient. A param group may have its
            own, as ``sara_rank_weight``.
        rank_every: add that in every so many steps, so many times as strong: it takes an SVD.
        reset_state_on_reselect: a re-selection drops the base's state, as the paper's memory-saving code
            does.
        compact: keep gradients and the base's state of the selected entries only: see Limits.
        seed: of the choice of matrices. The global generators are not touched.

    Attributes:
        threshold: in force; with ``fraction``, what it came to when the optimizer was wrapped.
        steps: taken so far.

    Group keys:
        ``sara=False`` leaves a param group out: all of it is trained, as without SaRA.

    Paper values:
        ``threshold=2e-3, rank_weight=5e-4, reselect_at=2500``: Stable Diffusion 1.5, over 5000 steps at lr
            5e-4 with weight decay 0.01.
        ``threshold=8e-4``, ``threshold=2e-4``: fewer entries; lr 7.6e-4 and 9.3e-4, by 1e-3 exp(-350
            threshold).
        ``fraction=0.1`` to ``fraction=0.2``: the share that other models have below such thresholds.

    Limits: The gradient is masked before the base's step and the weights after it, so any base serves; not
    those that move weights outside of ``step`` (schedulefree). Dense, ``p.grad`` and the base's state have
    all entries, and clipping counts them. With ``compact=True``: SGD, Adam or AdamW, alone, no sharded
    weights; ``p.grad`` is gathered in the backward pass, is 0 elsewhere to whoever reads it, and clipping
    counts the selected entries only; of AdamW's state there are 8 bytes a selected entry (float32), and a
    bit an entry. Under DDP the buckets still hold whole gradients. Checkpoints of the two forms don't load
    into each other.

    Keywords: sparse fine-tuning, parameter-efficient, mask, diffusion, pruning, magnitude, nuclear norm,
    progressive, memory, unstructural backpropagation.

    Evidence: ``optx run sara``; ``test_sara.py``, ``test_sara_compact.py``, ``test_sara_rank.py``,
    ``test_sara_delta.py``.

    Raises:
        OptxError: an argument out of range, or not exactly one of ``threshold`` and ``fraction``.
        TransformError: a base or transform that can't go with it, weights without values (on meta), no
            matrix for ``rank_weight``.

    Example:
        >>> import torch, optx
        >>> w = torch.nn.Parameter(torch.tensor([0.001, -0.0015, 0.01, -0.5, 0.0]))
        >>> opt = torch.optim.AdamW([("w", w)], lr=5e-4, weight_decay=0.01)
        >>> opt = optx.wrap(opt, optx.SaRA(threshold=2e-3))
        >>> base = {"w": w.detach().clone()}
        >>> w.grad = torch.tensor([1.0, -2.0, 3.0, 4.0, -0.5])
        >>> opt.step()
        >>> (w.detach() != base["w"]).tolist()
        [True, True, False, False, True]
        >>> opt.sara.density()
        <Density: 3 of 5 numbers (60.0%) trained>
        >>> bool((opt.sara.delta(base).apply(base)["w"] == w).all())
        True

    Source: arXiv 2409.06633; github.com/sjtuplayer/SaRA.
    """

    name = "sara"
    encloses = True
    slots: Mapping[str, Slot] = {"mask": like_weight(torch.bool, lasting=True, packed=True)}
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"rank_weight": (0.0, float("inf"))}

    def __init__(
        self,
        threshold: float | None = None,
        *,
        fraction: float | None = None,
        reselect_at: int = -1,
        rank_weight: float = 0.0,
        rank_every: int = 1,
        reset_state_on_reselect: bool = False,
        compact: bool = False,
        seed: int = 0,
    ) -> None:
        if (threshold is None) == (fraction is None):
            raise OptxError(
                f"SaRA: threshold is {threshold!r} and fraction is {fraction!r}; give exactly one of them."
            )
        if threshold is not None:
            check_range("SaRA", "threshold", threshold, 0.0)
        if fraction is not None:
            check_range("SaRA", "fraction", fraction, 0.0, 1.0)
            if not fraction > 0:
                raise OptxError("SaRA: fraction is 0; it must be above 0, or nothing is trained.")
        for argument, value in (("reset_state_on_reselect", reset_state_on_reselect), ("compact", compact)):
            if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"SaRA: {argument} is {value!r}; it must be True or False.")
        self.fraction = None if fraction is None else float(fraction)
        self.reselect_at = check_whole("SaRA", "reselect_at", reselect_at)
        if self.reselect_at < 1 and self.reselect_at != -1:
            raise OptxError(
                f"SaRA: reselect_at is {reselect_at!r}; it must be at least 1 step, or -1: never."
            )
        self.options = {"rank_weight": rank_weight}
        self.check_option("rank_weight", rank_weight, f"SaRA: rank_weight is {rank_weight!r}")
        self.rank_every = check_whole("SaRA", "rank_every", rank_every, 1)
        self.seed = check_whole("SaRA", "seed", seed)
        self.reset_state_on_reselect, self.compact = reset_state_on_reselect, compact
        self.keeps_shapes = not compact
        self._threshold = None if threshold is None else float(threshold)
        self._steps, self._reselected = 0, False
        self._first_state = FirstState()
        self._trained: float | None = None
        self._recount = True  # which takes a pass over the masks, so steps do it that have others
        self._ready()

    def _ready(self) -> None:
        """What a copy makes anew: hooks on weights, and gradients that are another's for a step."""
        self._pull = Pull(self._mask)
        self._compact = CompactStep(self._selection) if self.compact else None
        self._watching = False

    def __getstate__(self) -> dict[str, Any]:
        left = ("_pull", "_compact", "_watching")
        return {key: value for key, value in super().__getstate__().items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ready()

    @property
    def threshold(self) -> float | None:
        """What selected entries are below; None before a fraction has come to one."""
        return self._threshold

    @property
    def steps(self) -> int:
        """Taken so far, skipped ones not counted."""
        return self._steps

    # ---- for the person ----------------------------------------------------------------------------

    def density(self, model: nn.Module | None = None) -> Density:
        """How many entries of each weight are trained: a table; print it.

        Args:
            model: to name the parameters, if the optimizer was not made from ``named_parameters()``.
        """
        optimizer = self._bound("density")
        names = parameter_names(optimizer.base, model)
        weights = [p for p in optimizer.served(self) if p.requires_grad]
        rows = [
            Row(names[id(p)], tuple(p.shape), int(whole(self._mask(p).sum())), p.numel()) for p in weights
        ]
        return Density(rows, self._known_threshold(), self._reselected)

    def reselect(self) -> Density:
        """Let entries that are no longer below the threshold leave the selection, between two steps.

        Returns:
            The table of what is left.
        """
        optimizer = self._bound("reselect")
        for p in optimizer.served(self):
            if p.requires_grad:
                old = self._mask(p)
                new = old & small(p, self._known_threshold())
                if self._compact is not None:
                    self._compact.shrink(optimizer, p, old, new)
                optimizer.slot_store.put(p, "optx.sara.mask", bits.settled(new, p))
                if self.reset_state_on_reselect:
                    optimizer.drop_base_state(p)
        if self.reset_state_on_reselect:
            self._first_state.make(optimizer.base, filter(self.serves, optimizer.base.param_groups))
        self._reselected = self._recount = True
        self._tell(optimizer)
        if not (left := self.density()).selected:
            warn("SaRA: no entry is below the threshold any more, so nothing is trained from here on.")
        return left

    def delta(self, base: Checkpoint, model: nn.Module | None = None) -> Delta:
        """What was trained: the optimizer's weights as they are now, minus the base, for a sparse file.

        Args:
            base: the model as it was before training: a module, a state dict, a safetensors file, a folder.
            model: to name the parameters, if the optimizer was not made from ``named_parameters()``.

        Returns:
            A delta that gives these weights bit for bit when applied to the base, and raises on another.

        Raises:
            OptxError: a parameter has no name; or the base is not the one that was trained from: it differs
                where nothing was selected, or the selection is not what is below the threshold in it (that of
                a run that was resumed without its optimizer's checkpoint).
            ShapeError: it has a tensor in another shape.

        Example:
            >>> import torch, optx
            >>> model = torch.nn.Linear(4, 4)
            >>> base = {name: t.clone() for name, t in model.state_dict().items()}
            >>> opt = optx.wrap(torch.optim.AdamW(model.parameters()), optx.SaRA(fraction=0.25))
            >>> model(torch.ones(2, 4)).sum().backward()
            >>> opt.step()
            >>> delta = opt.sara.delta(base, model)
            >>> all(torch.equal(t, model.state_dict()[name]) for name, t in delta.apply(base).items())
            True
        """
        from optx.delta._selected import Trained, selected_delta

        optimizer = self._bound("delta")
        if model is None and not has_names(optimizer.base):
            raise OptxError(
                "SaRA: delta() needs the parameters' names; give model=, or make the optimizer from "
                "model.named_parameters()."
            )
        names = parameter_names(optimizer.base, model)
        served = set(optimizer.served(self))
        tensors: dict[str, Trained] = {}
        for group in optimizer.param_groups:
            for p in filter(lambda p: p.requires_grad, group["params"]):
                if names[id(p)].startswith("param_groups["):
                    raise OptxError(f"SaRA: delta() finds no name for {names[id(p)]} in model.")
                mask = whole(self._mask(p)) if p in served else None
                known = self._known_threshold(), not self._reselected
                tensors[names[id(p)]] = Trained(whole(p.detach()), mask, *known)
        return selected_delta("SaRA.delta", base, tensors)

    # ---- the optimizer's side ----------------------------------------------------------------------

    def moments(self, group: Any, base: torch.optim.Optimizer) -> Moments:
        """Gradients and weights are masked; a compact step has no others."""
        return Moments() if self.compact else Moments(gradient=select, after=keep_rest)

    def check(self, base: torch.optim.Optimizer) -> None:
        """Refuse a base that moves weights outside of its step, and transforms that would move the rest."""
        if has_modes(base):
            raise TransformError(
                f"SaRA: {type(base).__name__} moves weights in train() and eval() by state that can't be "
                "masked, so unselected ones would not stay. Use another base."
            )
        if (optimizer := wrapped_by(self)) is not None:
            check_company(self, optimizer)

    def bind(self, optimizer: Host) -> None:
        """Select, from the weights as they are now."""
        check_company(self, optimizer)
        weights = check_weights(self, optimizer)
        if self.fraction is not None:
            self._threshold = threshold_of_share(weights, self.fraction)
        self._pull.check(self, optimizer)
        if not any(bool(whole(self._mask(p, optimizer).any())) for p in weights):
            warn(f"SaRA: no weight is below {self._threshold:g} in size, so nothing will be trained.")
        if self._compact is not None:
            for p in weights:
                self._compact.condense(optimizer, p)
            self._watch(optimizer)
        self._tell(optimizer)

    def init_slot(self, name: str, p: Tensor, optimizer: Host) -> Tensor:
        """Which entries are selected."""
        return small(p, self._known_threshold())

    def groups_changed(self, optimizer: Host) -> None:
        """New weights are selected from by the same threshold."""
        check_weights(self, optimizer)
        self._watch(optimizer)
        self._recount = True

    def before_step(self, optimizer: Host) -> None:
        """Add the nuclear norm's gradient."""
        if optimizer.closure_pending:
            return
        if not self._watching:
            self._watch(optimizer)
        if self._recount:
            served = (p for p in optimizer.served(self) if p.requires_grad)
            self._trained = bits.share_of_ones((optimizer.slot(p, self, "mask"), p) for p in served)
            self._recount = False
        self._pull.give_back()
        if self._compact is not None:
            for p in optimizer.served(self):
                self._compact.gather(p)  # what was set by hand, or came where no hook was
        self._pull.add(self, optimizer)

    @contextmanager
    def around_step(self, optimizer: Host) -> Generator[None]:
        """Gradients are the person's again after it; compact, the selected entries stand in for weights."""
        groups = [group for group in optimizer.param_groups if self.serves(group)]
        compact = None if wrapped_by(self) is None else self._compact
        try:
            with nullcontext() if compact is None else compact.standing_in(optimizer, groups):
                yield
        finally:
            self._pull.give_back()

    def after_step(self, optimizer: Host) -> None:
        """Count the step, and select again where it is time."""
        if is_rehearsal(optimizer):
            return
        self._steps += 1
        if self._steps == self.reselect_at:
            self.reselect()
        self._tell(optimizer)

    def before_load(self, optimizer: Host, state_dict: Mapping[str, Any]) -> None:
        """Refuse a trained state without its selection, or in the other form."""
        check_load(self, optimizer, state_dict)

    def after_load(self, optimizer: Host) -> None:
        """Go on with the threshold and steps of the run that saved."""
        self._recount = True
        group, given = optimizer.param_groups[0], self._threshold
        self._steps = int(group.get("optx.sara.steps", self._steps))
        self._reselected = bool(group.get("optx.sara.reselected", self._reselected))
        self._threshold = float(group.get("optx.sara.threshold", self._known_threshold()))
        self.seed = int(group.get("optx.sara.seed", self.seed))
        if self.fraction is None and given != self._threshold:
            warn(
                f"SaRA: the checkpoint's entries were selected below {self._threshold:g}, and threshold is "
                f"{given:g}; the checkpoint's stays in force."
            )
        self._tell(optimizer)

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """Which share of the numbers the last step trained, and what selected ones were below."""
        if not optimizer.measured or self._trained is None:
            return {}
        return {"trained": self._trained, "threshold": self._known_threshold()}

    def unwrap(self, optimizer: Host) -> None:
        """Give gradients and state the weights' shapes again."""
        if self._compact is not None:
            self._compact.release()
            for p in optimizer.served(self):
                if p.requires_grad:
                    self._compact.spread(optimizer, p)
                if isinstance(p.grad, CompactGradient):
                    p.grad = p.grad.dense()

    def group_numbers(self) -> dict[str, float | int | bool]:
        """Steps, threshold, seed, whether there was a re-selection, and the form of the state."""
        threshold = 0.0 if self._threshold is None else self._threshold
        numbers: dict[str, float | int | bool] = {"steps": self._steps, "threshold": threshold}
        return numbers | {"seed": self.seed, "reselected": self._reselected, "compact": self.compact}

    def _tell(self, optimizer: Host) -> None:
        """Write the numbers where they are saved."""
        numbers = {f"optx.{self.name}.{key}": value for key, value in self.group_numbers().items()}
        for group in optimizer.param_groups:
            group.update(numbers)

    def _watch(self, optimizer: Host) -> None:
        if self._compact is not None:
            self._compact.watch(optimizer.served(self))
        self._watching = True

    def _selection(self, p: Tensor) -> Selection:
        return Selection(self._bound("step").slot(p, self, "mask"), p.shape)

    def _mask(self, p: Tensor, optimizer: Host | None = None) -> Tensor:
        return bits.mask_of((optimizer or self._bound("mask")).slot(p, self, "mask"), p)

    def _known_threshold(self) -> float:
        assert self._threshold is not None  # settled in bind
        return self._threshold

    def _bound(self, caller: str) -> Host:
        if (optimizer := wrapped_by(self)) is None:
            raise TransformError(
                f"SaRA: {caller}() needs the optimizer that optx.wrap(optimizer, sara) makes."
            )
        return optimizer

    def arguments(self) -> dict[str, Any]:
        """With the one of threshold and fraction that was given."""
        return {**super().arguments(), "threshold": self._threshold if self.fraction is None else None}
