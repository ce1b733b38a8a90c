"""What `Wrapped.plan` returns: which path each group's step takes, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optx.kernels.step.program import Program
from optx.step.transform import Transform


@dataclass(frozen=True)
class GroupPlan:
    """One param group's path.

    Attributes:
        path: ``fused cpu``, ``fused triton`` or ``foreach``.
        reason: why it is not fused; None if it is.
        tensors: how many parameters.
        numbers: how many elements in all.
        chain: the transforms and the base, in order.
        passes: reads of the gradient per step (the update, and one per level of sums).
        settings: those of `wrap` that are not its defaults, as ``("rounding='kahan'",)``.
        on_shards: whether kernels act on the local shards of DTensors.
        waits: what waits for a total over all gradients, so that `Wrapped.release` refuses it.
        kept: in how many bits moments and weights are kept, where `wrap` was asked for some.
        matrices: the functions of whole matrices between the passes, see `Matrices`.
    """

    index: int
    path: str
    reason: str | None
    tensors: int
    numbers: int
    chain: tuple[str, ...]
    passes: int
    settings: tuple[str, ...] = ()
    on_shards: bool = False
    waits: tuple[str, ...] = ()
    kept: str = ""
    matrices: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = f"{self.tensors} tensor{'s' * (self.tensors != 1)}, {self.numbers:,} numbers"
        passes = "" if self.passes == 1 else f", {self.passes} passes"
        passes += f", whole matrices in {' and '.join(self.matrices)}" if self.matrices else ""
        settings = "".join(f", {setting}" for setting in self.settings)
        path = f"{self.path} on local shards" if self.on_shards else self.path
        line = f"group {self.index}: {path} ({size}{passes}{settings}): {' -> '.join(self.chain)}"
        if self.waits:
            names = " and ".join(self.waits)
            line += f"\n    waits for a total: {names} (opt.release would refuse it)"
        line += f"\n    kept: {self.kept}" if self.kept else ""
        return line if self.reason is None else f"{line}\n    not fused: {self.reason}"


class Plan(tuple[GroupPlan, ...]):
    """The plans of all groups; prints one line per group."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def waiting(transforms: Sequence[Transform], program: Program) -> tuple[str, ...]:
    """Whose totals over the whole optimizer a program waits for: classes, and ``skip_nonfinite``."""
    owners = {ref.name.partition(".")[0] for level in program.levels for ref in level.totals}
    found = [type(t).__name__ for t in transforms if t.name in owners]
    return (*found, *(("skip_nonfinite",) if "incoming_sq" in owners else ()))
