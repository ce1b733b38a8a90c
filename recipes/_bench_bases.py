"""``optx bench bases``: a step of each optimizer that has rules, beside its library's own.

For each: torch's fused AdamW as the measure of the machine, the optimizer through `optx.wrap`, and every form
that its library has. They step in turn, each once more than is timed: what ran before it leaves threads that
spin. Beside the time stands its floor, the bytes that must move.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import re
import statistics
import tempfile
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import optx
from optx.kernels.audit.traffic import step_bytes
from optx.kernels.step.layout import Layout
from optx.kernels.step.program import Program

from . import _bench
from ._bench_step import ADAMW_BYTES, seconds_of, timed
from ._options import positive
from ._report import Table, console, tell

LR = 1e-8  # so small that weights, which all subjects share, stay as they are


@dataclass(frozen=True)
class Base:
    """One optimizer: its class, its settings, and those that choose among its library's forms."""

    path: str
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    forms: tuple[dict[str, Any], ...] = ({"foreach": True}, {"foreach": False})
    matrices: bool = False
    """Whether it steps ``--shape`` in place of ``--numbers``."""
    most: int | None = None
    """How many tensors it gets at most, where each takes long."""

    @property
    def name(self) -> str:
        """As the table has it."""
        settings = "".join(f" {key}={value}" for key, value in self.settings.items())
        return self.path.removeprefix("torch.optim.") + settings

    def make(self, weights: Sequence[nn.Parameter], **form: Any) -> torch.optim.Optimizer:
        """The optimizer."""
        module, _, name = self.path.rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = getattr(importlib.import_module(module), name)
            return kind(list(weights), lr=LR, **self.settings, **form)


_PLAIN: tuple[dict[str, Any], ...] = ({},)
BASES = (
    *map(Base, ("torch.optim.NAdam", "torch.optim.RAdam", "torch.optim.Adamax", "torch.optim.RMSprop")),
    Base("torch.optim.RMSprop", {"centered": True, "momentum": 0.9}),
    Base("torch.optim.Adagrad", forms=({"foreach": True}, {"foreach": False}, {"fused": True})),
    Base("torch.optim.Adadelta"),
    Base("torch.optim.Rprop", {"step_sizes": (1e-12, 1e-9)}),
    Base("torch.optim.ASGD"),
    *(Base(f"pytorch_optimizer.{name}") for name in ("Lion", "AdaBelief", "Yogi", "Adan", "NovoGrad")),
    *(Base(f"torch_optimizer.{name}", forms=_PLAIN) for name in ("AdaBelief", "Yogi", "NovoGrad", "Lamb")),
    Base("pytorch_optimizer.LARS", matrices=True),
    Base("torch.optim.Adafactor", matrices=True),
    Base("transformers.Adafactor", {"relative_step": False}, _PLAIN, matrices=True),
    Base("torch.optim.Muon", forms=_PLAIN, matrices=True, most=2),
)


def available() -> list[Base]:
    """Those whose library is installed."""
    there = {base.path.partition(".")[0] for base in BASES}
    there = {library for library in there if importlib.util.find_spec(library) is not None}
    return [base for base in BASES if base.path.partition(".")[0] in there]


def measure(base: Base, shape: tuple[int, ...], tensors: int, rounds: int) -> dict[str, Any]:
    """Times of all subjects of one optimizer."""
    shared = [torch.randn(shape) * 0.02 for _ in range(tensors)]
    gradients = [torch.randn(shape) * 1e-3 for _ in range(tensors)]

    def weights() -> list[nn.Parameter]:
        made = [nn.Parameter(w) for w in shared]
        for p, g in zip(made, gradients, strict=True):
            p.grad = g
        return made

    ours = optx.wrap(base.make(weights(), **base.forms[0]), fused=True)
    subjects: dict[str, Any] = {
        "AdamW": torch.optim.AdamW(weights(), lr=LR, weight_decay=0.0, fused=True),
        "ours": ours,
    }
    subjects |= {_words(form): base.make(weights(), **form) for form in base.forms}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name in random.Random(number).sample(list(subjects), len(subjects)):
            subjects[name].step()
            times[name].append(timed(subjects[name].step))
    return {"name": base.name, "bytes": _bytes_of(ours.program(0)), "times": times}


def _bytes_of(program: Program) -> float:
    """Bytes per number that a step must move, with what functions of whole matrices are given and make."""
    made = {fill.result.name: fill.dtype for level in program.levels for fill in level.fills}
    slots = (made.get(name, "float32") for name in program.slots)
    return step_bytes(program, Layout(("float32", "float32", *slots), "nearest", True))


def _words(form: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in form.items()) or "its own"


_FIRST_STEP = """
import time, torch
from optx.recipes._bench_bases import BASES
import optx
w = torch.nn.Parameter(torch.randn({shape})); w.grad = torch.randn({shape})
base = next(base for base in BASES if base.name == {name!r})
opt = optx.wrap(base.make([w], **base.forms[0]), fused=True)
start = time.perf_counter(); opt.step(); print(time.perf_counter() - start)
"""


def first_step_seconds(base: Base) -> float:
    """Time of a process's first step with an empty kernel cache."""
    with tempfile.TemporaryDirectory() as cache:
        shape = (32, 32) if base.matrices else (1000,)
        return seconds_of(_FIRST_STEP.format(name=base.name, shape=shape), cache)


def tables(results: dict[str, Any]) -> list[Table]:
    """Ratios to torch's fused AdamW, to the floor, and to the library's fastest form."""
    rows: list[Sequence[str]] = []
    for one in results["bases"]:
        middle = {name: statistics.median(found) for name, found in one["times"].items()}
        reference, ours = middle.pop("AdamW"), middle.pop("ours")
        floor, (form, fastest) = one["bytes"] / ADAMW_BYTES, min(middle.items(), key=lambda pair: pair[1])
        ratio = ours / reference
        first = f"{one['first']:.1f} s" if one.get("first") else ""
        faster = (f"{fastest / ours:.1f}", f"{fastest / reference / floor:.1f}", form)
        rows.append((one["name"], f"{floor:.2f}", f"{ratio:.2f}", f"{ratio / floor:.2f}", *faster, first))
    heads = (
        "optimizer",
        "floor",
        "step",
        "step / floor",
        *("times faster", "at the floor", "than"),
        "first step",
    )
    return [
        Table(
            heads,
            rows,
            "A step of each optimizer through optx.wrap, as a ratio to torch.optim.AdamW(fused=True)",
            "Medians, float32. Floor: bytes that must move, in units of AdamW's "
            f"{ADAMW_BYTES} per parameter, those per row and column left out. Times faster: than the fastest "
            "form that its library has; at the floor, what a step that takes no longer than its bytes would "
            "be. Muon's floor leaves its products out.",
        )
    ]


def _shape(text: str) -> str:
    """``ROWSxCOLUMNS``, as it was typed."""
    if re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", text) is None:
        raise ArgumentTypeError(f"{text!r} must be ROWSxCOLUMNS, as 1000x1000")
    return text


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser(
        "bases",
        __doc__,
        bases={"default": "", "help": "a part of their names (default: all whose library is installed)"},
        tensors={"type": positive, "default": 20},
        numbers={"type": positive, "default": 1_000_000, "help": "in each tensor"},
        shape={"type": _shape, "default": "1000x1000", "help": "of each matrix, where a base is for them"},
        rounds={"type": positive, "default": 10},
        first={
            "action": "store_true",
            "help": "time each first step too, compiling, in a process of its own",
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench bases --help``."""
    args = _bench.parsed(options(), arguments)
    chosen = [base for base in available() if args.bases in base.name]
    if not chosen:
        options().error(f"--bases: none of {', '.join(base.name for base in available())} has {args.bases!r}")
    measured: list[dict[str, Any]] = []
    for base in chosen:
        console.print(base.name)
        shape = tuple(map(int, args.shape.split("x"))) if base.matrices else (args.numbers,)
        found = measure(base, shape, min(args.tensors, base.most or args.tensors), args.rounds)
        measured.append({**found, "first": first_step_seconds(base) if args.first else None})
    found = _bench.results(options(), args, bases=measured)
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
