"""Pruning by what layers are given: block after block, each fed by the pruned blocks before it.

Within a block all inputs are the dense block's, as in Wanda's and SparseGPT's code; then it is pruned, and
its outputs computed anew for the next. Held are the activations between two blocks, and one block's sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, warn
from optx._mask_bits import pack
from optx._module_paths import paths_of
from optx.inject._weights import is_conv
from optx.pruning._blocks_calls import Call, Capture, Reached, hidden_of, hooked, run
from optx.pruning._blocks_plan import Chain, Step, Unit, plan
from optx.pruning._blocks_resume import Ledger
from optx.pruning._calibration import Batch, as_in_use
from optx.pruning._calibration_sums import InputSums, summed
from optx.pruning._method import PruneMethod
from optx.pruning._prune_layers import Layer, numbers_of

Bits = dict[str, Tensor]


def prune_blocks(
    model: nn.Module,
    method: PruneMethod,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    bar: Callable[[Iterable[str]], Iterable[str]],
    ledger: Ledger | None,
) -> Bits:
    """Prune layers in place, in the order in which the model runs.

    Args:
        model: the dense model.
        method: one that needs inputs.
        layers: of it.
        batches: calibration data.
        bar: shows how far it is, given the blocks' names.
        ledger: where finished blocks are kept; None: nowhere.

    Returns:
        Masks by the weights' names, packed.
    """
    with as_in_use(model):
        steps = plan(model, dict(paths_of(model).modules), layers, batches)
        walk = _Walk(model, method, batches, ledger)
        units = walk.steps(steps)
        for path in bar([unit.path for step in steps for unit in _units(step)]):
            unit = next(units)
            assert unit.path == path
    return walk.bits


def _units(step: Step) -> Sequence[Unit]:
    return step.units if isinstance(step, Chain) else (step,)


class _Walk:
    def __init__(
        self, model: nn.Module, method: PruneMethod, batches: Sequence[Batch], ledger: Ledger | None
    ) -> None:
        self.model, self.method, self.batches, self.ledger = model, method, batches, ledger
        self.bits: Bits = {}

    def steps(self, steps: Sequence[Step]) -> Iterator[Unit]:
        """Prune unit after unit."""
        for step in steps:
            if isinstance(step, Chain):
                yield from self._chain(step)
            else:
                self._finish(step, lambda sums, unit=step: self._by_running(unit, sums))
                yield step

    def _chain(self, chain: Chain) -> Iterator[Unit]:
        """Blocks by themselves, from kept activations."""
        capture = Capture(self.model, [unit.module for unit in chain.units])
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        for batch in self.batches:
            first, call = capture(batch)
            hidden.append(first)
            calls.append(call)
            del first  # or the first block's activations are held to the end
        for number, unit in enumerate(chain.units):

            def feed(sums: _Sums, unit: Unit = unit, number: int = number) -> None:
                for batch, h, call in zip(self.batches, hidden, calls, strict=True):
                    sums.batch = batch
                    call[number](unit.module, h.clone())  # a block may write to what it is given

            self._finish(unit, feed)
            if unit is not chain.units[-1]:
                for i, call in enumerate(calls):
                    hidden[i] = _handed(unit, call[number](unit.module, hidden[i]))
            yield unit

    def _by_running(self, unit: Unit, sums: _Sums) -> None:
        """What is in no chain: the whole model, as far as the unit."""

        def stop(*_: Any) -> None:
            raise Reached

        with hooked({}, {unit.module: stop} if unit.calls == 1 else {}):
            for batch in self.batches:
                sums.batch = batch
                run(self.model, batch)

    def _finish(self, unit: Unit, feed: Callable[[_Sums], None]) -> None:
        """Prune a unit, or take it from what was done before."""
        if not unit.layers:
            return
        done = self.ledger.take(unit) if self.ledger is not None else None
        if done is None:
            sums = _Sums(unit, self.method)
            with hooked(dict.fromkeys((layer.module for layer in unit.layers), sums.enter)):
                feed(sums)
            # All of it before any of it is written: what is interrupted has whole blocks, kept and pruned.
            made = {layer: self._prune(layer, sums.pop(layer)) for layer in unit.layers}
            done = {layer.name: pack(kept).cpu() for layer, (kept, _) in made.items()}
            if self.ledger is not None:
                self.ledger.put(unit, {layer.name: new for layer, (_, new) in made.items()}, done)
            for layer, (_, new) in made.items():
                layer.weight.copy_(new)
        self.bits |= done

    def _prune(self, layer: Layer, sums: InputSums) -> tuple[Tensor, Tensor]:
        if not sums.tokens:
            warn(
                f"optx.prune: {layer.path!r} sees no token any more once what comes before it is pruned; its "
                "inputs are taken to be all alike, so that it is pruned by magnitude."
            )
        try:
            return pruned(layer, self.method, sums)
        except OptxError as error:
            if not self.bits:
                raise
            raise type(error)(f"{error} ({len(self.bits)} weights before it are pruned already.)") from None


def pruned(layer: Layer, method: PruneMethod, sums: InputSums | None = None) -> tuple[Tensor, Tensor]:
    """The mask of a layer's weight and its new value, both of its shape, the latter in its dtype.

    Raises:
        OptxError: it would be inf or nan, or the method can't do it.
    """
    kept, new = method.prune_matrix(numbers_of(layer), sums)
    kept = layer.unmatrix(kept)
    value = layer.unmatrix(new).to(layer.weight.dtype).masked_fill(~kept, 0)
    if not bool(value.isfinite().all()):
        raise OptxError(f"prune: {layer.name!r} would be inf or nan in {value.dtype} once it is pruned.")
    return kept, value


def _handed(unit: Unit, output: Any) -> Tensor:
    found = hidden_of(output)
    assert found is not None, unit.path
    return found


class _Sums:
    """Of a unit's layers; what several are given together is multiplied once."""

    batch: Batch

    def __init__(self, unit: Unit, method: PruneMethod) -> None:
        self._layers = {layer.module: layer for layer in unit.layers}
        self._sums = {layer.module: layer.sums(method) for layer in unit.layers}
        self._last: tuple[Any, Tensor, int] = (None, torch.empty(0), 0)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer's call."""
        layer, sums = self._layers[module], self._sums[module]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        key = None if is_conv(module) else (x, x._version)
        if key is None or self._last[0] is None or self._last[0][0] is not x or self._last[0] != key:
            rows = layer.rows(x, self.batch.counted(x, layer.path))
            self._last = (key, summed(type(sums), rows), len(rows)) if len(rows) else (None, rows, 0)
        if self._last[2]:
            sums.add(self._last[1], self._last[2])

    def pop(self, layer: Layer) -> InputSums:
        """A layer's, which are not held any longer."""
        self._last = (None, torch.empty(0), 0)
        return self._sums.pop(layer.module)
