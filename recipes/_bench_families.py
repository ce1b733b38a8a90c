"""``optx bench families``: what every injection serves by default in small random models of every family.

Of each pair: the modules that are served, whether the output is exactly what it was at the start, whether a
gradient reaches all that was added, and whether everything is as it was after removal; or why it is refused.
"""

from __future__ import annotations

import re
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import optx

from . import _bench
from ._family_models import FAMILIES, Family
from ._report import Table, console, tell

Rows = dict[str, list[dict[str, Any]]]
"""By family, what became of each method."""


@dataclass(frozen=True)
class Method:
    """One injection with its default targets; ``prefix`` if it changes outputs from the start."""

    make: Callable[[], optx.Injection]
    prefix: bool = False


# Forms whose slope is nowhere zero, so that a gradient that is missing is missing for a reason.
METHODS: dict[str, Method] = {
    "LoRA": Method(lambda: optx.LoRA(rank=2)),
    "SVFit": Method(lambda: optx.SVFit(rank=2)),
    "IA3": Method(optx.IA3),
    "FLoRA": Method(lambda: optx.FLoRA(rank=1)),
    "BitFit": Method(optx.BitFit),
    "SequentialAdapter": Method(lambda: optx.SequentialAdapter(rank=2, form="gelu")),
    "ParallelAdapter": Method(lambda: optx.ParallelAdapter(rank=2, form="gelu")),
    "ScaledParallelAdapter": Method(lambda: optx.ScaledParallelAdapter(rank=2, form="gelu")),
    "MultiHeadParallelAdapter": Method(lambda: optx.MultiHeadParallelAdapter(rank=2, form="gelu")),
    "PrefixTuning": Method(lambda: optx.PrefixTuning(length=2), prefix=True),
    "MAM": Method(lambda: optx.MAM(prefix=2, rank=2), prefix=True),
    "Aside": Method(lambda: optx.Aside(rank=2, form="gelu")),
    "STN": Method(lambda: optx.STN(optx.HParams(drop=optx.hp(0.2, (0, 0.9)))), prefix=True),
    "IAA": Method(lambda: optx.IAA(rank=2, aside=2, form="gelu")),
    "Perp": Method(optx.Perp),
}


def measure(families: Sequence[Family] = FAMILIES, methods: Mapping[str, Method] = METHODS) -> Rows:
    """Every method on every family, one after the other on one model."""
    rows: Rows = {}
    for family in families:
        model = family.make()
        with torch.no_grad():  # in which some models take another way, with another rounding
            base = family.run(model)
        rows[family.label] = [
            {"method": name, **_one(family, model, base, method)} for name, method in methods.items()
        ]
    return rows


def _one(family: Family, model: nn.Module, base: Tensor, method: Method) -> dict[str, Any]:
    """One method on one model, which is as before afterwards."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what is left out: the table has what is served
            handle = optx.attach(model, method.make())
    except optx.OptxError as error:
        return {"refused": str(error)}
    with handle:
        served = [one.path for one in handle.served]
        with torch.no_grad():
            same = torch.equal(family.run(model), base)
        unreached = _unreached(family, model, handle)
    after = model.state_dict()
    removed = list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        removed = removed and torch.equal(family.run(model), base)
    return {"served": served, "identity": same, "unreached": unreached, "removed": removed}


def _unreached(family: Family, model: nn.Module, handle: optx.Handle) -> list[str]:
    """The tensors that were added and get no gradient, once they are away from their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    loss = family.run(model).float().square().sum()
    named = dict(handle.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return [name for name, g in zip(named, gradients, strict=True) if g is None or not g.any()]


# ---- in words ------------------------------------------------------------------------------------------


def pairs(rows: Rows) -> dict[tuple[str, str], dict[str, Any]]:
    """What became of each pair of a family and a method."""
    return {(family, row["method"]): row for family, found in rows.items() for row in found}


def tables(results: dict[str, Any]) -> list[Table]:
    """What is served, by family; and why the rest is refused."""
    rows = pairs(results["rows"])
    families, methods = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    reasons: dict[str, int] = {}
    columns: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        cells = tuple(_cell(rows[family, method], reasons) for family in families)
        columns.setdefault(cells, []).append(method)
    headers = ["", *(", ".join(alike) for alike in columns.values())]
    served = [row for row in rows.values() if "served" in row]
    exact = sum(row["identity"] for row in served)
    notes = [f"({number}) {reason}" for reason, number in reasons.items()]
    note = (
        f"With transformers {results['transformers']}. Paths are in the block; a * stands for numbers. Of "
        f"{len(rows)} pairs {len(served)} are served: {exact} change nothing at the start, and the other "
        f"{len(served) - exact} have a prefix or gates in them; a gradient reaches all that was added in "
        f"{sum(not row['unreached'] for row in served)}, and removal is exact in "
        f"{sum(row['removed'] for row in served)}. Refused: {'; '.join(notes)}."
    )
    cells = [[family, *(column[i] for column in columns)] for i, family in enumerate(families)]
    return [Table(headers, cells, "What is served by default", note)]


def _cell(row: Mapping[str, Any], reasons: dict[str, int]) -> str:
    if "refused" in row:
        reason = _reason(row["refused"])
        return f"– ({reasons.setdefault(reason, len(reasons) + 1)})"
    places = list(dict.fromkeys(in_block(path) for path in row["served"]))
    if len(places) > 5:
        return f"{len(row['served'])} modules"
    return ", ".join(places) or "the layer"


def in_block(path: str) -> str:
    """A path without what comes before the block and its number."""
    rest = re.sub(r"^.*?\.\d+(?:\.|$)", "", path, count=1)
    return re.sub(r"\b\d+\b", "*", rest) or "the layer"


def _reason(sentence: str) -> str:
    """A refusal without its way out, and without what is different in every model."""
    words = re.sub(r"^attach: \w+ ", "", sentence).partition(". ")[0].rstrip(".")
    words = re.sub(r"'[^' ]+'|\b[\w.]*\.\d+\.[\w.]*\b|\(\d[\d, ]*\)|\d+ and \d+", "…", words)
    words = re.sub(r", as in [\w-]+ models", "", words)
    return re.sub(r"\b\w+(?:For[A-Z]\w+|Model|Attention)\b", "…", words)


def options() -> ArgumentParser:
    """The benchmark's command line."""
    return _bench.parser("families", __doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench families --help``."""
    args = _bench.parsed(options(), arguments)
    found = _bench.results(options(), args, transformers=version("transformers"), rows=measure())
    console.print(_bench.heading(found))
    tell(tables(found))


if __name__ == "__main__":
    main()
