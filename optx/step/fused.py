"""The fused paths: the tables that point kernels at the tensors of param groups, and the steps over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optx._names import is_dtensor
from optx.kernels.step.layout import EIGHT, FRESH, STEP, Layout
from optx.kernels.step.program import Program
from optx.step.base_update import BaseRules
from optx.step.buckets import ADDRESS, Bucket, Column
from optx.step.counting import step_numbers
from optx.step.fusable import ALIASED, SHARED, Unfusable
from optx.step.gradients import Gradients
from optx.step.group_tensors import SLOT_DTYPE_NAMES, GroupTensors
from optx.step.known_numbers import KnownNumbers
from optx.step.measured import Table
from optx.step.memory import Extents
from optx.step.rounding import step_key
from optx.step.sharded import Shards, Share, all_here, has_whole_rows, here, surprise, window_of
from optx.step.slots import KAHAN, Slots
from optx.step.state import is_ours
from optx.step.transform import Group


class FusedGroup:
    """Runs the program of one param group, or of several that differ in their numbers only, by kernels.

    Groups that share a program share its launches: a tensor's row tells where its group's numbers are.

    A step compares every tensor with what it was when its address was taken; where anything differs, all are
    looked at again and the tables are made anew, before anything is changed.

    Args:
        groups: the param groups; several only for the CPU's kernels.
        program: what to compute.
        rules: the base's update.
        base: its state is read and, for new parameters, made as torch makes it.
        slots: the transforms' state.
        derived: keys of the cells that are taken from a state tensor of the base, with its name.
        rounding: for bfloat16 weights.
        triton: run Triton kernels, else Numba.
        numbers: what is known of the groups' numbers, by whoever served some of them before.

    Attributes:
        made_of: these arguments but the groups, for one that serves others with the same program.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        program: Program,
        rules: BaseRules,
        base: torch.optim.Optimizer,
        slots: Slots,
        derived: Sequence[tuple[str, str]],
        rounding: str,
        triton: bool,
        numbers: KnownNumbers | None = None,
    ) -> None:
        self.groups, self.program, self.rules, self.base = list(groups), program, rules, base
        self._slots, self._rounding, self.triton = slots, rounding, triton
        self._derived = list(derived)
        self._seen: list[Tensor] | None = None  # the parameters that the buckets were made for
        self._buckets: list[Bucket] = []
        self._written = Extents([], [])  # all that the kernels write
        # Of a group's settings it asks for those that a GPU's groups have, which are alone.
        self._tensors = GroupTensors(self.groups[0], program, rules, base, slots, triton)
        self.fresh = self._tensors.fresh
        self._was_fresh = False
        self.active: list[Tensor] = []
        self._draws: set[int] = set()  # the groups in which something is rounded stochastically
        self._sharing: list[list[Bucket]] = []  # each group's buckets, in the order of its parameters
        self._hypers = program.named("hyper")
        self._numbers = numbers or KnownNumbers(self._hypers)
        self._rows: list[list[float]] = []  # of numbers, as the kernels were last told
        derived = self._derived
        self.made_of = program, rules, base, slots, derived, rounding, triton, self._numbers
        self.sharded = any(map(is_dtensor, self._parameters()))
        self._gradients = Gradients(base, self.sharded)

    def serving(self, groups: Sequence[Group]) -> FusedGroup:
        """The same for other groups, which go with its program."""
        return FusedGroup(groups, *self.made_of)

    # ---- tables ------------------------------------------------------------------------------------

    def prepare(self, key: Callable[[Group], int]) -> None:
        """Point the kernels at this step's tensors and numbers.

        Args:
            key: gives the key of this step's random draws in a group.

        Raises:
            Unfusable: a tensor has no memory to point at; one of the groups can't be served by kernels, or
                several can't be served together.
            OptxError: a tensor that goes with a parameter has another shape or device, or an unknown dtype.
        """
        params = self._parameters()
        grads: list[Any] = [p.grad for p in params]
        active = list(params)
        if True in map(is_, grads, repeat(None)):
            active = [p for p, g in zip(params, grads, strict=True) if g is not None]
            grads = [g for g in grads if g is not None]
        self.active = active
        self._gradients.let_go()
        if self.sharded:
            grads = self._gradients.spread(active, grads)
        seen = self._seen
        same = seen is not None and len(active) == len(seen) and all(map(is_, active, seen))
        if len(self._buckets) != 1:
            grads = []  # each bucket asks for its own
        if not (same and all(map(self._point, self._buckets, repeat(grads)))):
            self._seen = None
            self._rebuild(params)
            self._seen = list(active)
        if self._derived:  # in place, once every tensor has been looked at
            for bucket in self._buckets:
                self._refresh_derived(bucket)
        self._write_numbers(key)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    def _numbered(self) -> list[tuple[int, int]]:
        """For each parameter the group that it is of, and its number there."""
        return [(owner, i) for owner, group in enumerate(self.groups) for i in range(len(group["params"]))]

    def _write_numbers(self, key: Callable[[Group], int]) -> None:
        """Tell the kernels what the groups' numbers are now."""
        keys = [key(group) if i in self._draws else 0 for i, group in enumerate(self.groups)]
        if self.triton:
            numbers = list(step_numbers(self.groups[0], self._hypers).values())
            for bucket in self._buckets:
                # The key of its draws was settled with the table, see `_bucket`.
                bucket.runner.live = {i: v for i, v in enumerate(numbers) if _on_gpu(v)}
                bucket.runner.hypers[: len(numbers)] = [0.0 if _on_gpu(v) else float(v) for v in numbers]
            return
        rows = list(map(self._numbers.of, self.groups))
        told = len(rows) == len(self._rows) and all(map(is_, rows, self._rows))
        for bucket in self._buckets:
            if not told:
                bucket.runner.groups[:, : len(self._hypers)] = rows
            if self._draws:
                salt = 0 if bucket.shards is None else bucket.shards.salt
                bucket.runner.set_key([one ^ salt for one in keys] if salt else keys)
        self._rows = rows

    def _rebuild(self, params: Sequence[Tensor]) -> None:
        """Look at every tensor, sort the parameters by dtypes, and make the tables."""
        tensors, scratch = self._tensors, self.program.scratch
        buckets: dict[_Kind, list[int]] = {}
        orders: list[dict[_Kind, None]] = [{} for _ in self.groups]
        places = self._numbered()
        for i, p in enumerate(params):
            if p.grad is not None:
                grad = self._gradients.of(p, p.grad)
                tensors.check_weight(p, grad)
                tensors.make_missing(p)
                kept = [
                    scratch.get(name) or tensors.dtype(p, name, tensors.role(p, tensors.key(name)))
                    for name in self.program.slots
                ]
                for name in self.program.cells:
                    tensors.cell(p, name)
                for name, axis in self.program.vectors:
                    tensors.vector(p, name, axis)
                dtypes = (SLOT_DTYPE_NAMES[p.dtype], SLOT_DTYPE_NAMES[grad.dtype], *kept)
                kind = dtypes, Shards.of(p)
                buckets.setdefault(kind, []).append(i)
                orders[places[i][0]][kind] = None
        made = {
            kind: self._bucket(kind, [params[i] for i in members], [places[i] for i in members])
            for kind, members in buckets.items()
        }
        self._buckets, self._rows = list(made.values()), []
        self._sharing = [[made[kind] for kind in order] for order in orders]
        self._draws = {owner for owner, order in enumerate(orders) if any(self._drawn(d) for d, _ in order)}
        for bucket in self._buckets:
            self._take(bucket)
        written = [c for b in self._buckets for c in (b.columns[0], *b.columns[2:])]
        self._written = Extents(
            [a for c in written for a in c.addresses], [n for c in written for n in c.sizes.tolist()]
        )
        if self._written.overlap:
            raise self._refusal(SHARED)
        if any(self._written.meet(b.columns[1].addresses, b.columns[1].sizes) for b in self._buckets):
            raise self._refusal(ALIASED)

    def _drawn(self, dtypes: Sequence[str]) -> bool:
        """Whether anything of these dtypes may be rounded stochastically when it is stored."""
        named, scratch = zip(self.program.slots, dtypes[2:], strict=True), self.program.scratch
        return not _DRAWN.isdisjoint((dtypes[0], *(d for name, d in named if name not in scratch)))

    def _refusal(self, reason: str) -> Exception:
        return surprise(reason) if self.sharded else Unfusable(reason)

    def _bucket(self, kind: _Kind, members: list[Tensor], places: list[tuple[int, int]]) -> Bucket:
        """One for these parameters, given which group each is of and its number there."""
        dtypes, shards = kind
        low = dtypes[0] == "bfloat16"
        rounding = self._tensors.rounding or self._rounding
        layout = Layout(dtypes, rounding if low else "nearest", self.rules.counts_tensors)
        numels = [here(p).numel() for p in members]
        wholes = None if shards is None else [p.numel() for p in members]
        shapes = [p.shape for p in members]
        owners, numbers = [owner for owner, _ in places], [number for _, number in places]
        if self.triton:
            from optx.kernels.step.triton import TritonStep

            device = members[0].device
            runner: Any = TritonStep(self.program, layout, numels, numbers, device, wholes, shapes)
            # One key for the whole run: on the device, draws go on with the step count, also in CUDA graphs.
            group = self.groups[0]
            key = step_key(group.get("optx.seed", 0), 0) ^ (0 if shards is None else shards.salt)
            runner.set_key(key, group.get("optx.step", 0))
        else:
            from optx.kernels.step.cpu import CpuStep

            cut = self.program.tiled and shards is not None
            windows = list(map(window_of, members)) if cut else None
            count = len(self.groups)
            runner = CpuStep(self.program, layout, numels, numbers, owners, count, wholes, shapes, windows)
        names = [*runner.columns.roles, *runner.columns.cells]
        held = [i for i, name in enumerate(names) if name not in self.program.scratch]
        keys = [self._tensors.key(names[i]) for i in held[2:]]
        for p in members:
            if "kahan" in runner.columns.roles:
                self._tensors.role(p, KAHAN)
            if "rest" in runner.columns.roles:
                self._tensors.rest(p)
        own = shards is not None and not self.program.needs_all_rows and all(map(has_whole_rows, members))
        return Bucket(members, runner, keys, held, owners, shards, own)

    # ---- addresses ---------------------------------------------------------------------------------

    def _take(self, bucket: Bucket) -> None:
        """Take the addresses of tensors that were looked at."""
        members = bucket.members
        columns = [members, self._gradients.laid_out(members)]
        columns += [[self._tensors.find(p, key) for p in members] for key in bucket.keys]
        roles = len(bucket.runner.columns.roles) - len(self.program.scratch)
        packed = [False, False, *(key in self._tensors.packed for key in bucket.keys)]
        bucket.columns = [Column.of(tensors, i >= roles, packed[i]) for i, tensors in enumerate(columns)]
        for number, column in zip(bucket.places_in_row, bucket.columns, strict=True):
            bucket.runner.tensors[:, number] = column.addresses
        bucket.found = dict(zip(bucket.keys, columns[2:], strict=True))
        self._mark(bucket, self._states(bucket))

    def _point(self, bucket: Bucket, grads: list[Tensor]) -> bool:
        """Write this step's addresses into the table; False where a tensor is not what it was.

        What runs per tensor here is most of a small model's step.
        """
        members = bucket.members
        pending, states = self._slots.store.pending, self._states(bucket)
        try:
            grads = grads or self._gradients.all_of(members)
            if bucket.shards is not None:
                grads = all_here(grads)
            like = bucket.columns[1].like
            if like is None or not like(grads):
                grads = self._gradients.laid_out(members)
                if like is None or not like(grads):
                    return False
            columns = [members, grads]
            for key in bucket.keys:
                if pending and is_ours(key):
                    pairs = zip(states, members, strict=True)
                    columns.append([s[key] if key in s else pending[p][key] for s, p in pairs])
                else:
                    columns.append([s[key] for s in states])
            for number, column, tensors in zip(bucket.places_in_row, bucket.columns, columns, strict=True):
                if column.held is not None:
                    if column.holds(tensors):
                        continue
                    return False
                if column.specs is not None:
                    tensors = column.here(tensors)
                if column.like is not None and number != 1 and not column.like(tensors):
                    return False
                addresses = list(map(ADDRESS, tensors))
                if addresses != column.addresses:
                    # A gradient lies elsewhere in every step; one without elements lies nowhere.
                    if number != 1 or addresses.count(0) != column.addresses.count(0):
                        return False
                    starts = np.array(addresses)
                    if self._written.meet(starts, column.sizes):
                        return False
                    bucket.runner.tensors[:, number] = starts
                    column.addresses = addresses
            self._mark(bucket, states)
        except (KeyError, TypeError, RuntimeError, AttributeError):  # not there, no tensor, without memory
            return False
        bucket.found = dict(zip(bucket.keys, columns[2:], strict=True))
        return True

    def _states(self, bucket: Bucket) -> list[dict[str, Tensor]]:
        """What the base keeps of each member.

        torch hashes tensors in Python, which takes longer than all comparisons of a step. Where the same
        parameters have state in the same order as before, it is found without.
        """
        state, members = self.base.state, bucket.members
        if len(state) > 2 * len(members):
            return [state.get(p, _NOTHING) for p in members]
        if not bucket.places or len(state) != len(bucket.known) or not all(map(is_, state, bucket.known)):
            places = {id(p): i for i, p in enumerate(state)}
            if not all(id(p) in places for p in members):
                return [state.get(p, _NOTHING) for p in members]
            bucket.known, bucket.places = list(state), [places[id(p)] for p in members]
            bucket.in_order = bucket.places == list(range(len(state)))
        entries = list(state.values())
        return entries if bucket.in_order else [entries[i] for i in bucket.places]

    def _mark(self, bucket: Bucket, states: Sequence[Mapping[str, Any]]) -> None:
        """Tell the kernels which states are new, and the number of the step where they do not count."""
        if self.fresh or self._was_fresh:
            bucket.runner.cols[:, FRESH] = [id(p) in self.fresh for p in bucket.members]
        if self.rules.counted == "number":
            bucket.runner.cols[:, STEP] = [state["step"] + 1 for state in states]
        elif self.rules.counted == "group":
            counts = [group.setdefault("step", 0) + 1 for group in self.groups]
            bucket.runner.cols[:, STEP] = [counts[owner] for owner in bucket.owners]

    # ---- numbers that are taken from the base's state --------------------------------------------------

    def _refresh_derived(self, bucket: Bucket) -> None:
        """Take anew what no longer goes with the state that it was taken from."""
        for key, source in self._derived:
            kept = bucket.found[key]
            sources: list[Any] = bucket.found.get(source) or [None] * len(kept)
            tensors: list[Any] = [*sources, *kept]
            try:
                versions = list(map(_VERSION, tensors))
            except (AttributeError, RuntimeError):  # not there yet, or it counts none
                versions = None
            last, then = bucket.looked.get(key, ((), None))
            # Others with the same count are possible: `state[p][k] = state[p][k].data.mul_(2)`, twice.
            if versions is None or versions != then or not all(map(is_, last, tensors)):
                self._slots.refresh(bucket.members, key, sources)
                bucket.looked[key] = tensors, versions

    def _took_derived(self) -> None:
        """Kernels count up no version: only what this step made is news."""
        for bucket in self._buckets if self.fresh else ():
            bucket.looked.clear()
            for key, source in self._derived:
                if source in bucket.found:
                    self._slots.took(bucket.members, key, bucket.found[source])

    # ---- a step ------------------------------------------------------------------------------------

    def computed(self) -> Iterator[Table]:
        """The numbers of the last step, which the next one writes over."""
        for bucket in self._buckets:
            yield Table(bucket.members, bucket.runner.columns.cols, bucket.runner.computed, bucket.rows)

    def step(self) -> None:
        """A whole step, where nothing waits for totals."""
        for bucket in self._buckets:
            bucket.runner.step()
        self._done()

    def sum(self, level: int) -> list[Share]:
        """A level's sums over shards that lie here, to be completed before `measure`."""
        if level >= len(self.program.levels):
            return []
        sharded = [bucket for bucket in self._buckets if bucket.shards is not None]
        for bucket in sharded:
            bucket.runner.sum(level)
        return [share for bucket in sharded for share in bucket.partial(self.program.levels[level].sums)]

    def measure(self, level: int) -> list[dict[str, Any]]:
        """A level's sums and scalars; each group's shares of its totals by name."""
        if level >= len(self.program.levels):
            return []
        for bucket in self._buckets:
            if bucket.shards is None:
                bucket.runner.measure(level)
            else:
                bucket.runner.scalars(level)
        return [self._shares(level, owner) for owner in range(len(self.groups))]

    def _shares(self, level: int, owner: int) -> dict[str, Any]:
        """Added up as if the group were alone: its bits are the same in whatever company."""
        shares: dict[str, Any] = {}
        for bucket in self._sharing[owner]:
            runner = bucket.runner
            own = runner.totals if self.triton else runner.shares[owner]
            for ref in self.program.levels[level].totals:
                share = own[runner.columns.totals.index(ref.name)]
                shares[ref.name] = shares.get(ref.name, 0.0) + share
        return shares

    def finish(self, level: int, totals: dict[str, Any]) -> None:
        """The scalars that waited for totals."""
        if level >= len(self.program.levels):
            return
        for bucket in self._buckets:
            bucket.runner.receive(totals)
            bucket.runner.finish(level)

    def update(self) -> list[Share]:
        """Rewrite weights and state; what was observed of shards is to be completed before `commit`."""
        for bucket in self._buckets:
            bucket.runner.update()
        return [share for bucket in self._buckets for share in bucket.partial(self.program.left)]

    def commit(self) -> None:
        """Count the step, and keep what was observed."""
        for bucket in self._buckets:
            bucket.runner.commit()
        self._done()

    @property
    def written(self) -> list[Tensor]:
        """The weights that a step has moved, and what of them lies here."""
        if not self.sharded:
            return self.active
        return [*self.active, *(here(p) for p in self.active)]

    def count_groups(self) -> None:
        """One step more, where groups count: once for all of their tensors."""
        if self.rules.counted == "group":
            for group in self.groups:
                group["step"] = group.get("step", 0) + 1

    def _done(self) -> None:
        if self.rules.counted == "number":
            for bucket in self._buckets:
                for state in map(self.base.state.__getitem__, bucket.members):
                    state["step"] += 1
        self.count_groups()
        self._took_derived()
        self._was_fresh = bool(self.fresh)
        self._release()

    def _release(self) -> None:
        """Let go of what is only held during a step."""
        self.fresh.clear()
        self._gradients.let_go()
        for bucket in self._buckets:
            bucket.found = {}
            bucket.runner.stacks.let_go()

    def undo(self) -> None:
        """The step is skipped: take back the state that `prepare` made."""
        self._tensors.take_back(self.active)
        if self.fresh:
            self._seen, self._buckets = None, []
        self._release()


_Kind = tuple[tuple[str, ...], "Shards | None"]  # dtypes, and how they are spread

_DRAWN = {"bfloat16", *EIGHT}  # what may be rounded stochastically
_NOTHING: dict[str, Tensor] = {}

_VERSION = attrgetter("_version")


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
