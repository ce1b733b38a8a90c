"""What `wrap` returns: an optimizer that is another one plus transforms, and shares its groups and state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optx._errors import OptxError, TransformError, warn
from optx._names import is_dtensor
from optx.kernels.step.program import Program
from optx.step.base_step import guard, has_modes, release, run_post_hooks, run_pre_hooks
from optx.step.bases import base_rules
from optx.step.checkpoint import pack, unpack
from optx.step.checks import check_base, check_whole_tensors, check_wrap
from optx.step.following import Followed, Following, check_followed
from optx.step.kept import MASTER, STATE, fill_group, moments_of
from optx.step.known_groups import Known, gone, known_of, replaced
from optx.step.measured import Measured
from optx.step.metrics import collect
from optx.step.moments import settle
from optx.step.plan import Plan
from optx.step.release import Released, asked_by_scaler
from optx.step.slots import first_value, make_slots
from optx.step.state import OF_WIDTH, SlotStore, is_ours
from optx.step.stepper import Stepper
from optx.step.transform import Fused, Group, Master, Rounding, StateFormat, Transform

Settings = dict[str, Any]  # of what `wrap` takes beside transforms, that which was given
# By attribute: opt.metrics is a method.
DEFAULTS: Settings = {
    "fused": "auto",
    "skip_nonfinite": False,
    "rounding": "stochastic",
    "metrics_asked": False,
    "state_format": None,
    "master": None,
}


class Wrapped(Optimizer):
    """What `wrap` returns: a torch optimizer whose groups, state and defaults are the base's own.

    They are delegated by property: a shared list would go stale at the first ``load_state_dict``, and a
    ``__getattr__`` forwarder would make GradScaler take us for a fused base.

    Attributes:
        base: the wrapped optimizer.
        transforms: in order; each is also an attribute by its name (``opt.adamr``).
        skipped_steps: how many steps were skipped for a non-finite gradient.
        skipped_last: whether the last step was.
        totals: sums over the whole optimizer taken in the last step (AdamR's ``adamr.second``).
    """

    def __init__(
        self,
        base: Optimizer,
        transforms: Sequence[Transform],
        settings: Settings,
        handles: Sequence[Followed] = (),
    ) -> None:
        # Not Optimizer.__init__: it would make groups and state of its own.
        self.base = base
        self.transforms: tuple[Transform, ...] = ()
        self.skipped_steps = 0
        self.skipped_last = False
        self.evaluating = False  # a step's closure
        self.closure_pending = False  # while transforms look at a step whose gradients are still to come
        self.closure_loss: Any = None  # what a step's closure returned last
        self.totals: dict[str, Any] = {}
        self.fused: Fused
        self.skip_nonfinite: bool
        self.rounding: Rounding
        self.metrics_asked: bool  # on all ranks alike, so that they can add up over shards together
        vars(self).update(DEFAULTS)
        self.state_format: StateFormat | None  # opt.state is the state
        self.master: Master | None
        self.rounding_asked = False
        self.sharded = False  # whether there are DTensors
        self.metering = False  # whether steps measure what only `metrics` tells
        self.slot_store = SlotStore(base)
        self._hooks()
        self._warned_capturable_if_run_uncaptured = True
        self._known: Known = []
        self._removed = self._looked = False
        self._warned_idle = self._had_gradient = False
        self.released: Released | None = None  # where backward takes the steps
        self._followed: list[Following] = []
        self.take_on(transforms, settings, handles)
        guard(base, self)

    def take_on(
        self, transforms: Sequence[Transform], settings: Settings, handles: Sequence[Followed] = ()
    ) -> None:
        """Begin to serve these transforms, and to follow handles, whose own transforms come first.

        Raises:
            OptxError: as `wrap`; nothing is changed.
        """
        if handles:
            self._follow(handles, transforms, settings)
        else:
            self._serve(transforms, settings)

    def _serve(self, transforms: Sequence[Transform], settings: Settings) -> None:
        """Begin to serve these transforms; where one can't be served, nothing has changed."""
        old = dict(vars(self))
        vars(self).update(settings, transforms=(*transforms, *self.transforms))
        self.rounding_asked = self.rounding_asked or "rounding" in settings
        bound: list[Transform] = []
        try:
            check_wrap(self)
            with self.slot_store.restored_on_error():
                for key in ("state_format", "master"):
                    if key in settings and old[key] is not None:  # asked anew: what was asked before ends
                        self._forget_kept(key)
                self._fill_groups()
                self._stepper = Stepper(self)
                self._stepper.paths.plan()  # raises for fused=True that can't be honoured
                vars(self).update({t.name: t for t in transforms})
                try:
                    for transform in transforms:
                        transform.set_owner(self)
                        transform.bind(self)
                        bound.append(transform)
                    self._fill_groups()  # one may have split the groups
                    make_slots(self, self._programs())
                    # torch's distributed checkpoint asks a base that has state (a new Adagrad) for its keys.
                    self.slot_store.settle([p for p in self.slot_store.pending if self.base.state.get(p)])
                except BaseException:
                    for transform in reversed(bound):
                        transform.unwrap(self)
                    for transform in transforms:
                        transform.set_owner(None)
                    raise
        except BaseException:
            vars(self).clear()
            vars(self).update(old)
            raise

    def _follow(
        self, handles: Sequence[Followed], transforms: Sequence[Transform], settings: Settings
    ) -> None:
        """Take on what handles changed of the model, and what they bring, with these transforms."""
        check_base(self.base)
        check_followed(handles, self.followed, released=self.released is not None)
        given, before = {t.name for t in transforms}, self.transforms
        new = [Following(one, [t for t in one.transforms() if t.name not in given]) for one in handles]
        with self.slot_store.restored_on_error():
            gone = [p for one in new for p in one.begin(self.base)]
            self._serve([*(t for one in new for t in one.transforms), *transforms], settings)
            for transform in before:
                transform.groups_changed(self)
            self._fill_groups()
        self.slot_store.forget(gone)
        self._followed = [*self._followed, *new]

    @property
    def followed(self) -> list[Followed]:
        """The handles that this optimizer follows."""
        return [one.handle for one in self._followed]

    @property
    def brought(self) -> list[Transform]:
        """The transforms that came with handles."""
        return [t for one in self._followed for t in one.transforms]

    def _part_ways(self) -> None:
        """Go back from handles that were taken off."""
        over = [one for one in self._followed if one.handle.removed]
        if not over or self._removed:
            return
        self._followed = [one for one in self._followed if one not in over]
        if self.released is not None:
            self.released.remove()
        for one in over:
            self.slot_store.forget(one.end(self.base))
            self._let_go(one.transforms)
        self._stepper = Stepper(self)
        self.follow_parameters()

    def _let_go(self, transforms: Sequence[Transform]) -> None:
        """Serve some transforms no longer; nothing of them stays."""
        for transform in reversed(transforms):
            transform.unwrap(self)
            transform.set_owner(None)
            del vars(self)[transform.name]
        names = tuple(f"optx.{t.name}." for t in transforms)
        for group in self.base.param_groups if transforms else ():
            for key in [key for t in transforms for key in t.group_keys()]:
                group.pop(key, None)
            for p in group["params"]:
                self.slot_store.drop(p, [key for key in self.slot_store.of(p) if key.startswith(names)])
        vars(self)["transforms"] = tuple(t for t in self.transforms if t not in transforms)

    def _forget_kept(self, setting: str) -> None:
        for group in self.param_groups:
            group.pop(STATE if setting == "state_format" else MASTER, None)

    def __setattr__(self, name: str, value: Any) -> None:
        held = vars(self).get(name)
        if held is not None and held is not value:
            if isinstance(held, Transform):
                raise TransformError(
                    f"optx: opt.{name} is the transform that acts in each step, and what is put over it "
                    f"would only hide it. Set its options (opt.{name}.option = ...), or call remove() and "
                    "wrap again."
                )
            if name in ("base", "transforms"):
                raise TransformError(
                    f"optx: opt.{name} was settled when the optimizer was wrapped: state and hooks hang "
                    "on it. Wrap again: wrap(opt, transform) adds one, opt.remove() takes all off."
                )
        object.__setattr__(self, name, value)

    def _hooks(self) -> None:
        for moment in ("step", "state_dict", "load_state_dict"):
            setattr(self, f"_optimizer_{moment}_pre_hooks", OrderedDict())
            setattr(self, f"_optimizer_{moment}_post_hooks", OrderedDict())

    # ---- what is the base's own ---------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base's param groups."""
        if self._followed:  # whoever looks at them sees them as the model is now
            self._part_ways()
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[Group]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = value

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base's state, ours within it."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base does it; transforms drop what they hold of gradients."""
        self.base.zero_grad(set_to_none=set_to_none)
        for transform in self.transforms:
            transform.gradients_dropped(self)

    # ---- stepping -----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step: the transforms' gradient rules, the base update, the transforms' weight rules.

        A step happens whole or not at all: an error in the closure, a pre-hook or the base leaves weights,
        state and counters as they were, and gradients as the closure left them; after one in a post-hook the
        step has been taken. (On the foreach path weights and state are copied for that, on a CPU into memory
        that is kept from step to step. What a closure itself wrote to weights, before SGD, Adam or AdamW did
        anything, stays, as with torch.) The base's own hooks run first, on every path.

        Args:
            closure: evaluates the model again and returns the loss, as in torch. A base that evaluates it
                several times (LBFGS, SAM) gets transformed gradients every time.

        Returns:
            The closure's loss, or None.

        Raises:
            OptxError: a gradient is sparse, a tensor of the state has another shape than its weight, or
                `remove` was called.
        """
        self._check_alive("step")
        self.skipped_last = self._had_gradient = False
        if self.released is not None:
            self._had_gradient = self.released.stepped_any()
            if self.released.close(closure):
                self._took_step(None)
                return None
        closure = run_pre_hooks(self.base, closure)
        self.follow_parameters()
        if not self._looked:  # an engine may have come between wrap and the first step
            check_whole_tensors(self)
            self._looked = True
        self.closure_pending = closure is not None
        self._before_step()
        try:
            loss, stepped = self._stepper.step(self._then_before_step(closure))
        finally:
            self.closure_loss = None  # of this step alone, and it may hold a graph
        if stepped:
            self._took_step(closure)
        else:
            self.skipped_last = True
        return loss

    # torch puts its hooks around the step of a class when the first is made. This is the same, and outside of
    # it torch.compile is told to leave the step alone: it can't follow kernels that are called by address.
    step = torch._disable_dynamo(Optimizer.profile_hook_step(step))  # pyright: ignore
    step.hooked = True  # type: ignore[attr-defined]

    def _took_step(self, closure: Callable[[], Any] | None) -> None:
        try:
            run_post_hooks(self.base, closure)
        finally:  # the step has been taken, whatever a hook makes of it
            for transform in self.transforms:
                transform.after_step(self)
        self._tell_idle()  # last: where warnings are errors, it raises

    def release(self, model: nn.Module) -> Released:
        """Have backward passes take the steps: each weight's when its gradient is complete, which is freed.

        Gradients of all weights are then never there at once: above weights and state, memory peaks at about
        the largest layer's. What is returned is a context manager for the backward pass that takes a step,
        the last one where several micro-batches are accumulated (whose sums are held, so that accumulation
        saves less). ``opt.step()`` closes the step: it counts it and runs post-hooks and schedulers' patches.
        The learning rate is read when a tensor is stepped. Results are those of ``opt.step()`` to the bit.

        On CPUs each tensor is a launch of its own, which ends when the last of torch's threads has had its
        turn: a step of hundreds of tensors waits as many times, an ordinary one once, so that how long it
        takes depends on who else wants the cores. Of SmolLM2-135M (211 such launches), forward, backward and
        step of 16 tokens took 0.88 of the ordinary time on one thread, where half as much memory is touched
        anew, and 1.03, 1.07 and 1.24 in three runs on two. On cores that are shared, train on fewer threads.

        Transforms that wait for a total over all gradients (AdamR with ``normalize=True``, Clip; `plan` says
        which) and bases without a fused form are refused, and so are ``skip_nonfinite``, a GradScaler, step
        pre-hooks, and `torch.nn.parallel.DistributedDataParallel`, which averages gradients after they were
        brought. FSDP2's DTensors are served where no sums are needed. A backward pass outside of the block
        steps nothing; one on weights that were stepped and not closed by ``step()`` raises, and so does a
        second block. In reentrant checkpointing, a weight of several segments raises.

        An error in the midst of such a backward pass leaves some weights stepped and others not: the next
        block, ``step()`` and ``state_dict()`` raise until a checkpoint was loaded or the handle's
        `Released.discard` was called. A copy of the optimizer is not released.

        Args:
            model: what the optimizer trains.

        Returns:
            The handle; its ``remove()`` gives ordinary steps back.

        Raises:
            OptxError: as above; the optimizer is released already.

        Example:
            >>> import torch, optx
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
            >>> opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), optx.PerpGrad())
            >>> released = opt.release(model)
            >>> for batch in torch.randn(3, 2, 5, 4):  # steps of two micro-batches
            ...     (model(batch[0]).square().mean() / 2).backward()
            ...     with released:
            ...         (model(batch[1]).square().mean() / 2).backward()
            ...     opt.step()
            >>> [p.grad for p in model.parameters()]
            [None, None, None, None]
        """
        self._check_alive("release")
        if self.released is not None:
            raise OptxError("release: the optimizer is released already. Use opt.released, or remove() it.")
        self.released = Released(self, model)
        return self.released

    @property
    def stepper(self) -> Stepper:
        """What takes the steps; another one after a load."""
        return self._stepper

    @property
    def step_hooks(self) -> bool:
        """Whether hooks run before a step."""
        return bool(self._optimizer_step_pre_hooks)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler asks for it in its step().
        if self.released is not None and asked_by_scaler():
            self.released.refuse_scaler()
        return False

    def _check_alive(self, what: str) -> None:
        if self._removed:
            raise OptxError(
                f"optx: {what}() after remove(), which gave the plain optimizer back as opt.base. Go on with "
                "that, or wrap it again."
            )

    def _tell_idle(self) -> None:
        """A step without any gradient is hardly meant."""
        if not (self._warned_idle or self._had_gradient):
            self._warned_idle = True
            warn(
                "optx: step() found no gradient on any parameter, so nothing moved. Call loss.backward() "
                "before it, on a model whose parameters this optimizer has."
            )

    def _before_step(self) -> None:
        # Now: some bases take the gradients away.
        self._had_gradient |= any(p.grad is not None for g in self.param_groups for p in g["params"])
        for transform in self.transforms:
            transform.before_step(self)

    def _then_before_step(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """A closure makes new gradients, and may write them by hand."""
        if closure is None:
            return None

        def evaluate() -> Any:
            self.evaluating = True
            try:
                loss = self.closure_loss = closure()
            finally:
                self.evaluating = False
            self._check_alive("step")
            self.closure_pending = False
            self._before_step()
            return loss

        return evaluate

    def plan(self) -> Plan:
        """Which path each param group's step takes, and why; print it.

        Example:
            >>> import torch, optx
            >>> opt = optx.wrap(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(2))]), optx.PerpGrad())
            >>> print(opt.plan())
            group 0: foreach (1 tensor, 2 numbers, 2 passes): PerpGrad(rescale=True) -> LBFGS
                not fused: LBFGS has no fused form (optx.register_base gives it one)
        """
        with torch.no_grad(), self.around_step():
            return self._stepper.paths.plan()

    def metrics(self) -> dict[str, float]:
        """Plain numbers for a log, by name; what no step has measured yet is not among them.

        They are of the last step that was taken, or of now, where that is said. Most of them a step has
        computed anyway. For the others (a norm where nothing else needs it, distances) steps take a sum on
        their way from the first call on, so call it once before training; weights stay the same to the bit.
        Nothing is communicated: one rank alone may call it, and sees what all ranks would. Steps of DTensor
        parameters add these sums up over all ranks, and so must have been asked to on all of them:
        ``optx.wrap(..., metrics=True)``. On a GPU it waits for the last step, once.

        With a closure, gradients are those of its last evaluation. ``SaRA(rank_weight=...)`` adds to them
        before they are measured. After a load or a copy there is nothing until the next step. A transform of
        your own adds numbers by `Transform.metrics`.

        ============================ =========================================================================
        name                         what it is
        ============================ =========================================================================
        ``optx/lr``                  the param groups' learning rates in the last step: their mean
        ``optx/lr/<i>``              each group's, where they differ
        ``optx/skipped_steps``       how many steps were skipped for a gradient that is not finite
        ``optx/grad_norm``           l2 norm of all gradients as ``step()`` got them: clipped, unscaled
        ``backslash/shape``          the shape that was fitted to the weights
        ``backslash/rate``           kappa nu / N, what weights were shrunk by at most
        ``clip/norm``                l2 norm of the gradients before `Clip` scaled them
        ``clip/scale``               what it multiplied them by, at most 1
        ``normalized_grad/frozen``   tensors whose gradients were below the floor, and became 0
        ``normalized_grad/norm``     of all gradients together (``per="global"``)
        ``perp_grad/removed``        share of the gradients' norm that lay along the weights, 0 to 1
        ``adamr/distance``           l2 distance of all weights that have an anchor from their anchors
        ``adamr/pull``               lr * weight / r of the step: the mean over param groups
        ``adamr/scale``              r, with ``normalize=True``
        ``hft/active``               share of the numbers that is trained now
        ``hft/round``                the round, from 0
        ``keep_mask/kept``           share of kept numbers in the weights that have a mask
        ``sara/trained``             share of the numbers that the step trained, as in ``density()``
        ``sara/threshold``           what selected entries were below
        ``subgm/step_size``          what gradients are multiplied by; their own norm may divide it yet
        ``dsp_reg/sensitivity``      mean of S over the regularised weights that the step moved
        ``dsp_reg/strength``         ``weight``, or 0 while S is only collected; the largest of all groups
        ``mu/lr_min``, ``mu/lr_max`` the range of the learning rates that MuAdamW makes
        ============================ =========================================================================

        Raises:
            OptxError: `remove` was called; parameters are DTensors, and metrics were not asked for by `wrap`.

        Example:
            >>> import torch, optx
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> opt = optx.wrap(torch.optim.SGD([w], lr=0.5), optx.PerpGrad())
            >>> sorted(opt.metrics())
            ['optx/lr', 'optx/skipped_steps']
            >>> w.grad = torch.tensor([0.0, 1.0])
            >>> opt.step()
            >>> {name: round(value, 6) for name, value in sorted(opt.metrics().items())}
            {'optx/grad_norm': 1.0, 'optx/lr': 0.5, 'optx/skipped_steps': 0.0, 'perp_grad/removed': 0.8}
        """
        self._check_alive("metrics")
        if not self.metrics_asked:
            self._find_shards()  # a trainer may have sharded them since the last step
        if self.sharded and not self.metrics_asked:
            raise OptxError(
                "optx: metrics() of sharded parameters (DTensors) needs sums that all ranks take together in "
                "each step, and nobody asked for them: give optx.wrap(..., metrics=True) on all ranks; "
                "optx.wrap(opt, metrics=True) on all of them asks for those of the steps to come."
            )
        self.metering = True
        return collect(self)

    def ask_metrics(self) -> None:
        """Have every step measure what `metrics` tells, from the next on: on all ranks, or on none."""
        self.metrics_asked = self.metering = True

    @property
    def measured(self) -> Measured:
        """What the last step computed, for `Transform.metrics`."""
        return self._stepper.measured

    def around_step(self) -> AbstractContextManager[Any]:
        """What the transforms put in the place of gradients and parameters during a step."""
        own = [t for t in self.transforms if type(t).around_step is not Transform.around_step]
        if not own:
            return nullcontext()
        with ExitStack() as stack:
            for transform in own:
                stack.enter_context(transform.around_step(self))
            return stack.pop_all()

    def settings(self) -> tuple[str, ...]:
        """The arguments of `wrap` that are not its defaults, as they are written."""
        return tuple(f"{name}={value!r}" for name, value in self.given_settings().items())

    def given_settings(self) -> Settings:
        """The arguments of `wrap` that are not its defaults."""
        return {
            k.removesuffix("_asked").removesuffix("_format"): vars(self)[k]
            for k, v in DEFAULTS.items()
            if vars(self)[k] != v
        }

    def program(self, index: int) -> Program:
        """What the step of one param group computes, as data (see `optx.kernels.step.program`)."""
        return self._stepper.paths.program(index)

    # ---- groups -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group to the base; its slots are made as at wrap time.

        Raises:
            OptxError: a transform cannot serve the new parameters; nothing is added.
        """
        self._check_alive("add_param_group")
        count, known, metering = len(self.param_groups), self._known, self.metering
        with self.slot_store.restored_on_error():
            self.base.add_param_group(param_group)
            try:
                check_wrap(self, self.param_groups[count:])
                self._fill_groups()
                make_slots(self, self._programs()[count:], all_of_them=True)
                self._stepper.paths.plan()
                self._groups_changed()
            except BaseException:
                del self.base.param_groups[count:]
                self._known, self.metering = known, metering
                self._find_shards()
                raise

    def served(self, transform: Transform) -> list[Tensor]:
        """The parameters of the groups that a transform is not left out of."""
        groups = filter(transform.serves, self.param_groups)
        return [p for group in groups for p in group["params"]]

    def slot(
        self, p: Tensor, transform: Transform, name: str, make: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """A transform's state tensor for ``p``, made on first use."""
        make = make or (lambda: first_value(self, transform, name, p))
        lasting = transform.slots[name].lasting
        return self.slot_store.get(p, f"optx.{transform.name}.{name}", make, lasting)

    def _programs(self) -> list[tuple[Group, Program]]:
        return [(path.group, path.program) for path in self._stepper.paths.groups()]

    def drop_base_state(self, p: Tensor) -> None:
        """Forget the base's state of a parameter; the transforms' slots stay, but for derived ones."""
        derived = [
            f"optx.{t.name}.{name}" for t in self.transforms for name, s in t.slots.items() if s.derived
        ]
        self.slot_store.drop_base_state(p, derived)

    def _fill_groups(self) -> None:
        """Give every group our keys, where it has none."""
        for group in self.param_groups:
            for transform in self.transforms:
                for key, value in transform.group_keys().items():
                    group.setdefault(key, value)
            fill_group(group, self.state_format, self.master)
            if any(p.dtype == torch.bfloat16 for p in group["params"]) or group.get(STATE, 32) < 32:
                group.setdefault("optx.seed", 0)
                group.setdefault("optx.step", 0)
        self._known = [(group, list(group["params"])) for group in self.param_groups]
        self._find_shards()
        # A call of `metrics` may have been one rank's alone, and sums over shards are completed by all.
        self.metering = self.metrics_asked or (self.metering and not self.sharded)

    def _find_shards(self) -> None:
        self.sharded = any(is_dtensor(p) for group in self.param_groups for p in group["params"])

    def follow_parameters(self) -> None:
        """Take on what was put into the groups by hand; every step begins with it.

        Accelerate and FSDP2 put other parameter objects there: state goes along.
        """
        groups = self.param_groups
        if len(self._known) == len(groups) and all(
            len(known) == len(group["params"]) and all(map(is_, known, group["params"]))
            for (_, known), group in zip(self._known, groups, strict=True)
        ):
            return
        check_whole_tensors(self, self._known)
        for old, new in replaced(self._known, groups):
            self.slot_store.follow(old, new)
        self.slot_store.forget(gone(self._known, groups))
        self._stepper = Stepper(self)  # a DTensor takes another path than the parameter it replaces
        check_wrap(self, [g for i, g in enumerate(groups) if not known_of(self._known, i, g)])
        self._fill_groups()
        self._groups_changed()

    def _groups_changed(self) -> None:
        for transform in self.transforms:
            transform.groups_changed(self)
        self._fill_groups()  # one may have split the groups

    # ---- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the transforms' tensors and numbers in it."""
        self._check_alive("state_dict")
        if self.released is not None:
            self.released.check_saved()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self.follow_parameters()
        packed = pack(self)
        for hook in self._optimizer_state_dict_post_hooks.values():
            packed = hook(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any], convert: bool = False) -> None:
        """Load a state dict of this optimizer, wrapped alike or otherwise or not at all.

        What a transform needs and the checkpoint lacks stays as it is here, and a warning names it.

        Args:
            state_dict: what `state_dict` returned.
            convert: take it in another format than this optimizer's ``state`` and ``master``, also that of
                torchao's, bitsandbytes' and FlashOptim's 8-bit optimizers (see `optx.convert_state`).

        Raises:
            OptxError: it is in another format, and ``convert`` is False; or of another optimizer.
        """
        self._check_alive("load_state_dict")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self.follow_parameters()
        for transform in self.transforms:
            transform.before_load(self, state_dict)
        unpack(self, state_dict, convert)
        self._stepper = Stepper(self)
        if self.released is not None:
            self.released.forget()
        for transform in self.transforms:
            transform.after_load(self)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __copy__(self) -> Wrapped:
        raise OptxError(
            "optx: copy.copy of a wrapped optimizer would step the same parameters twice. Use copy.deepcopy "
            "of the model and the optimizer together."
        )

    def __getstate__(self) -> dict[str, Any]:
        if not self._removed:
            self.follow_parameters()  # a copy has nothing to do with what left
        # Kernels and tables hold addresses; a copy makes its own.
        state = {k: v for k, v in self.__dict__.items() if k not in ("_stepper", "step", "released")}
        # torch's optimizers pickle groups, state and defaults only, and many subclasses lose settings.
        known = ("defaults", "state", "param_groups", "step", "_zero_grad_profile_name")
        state["_base_settings"] = {
            k: v for k, v in vars(self.base).items() if k not in known and not k.startswith("_optimizer_")
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state.pop("_base_settings")
        self.__dict__.update(state, released=None)
        for key, value in settings.items():
            vars(self.base).setdefault(key, value)
        self._stepper = Stepper(self)
        if not self._removed:
            guard(self.base, self)
        for transform in () if self._removed else self.transforms:
            transform.set_owner(self)

    @property
    def removed(self) -> bool:
        """Whether `remove` was called."""
        return self._removed

    def remove(self) -> Optimizer:
        """Take the transforms off and return the base, whose state stays; this can't be stepped any more.

        Moments come back in the weights' dtypes; of weights in two parts the bfloat16 stays.
        """
        if self._removed:
            return self.base
        if self.released is not None:
            self.released.remove()
        self._removed = True
        self._followed = []
        self._stepper.copies.clear()
        release(self.base)
        for transform in reversed(self.transforms):
            transform.unwrap(self)
            transform.set_owner(None)
        self._decode_moments()
        for state in self.base.state.values():
            for key in filter(is_ours, list(state)):
                del state[key]
        named = {key for t in self.transforms for key in t.group_keys()}
        for group in self.base.param_groups:
            for key in [k for k in group if k in named or (is_ours(k) and not k.startswith(OF_WIDTH))]:
                del group[key]
        return self.base

    def _decode_moments(self) -> None:
        """Give the base its moments in the weights' dtypes, as it makes and takes them itself."""
        for group in self.base.param_groups:
            for key in moments_of(base_rules(self.base, group), (), group) if STATE in group else ():
                for p in group["params"]:
                    if isinstance(t := settle(self.slot_store, p, key, "signed", None), Tensor):
                        self.base.state[p][key] = t.to(p.dtype)

    def __repr__(self) -> str:
        # Each transform with the numbers in force, see Transform.__getattr__.
        own = (t for t in self.transforms if t not in self.brought)
        inside = map(repr, (self.base, *self.followed, *own))
        return f"optx.wrap({', '.join([*inside, *self.settings()])})"


class _WrappedWithModes(Wrapped):
    """For bases with ``train()`` and ``eval()`` (schedulefree): GradScaler and Accelerate look for them."""

    def train(self) -> Any:
        """As the base."""
        return self._moved(cast(Any, self.base).train())

    def eval(self) -> Any:
        """As the base."""
        return self._moved(cast(Any, self.base).eval())

    def _moved(self, result: Any) -> Any:
        for transform in () if self._removed else self.transforms:
            transform.weights_moved(self)
        return result


def class_for(base: Optimizer) -> type[Wrapped]:
    """The class with the methods that others look for on this base."""
    return _WrappedWithModes if has_modes(base) else Wrapped
