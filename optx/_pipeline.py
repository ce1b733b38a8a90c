"""Composes transforms and a base into one `Program`: binds names, and finds how few passes do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optx._bases import BaseRules
from optx._errors import TransformError
from optx._rules import Rule, rule
from optx._transform import Moments, Transform
from optx.kernels.program import W0, Call, G, Level, Program, Ref, W

_REGISTERS = {"w": W, "g": G, "w0": W0}
GRAD_SQ = Ref("col", "grad_sq")
NUMEL = Ref("col", "numel")


@rule(writes="grad_sq")
def square(g: Any) -> Any:
    """Summed, the gradient's squared norm."""
    return g * g


@dataclass
class _Builder:
    """Collects the calls of one group, level by level."""

    base_names: frozenset[str]  # state tensors of the base
    base_hypers: frozenset[str]
    counted: bool
    levels: list[Level] = field(default_factory=list[Level])
    gradient: list[Call] = field(default_factory=list[Call])
    weight: list[Call] = field(default_factory=list[Call])
    after: list[Call] = field(default_factory=list[Call])
    observe: list[Call] = field(default_factory=list[Call])
    # The level whose scalars the gradient rules so far depend on, plus one; and how many of the gradient
    # rules each level's pass must re-apply to see the gradient it sums.
    depth: int = 0
    grad_sq_level: int = -1  # where the col grad_sq, as it stands now in the chain, was computed

    def level(self, index: int) -> Level:
        while len(self.levels) <= index:
            self.levels.append(Level())
        return self.levels[index]

    def extend(self, index: int, **more: Iterable[Any]) -> None:
        old = self.level(index)
        parts: dict[str, Any] = {k: (*getattr(old, k), *v) for k, v in more.items()}
        self.levels[index] = dataclasses.replace(old, **parts)

    def need_grad_sq(self) -> int:
        """Make sure that the squared norm of the gradient as it stands is summed; give its level."""
        if self.grad_sq_level < 0:
            self.sum(Call(square, (G,), (GRAD_SQ,)))
            self.grad_sq_level = self.depth
        return self.grad_sq_level

    def sum(self, call: Call) -> None:
        level = self.level(self.depth)
        if not level.sums:
            self.extend(self.depth, prefix=self.gradient)
        self.extend(self.depth, sums=[call])


def build(
    transforms: Sequence[Transform],
    moments: Mapping[str, Moments],
    base: BaseRules | None,
    base_names: Iterable[str],
    base_hypers: Iterable[str],
    *,
    check_finite: bool = False,
) -> Program:
    """The program of one param group.

    Args:
        transforms: those enabled for the group, in order.
        moments: each one's rules, by transform name.
        base: the base's update as rules; None to leave the base as it is.
        base_names: state tensors of the base that rules may read.
        base_hypers: numbers of the base's param group that rules may read.
        check_finite: total the squared norm of the incoming gradient under the name ``grad_sq``.

    Raises:
        TransformError: a rule reads a name that nothing provides.
    """
    b = _Builder(frozenset(base_names), frozenset(base_hypers), base.counted if base else True)
    if check_finite:
        b.need_grad_sq()
        # A col of its own: later transforms may replace grad_sq.
        b.extend(0, scalars=[Call(_keep, (GRAD_SQ,), (Ref("col", "incoming_sq"),))])
        b.extend(0, totals=[Ref("col", "incoming_sq")])
    for transform in transforms:
        _add(b, transform, moments[transform.name])
    base_calls: list[Call] = []
    if base:
        for r in base.scalars:
            call = _bind_base(b, r)
            b.extend(max(len(b.levels) - 1, 0), scalars=[call])
        base_calls = [_bind_base(b, r) for r in base.update]
    return Program(
        tuple(b.levels),
        tuple(b.gradient),
        tuple(b.weight),
        tuple(base_calls),
        tuple(b.after),
        tuple(b.observe),
    )


@rule(writes="kept")
def _keep(grad_sq: Any) -> Any:
    return grad_sq * 1.0


def _add(b: _Builder, transform: Transform, m: Moments) -> None:
    sum_names = m.sums.writes if m.sums else ()
    scalar_names = (*(m.scalars.writes if m.scalars else ()), *(m.finish.writes if m.finish else ()))

    def resolve(r: Rule, name: str) -> Ref:
        own = f"{transform.name}.{name}"
        if name in _REGISTERS:
            return _REGISTERS[name]
        if name in transform.slots:
            return Ref("cell" if transform.slots[name].scalar else "slot", own)
        if name == "grad_sq":
            return GRAD_SQ
        if name in sum_names or name in scalar_names:
            return Ref("col", own)
        if name in transform.options:
            return Ref("hyper", own)
        if name.startswith("total_") and name[6:] in m.totals:
            return Ref("total", "numel" if name[6:] == "numel" else f"{transform.name}.{name[6:]}")
        if (common := _common(b, name)) is not None:
            return common
        raise TransformError(
            f"{transform!r}: rule {r.name!r} reads {name!r}, which is no slot {sorted(transform.slots)}, "
            f"option {sorted(transform.options)} or earlier result of the transform, nor a name of this base "
            f"({', '.join(sorted(b.base_names | b.base_hypers))})."
        )

    def bind(r: Rule) -> Call:
        return Call(r, tuple(resolve(r, n) for n in r.reads), tuple(resolve(r, n) for n in r.writes))

    level = 0
    if m.sums:
        level = b.depth
        b.sum(bind(m.sums))
    if any(r and "grad_sq" in r.reads for r in (m.scalars, m.finish)):
        level = max(level, b.need_grad_sq())
    if m.scalars:
        b.extend(level, scalars=[bind(m.scalars)])
    totals = [NUMEL if n == "numel" else Ref("col", f"{transform.name}.{n}") for n in m.totals]
    b.extend(level, totals=[t for t in totals if t not in b.level(level).totals])
    if m.finish:
        b.extend(level, finish=[bind(m.finish)])
    if m.gradient:
        call = bind(m.gradient)
        b.gradient.append(call)
        tells_norm = m.scalars is not None and "grad_sq" in m.scalars.writes
        b.grad_sq_level = level if tells_norm else -1
        if any(ref.kind in ("col", "total") and ref != NUMEL for ref in call.args):
            b.depth = level + 1
    b.weight.extend([bind(m.weight)] if m.weight else [])
    b.after.extend([bind(m.after)] if m.after else [])
    b.observe.extend([bind(m.observe)] if m.observe else [])


def _common(b: _Builder, name: str) -> Ref | None:
    """Names that every rule may read."""
    if name in ("numel", "fresh") or (name == "step" and b.counted):
        return Ref("col", name)
    if name in b.base_names:
        return Ref("slot", name)
    return Ref("hyper", name) if name in b.base_hypers else None


def _bind_base(b: _Builder, r: Rule) -> Call:
    def resolve(name: str) -> Ref:
        return _REGISTERS.get(name) or _common(b, name) or Ref("col", f"base.{name}")

    return Call(r, tuple(resolve(n) for n in r.reads), tuple(resolve(n) for n in r.writes))
