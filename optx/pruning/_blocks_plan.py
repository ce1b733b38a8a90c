"""In which order a model's layers are pruned, and from where each gets its inputs: one look at how it runs.

Blocks that follow one another are a chain: the activations between them are kept, and each is run by itself.
What is in no chain is reached by running the model anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optx._errors import OptxError
from optx.pruning._blocks_calls import depends_on_hidden, hidden_of, hooked, run, split
from optx.pruning._calibration import Batch
from optx.pruning._prune_layers import Layer

_NUMBERED = re.compile(r"(|.*[._])\d+")


@dataclass(frozen=True, eq=False)
class Unit:
    """What is pruned at once, all its inputs being those that it has before.

    Attributes:
        path: of a block, or of a single layer.
        module: which it is.
        layers: to prune in it; none: it is only run.
        calls: how often the model calls it.
    """

    path: str
    module: nn.Module
    layers: tuple[Layer, ...]
    calls: int = 1


@dataclass(frozen=True)
class Chain:
    """Blocks each of which is given what the one before hands on."""

    units: tuple[Unit, ...]


Step = Chain | Unit


def plan(
    model: nn.Module, modules: Mapping[str, nn.Module], layers: Sequence[Layer], batches: Sequence[Batch]
) -> list[Step]:
    """The steps, in the order in which the model runs.

    Raises:
        OptxError: a layer is given nothing in all of the data, or something that can't be served; names it.
    """
    rows = _rows(modules, layers)
    seen = _Rehearsal(layers, rows)
    with hooked(*seen.hooks()):
        padded = next((batch for batch in batches if batch.padding), None)
        for batch in batches:
            done = all(seen.calls[layer.module] for layer in layers)
            if done and batch is not padded:
                continue
            seen.begin(batch)
            run(model, batch)
        unseen = [layer.path for layer in layers if not seen.calls[layer.module]]
        if unseen:
            _refuse_unseen(unseen, len(batches))
    steps: list[tuple[int, Step]] = []
    for row in rows:
        for step in _steps_of(row, seen, model, batches[0]):
            first = step.units[0] if isinstance(step, Chain) else step
            steps.append((seen.first[first.module], step))
    inside = {layer for row in rows for unit in row for layer in unit.layers}
    for layer in layers:
        if layer not in inside:
            unit = Unit(layer.path, layer.module, (layer,), seen.calls[layer.module])
            steps.append((seen.first[layer.module], unit))
    return [step for _, step in sorted(steps, key=lambda pair: pair[0])]


def _refuse_unseen(paths: Sequence[str], batches: int) -> None:
    """An expert that no token went to, or what these data don't use."""
    some = ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    raise OptxError(
        f"prune: {some} saw no token of the calibration data ({batches} batches), so that there is nothing "
        "to go by; give more data, or leave them out with exclude=."
    )


def _rows(modules: Mapping[str, nn.Module], layers: Sequence[Layer]) -> list[list[Unit]]:
    """The outermost numbered modules with something to prune in them, those of one list together."""
    found: dict[str, list[Unit]] = {}
    outer = ""
    for path, module in modules.items():
        matched = _NUMBERED.fullmatch(path)
        if matched is None or (outer and path.startswith(outer)):
            continue
        outer = f"{path}."
        own = tuple(one for one in layers if one.path == path or one.path.startswith(outer))
        found.setdefault(matched[1], []).append(Unit(path, module, own))
    trimmed: list[list[Unit]] = []
    for row in found.values():
        full = [i for i, unit in enumerate(row) if unit.layers]
        if full:
            trimmed.append(row[full[0] : full[-1] + 1])
    return trimmed


class _Rehearsal:
    """What a run of the dense model shows: the order of calls, and whether blocks follow one another."""

    def __init__(self, layers: Sequence[Layer], rows: Sequence[Sequence[Unit]]) -> None:
        self.layers = {layer.module: layer for layer in layers}
        self.row_of = {unit.module: i for i, row in enumerate(rows) for unit in row}
        self.before = {
            unit.module: (row[i - 1].module if i else None) for row in rows for i, unit in enumerate(row)
        }
        self.calls: Counter[nn.Module] = Counter()
        self.first: dict[nn.Module, int] = {}
        self.broken: set[int] = set()
        self.handed: dict[int, tuple[nn.Module, Tensor | None]] = {}

    def begin(self, batch: Batch) -> None:
        """The next run's batch."""
        self.batch = batch
        self.here: Counter[nn.Module] = Counter()
        self.handed = {}

    def hooks(self) -> tuple[dict[nn.Module, Any], dict[nn.Module, Any]]:
        """Before and after each module."""
        modules = dict.fromkeys([*self.row_of, *self.layers])
        return dict.fromkeys(modules, self.enter), dict.fromkeys(self.row_of, self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call."""
        self.first.setdefault(module, len(self.first))
        self.here[module] += 1
        self.calls[module] = max(self.calls[module], self.here[module])
        if module in self.layers:
            self._look_at(self.layers[module], args[0] if args else next(iter(kwargs.values())))
        if module in self.row_of:
            row = self.row_of[module]
            found = split(args, kwargs)
            before, handed = self.handed.get(row, (None, None))
            follows = before is self.before[module] and (before is None or (found and found[0] is handed))
            if found is None or not found[0].is_floating_point() or not follows:
                self.broken.add(row)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After a call of a block."""
        self.handed[self.row_of[module]] = (module, hidden_of(output))

    def _look_at(self, layer: Layer, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise OptxError(
                f"prune: what {layer.path!r} is given in calibration is inf or nan before anything is "
                "pruned; look for where the model's activations overflow, or calibrate it in float32."
            )
        self.batch.counted(x, layer.path)


def _steps_of(row: Sequence[Unit], seen: _Rehearsal, model: nn.Module, batch: Batch) -> list[Step]:
    """A row as one chain; as blocks by themselves if it is none; as layers where blocks aren't called."""
    modules = [unit.module for unit in row]
    once = all(seen.calls[m] == 1 for m in modules) and seen.row_of[modules[0]] not in seen.broken
    if once and not depends_on_hidden(model, modules, batch):
        return [Chain(tuple(row))]
    steps: list[Step] = []
    for unit in row:
        if seen.calls[unit.module] and unit.layers:
            steps.append(Unit(unit.path, unit.module, unit.layers, seen.calls[unit.module]))
        else:
            steps += [Unit(one.path, one.module, (one,), seen.calls[one.module]) for one in unit.layers]
    return steps
