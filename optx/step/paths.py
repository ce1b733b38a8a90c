"""Which path each param group's step takes: its program, and the kernels that run it where some can."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from optx._errors import FusedError, OptxError
from optx._names import is_dtensor
from optx.kernels.step.program import Program
from optx.step.base_step import step_replaced
from optx.step.bases import base_rules, check_settings, readable_state, structure
from optx.step.checks import check_group
from optx.step.fusable import why_not, why_not_tensors
from optx.step.fused import FusedGroup
from optx.step.group_numbers import base_numbers
from optx.step.kept import MASTER, STATE, check_kept, fill_group
from optx.step.kept_words import kept_words
from optx.step.pipeline import build
from optx.step.plan import GroupPlan, Plan, waiting
from optx.step.slots import Slots
from optx.step.step_moments import Moments
from optx.step.transform import Group, Host, Transform

# Settings of a group that decide what its program is, not just its numbers, whatever the base's rules make of
# them.
_STRUCTURAL = ("amsgrad", "differentiable", STATE, MASTER)


@dataclass
class GroupPath:
    """One group's program and path, valid while its structure stays.

    Attributes:
        structure: of the group when the program was made.
        values: of its options when they were last checked.
        moments: what the transforms made of these.
        fused: the kernels that run it; neighbours that differ in numbers only share them.
        alone: whether its tensors and its neighbours' can't be served together.
        tensors: whether it is only its tensors that no kernel can serve; they may be others in the next step.
    """

    group: Group
    structure: tuple[Any, ...]
    values: list[Any]
    moments: dict[str, Moments]
    program: Program
    fused: FusedGroup | None
    reason: str | None
    tensors: bool
    derived: list[tuple[str, str]]
    alone: bool = False

    def goes_with(self, other: GroupPath) -> bool:
        """Whether one launch can serve both: the CPU's kernels take each tensor's numbers from its group."""
        a, b = self.fused, other.fused
        if a is None or b is None or a.triton or b.triton or self.alone or other.alone:
            return False
        if any(self.group.get(key) != other.group.get(key) for key in (STATE, MASTER)):
            return False
        return (a.program, a.rules, self.derived) == (b.program, b.rules, other.derived)


class Paths:
    """The programs and paths of one wrapped optimizer's groups, chosen anew where what decides them changed.

    Args:
        wrapped: the optimizer, which this does not keep alive.
        slots: its transforms' state.
    """

    def __init__(self, wrapped: Host, slots: Slots) -> None:
        self._wrapped = weakref.ref(wrapped)
        self._slots = slots
        self._groups: list[GroupPath] = []
        self._joined: list[GroupPath] = []  # those that `_join` last saw

    @property
    def wrapped(self) -> Host:
        """The optimizer that these are of."""
        wrapped = self._wrapped()
        assert wrapped is not None
        return wrapped

    def _settings(self) -> tuple[Any, ...]:
        w = self.wrapped
        return w.fused, w.rounding, w.skip_nonfinite, w.metering, step_replaced(w.base)

    def _sparse(self, groups: Sequence[Group]) -> list[bool]:
        """Whether there are sparse gradients; of the bases with a fused form, only SGD takes them."""
        if type(self.wrapped.base) is not torch.optim.SGD:
            return [False] * len(groups)
        return [
            not group.get("differentiable", False)
            and any(p.grad is not None and p.grad.layout != torch.strided for p in group["params"])
            for group in groups
        ]

    def enabled(self, group: Group) -> list[Transform]:
        """The transforms that a group is not left out of."""
        return [t for t in self.wrapped.transforms if t.serves(group)]

    def groups(self, retry: bool = True) -> list[GroupPath]:
        """Every group's program and path, as its settings are now.

        Args:
            retry: look whether tensors that no kernel could serve are others now.
        """
        base, groups = self.wrapped.base, self.wrapped.param_groups
        settings, transforms = self._settings(), self.wrapped.transforms
        options = [f"{t.name}_{option}" for t in transforms for option in t.options]
        del self._groups[len(groups) :]
        for i, (group, sparse) in enumerate(zip(groups, self._sparse(groups), strict=True)):
            structure = (*settings, sparse, *_structure(base, group, transforms))
            known = self._groups[i] if i < len(self._groups) else None
            if known is None or known.group is not group or known.structure != structure:
                fill_group(group, self.wrapped.state_format, self.wrapped.master)  # a word, put there since
                structure = (*settings, sparse, *_structure(base, group, transforms))
                chosen = self._choose(i, group, structure)
                check_group(group, self.wrapped.transforms, self.wrapped.base)
                self._groups[i : i + 1] = [chosen]
            elif known.values != (values := _values(group, options)):
                check_group(group, self.wrapped.transforms, self.wrapped.base)
                check_settings(self.wrapped.base, group)
                if known.moments == self._moments(group):
                    known.values = values
                else:
                    self._groups[i] = self._choose(i, group, structure)
            elif retry and known.tensors and self._servable(known):
                self._groups[i] = self._choose(i, group, structure)
            elif known.reason is not None and self.wrapped.rounding_asked:
                self._check_rounding(i, group, known.reason)  # the model may have been cast meanwhile
        if not _same(self._joined, self._groups):
            self._join()
        return self._groups

    def _servable(self, known: GroupPath) -> bool:
        """Whether kernels can take the tensors of a group that they could not."""
        return why_not_tensors(known.group, self.wrapped.state, known.program.shaped) is None

    def _join(self) -> None:
        """Let neighbours that differ in numbers only share their kernels; the order of groups stays."""
        runs: list[list[GroupPath]] = []
        for path in self._groups:
            if runs and runs[-1][0].goes_with(path):
                runs[-1].append(path)
            else:
                runs.append([path])
        for run in runs:
            fused, groups = run[0].fused, [path.group for path in run]
            if fused is not None and not _same(fused.groups, groups):
                fused = fused.serving(groups)
            for path in run:
                path.fused = fused
        self._joined = list(self._groups)

    def _choose(
        self, index: int, group: Group, structure: tuple[Any, ...], unfusable: str | None = None
    ) -> GroupPath:
        base, fused = self.wrapped.base, self.wrapped.fused
        moments = self._moments(group)
        program = self._program(group, moments, with_base=True)
        reason = "fused=False" if fused is False else why_not(base, group, program)
        of_tensors = (
            None if reason else unfusable or why_not_tensors(group, self.wrapped.state, program.shaped)
        )
        reason = reason or of_tensors
        triton = any(p.device.type == "cuda" for p in group["params"])
        if reason is None and fused in ("cpu", "triton") and fused != ("triton" if triton else "cpu"):
            triton = fused == "triton"
            if not (triton and os.environ.get("TRITON_INTERPRET") == "1"):
                reason = f"fused={fused!r}, and the parameters are on {group['params'][0].device}"
        if reason is None and triton and program.tiled and any(map(is_dtensor, group["params"])):
            reason = "it sums over rows or columns of sharded parameters, which only the CPU's kernels do"
        if reason is not None and fused not in ("auto", False):
            raise FusedError(f"wrap: fused={fused!r} cannot be honoured for param group {index}: {reason}.")
        check_kept(self.wrapped, index, group, reason, program.tiled)
        if reason is not None:
            program = self._program(group, moments, with_base=False)
            self._check_rounding(index, group, reason)
        derived = self._derived(group, program)
        runner = None
        if reason is None:
            rules = base_rules(base, group)
            assert rules is not None
            runner = FusedGroup(
                [group], program, rules, base, self._slots, derived, self.wrapped.rounding, triton
            )
        options = [f"{t.name}_{option}" for t in self.wrapped.transforms for option in t.options]
        values, tensors = _values(group, options), of_tensors is not None
        return GroupPath(group, structure, values, moments, program, runner, reason, tensors, derived)

    def _moments(self, group: Group) -> dict[str, Moments]:
        return {t.name: t.moments(group, self.wrapped.base) for t in self.enabled(group)}

    def _check_rounding(self, index: int, group: Group, reason: str) -> None:
        """Refuse a rounding that was asked for where the base itself writes the weights."""
        asked = self.wrapped.rounding if self.wrapped.rounding_asked else "nearest"
        if asked != "nearest" and any(p.dtype == torch.bfloat16 for p in group["params"]):
            name = type(self.wrapped.base).__name__
            raise OptxError(
                f"wrap: rounding={asked!r} cannot be honoured for param group {index}, which is not fused: "
                f"{reason}. {name} itself writes its bfloat16 weights, and rounds to nearest. Leave rounding "
                "out, or pass rounding='nearest'."
            )

    def _program(self, group: Group, moments: dict[str, Moments], with_base: bool) -> Program:
        base = self.wrapped.base
        rules = base_rules(base, group)
        return build(
            self.enabled(group),
            moments,
            rules if with_base else None,
            readable_state(base, group),
            base_numbers(group),
            check_finite=self.wrapped.skip_nonfinite,
            meter=self.wrapped.metering,
        )

    def _derived(self, group: Group, program: Program) -> list[tuple[str, str]]:
        """The derived slots that this program keeps up, with their sources; others go stale: drop them."""
        kept: list[tuple[str, str]] = []
        written = {ref.name for call in program.observe for ref in call.writes}
        for transform in self.wrapped.transforms:
            for name, slot in transform.slots.items():
                if slot.derived and f"{transform.name}.{name}" in written:
                    kept.append((f"optx.{transform.name}.{name}", slot.derived))
                elif slot.derived:
                    for p in group["params"]:
                        self._slots.store.drop(p, [f"optx.{transform.name}.{name}"])
        return kept

    def leave_kernels(self, fused: FusedGroup, reason: str) -> None:
        """Have a group served by torch's operations after all: a kernel can't be pointed at a tensor.

        Of several that share their kernels, it shows which one it is when each is served alone; it may be
        none, where tensors of two groups share their memory.
        """
        shared = [i for i, path in enumerate(self._groups) if path.fused is fused]
        if len(shared) > 1:
            for i in shared:
                self._groups[i].alone = True
            self._join()
            return
        known = self._groups[shared[0]]
        self._groups[shared[0]] = self._choose(shared[0], known.group, known.structure, reason)

    def program(self, index: int) -> Program:
        """What the step of one param group computes."""
        return self.groups()[index].program

    def plan(self) -> Plan:
        """Which path each group takes, and why."""
        plans: list[GroupPlan] = []
        for i, (state, group) in enumerate(zip(self.groups(), self.wrapped.param_groups, strict=True)):
            params: list[Tensor] = group["params"]
            path, on_shards = "foreach", False
            if state.fused is not None:
                path = "fused triton" if state.fused.triton else "fused cpu"
                on_shards = any(map(is_dtensor, params))
            chain = (*(t.describe(group) for t in self.enabled(group)), type(self.wrapped.base).__name__)
            fills = [fill for level in state.program.levels for fill in level.fills]
            passes = 1 + len(fills) + sum(bool(level.sums) for level in state.program.levels)
            numbers = sum(p.numel() for p in params)
            settings, waits = self.wrapped.settings(), waiting(self.enabled(group), state.program)
            kept = kept_words(self.wrapped, group)
            matrices = tuple(getattr(fill.function, "__name__", str(fill.function)) for fill in fills)
            found = len(params), numbers, chain, passes, settings, on_shards, waits, kept, matrices
            plans.append(GroupPlan(i, path, state.reason, *found))
        return Plan(plans)


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _structure(base: torch.optim.Optimizer, group: Group, transforms: Sequence[Transform]) -> tuple[Any, ...]:
    """What decides what a group's program is. Every step makes one for each group."""
    of_base = structure(base, group)
    return (of_base, *map(group.get, _STRUCTURAL), *[t.serves(group) for t in transforms], *group)


def _values(group: Group, options: Sequence[str]) -> list[Any]:
    """What a scheduler may set before every step, and a program only reads."""
    rows = [row for key, row in group.items() if type(row) in (tuple, list) and key != "params"]
    values: list[Any] = [one for row in rows for one in row]
    values += map(group.get, options)
    # A tensor among them is compared by its identity: its value is read where it is used.
    return [id(v) if isinstance(v, Tensor) else v for v in values]
