"""Runs a step: picks each group's path, keeps the order of moments, and hides our state from the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optx._bases import base_numbers, base_rules, rule_numbers
from optx._errors import FusedError, TransformError
from optx._foreach import GroupRun
from optx._fused import KAHAN, FusedGroup, why_not
from optx._pipeline import build
from optx._plan import GroupPlan, Plan
from optx._rounding import step_key, write
from optx._transform import Group, Transform
from optx.kernels.program import W0, Program

if TYPE_CHECKING:
    from optx._wrap import Wrapped

# State that rules may read of a base without a fused form, where the base has it.
_READABLE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Settings of a group that decide what its program is, not just its numbers.
_STRUCTURAL = ("amsgrad", "maximize", "nesterov", "differentiable", "decoupled_weight_decay")


class _SkipStep(Exception):
    """Leaves a base's step from inside its closure, before it has changed anything."""


@dataclass
class _GroupState:
    """One group's program and path, valid while its structure stays."""

    structure: tuple[Any, ...]
    program: Program
    fused: FusedGroup | None
    reason: str | None


class Stepper:
    """The machinery of one wrapped optimizer; remade after a load or a copy, since it holds addresses."""

    def __init__(self, wrapped: Wrapped) -> None:
        self.w = wrapped
        self._groups: list[_GroupState] = []

    # ---- paths -------------------------------------------------------------------------------------

    def _structure(self, group: Group) -> tuple[Any, ...]:
        flags = [group.get(key) for key in _STRUCTURAL]
        zero = [_is_zero(group.get(key, 0)) for key in ("momentum", "weight_decay")]
        enabled = [t.serves(group) for t in self.w.transforms]
        options = (self.w.fused, self.w.rounding, self.w.skip_nonfinite)
        return (id(group), *options, self._sparse(group), *flags, *zero, *enabled)

    def _sparse(self, group: Group) -> bool:
        """Whether there are sparse gradients; of the bases with a fused form, only SGD takes them."""
        if type(self.w.base) is not torch.optim.SGD or group.get("differentiable", False):
            return False
        return any(p.grad is not None and p.grad.layout != torch.strided for p in group["params"])

    def _enabled(self, group: Group) -> list[Transform]:
        return [t for t in self.w.transforms if t.serves(group)]

    def groups(self) -> list[_GroupState]:
        """Every group's program and path, as its settings are now."""
        groups = self.w.param_groups
        del self._groups[len(groups) :]
        for i, group in enumerate(groups):
            structure = self._structure(group)
            if i == len(self._groups):
                self._groups.append(self._choose(i, group, structure))
            elif self._groups[i].structure != structure:
                self._groups[i] = self._choose(i, group, structure)
        return self._groups

    def _choose(self, index: int, group: Group, structure: tuple[Any, ...]) -> _GroupState:
        base, fused = self.w.base, self.w.fused
        program = self._program(group, with_base=True)
        reason = "fused=False" if fused is False else why_not(base, group, program)
        reason = reason or ("a gradient is sparse" if self._sparse(group) else None)
        triton = any(p.device.type == "cuda" for p in group["params"])
        if reason is None and fused in ("cpu", "triton") and fused != ("triton" if triton else "cpu"):
            triton = fused == "triton"
            if not (triton and os.environ.get("TRITON_INTERPRET") == "1"):
                reason = f"fused={fused!r}, and the parameters are on {group['params'][0].device}"
        if reason is not None:
            if fused not in ("auto", False):
                raise FusedError(
                    f"wrap: fused={fused!r} cannot be honoured for param group {index}: {reason}."
                )
            return _GroupState(structure, self._program(group, with_base=False), None, reason)
        rules = base_rules(base, group)
        assert rules is not None
        runner = FusedGroup(group, program, rules, base, self._slot, self.w.rounding, triton)
        return _GroupState(structure, program, runner, None)

    def _program(self, group: Group, with_base: bool) -> Program:
        base = self.w.base
        rules = base_rules(base, group)
        enabled = self._enabled(group)
        names = rules.slots if rules else (_READABLE if "betas" in group else ())
        return build(
            enabled,
            {t.name: t.moments(group, base) for t in enabled},
            rules if with_base else None,
            names,
            base_numbers(group),
            check_finite=self.w.skip_nonfinite,
        )

    def _slot(self, p: Tensor, key: str) -> Tensor:
        store = self.w._slots  # pyright: ignore[reportPrivateUsage]
        if key == KAHAN:
            return store.get(p, key, lambda: torch.zeros_like(p, requires_grad=False))
        _, transform, name = key.split(".", 2)
        owner = next(t for t in self.w.transforms if t.name == transform)
        return self.w.slot(p, owner, name)

    def plan(self) -> Plan:
        """Which path each group takes, and why."""
        plans: list[GroupPlan] = []
        for i, (state, group) in enumerate(zip(self.groups(), self.w.param_groups, strict=True)):
            params: list[Tensor] = group["params"]
            path = "foreach"
            if state.fused is not None:
                path = "fused triton" if state.fused.triton else "fused cpu"
            chain = (*map(repr, self._enabled(group)), type(self.w.base).__name__)
            passes = 1 + sum(bool(level.sums) for level in state.program.levels)
            numbers = sum(p.numel() for p in params)
            plans.append(GroupPlan(i, path, state.reason, len(params), numbers, chain, passes))
        return Plan(plans)

    # ---- a step ------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Take a step; the closure's loss, and whether anything was done (False: skipped)."""
        states = self.groups()
        loss = None
        inside = closure is not None and all(s.fused is None for s in states)
        if closure is not None and not inside:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            step = _Step(self, states)
            try:
                result = step.run(closure if inside else None)
            except BaseException as error:
                for runner, _ in step.fused:
                    runner.undo()
                if not isinstance(error, _SkipStep):
                    raise
                self.w.skipped_steps += 1
                return (step.loss if inside else loss), False
        for group in self.w.param_groups:
            if "optx.step" in group:
                group["optx.step"] += 1
        return (result if inside else loss), True

    def key(self, group: Group, part: int = 0) -> int:
        """The key of this step's random draws in a group."""
        return step_key(group["optx.seed"], group["optx.step"], part) if "optx.seed" in group else 0


class _Step:
    """One step over all groups. Fused groups run their kernels; the others share one run of the base."""

    def __init__(self, stepper: Stepper, states: Sequence[_GroupState]) -> None:
        self.s, self.w = stepper, stepper.w
        pairs = list(zip(states, self.w.param_groups, strict=True))
        self.fused = [(state.fused, group) for state, group in pairs if state.fused is not None]
        self.loose = [(state.program, group) for state, group in pairs if state.fused is None]
        self.levels = max((len(state.program.levels) for state, _ in pairs), default=0)
        self.waits = any(state.program.has_totals for state, _ in pairs)
        self.runs: list[tuple[GroupRun, Group]] = []
        self.originals: list[tuple[Tensor, Tensor | None]] = []
        self.starts: dict[int, list[Tensor]] = {}
        self.before: dict[Tensor, tuple[int, Tensor]] = {}  # versions and copies, where a closure comes first
        self.late: dict[int, list[Tensor]] = {}  # edits that the base would have undone
        self.loss: Any = None

    def run(self, closure: Callable[[], Any] | None) -> Any:
        store = self.w._slots  # pyright: ignore[reportPrivateUsage]
        for runner, group in self.fused:
            runner.prepare(self.s.key(group))
        if closure is None:
            self._open()
            self._measure()
        self._update_fused()
        if self.loose:
            self._run_base(closure)
        if store.pending:
            store.settle(p for runner, _ in self.fused for p in runner.active)
            store.settle(p for run, _ in self.runs for p in run.weights)
        return self.loss

    def _measure(self) -> None:
        """All levels of sums, totals and scalars, over all groups at once."""
        if not self.waits:
            for run, _ in self.runs:
                for level in run.program.levels:
                    run.measure(level)
            return
        for index in range(self.levels):
            totals: dict[str, Any] = {}
            shares = [runner.measure(index) for runner, _ in self.fused]
            shares += [run.measure(r) for run, _ in self.runs for r in run.program.levels[index : index + 1]]
            for share in shares:
                for name, value in share.items():
                    totals[name] = _add(totals.get(name), value)
            incoming = totals.get("incoming_sq")
            if incoming is not None and not torch.isfinite(torch.as_tensor(incoming)):
                raise _SkipStep
            self.w.totals.update(totals)
            for runner, _ in self.fused:
                runner.finish(index, totals)
            for run, _ in self.runs:
                run.totals.update({k: torch.as_tensor(v) for k, v in totals.items()})
                for level in run.program.levels[index : index + 1]:
                    run.finish(level)

    def _update_fused(self) -> None:
        base = self.w.base
        if not self.fused:
            return
        # The base's own step does not run, so what hangs on it is called here, once.
        alone = not self.loose
        for hook in base._optimizer_step_pre_hooks.values() if alone else ():  # pyright: ignore
            hook(base, (), {})
        for runner, _ in self.fused:
            runner.update() if self.waits else runner.step()
            if runner.active:
                torch.autograd.graph.increment_version(runner.active)
        for hook in base._optimizer_step_post_hooks.values() if alone else ():  # pyright: ignore
            hook(base, (), {})
        base._opt_called = True  # type: ignore[attr-defined]  # schedulers made on the base look at it

    # ---- groups whose base runs as it is -------------------------------------------------------------

    def _open(self) -> None:
        """Look at the gradients of the loose groups as they are now."""
        self.runs = [
            (run, group) for program, group in self.loose if (run := self._open_group(program, group))
        ]

    def _open_group(self, program: Program, group: Group) -> GroupRun | None:
        if not (program.levels or program.update or program.observe):
            return None
        active: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not active:
            return None
        grads = [p.grad for p in active if p.grad is not None]
        for p, g in zip(active, grads, strict=True):
            if g.layout != torch.strided:
                raise TransformError(
                    f"optx: a sparse gradient for a parameter of shape {tuple(p.shape)}; use sparse=False in "
                    "the embedding, or put it in a param group that leaves every transform out."
                )
        state = self.w.base.state
        cols = {"numel": [float(p.numel()) for p in active], "fresh": [0.0] * len(active)}
        if any(ref.name == "step" for call in program.calls() for ref in call.args):
            cols["step"] = [float(state[p]["step"]) + 1.0 if state.get(p) else 1.0 for p in active]
        numbers = rule_numbers(group, program.named("hyper"))
        return GroupRun(program, active, grads, _Slots(self.s, active), numbers, cols)

    def _rewrite(self, first: bool) -> None:
        """Gradient rules into ``p.grad`` (the person's gradients come back later), then weight rules."""
        for number, (run, group) in enumerate(self.runs):
            if run.program.gradient:
                for p, new in zip(run.weights, run.rewrite_gradients(), strict=True):
                    self.originals.append((p, p.grad))
                    p.grad = new
            if first:
                after = (*run.program.after, *run.program.observe)
                if W0 in run.program.reads(after):
                    self.starts[number] = [p.detach().clone() for p in run.weights]
                if any(p._version != self.before[p][0] for p in run.weights if p in self.before):
                    self._edit_late(number, run)
                else:
                    self._write(run, run.edit_weights(run.program.weight), group, 0)

    def _edit_late(self, number: int, run: GroupRun) -> None:
        """SAM moves the weights before it evaluates, and puts them back: edit what they were, after it."""
        perturbed = run.weights
        run.weights = starts = [self.before[p][1] for p in perturbed]
        self.starts[number] = starts
        edited = run.edit_weights(run.program.weight)
        run.weights = perturbed
        if edited is not None:
            self.late[number] = [new - old for new, old in zip(edited, starts, strict=True)]

    def _write(self, run: GroupRun, values: list[Tensor] | None, group: Group, part: int) -> None:
        stochastic = self.w.rounding != "nearest"
        for i, (p, value) in enumerate(zip(run.weights, values or (), strict=False)):
            write(p, value, stochastic, abs(self.s.key(group, 2 * i + part)))

    def _restore(self) -> None:
        for p, grad in reversed(self.originals):
            p.grad = grad
        self.originals.clear()

    def _run_base(self, closure: Callable[[], Any] | None) -> None:
        base = self.w.base
        store = self.w._slots  # pyright: ignore[reportPrivateUsage]
        everything = base.param_groups
        params = [p for _, group in self.loose for p in group["params"]]
        evaluations = 0
        if closure is not None:
            edited = [p for program, group in self.loose if program.weight for p in group["params"]]
            self.before = {p: (p._version, p.detach().clone()) for p in edited}

        def evaluate() -> Any:
            nonlocal evaluations
            self._restore()
            assert closure is not None
            with torch.enable_grad():
                self.loss = loss = closure()
            with torch.no_grad():  # LBFGS enables gradients around its closure
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
                    base.param_groups = [group for _, group in self.loose]
                self.loss = base.step(evaluate) if closure is not None else base.step()
        finally:
            base.param_groups = everything
            self._restore()
        for number, (run, group) in enumerate(self.runs):
            if number in self.late:
                moved = [p.detach() + d for p, d in zip(run.weights, self.late[number], strict=True)]
                self._write(run, moved, group, 0)
            self._write(run, run.edit_weights(run.program.after, self.starts.get(number)), group, 1)
            if run.program.observe:
                run.observe()


class _Slots(Mapping[str, list[Tensor]]):
    """State tensors of some parameters by role: the base's (zeros until it has any) or a transform's."""

    def __init__(self, stepper: Stepper, params: Sequence[Tensor]) -> None:
        self._stepper, self._params = stepper, params

    def __getitem__(self, name: str) -> list[Tensor]:
        if "." in name:
            slot = self._stepper._slot  # pyright: ignore[reportPrivateUsage]
            return [slot(p, f"optx.{name}") for p in self._params]
        state = self._stepper.w.base.state
        return [
            state[p][name] if p in state and name in state[p] else torch.zeros_like(p) for p in self._params
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _add(a: Any, b: Any) -> Any:
    """Add shares of a total that may live on several devices."""
    if a is None:
        return b
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.device != b.device:
        return a + b.to(a.device)
    return a + b
