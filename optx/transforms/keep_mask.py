"""KeepMask: a pruned model is trained on, and what was pruned stays 0.

Source: the mask in the optimizer is optx's own; that retraining after pruning needs one is from "PERP:
Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TransformError, warn
from optx._masked_model import local
from optx._masks import Masks
from optx._names import parameter_names, plain_name
from optx._rules import rule
from optx.ops import where
from optx.step import bits
from optx.step.declared import like_weight
from optx.step.state import is_ours, saved_slots
from optx.step.transform import Host, Transform, wrapped_by
from optx.transforms._kept_weights import LEAST, Pairing, mask_state, newly_kept, regrown

_version = attrgetter("_version")
_WATCHED = 32  # weights: to ask each of hundreds takes a twentieth of a step


@rule(writes="g")
def keep_gradient(g: Any, kept: Any) -> Any:
    """0 where the weight is pruned; chosen, not multiplied, so that inf and nan there are gone."""
    return where(kept > 0.5, g, 0.0)


@rule(writes="w")
def keep_weight(w: Any, kept: Any) -> Any:
    """0 where the weight is pruned, and never -0."""
    return where(kept > 0.5, w, 0.0)


class KeepMask(Transform):
    """Train a pruned model on, with any optimizer, and keep every pruned weight at 0.

    In every step the gradient and the weights are set to 0 where the mask says so, in the same pass over
    memory as the update, for one bit a weight. The base's moments are 0 there from the first step; those that
    it brings along, from training before the pruning, are set to 0 when the optimizer is wrapped or loaded.
    Weights are 0 after every step, whatever the base does: weight decay, momentum, a dense update (Muon,
    Shampoo), averages (schedulefree's ``eval()``), stochastic rounding, a pull to anchors that are not 0.

    A weight that is kept and happens to be 0 is trained on: the mask is stored, not taken from zeros again.
    It is in ``state[p]["optx.keep_mask.kept"]`` (one bit a weight, laid out as in `Masks`; a byte where a row
    is no multiple of 8 numbers) and in checkpoints, outlasts ``optimizer.state.clear()``, and is sharded as
    its weight. A checkpoint's mask takes the place of the one given here, with a warning if that lets zeros
    go; ``masks`` take the place of what a state that was loaded before the wrap has.

    Its place among other transforms does not matter: its gradient rule comes before all others', so that
    their sums (PerpGrad's) see what the base will see, and again after each that writes gradients; its
    weights' rule comes last.

    Args:
        masks: which weights are kept: `Masks`, or bool tensors by parameter name (True: kept). None:
            where weights are 0 now; looked at are weights of two or more dimensions, as biases and norms
            start at 0, and those with fewer than 1 % zeros, or nothing else, do not count as pruned.
        model: gives the parameters' names, if the optimizer was not built from ``named_parameters()``;
            without it they are those of the model that ``masks`` were made from or last applied to.

    Group keys:
        ``keep_mask=False`` leaves a param group out: zeros there are trained.

    Paper values:
        None: what is pruned is the mask's matter, and the rate is the retraining's.

    Limits: Gradient clipping by norm before the step still counts the gradients of pruned weights, and
    GradScaler skips a step for an inf in one. Memory and time are a dense model's. LBFGS has to be wrapped
    before its first step: its history mixes all weights.

    Keywords: pruning, sparse training, sparsity, retraining, masked optimizer, 2:4, n:m, semi-structured,
    zeros, lottery ticket, freeze zeros.

    Evidence: ``optx run prune``, ``optx run share``; ``optx bench step``; ``test_keep_mask.py``,
    ``test_keep_mask_bases.py``.

    Raises:
        OptxError: ``masks`` are no masks, two masks of one weight differ, or a pruned weight is not 0 when
            the optimizer is wrapped or takes its first step after a load; names it.
        TransformError: nothing is pruned, a mask fits no parameter, the parameters' names are not known, or
            LBFGS has stepped before.
        ShapeError: a mask has another shape than its weight.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(4, 2)
        >>> masks = optx.Masks.from_bool({"weight": torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1]]).bool()})
        >>> masks.apply_(model)
        >>> opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> opt = optx.wrap(opt, optx.KeepMask(masks))
        >>> for _ in range(10):
        ...     opt.zero_grad()
        ...     model(torch.randn(8, 4)).square().sum().backward()
        ...     opt.step()
        >>> masks.verify(model)  # raises if a zero had grown back
        >>> opt.keep_mask.current().sparsity
        0.375

    Source: arXiv 2312.15230, section 2, for what it is needed for.
    """

    name = "keep_mask"
    looks_at_gradients = False
    encloses = True
    rules: ClassVar = {"gradient": keep_gradient, "after": keep_weight}

    def __init__(
        self, masks: Masks | Mapping[str, Tensor] | None = None, model: nn.Module | None = None
    ) -> None:
        given: Any = masks
        if given is not None and not isinstance(given, Mapping):
            hint = " Of a file: optx.Masks.load(path)." if isinstance(given, str | PathLike) else ""
            hint = " A model goes in as KeepMask(model=model)." if isinstance(given, nn.Module) else hint
            raise OptxError(
                f"KeepMask: masks is a {type(given).__name__}; it must be optx.Masks, or bool tensors by "
                f"name, as {{'layers.0.weight': weight != 0}}.{hint}"
            )
        owner: Any = model
        if owner is not None and not isinstance(owner, nn.Module):
            raise OptxError(f"KeepMask: model is a {type(owner).__name__}; it must be a torch.nn.Module.")
        self.options = {}
        self.slots = {"kept": like_weight(torch.bool, lasting=True, packed=True)}
        own = masks if masks is None or isinstance(masks, Masks) else Masks.from_bool(masks)
        self._pairing = Pairing(own, model)
        self._before: dict[Tensor, Tensor] = {}  # while a checkpoint is loaded, the masks until then
        self._unchecked = False  # whether weights may be others than those that were looked at
        self._watched: list[Tensor] = []  # whose writes torch counts, from the first step on
        self._writes = 0  # of all of them, as the last step left them
        self._stepping = False
        self._kept: float | None = None
        self._recount = True  # which takes a pass over the masks, so steps do it that have others

    def arguments(self) -> dict[str, Any]:
        """As they were given; `current` has the masks in force."""
        return {"masks": self._pairing.masks, "model": self._pairing.model}

    # ---- for the person ----------------------------------------------------------------------------

    def current(self) -> Masks:
        """The masks that are in force, as a checkpoint may have brought them: to save, or to verify.

        Raises:
            OptxError: it is not wrapped, or the parameters' names are not known.
        """
        optimizer = self._bound()
        masks, model = self._pairing.masks, self._pairing.model
        model = model if model is not None or masks is None else masks.model
        names = parameter_names(optimizer.base, model)
        found: dict[str, Tensor] = {}
        for p, slot in self._slots(optimizer).items():
            if bits.form(slot, p) != "ones" and p.ndim:
                name = plain_name(names[id(p)])
                if name.startswith("param_groups["):
                    raise OptxError(
                        "KeepMask: the optimizer does not know its parameters' names. Build it from "
                        "model.named_parameters(), or pass model=model."
                    )
                mask = bits.mask_of(slot, p)
                found[name] = (mask.full_tensor() if hasattr(mask, "full_tensor") else mask).cpu()  # type: ignore[attr-defined]
        return Masks.from_bool(found)

    # ---- for the machinery -------------------------------------------------------------------------

    def bind(self, optimizer: Host) -> None:
        """Find each parameter's mask, look whether the weight goes with it, mask what the base remembers."""
        served = optimizer.served(self)
        found = self._pairing.of(served, optimizer)
        _refuse_history(optimizer, optimizer.base.state)
        asked = {p: bits.settled(found.get(id(p), bits.every_bit(p)), p) for p in served}
        if self._pairing.masks is not None:  # what a checkpoint left in the base's state is an older mask
            for p in served:
                optimizer.slot_store.drop(p, [self._key])
        for p, slot in asked.items():
            optimizer.slot(p, self, "kept", lambda slot=slot: slot)
        self._tell_regrowing(optimizer, asked, "the optimizer's state has masks already", "pass masks=")
        self._check(optimizer)
        self._mask_state(optimizer)

    def init_slot(self, name: str, p: Tensor, optimizer: Host) -> Tensor:
        """The mask of a parameter that came later."""
        self._unchecked = True
        return self._pairing.of([p], optimizer, some=False).get(id(p), bits.every_bit(p))

    def before_step(self, optimizer: Host) -> None:
        """After a load, weights of other masks would be pruned without a word."""
        if self._recount:
            slots = ((slot, p) for p, slot in self._slots(optimizer).items())
            self._kept = bits.share_of_ones((t, p) for t, p in slots if bits.form(t, p) != "ones")
            self._recount = False
        first, self._stepping = not self._stepping, True  # a closure may have moved them for a while
        if self._unchecked or (first and self._watched and self._writes != sum(map(_version, self._watched))):
            self._check(optimizer)

    def after_step(self, optimizer: Host) -> None:
        """Whoever writes into the weights from here on is noticed."""
        if not self._watched:
            served = [p for p in optimizer.served(self) if not p.is_inference()]
            self._watched = served[:: -(-len(served) // _WATCHED) or 1]  # a load writes into all
        self._stepping, self._writes = False, sum(map(_version, self._watched))

    def groups_changed(self, optimizer: Host) -> None:
        """Parameters that came, or were replaced, are looked at before the next step."""
        self._unchecked, self._watched, self._recount = True, [], True

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """Which share of the masked weights' numbers the last step kept."""
        return {"kept": self._kept} if optimizer.measured and self._kept is not None else {}

    def weights_moved(self, optimizer: Host) -> None:
        """A base that averages weights may put a little into what is pruned."""
        with torch.no_grad():
            for p, _ in list(regrown(self._slots(optimizer))):
                local(p).masked_fill_(~local(bits.mask_of(self._slot(p, optimizer), p)), 0.0)

    def before_load(self, optimizer: Host, state_dict: Mapping[str, Any]) -> None:
        """Refuse a history that mixes all weights, unless it was made under a mask."""
        self._before = self._slots(optimizer)
        if not any(self._key in slots for slots in saved_slots(dict(state_dict)).values()):
            _refuse_history(optimizer, state_dict.get("state", {}))

    def after_load(self, optimizer: Host) -> None:
        """Mask what the checkpoint brought; the weights may still be loaded after this."""
        self._mask_state(optimizer)
        self._unchecked = self._recount = True
        before, self._before = self._before, {}
        way_out = "call remove() after the load and wrap again with masks="
        self._tell_regrowing(optimizer, before, "load_state_dict: the checkpoint has other masks", way_out)

    def _tell_regrowing(
        self, optimizer: Host, asked: Mapping[Tensor, Tensor], why: str, way_out: str
    ) -> None:
        """Warn if weights that were to be pruned are kept by the masks in force: zeros are trained."""
        least = LEAST if self._pairing.masks is None else 0.0  # without masks a 0 may be chance
        found = list(newly_kept(asked, self._slots(optimizer), least))
        if found:
            p, count = found[0]
            others = f", and some in {len(found) - 1} others" if len(found) > 1 else ""
            shape = tuple(p.shape)
            warn(
                f"KeepMask: {why}, which are in force now and keep {count:,} weights of one of shape {shape}"
                f"{others} that were pruned here: these zeros will be trained. To keep them, {way_out}."
            )

    @property
    def _key(self) -> str:
        return f"optx.{self.name}.kept"

    def _bound(self) -> Host:
        owner = wrapped_by(self)
        if owner is None:
            raise OptxError("KeepMask: current() is of an optimizer; wrap one with it first.")
        return owner

    def _slot(self, p: Tensor, optimizer: Host) -> Tensor:
        return bits.settled(optimizer.slot(p, self, "kept"), p)

    def _slots(self, optimizer: Host) -> dict[Tensor, Tensor]:
        return {p: self._slot(p, optimizer) for p in optimizer.served(self)}

    def _check(self, optimizer: Host) -> None:
        """Raise unless every pruned weight is 0."""
        wrong = list(regrown(self._slots(optimizer)))
        self._unchecked = False
        if wrong:
            self._unchecked = True
            masks, model = self._pairing.masks, self._pairing.model
            names = parameter_names(optimizer.base, model or (masks.model if masks else None))
            p, count = wrong[0]
            others = f", and {len(wrong) - 1} other weights" if len(wrong) > 1 else ""
            raise OptxError(
                f"KeepMask: {plain_name(names[id(p)])!r} has {count:,} masked weights that are not 0"
                f"{others}; a step would prune them. Call masks.apply_(model) first, or load the weights "
                "that go with the masks."
            )

    def _mask_state(self, optimizer: Host) -> None:
        state = optimizer.base.state
        for p, slot in self._slots(optimizer).items():
            if p in state and bits.form(slot, p) != "ones":
                mask_state(state[p], p, slot)


def _refuse_history(optimizer: Host, state: Mapping[Any, Any]) -> None:
    """LBFGS's directions are sums over steps of all weights: no part of them is a pruned weight's."""
    entries = [entry for entry in state.values() if isinstance(entry, dict)]
    if isinstance(optimizer.base, torch.optim.LBFGS) and any(not is_ours(key) for e in entries for key in e):
        raise TransformError(
            "KeepMask: LBFGS has stepped before the model was pruned, and its history would move pruned "
            "weights; make a new LBFGS."
        )
