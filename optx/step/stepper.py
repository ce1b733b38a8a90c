"""Runs a step: keeps the order of moments over all groups, and hides our state from the base."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, TransformError
from optx._names import is_dtensor, whole
from optx.kernels.step.program import W0
from optx.kernels.step.tiles import sizes_of
from optx.step.base_step import step_without_hooks
from optx.step.bases import has_fused_form
from optx.step.checks import check_memory, check_state_shapes
from optx.step.counting import step_numbers
from optx.step.foreach import GroupRun
from optx.step.fusable import Unfusable
from optx.step.interrupts import Held
from optx.step.measured import Measured, Table
from optx.step.metrics import rates
from optx.step.paths import GroupPath, Paths
from optx.step.rounding import step_key, write
from optx.step.rounds import Loose, Rounds
from optx.step.sharded import Share, complete
from optx.step.slots import Slots
from optx.step.state import is_ours
from optx.step.state_by_role import StateByRole, step_counts
from optx.step.transform import Group, Host
from optx.step.undo import Copies, Undo


class _SkipStep(Exception):
    """Leaves a base's step from inside its closure."""


class Stepper:
    """The machinery of one wrapped optimizer; remade after a load or a copy, since it holds addresses."""

    def __init__(self, wrapped: Host) -> None:
        # Weakly: a dropped optimizer is freed at once, with its state.
        self._wrapped = weakref.ref(wrapped)
        self.slots = Slots(wrapped)
        self.copies = Copies()
        self.paths = Paths(wrapped, self.slots)
        self.measured = Measured()

    @property
    def wrapped(self) -> Host:
        """The optimizer that this steps."""
        wrapped = self._wrapped()
        assert wrapped is not None
        return wrapped

    def step(self, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Take a step; the closure's loss, and whether anything was done (False: skipped).

        An error on the way leaves weights, state, gradients and counters as they were.
        """
        w = self.wrapped
        loss = None
        # A base with a fused form evaluates a closure once, before it does anything.
        inside = closure is not None and not has_fused_form(w.base)
        if closure is not None and not inside:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), w.around_step():
            step = self._prepared()
            if not step.loose:
                self.copies.clear()
            try:
                result = step.run(closure if inside else None)
            except BaseException as error:
                if not step.done:
                    step.undo()
                if not self.measured.lasting:
                    self.measured = Measured()
                if not isinstance(error, _SkipStep):
                    raise
                w.skipped_steps += 1
                return (step.loss if inside else loss), False
        if not w.metering:
            self.measured.look()
        return (result if inside else loss), True

    def _prepared(self) -> _Step:
        """A step whose kernels are pointed at their tensors; a group that none serves goes the other way."""
        retry = True
        while True:
            states = self.paths.groups(retry)
            retry = False
            step = _Step(self, states)
            for runner in step.fused:
                try:
                    runner.prepare(self.key)
                except Unfusable as error:
                    step.undo()
                    self.paths.leave_kernels(runner, str(error))
                    break
                except BaseException:
                    step.undo()
                    raise
            else:
                return step

    def key(self, group: Group, part: int = 0) -> int:
        """The key of this step's random draws in a group; from now on the group counts its steps."""
        group.setdefault("optx.seed", 0)
        return step_key(group["optx.seed"], group.setdefault("optx.step", 0), part)


class _Step:
    """One step over all groups. Fused groups run their kernels; the others share one run of the base."""

    def __init__(self, stepper: Stepper, states: Sequence[GroupPath]) -> None:
        self.stepper, self.wrapped = stepper, stepper.wrapped
        # Several groups may share one.
        self.fused = list({id(s.fused): s.fused for s in states if s.fused is not None}.values())
        self.loose = [state for state in states if state.fused is None]
        # A function of whole matrices may fail: before anything is written.
        self.waits = any(state.program.has_totals or state.program.scratch for state in states)
        self.waits = self.waits or any(runner.sharded for runner in self.fused)
        self.runs: list[tuple[GroupRun, GroupPath]] = []
        self.originals: list[tuple[Tensor, Tensor | None]] = []
        self.starts: dict[int, list[Tensor]] = {}
        self.before: Undo | None = None
        self.observed: list[Share] = []  # by loose groups, still to be completed over the mesh
        self.late: dict[int, list[Tensor]] = {}  # edits that the base would have undone
        self.loss: Any = None
        self.rounds = Rounds()
        self.whole = True  # whether every gradient is in a run's numbers
        self.done = False

    def run(self, closure: Callable[[], Any] | None) -> Any:
        """All of it, the fused groups last: from there on nothing can fail.

        No signal interrupts what moves weights and state, except in a closure.
        """
        if self.loose:
            self.stepper.slots.store.tidy()
        if closure is None:
            self._open()
            self._measure()
        with Held() as held:
            if self.loose:
                self._run_base(closure, held)
            else:
                self._take_rounds(after=True)
            self._update_fused()
            self._conclude()
            self.done = True
        return self.loss

    def _conclude(self) -> None:
        """The step has been taken: count it, and put the slots where torch keeps state."""
        store = self.stepper.slots.store
        for run, state in self.runs:
            self._took(run, state)
        if store.pending:
            store.settle(p for runner in self.fused for p in runner.active)
            store.settle(p for run, _ in self.runs for p in run.weights)
        for group in self.wrapped.param_groups:
            if "optx.step" in group:
                group["optx.step"] += 1
        if self.before is not None:
            self.before.forget()
        self._hand_out()

    def _hand_out(self) -> None:
        """The numbers that were computed, for whoever asks after the step."""
        tables = [table for runner in self.fused for table in runner.computed() if table.weights]
        tables += [Table(run.weights, list(run.cols), list(run.cols.values())) for run, _ in self.runs]
        self.stepper.measured = measured = Measured(tables, self.whole, rates(self.wrapped.param_groups))
        if self.wrapped.metering:
            measured.keep()

    def undo(self) -> None:
        """Leave nothing of what was done so far."""
        for runner in self.fused:
            runner.undo()
        if self.before is not None:
            self.before.restore(self.stepper.slots.store.pending)

    def _measure(self) -> None:
        """All sums, totals and scalars that the base's update waits for, over all groups at once."""
        self.rounds = Rounds()
        self._take_rounds(after=False)

    def _take_rounds(self, after: bool) -> None:
        fused = self.fused if self.waits else []  # where nothing waits they do all of it in one go, later
        loose = [Loose(run, self.starts.get(i) if after else None) for i, (run, _) in enumerate(self.runs)]
        self.rounds.take([*fused, *loose], after, self._check_incoming)
        self.wrapped.totals.update(self.rounds.totals)
        for transform in () if after else self.wrapped.transforms:
            transform.after_totals(self.wrapped)

    def _check_incoming(self, squares: Any) -> None:
        if not torch.isfinite(torch.as_tensor(squares)):
            self._skip_if_nonfinite()

    def _skip_if_nonfinite(self) -> None:
        """A sum of squares is infinite also where a float64 gradient is merely large."""
        grads = [p.grad for group in self.wrapped.param_groups for p in group["params"] if p.grad is not None]
        # Every gradient on every rank, each completed over its mesh: all ranks must come to one verdict.
        counts = [int(whole((~torch.isfinite(g)).sum())) for g in grads]
        if any(counts):
            raise _SkipStep

    def _update_fused(self) -> None:
        shares = [share for runner in self.fused if self.waits for share in runner.update()]
        complete(self.observed + shares)
        for run, _ in self.runs:
            run.keep()
        for runner in self.fused:
            runner.commit() if self.waits else runner.step()
            if runner.active:
                torch.autograd.graph.increment_version(runner.written)
        self.wrapped.base._opt_called = True  # type: ignore[attr-defined]  # schedulers made on the base look at it

    # ---- groups whose base runs as it is -------------------------------------------------------------

    def _open(self) -> None:
        """Look at the gradients of the loose groups as they are now."""
        opened = [(self._open_group(state), state) for state in self.loose]
        self.runs = [(run, state) for run, state in opened if run is not None]

    def _open_group(self, state: GroupPath) -> GroupRun | None:
        program, group, slots = state.program, state.group, self.stepper.slots
        active: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        check_state_shapes(self.wrapped.base, group, active)
        check_memory(self.wrapped.base, active)
        if not self.stepper.paths.enabled(group):
            active = self._without_sparse(active)
        if not active or not (program.levels or program.update or program.observe or program.meter):
            self.whole &= not active
            return None
        # A ZeroTensor's arithmetic loses its dtype; with memory of its own it is a gradient like others.
        zero = torch.Tensor._is_zerotensor  # pyright: ignore
        grads = [p.grad.clone() if zero(p.grad) else p.grad for p in active if p.grad is not None]
        for p, g in zip(active, grads, strict=True):
            if g.layout != torch.strided:
                raise TransformError(
                    f"optx: a sparse gradient for a parameter of shape {tuple(p.shape)}; use sparse=False in "
                    "the embedding, or put it in a param group that leaves every transform out."
                )
        base_state = self.wrapped.base.state
        for key, source in state.derived:
            slots.refresh(active, key, [base_state.get(p, {}).get(source) for p in active])
        cols = {"numel": [float(p.numel()) for p in active], "fresh": [0.0] * len(active)}
        read = {ref.name for call in program.calls() for ref in call.args if ref.kind == "col"}
        if read & {"ndim", "rows", "columns"}:
            cols |= sizes_of([p.shape for p in active])
        if "step" in read:
            cols["step"] = step_counts(self.wrapped.base, group, active)
        numbers = step_numbers(group, program.named("hyper"))
        run = GroupRun(
            program,
            active,
            grads,
            StateByRole(self.wrapped.base, slots, active, program.packed),
            numbers,
            cols,
            lambda stepper=self.stepper: stepper.key(
                group, -1
            ),  # the weights' draws have the parts from 0 on
        )
        run.look()
        return run

    def _without_sparse(self, active: list[Tensor]) -> list[Tensor]:
        """Where only `skip_nonfinite` looks at gradients, it looks at the elements that a sparse one has."""
        dense: list[Tensor] = []
        for p in active:
            g = p.grad
            if g is None or g.layout == torch.strided:
                dense.append(p)
                continue
            self.whole = False
            if self.wrapped.skip_nonfinite and not bool(torch.isfinite(g.coalesce().values()).all()):
                raise _SkipStep
        return dense

    def _took(self, run: GroupRun, state: GroupPath) -> None:
        """Derived numbers have been taken from the state as it is now."""
        base_state = self.wrapped.base.state
        for key, source in state.derived:
            sources = [base_state.get(p, {}).get(source) for p in run.weights]
            self.stepper.slots.took(run.weights, key, sources)

    def _rewrite(self, first: bool) -> None:
        """Gradient rules into ``p.grad`` (the person's gradients come back later), then weight rules."""
        assert self.before is not None
        for number, (run, state) in enumerate(self.runs):
            if run.program.gradient:
                for p, new in zip(run.weights, run.rewrite_gradients(), strict=True):
                    self.originals.append((p, p.grad))
                    p.grad = new
            if first:
                after = (*run.program.later, *run.program.observe)
                if W0 in run.program.reads(after):
                    same = not self.before.moved(run.weights)
                    self.starts[number] = [
                        self.before.weight(p) if same else p.detach().clone() for p in run.weights
                    ]
                if run.program.weight and self.before.moved(run.weights):
                    self._edit_late(number, run)
                else:
                    self._write(run, run.edit_weights(run.program.weight), state.group, 0)
            run.keep_gradients()

    def _edit_late(self, number: int, run: GroupRun) -> None:
        """SAM moves the weights before it evaluates, and puts them back: edit what they were, after it."""
        assert self.before is not None
        perturbed = run.weights
        run.weights = starts = [self.before.weight(p) for p in perturbed]
        self.starts[number] = starts
        edited = run.edit_weights(run.program.weight)
        run.weights = perturbed
        if edited is not None:
            self.late[number] = [new - old for new, old in zip(edited, starts, strict=True)]

    def _write(self, run: GroupRun, values: list[Tensor] | None, group: Group, part: int) -> None:
        stochastic = self.wrapped.rounding != "nearest"
        for i, (p, value) in enumerate(zip(run.weights, values or (), strict=False)):
            key = abs(self.stepper.key(group, 2 * i + part)) if p.dtype == torch.bfloat16 else 0
            write(p, value, stochastic, key)

    def _restore(self) -> None:
        for p, grad in reversed(self.originals):
            p.grad = grad
        self.originals.clear()

    def _remember(self) -> Undo:
        """Everything that the loose groups' step may change."""
        written = {ref.name for s in self.loose for call in s.program.calls() for ref in call.writes}
        return Undo(
            self.stepper.copies,
            self.wrapped.base,
            [p for s in self.loose for p in s.group["params"] if p.requires_grad or p.grad is not None],
            self.stepper.slots.store.pending,
            lambda key: not is_ours(key) or key.removeprefix("optx.") in written,
        )

    def _step_base(self, evaluate: Callable[[], Any] | None) -> Any:
        base = self.wrapped.base
        try:
            return step_without_hooks(base, evaluate)
        except RuntimeError as error:  # torch's, of an operation on DTensors, names neither base nor group
            spread = any(is_dtensor(p) for state in self.loose for p in state.group["params"])
            if evaluate is not None or type(error) is not RuntimeError or not spread:
                raise
            reasons = " and ".join(dict.fromkeys(str(state.reason) for state in self.loose))
            raise OptxError(
                f"optx: {type(base).__name__}'s own step fails on sharded parameters (DTensors), and takes "
                f"those that are not fused: {reasons}. Nothing changed. torch: {str(error).splitlines()[0]}"
            ) from error

    def _run_base(self, closure: Callable[[], Any] | None, held: Held) -> None:
        base, store = self.wrapped.base, self.stepper.slots.store
        everything = base.param_groups
        params = [p for state in self.loose for p in state.group["params"]]
        evaluations = 0
        self.before = self._remember()

        def evaluate() -> Any:
            nonlocal evaluations
            self._restore()
            assert closure is not None
            with torch.enable_grad(), held.let_through():
                self.loss = loss = closure()
            with torch.no_grad():  # LBFGS enables gradients around its closure
                self.loose = self.stepper.paths.groups(retry=False)  # all: such a base has no fused form
                self._open()
                self._measure()
                self._rewrite(first=evaluations == 0)
            evaluations += 1
            return loss

        try:
            with store.hidden(params):
                if closure is None:
                    self._rewrite(first=True)
                if self.fused:
                    base.param_groups = [state.group for state in self.loose]
                self.loss = self._step_base(evaluate if closure is not None else None)
        finally:
            if self.fused:
                base.param_groups = everything
            self._restore()
        for number, moves in self.late.items():
            run, state = self.runs[number]
            moved = [p.detach() + d for p, d in zip(run.weights, moves, strict=True)]
            self._write(run, moved, state.group, 0)
        self._take_rounds(after=True)
        for number, (run, state) in enumerate(self.runs):
            self._write(run, run.edit_weights(run.program.after, self.starts.get(number)), state.group, 1)
            self.observed += run.observe(self.starts.get(number))
