"""``optx audit``: the programs that the kernels' audit compiles.

Torch's bases in every dtype, and every transform that optx has.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

import optx.transforms
from optx._rules import rule
from optx.bases import adabelief, adan, lamb, lars, lion, novograd, yogi
from optx.kernels.audit import report
from optx.kernels.audit.kernels import Case
from optx.kernels.step.layout import Layout
from optx.ops import minimum, sqrt
from optx.step.base_update import BaseRules
from optx.step.bases import base_rules
from optx.step.group_numbers import base_numbers
from optx.step.pipeline import build
from optx.step.transform import Transform

_Base = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
_FLOAT, _HALF, _LOW = torch.float32, torch.float16, torch.bfloat16


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    from optx.recipes._run import environment

    return report.main(all_cases, arguments, environment)


def all_cases() -> list[Case]:
    """Bases, dtypes, then transforms and their compositions."""
    return [*_bases(), *_libraries(), *_dtypes(), *_transforms()]


def make(
    name: str,
    base: _Base,
    transforms: Sequence[Transform] = (),
    *,
    w: torch.dtype = _FLOAT,
    g: torch.dtype | None = None,
    moments: torch.dtype | None = None,
    rounding: str = "nearest",
    eight: bool = False,
) -> Case:
    """The program of transforms over a base.

    Args:
        name: what the table calls it.
        base: makes the optimizer.
        transforms: in order.
        w: dtype of the weights.
        g: of the gradients; None for the weights'.
        moments: of the base's state; None for the weights'.
        rounding: of bfloat16 weights.
        eight: keep moments in 8 bits.
    """
    optimizer = base([torch.nn.Parameter(torch.zeros(1, 1, dtype=w))])
    group = optimizer.param_groups[0]
    rules = base_rules(optimizer, group)
    assert rules is not None, "the audit compiles fused bases only"
    bound = {t.name: t.moments(group, optimizer) for t in transforms}
    program = build(transforms, bound, rules, rules.elements, base_numbers(group))
    kept = {f"{t.name}.{slot}": s.dtype or w for t in transforms for slot, s in t.slots.items()}
    kept |= {name: getattr(torch, dtype) for name, dtype in program.scratch.items()}
    dtypes = (
        w,
        g or w,
        *("bits" if s in program.packed else kept.get(s, moments or w) for s in program.slots),
    )
    coded = {n: f"{s.moment}8" for n, s in rules.slots.items() if eight and s.moment}
    named = zip(("w", "g", *program.slots), dtypes, strict=True)
    names = tuple(coded.get(role) or str(dtype).removeprefix("torch.") for role, dtype in named)
    return Case(name, program, Layout(names, rounding, rules.counts_tensors))


def _adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters)


def _amsgrad_l2(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, weight_decay=0.1, amsgrad=True)


def _bases() -> Iterator[Case]:
    yield make("SGD", lambda p: torch.optim.SGD(p, 0.1))
    yield make("SGD momentum", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    yield make("SGD nesterov", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True))
    yield make("Adam", lambda p: torch.optim.Adam(p))
    yield make("AdamW", _adamw)
    yield make("AdamW amsgrad", lambda p: torch.optim.AdamW(p, amsgrad=True))
    yield make("NAdam", lambda p: torch.optim.NAdam(p, weight_decay=0.1))
    yield make("RAdam", lambda p: torch.optim.RAdam(p))
    yield make("Adamax", lambda p: torch.optim.Adamax(p))
    yield make("RMSprop", lambda p: torch.optim.RMSprop(p))
    yield make("RMSprop centered momentum", lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9))
    yield make("Adagrad", lambda p: torch.optim.Adagrad(p))
    yield make("Adadelta", lambda p: torch.optim.Adadelta(p))
    yield make("Rprop", lambda p: torch.optim.Rprop(p))
    yield make("ASGD", lambda p: torch.optim.ASGD(p))
    yield make("Adafactor", lambda p: torch.optim.Adafactor(p))
    yield make("Muon", lambda p: torch.optim.Muon(p))
    yield make("Muon 8-bit", lambda p: torch.optim.Muon(p, nesterov=False), eight=True)


def _libraries() -> Iterator[Case]:
    """By their rules alone: the libraries need not be there."""
    group: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99, 0.9), "eps": 1e-8, "weight_decay": 0.1}
    group |= {"weight_decouple": True, "fixed_decay": False, "ams_bound": False, "amsgrad": False}
    group |= {"grad_averaging": True, "initial_accumulator": 1e-6}
    group |= {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "trust_coefficient": 1e-3}
    base = SimpleNamespace(maximize=False, defaults={"max_grad_norm": 0.0})
    base.clamp_value, base.adam, base.debias = 10.0, False, False
    for name, rules in (
        ("Lion", lion.lion),
        ("AdaBelief", adabelief.pytorch_optimizer),
        ("Yogi", yogi.pytorch_optimizer),
        ("Adan", adan.adan),
        ("NovoGrad", novograd.torch_optimizer),
        ("Lamb", lamb.lamb),
        ("LARS", lars.lars),
    ):
        made = rules(group, base)
        assert isinstance(made, BaseRules), made
        program = build((), {}, made, made.elements, base_numbers(group))
        dtypes = ("float32",) * (2 + len(program.slots))
        yield Case(name, program, Layout(dtypes, "nearest", made.counts_tensors))


def _dtypes() -> Iterator[Case]:
    yield make("AdamW bf16 stochastic", _adamw, w=_LOW, rounding="stochastic")
    yield make("AdamW bf16 kahan", _adamw, w=_LOW, rounding="kahan")
    yield make("AdamW bf16, fp32 moments", _adamw, w=_LOW, moments=_FLOAT, rounding="stochastic")
    yield make("AdamW fp32, bf16 gradients", _adamw, g=_LOW)
    yield make("AdamW fp32, fp16 gradients", _adamw, g=_HALF)
    yield make("AdamW fp16, fp32 moments", _adamw, w=_HALF, moments=_FLOAT)
    yield make("AdamW 8-bit moments", _adamw, eight=True)
    yield make("AdamW bf16 split, 8-bit moments", _adamw, w=_LOW, rounding="split8", eight=True)
    yield make("AdamW bf16 split16", _adamw, w=_LOW, rounding="split16", moments=_FLOAT)
    yield make("AdamW fp64", _adamw, w=torch.float64)
    adafactor: _Base = lambda p: torch.optim.Adafactor(p)  # noqa: E731
    yield make("Adafactor bf16 stochastic", adafactor, w=_LOW, rounding="stochastic")


@rule(writes="row_sq")
def _square(g: Any) -> Any:
    return g * g


@rule(writes="factor")
def _shorten(row_sq: Any, longest: Any) -> Any:
    return minimum(1.0, longest / sqrt(row_sq))


@rule(writes="g")
def _scale(g: Any, factor: Any) -> Any:
    return g * factor


class _ClipRows(Transform):
    """No method of optx's has sums over rows; a user's may."""

    name = "clip_rows"
    options: Mapping[str, float] = {"longest": 1.0}
    rules: ClassVar[Mapping[str, Any]] = {"row_sums": _square, "rows": _shorten, "gradient": _scale}


def _transforms() -> Iterator[Case]:
    """Each variant of each transform over AdamW, its first over the base that needs most, and one chain."""
    chain: list[Transform] = []
    for variants in transform_examples().values():
        for name, transform in variants.items():
            yield make(f"{name} + AdamW", _adamw, [transform])
        name, first = next(iter(variants.items()))
        yield make(f"{name} + Adam amsgrad l2", _amsgrad_l2, [first])
        chain.append(first)
    yield make("rows clipped + AdamW", _adamw, [_ClipRows()])
    # Those that rewrite gradients come first in practice.
    optimizer = _adamw([torch.nn.Parameter(torch.zeros(1))])
    chain.sort(key=lambda t: t.moments(optimizer.param_groups[0], optimizer).gradient is None)
    name = " + ".join([*(type(t).__name__ for t in chain), "AdamW"])
    yield make(name, _adamw, chain)
    yield make(f"{name} bf16 stochastic", _adamw, chain, w=_LOW, rounding="stochastic")


# How to make the variants of a transform that compile to different kernels, where ``Class()`` is not all.
_VARIANTS: dict[str, dict[str, Callable[[Any], Transform]]] = {
    "BackSlash": {
        "BackSlash": lambda c: c(1.0, until=100),
        "BackSlash to zero, one pass": lambda c: c(1.0, prox=True, exact=False),
    },
    "SaRA": {"SaRA": lambda c: c(fraction=0.1)},
    "AdamR": {
        "AdamR": lambda c: c(),
        "AdamR plain": lambda c: c(normalize=False),
        "AdamR plain l1": lambda c: c(normalize=False, norm="l1"),
        "AdamR to zero": lambda c: c(anchor="zero"),
    },
    "DSPReg": {
        "DSPReg": lambda c: c(2),
        "DSPReg in the gradient": lambda c: c(2, decoupled=False),
        "DSPReg to its anchor": lambda c: c(2, anchor="init", norm="layer"),
        "DSPReg largest, in the gradient, from its anchor": lambda c: c(
            2, anchor="init", norm="max", decoupled=False
        ),
    },
}


def transform_examples() -> dict[str, dict[str, Transform]]:
    """Variants by name of every transform in `optx.transforms` that has rules, by class name.

    Found by looking, so that a new one is compiled without being listed; one that can't be made without
    arguments needs an entry in ``_VARIANTS``.
    """
    found: dict[str, dict[str, Transform]] = {}
    for module in pkgutil.iter_modules(optx.transforms.__path__, "optx.transforms."):
        for value in vars(importlib.import_module(module.name)).values():
            if not (
                isinstance(value, type) and issubclass(value, Transform) and value.__module__ == module.name
            ):
                continue
            name = value.__name__
            if value.moments is Transform.moments and not value.rules:
                continue  # it acts otherwise than through a kernel
            makers = _VARIANTS.get(name, {name: lambda c: c()})
            found[name] = {label: make_one(value) for label, make_one in makers.items()}
    return found
