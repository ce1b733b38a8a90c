"""HFT: in every round a random half of the matrices is trained, and the other half stays as it is.

Source: "HFT: Half Fine-Tuning for Large Language Models", arXiv 2404.18466 (ACL 2025). There is no official
code; the selection (section 3, category level) agrees with the re-implementation in gucci-j/ssu.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optx._errors import OptxError, TransformError, check_whole, warn
from optx.step.rehearsal import is_rehearsal
from optx.step.transform import Host, Transform
from optx.transforms._ddp_rounds import KnownDDP
from optx.transforms._drawn_half import DrawnHalf, check_model
from optx.transforms._flags import inherited_flags, serve, serve_no_more
from optx.transforms._frozen_half import (
    FirstState,
    FrozenHalf,
    check_state_is_here,
    check_state_may_stay,
    only_rehearsed,
)
from optx.transforms._half_selection import Balance, Draw, Level, Selection
from optx.transforms._rounds import SavedRound


class HFT(Transform):
    """Train a random half of the matrices per round and keep the other half frozen (Half Fine-Tuning).

    A round is one training stage: an instruction tuning, one task of a sequence. In each transformer block
    2 of the 4 attention matrices, half of the feed-forward matrices and half of the norms are trained; the
    embeddings, the head and the final norm always are. What was learned before survives better, and the
    frozen half takes no gradient and no step time.

    It has ``requires_grad=False``, so it stays bit-identical under weight decay and momentum, and gradients
    set by hand (GEM's projection) are dropped before each step. A param group that is added later, and a
    group whose ``hft`` key changes, are seen at once.

    What a person froze stays so and is not drawn from, whether before `wrap` or in the middle of a round
    (noticed at the next step or round); thawed by hand again, it is trained, and drawn from in the next
    round. What the round froze stays frozen until the next one, also if it is thawed by hand: a warning
    says so. To keep such a weight frozen beyond the round, call `freeze`; to train it, `thaw`, or give its
    group ``hft=False``. `Wrapped.remove` leaves every ``requires_grad`` flag as you last set it.

    One HFT serves a model; put it on one optimizer if there are several.

    With DDP, wrap the model first, with ``find_unused_parameters=True``, and then the optimizer: DDP
    learns of the trainable parameters when it is made. For rounds of a stage each, cheaper: wrap the
    optimizer (or call `next_round`) first and make the DDP then, anew in each round, without that option:
    it has the trained half only. A DDP of an earlier round is refused. All ranks draw the same half,
    without communication.

    Source: "HFT: Half Fine-Tuning for Large Language Models", arXiv 2404.18466.

    Args:
        model: the model that the optimizer trains; its parameter names tell blocks and categories. A
            fused matrix (GPT-2's ``c_attn``, ``qkv_proj``, ``gate_up_proj``) is drawn as one.
        ratio: the share to train (the paper's is 0.5; 0.4 to 0.6 do about as well). 1 freezes nothing, 0
            all that can be drawn. `Selection.ratio` tells what the draw came to: of 3 feed-forward
            matrices, half of the blocks train 2 and half 1; of an odd number of blocks, the smaller half 2.
        level: ``"category"`` (the paper's choice), ``"layer"`` (half of the blocks) or ``"model"``
            (half of all matrices and half of all norms, from one pool each).
        seed: of the draws. The global generators are not touched.
        rounds_every: begin a new round after so many steps; None leaves it to `next_round`. It may be set
            later (``opt.hft.rounds_every = 100``), the only one of these that may.
        reset_state: at a new round, drop the base's state of all parameters (each of the paper's stages
            starts a new optimizer), so that there is state for the trained half only: of AdamW's 8 bytes
            per number (in float32), 4. False keeps it, and a weight that is thawed goes on with the moments
            and step count that it had; state is then held for all that was ever trained, in the end as much
            as without HFT. It is in ``state[p]`` and in checkpoints as any other.
        balance: ``"count"``, or ``"params"`` to choose as many matrices as that, but with a share of
            numbers near ``ratio``: under grouped-query attention, 2 of 4 may be a quarter of them.
        blocks: a regular expression that matches the blocks' names, for models whose blocks are not
            recognised.

    Attributes:
        round: the current round, from 0.
        seed: as given, or as in the checkpoint that was loaded.

    Group keys:
        ``hft=False`` leaves a param group out: it is trained as if it were not there.

    Paper values:
        ``ratio=0.5, level="category", reset_state=True``: Llama 2 7B and 13B (the defaults): instruction
            tuning on Tülu V2, preference tuning, and TRACE's eight tasks, each a round with a draw of its
            own. Learning rate and schedule as for full fine-tuning.
        ``ratio=0.4`` to ``ratio=0.6``: about as good.
        ``level="layer"``, ``level="model"``: compared, and worse (TRACE: 47.9 and 46.9, where category has
            51.3).

    Limits: A model whose blocks are not recognised needs ``blocks``. What is saved is the frozen half's
    weight gradients and optimizer state; the backward pass still runs down to the embeddings.

    Keywords: Half Fine-Tuning, forgetting, drift, sparse, freezing, memory, continual learning, lifelong
    learning.

    Evidence: ``optx run finetune``; ``test_hft.py``, ``test_hft_selection.py``, ``test_hft_rounds.py``.

    Raises:
        OptxError: an argument out of range, or no blocks in the model.
        TransformError: a parameter of the optimizer is not in the model, another optimizer's HFT serves the
            model, nothing would be trained, or ``reset_state=False`` with a base that moves weights without
            a gradient by their state (LBFGS, schedulefree).

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
        >>> opt = torch.optim.AdamW(model.parameters(), lr=2e-5)
        >>> opt = optx.wrap(opt, optx.HFT(model, seed=0))
        >>> round(opt.hft.selected().ratio.count, 2)
        0.5
        >>> opt.hft.next_round().round
        1
    """

    name = "hft"

    def __init__(
        self,
        model: nn.Module,
        ratio: float = 0.5,
        level: Level = "category",
        seed: int = 0,
        rounds_every: int | None = None,
        reset_state: bool = True,
        balance: Balance = "count",
        *,
        blocks: str | None = None,
    ) -> None:
        if not isinstance(reset_state, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"HFT: reset_state is {reset_state!r}; it must be True or False.")
        self.model = model
        self.rounds_every = rounds_every
        self.reset_state = reset_state
        self._half = DrawnHalf(model, Draw(ratio, level, balance, seed), blocks)
        self._steps = 0  # in this round; counted where rounds_every asks for it
        self._frozen = FrozenHalf()
        self._first_state = FirstState()
        self._ddp = KnownDDP()
        self._loading = False
        self._optimizer: weakref.ref[Host] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of (model, optimizer) serves the copied optimizer; a weak reference can't be copied.
        return {**super().__getstate__(), "_optimizer": self._served_by()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        optimizer = state["_optimizer"]
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    @property
    def round(self) -> int:
        """The current round, from 0."""
        return self._half.draw.round

    @property
    def rounds_every(self) -> int | None:
        """After how many steps a new round begins; None: never by itself."""
        return self._rounds_every

    @rounds_every.setter
    def rounds_every(self, steps: int | None) -> None:
        wanted = "a whole number of steps, or None"
        number = None if steps is None else check_whole("HFT", "rounds_every", steps, wanted=wanted)
        if number is not None and number < 1:
            raise OptxError(f"HFT: rounds_every is {steps!r}; it must be at least 1 step, or None.")
        self._rounds_every = number

    @property
    def seed(self) -> int:
        """The seed of all rounds' draws."""
        return self._half.draw.seed

    # ---- for the person ----------------------------------------------------------------------------

    def next_round(self) -> Selection:
        """Draw a new half, between two steps. Gradients of what is now frozen are dropped.

        Returns:
            The new selection.
        """
        return self.start_round(self.round + 1)

    def start_round(self, number: int) -> Selection:
        """Begin round ``number``; a round's half depends only on it, the seed, and what the person froze."""
        optimizer = self._bound("start_round")
        self._ddp.check(self.model)
        self._half.see(optimizer.param_groups, self.serves)
        self._half.flags.follow()
        self._half.watch()
        self._half.begin(number)
        self._steps = 0
        self._enter(optimizer, self.reset_state)
        return self.selected()

    def selected(self) -> Selection:
        """What this round trains, parameter by parameter."""
        optimizer = self._bound("selected")
        if not self._loading:
            self._follow(optimizer)
        self._half.see(optimizer.param_groups, self.serves)
        return Selection(self._half.rows(), self.round)

    def freeze(self, *names: str) -> None:
        """Freeze parameters for good, by their names in `selected`, also where the round has done so already.

        Raises:
            OptxError: there is no parameter of that name; nothing is changed.
        """
        self._want(names, False, "freeze")

    def thaw(self, *names: str) -> None:
        """Train parameters from now on, until a next round draws otherwise.

        Raises:
            OptxError: there is no parameter of that name; nothing is changed.
        """
        self._want(names, True, "thaw")

    @contextmanager
    def loading(self) -> Generator[None]:
        """Inside, everything that rounds freeze has ``requires_grad=True``: torch looks at it.

        ``torch.distributed.checkpoint`` loads the state of trainable parameters only, so load in here; the
        saved round begins with the load. Parameters that were never trained have no state:
        ``StateDictOptions(strict=False)`` loads the others. ``load_state_dict`` needs no such help.

        Example:
            >>> import torch, optx
            >>> from torch.distributed.checkpoint import state_dict as dcp
            >>> model = torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
            >>> opt = optx.wrap(torch.optim.AdamW(model.parameters()), optx.HFT(model))
            >>> saved = dcp.get_optimizer_state_dict(model, opt)
            >>> with opt.hft.loading():
            ...     options = dcp.StateDictOptions(strict=False)
            ...     dcp.set_optimizer_state_dict(model, opt, saved, options=options)
        """
        optimizer = self._bound("loading")
        self._follow(optimizer)
        self._loading = True
        self._half.thaw_all()
        try:
            yield
        finally:
            self._loading = False
            for p in optimizer.served(self):
                if only_rehearsed(optimizer.base, p):
                    optimizer.drop_base_state(p)
            self._enter(optimizer, reset=False)

    # ---- the round and the person ------------------------------------------------------------------

    def _enter(self, optimizer: Host, reset: bool) -> None:
        """Make the flags, the gradients and the optimizer's state those of this round."""
        self._half.see(optimizer.param_groups, self.serves)
        self._half.set_flags()
        served = optimizer.served(self)
        self._frozen.take(served)
        dropped = served if reset else self._frozen.tensors if self.reset_state else ()
        for p in dropped:
            optimizer.drop_base_state(p)
        self._first_state.make(optimizer.base, filter(self.serves, optimizer.base.param_groups))
        self._tell(optimizer)

    def _follow(self, optimizer: Host) -> None:
        """Take on what the person changed: flags, and groups that are left out."""
        if not self._half.sees(optimizer.param_groups, self.serves):
            self.groups_changed(optimizer)
        elif self._half.follow():
            self._frozen.take(optimizer.served(self))

    def _want(self, names: tuple[str, ...], trainable: bool, caller: str) -> None:
        optimizer = self._bound(caller)
        self._follow(optimizer)
        self._half.want(names, trainable, caller)
        self._enter(optimizer, reset=False)

    # ---- the optimizer's side ----------------------------------------------------------------------

    def check(self, base: torch.optim.Optimizer) -> None:
        """Refuse another model's parameters, a DDP that would wait for frozen ones, and an empty half."""
        unbound, half = self._served_by() is None, self._half
        if unbound:
            half.flags = inherited_flags(self.model)
        check_model(self.model, base)
        check_state_is_here(base)
        if not self.reset_state:
            check_state_may_stay(base)
        half.flags.follow()
        half.watch()
        half.see(base.param_groups, self.serves)
        half.check_trains(base, anew=unbound)

    def bind(self, optimizer: Host) -> None:
        """Freeze this round's half."""
        self._optimizer = weakref.ref(optimizer)
        self._ddp.see(self.model)
        serve(self.model, self._optimizer, self._half.flags)
        self._half.begin(self.round)
        # One history for all parameters would go on moving those that are frozen now.
        self._enter(optimizer, reset=isinstance(optimizer.base, torch.optim.LBFGS))

    def groups_changed(self, optimizer: Host) -> None:
        """Take in groups that came, parameters that were replaced, and layers that are new in the model."""
        self._half.see(optimizer.param_groups, self.serves)
        self._half.flags.follow()
        self._half.watch()
        self._half.take_in_new()
        self._enter(optimizer, reset=False)

    def before_step(self, optimizer: Host) -> None:
        """A frozen weight may have got a gradient by hand, or from a graph made earlier: drop it."""
        if self._loading:
            return
        self._follow(optimizer)
        self._frozen.drop_gradients()
        if not self.reset_state:
            self._frozen.watch()

    def after_step(self, optimizer: Host) -> None:
        """Count the step, and begin a new round where it is time."""
        if self._loading:
            return
        if not self.reset_state:
            self._frozen.check_unwritten(optimizer.base)
        if self.rounds_every is None or is_rehearsal(optimizer):
            return
        self._steps += 1
        if self._steps >= self.rounds_every:
            self.next_round()
        else:
            self._tell(optimizer)

    def after_load(self, optimizer: Host) -> None:
        """Return to the round that was saved."""
        saved = SavedRound(self.round, self.seed, self._steps).found_in(optimizer.param_groups[0], self.name)
        self._steps = saved.steps
        if not self._loading:
            self._half.flags.follow()
        self._half.watch()
        self._half.see(optimizer.param_groups, self.serves)
        self._half.return_to(saved)
        self._enter(optimizer, reset=False)
        if saved.selection not in (0, self._half.checksum):
            warn(
                f"HFT: the checkpoint trained another half in round {saved.round} than this HFT does. Give "
                "it the model, ratio, level, balance and frozen parameters of the run that saved it."
            )
        elif not self.reset_state and saved.kept > (came := self._frozen.with_state(optimizer.base)):
            warn(
                f"HFT: the checkpoint has the state of {saved.kept} frozen weights, and {came} "
                "came: torch.distributed.checkpoint loads trainable parameters only. Load inside of "
                "`with opt.hft.loading():`."
            )

    def unwrap(self, optimizer: Host) -> None:
        """Restore every ``requires_grad``."""
        self._half.give_back()
        serve_no_more(self.model)
        self._frozen.take(())
        self._optimizer = None

    def group_numbers(self) -> dict[str, float | int | bool]:
        """Round, seed, steps in this round, a checksum of the draw, and how many frozen have state."""
        optimizer = self._served_by()
        kept = 0 if optimizer is None else self._frozen.with_state(optimizer.base)
        return SavedRound(self.round, self.seed, self._steps, self._half.checksum, kept)._asdict()

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """Which share of the numbers this round trains, and the round."""
        served = optimizer.served(self)
        active = sum(p.numel() for p in served if p.requires_grad)
        return {"active": active / max(sum(p.numel() for p in served), 1), "round": self.round}

    def _tell(self, optimizer: Host) -> None:
        """Write the numbers where they are saved."""
        numbers = {f"optx.{self.name}.{key}": value for key, value in self.group_numbers().items()}
        for group in optimizer.param_groups:
            group.update(numbers)

    def _served_by(self) -> Host | None:
        """The optimizer, held weakly: it holds this transform."""
        return None if self._optimizer is None else self._optimizer()

    def _bound(self, caller: str) -> Host:
        optimizer = self._served_by()
        if optimizer is None:
            raise TransformError(
                f"HFT: {caller}() needs an optimizer: opt = optx.wrap(optimizer, HFT(model))."
            )
        optimizer.follow_parameters()
        return optimizer

    def arguments(self) -> dict[str, Any]:
        """With those that the draw keeps; the seed is a loaded checkpoint's, if there was one."""
        draw = self._half.draw
        drawn = {"ratio": draw.ratio, "level": draw.level, "balance": draw.balance}
        return {**super().arguments(), **drawn, "blocks": self._half.layers.pattern}
