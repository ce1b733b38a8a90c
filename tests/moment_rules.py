"""Transforms that read and write every name that a rule may, in every moment, for tests of what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from reference import Part
from torch import Tensor

import optx
from optx.ops import sqrt

# ---- registers and numbers ----------------------------------------------------------------------------


@optx.rule(writes=("along", "start"))
def look(w: Any, w0: Any, g: Any, saw_g: Any, count: Any, rate: Any, calm: Any) -> Any:
    return w * g + 0.1 * saw_g, (w0 * w0 - 0.5 * w * w0) * (rate + count) + calm


@optx.rule(writes=("k", "count", "calm"))
def per_tensor(along: Any, start: Any, grad_sq: Any, numel: Any, count: Any, calm: Any, lr: Any) -> Any:
    return (along + start) / (1.0 + numel + grad_sq), count + 1.0, calm * 0.5 + lr


@optx.rule(writes=("pace", "calm"))
def after_totals(total_k: Any, total_numel: Any, total_start: Any, k: Any, grad_sq: Any, calm: Any) -> Any:
    pace = (total_k + k) / total_numel + grad_sq / (10.0 + grad_sq)
    return pace, calm + 0.01 * total_start / total_numel


@optx.rule(writes="g")
def bend(g: Any, w: Any, w0: Any, pace: Any, count: Any, grad_sq: Any, saw_w: Any) -> Any:
    return g * (1.0 + 0.1 * pace) + 0.01 * count * w - 0.02 * w0 + 0.1 * saw_w / (1.0 + grad_sq)


@optx.rule(writes=("w", "saw_g", "saw_w0"))
def before(w: Any, w0: Any, g: Any, k: Any, grad_sq: Any, calm: Any, saw_g: Any, rate: Any) -> Any:
    return (
        w - 0.01 * g - 0.02 * w0 * k + 0.01 * calm + 0.001 * grad_sq,
        0.5 * saw_g + g,
        w0 * rate,
    )


@optx.rule(writes=("way", "uphill"))
def look_back(w: Any, w0: Any, g: Any, saw_w: Any, saw_g: Any, k: Any, habit: Any, ticks: Any) -> Any:
    return (w - w0) * (w - w0) + 0.01 * saw_w * ticks, g * (w0 - w) + 0.01 * saw_g * k + 0.001 * habit


@optx.rule(writes=("length", "habit"))
def lengths(way: Any, uphill: Any, along: Any, numel: Any, ticks: Any, habit: Any, grad_sq: Any) -> Any:
    length = sqrt(way * way + uphill * uphill) / (1.0 + numel + 0.1 * along * along + grad_sq)
    return length, 0.5 * habit + length * ticks


@optx.rule(writes="part")
def part_of_all(length: Any, total_length: Any, total_uphill: Any, total_k: Any, habit: Any) -> Any:
    return (length + 0.01 * total_uphill) / (1.0 + total_length + total_k * total_k) + 0.01 * habit


@optx.rule(writes=("w", "saw_w"))
def behind(
    w: Any, w0: Any, g: Any, saw_g: Any, saw_w0: Any, pace: Any, grad_sq: Any, part: Any, ticks: Any
) -> Any:
    back = 0.1 * (w0 - w) / (1.0 + part * part) / ticks
    return w + back + 0.01 * g - 0.02 * saw_w0 * pace, w - w0 + 0.01 * saw_g / (1.0 + grad_sq)


@optx.rule(writes=("moved", "slope", "sight"))
def watch(w: Any, w0: Any, g: Any, saw_g: Any, saw_w: Any, moved: Any, count: Any, k: Any) -> Any:
    return (w - w0) * (w - w0), (w - w0) * g, saw_g + saw_w + 0.1 * moved + 0.01 * count + k


@optx.rule(writes="g")
def soften(g: Any, limit: Any) -> Any:
    return g / (1.0 + optx.ops.abs(g) / limit)


class Names(optx.Transform):
    """Every name that no base takes away, in every moment."""

    name: ClassVar[str] = "first"
    slots: ClassVar = {
        **{name: optx.like_weight() for name in ("saw_g", "saw_w", "saw_w0")},
        **{name: optx.per_tensor() for name in ("count", "calm", "moved", "slope", "sight", "habit")},
        "ticks": optx.counter(),
    }
    options: ClassVar = {"rate": 0.75}
    rules: ClassVar = {
        "sums": look,
        "scalars": per_tensor,
        "totals": ("k", "numel", "start"),
        "finish": after_totals,
        "gradient": bend,
        "weight": before,
        "after_sums": look_back,
        "after_scalars": lengths,
        "after_totals": ("length", "uphill"),
        "after_finish": part_of_all,
        "after": behind,
        "observe": watch,
    }


class SecondNames(Names):
    """The same once more, in a chain."""

    name = "second"


class Soften(optx.Transform):
    """A gradient rule that depends on no sum, between two that do."""

    name = "soften"
    options: ClassVar = {"limit": 2.0}
    rules: ClassVar = {"gradient": soften}


@optx.rule(writes="length")
def length(along: Any, grad_sq: Any) -> Any:
    return along + grad_sq


@optx.rule(writes="rate")
def by_norm(total_length: Any, grad_sq: Any) -> Any:
    return grad_sq / (1.0 + grad_sq + total_length * total_length)


@optx.rule(writes="along")
def along(w: Any, g: Any) -> Any:
    return w * g


@optx.rule(writes="w")
def pull(w: Any, rate: Any, grad_sq: Any) -> Any:
    return w * (1.0 - 0.1 * rate) + 0.001 * grad_sq


class Pull(optx.Transform):
    """Takes sums and a norm, and leaves the gradient alone: later transforms share its pass, or must not."""

    name = "pull"
    rules: ClassVar = {
        "sums": along,
        "scalars": length,
        "totals": ("length",),
        "finish": by_norm,
        "weight": pull,
    }


# ---- the base's state -----------------------------------------------------------------------------------


@optx.rule(writes="energy")
def sum_second(exp_avg_sq: Any, exp_avg: Any) -> Any:
    return exp_avg_sq + 0.1 * exp_avg


@optx.rule(writes="size")
def of_second(energy: Any, step: Any, beta2: Any) -> Any:
    return sqrt(1.0 + energy * energy) / (1.0 - beta2**step)


@optx.rule(writes="g")
def with_first(g: Any, exp_avg: Any, size: Any) -> Any:
    return g + 0.1 * exp_avg / (1.0 + size)


@optx.rule(writes=("w", "gap"))
def with_moments(w: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, step: Any) -> Any:
    return w - 0.01 * exp_avg / step, exp_avg - g + exp_avg_sq


class Moving(optx.Transform):
    """Reads the base's moments in every moment."""

    name = "moving"
    slots: ClassVar = {"gap": optx.like_weight(), "energy_then": optx.per_tensor()}
    rules: ClassVar = {
        "sums": sum_second,
        "scalars": of_second,
        "gradient": with_first,
        "weight": with_moments,
        "after": with_moments,
        "observe": optx.rule(sum_second.function, writes="energy_then"),
    }


# ---- dtypes of slots ------------------------------------------------------------------------------------

FIRST = {"i": 2.0**24 + 1, "q": 2.0**40 + 1, "d": 1.0 / 3.0, "cq": 2.0**40 + 1, "cd": 1.0 / 3.0}
SLOTS: dict[str, torch.dtype | None] = {
    "b": torch.bool,
    "u": torch.uint8,
    "a": torch.int8,
    "s": torch.int16,
    "i": torch.int32,
    "q": torch.int64,
    "h": torch.float16,
    "z": torch.bfloat16,
    "f": torch.float32,
    "d": torch.float64,
    "o": None,
}
CELLS = {f"c{name}": dtype for name, dtype in SLOTS.items() if dtype is not None}


@optx.rule(writes=("all_slots", "all_cells"))
def sum_all(
    b: Any, u: Any, a: Any, s: Any, i: Any, q: Any, h: Any, z: Any, f: Any, d: Any, o: Any, cq: Any, cu: Any
) -> Any:
    return b + u + a + s + (i - 16777216.0) + (q - 1099511627776.0) + h + z + f + d + o, cq * 0.0 + cu


@optx.rule(writes=("cb", "cu", "ca", "cs", "ci", "cq", "ch", "cz", "cf", "cd", "both"))
def more(
    all_slots: Any,
    all_cells: Any,
    numel: Any,
    cb: Any,
    cu: Any,
    ca: Any,
    cs: Any,
    ci: Any,
    cq: Any,
    ch: Any,
    cz: Any,
    cf: Any,
    cd: Any,
) -> Any:
    x = 1.75
    both = (all_slots + all_cells) / (1.0 + numel) * 0.001
    return cb + x, cu + x, ca - x, cs - x, ci + x, cq + x, ch + x, cz + x, cf + x, cd + x, both


@optx.rule(writes=("g", "b", "u", "a", "s", "i", "q", "h", "z", "f", "d", "o"))
def write_all(
    g: Any, b: Any, u: Any, a: Any, s: Any, i: Any, q: Any, h: Any, z: Any, f: Any, d: Any, o: Any, cu: Any
) -> Any:
    sent = g + 0.01 * (b + u + a + s + (i - 16777216.0) + (q - 1099511627776.0) + h + z + f + d + o + cu)
    up = 2.75
    return sent, b + up, u + up, a - up, s - up, i + up, q + up, h + up, z + up, f + up, d + up, o + up


@optx.rule(writes=("w", "b", "u", "a", "s", "i", "q", "h", "z", "f", "d", "o"))
def write_again(
    w: Any,
    b: Any,
    u: Any,
    a: Any,
    s: Any,
    i: Any,
    q: Any,
    h: Any,
    z: Any,
    f: Any,
    d: Any,
    o: Any,
    cb: Any,
    ca: Any,
    ci: Any,
    cd: Any,
) -> Any:
    moved = w - 0.01 * (b + u + a + s + (i - 16777216.0) + (q - 1099511627776.0) + h + z + f + d + o)
    moved = moved + 0.001 * (cb + ca + ci + cd)
    x = 0.5
    return moved, b - 1.0, u - x, a + x, s + x, i - x, q - x, h - x, z - x, f - x, d - x, o - x


@optx.rule(writes=("seen", "seen_q", "cu"))
def see_all(
    w: Any,
    g: Any,
    b: Any,
    u: Any,
    a: Any,
    s: Any,
    i: Any,
    q: Any,
    h: Any,
    z: Any,
    f: Any,
    d: Any,
    o: Any,
    cu: Any,
    cq: Any,
) -> Any:
    small = b + u + a + s + h + z + f + d + o + 0.01 * w * g
    return small + 0.001 * (i - 16777216.0), q - 1099511627776.0 + 0.0 * cq, u + cu * 0.0 + 0.25


class Dtypes(optx.Transform):
    """A slot and a cell of every dtype, read and written in every moment."""

    name = "dtypes"
    slots: ClassVar = {
        **{name: optx.like_weight(dtype) for name, dtype in SLOTS.items()},
        **{name: optx.per_tensor(dtype) for name, dtype in CELLS.items()},
        "seen": optx.per_tensor(),
        "seen_q": optx.per_tensor(torch.int64),
    }
    rules: ClassVar = {
        "sums": sum_all,
        "scalars": more,
        "gradient": write_all,
        "weight": write_again,
        "observe": see_all,
    }

    def init_slot(self, name: str, p: Tensor, optimizer: Any) -> Tensor:
        return super().init_slot(name, p, optimizer).fill_(FIRST.get(name, 0.0))


@optx.rule(writes="squares")
def square(g: Any) -> Any:
    return g * g


@optx.rule(writes=("g", "trace"))
def keep_trace(g: Any, trace: Any, squares: Any) -> Any:
    trace = 0.5 * trace + g / (1.0 + squares)
    return g + trace, trace


class Trace(optx.Transform):
    """Its sums see a gradient that a rule with a slot has changed."""

    name = "trace"
    slots: ClassVar = {"trace": optx.like_weight(torch.float64)}
    rules: ClassVar = {"sums": square, "gradient": keep_trace}


def parts(transforms: list[optx.Transform], first: Mapping[str, float] = FIRST) -> list[Part]:
    """The same transforms for the reference, which knows nothing of optx."""
    found: list[Part] = []
    for t in transforms:
        rules = {k: (r.function, r.reads, r.writes) for k, r in t.rules.items() if "totals" not in k}
        slots = {n: s.dtype for n, s in t.slots.items() if not s.scalar}
        cells = {n: s.dtype for n, s in t.slots.items() if s.scalar}
        counters = [n for n, s in t.slots.items() if s.counts]
        start = first if isinstance(t, Dtypes) else {}
        totals = {when: t.rules.get(f"{when}totals", ()) for when in ("", "after_")}
        found.append(Part(t.name, rules, slots, cells, start, t.options, totals, counters))  # type: ignore[arg-type]
    return found
