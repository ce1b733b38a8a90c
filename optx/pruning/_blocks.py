"""Pruning by what layers are given: block after block, each fed by the pruned blocks before it.

Within a block all inputs are the dense block's, as in Wanda's and SparseGPT's code; then it is pruned, and
its outputs computed anew for the next. Held are the activations between two blocks, and one block's sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    walk = Walk(model, method, batches, ledger)
    walk(layers, bar)
    return walk.bits


def units_of(step: Step) -> Sequence[Unit]:
    """The blocks of a step."""
    return step.units if isinstance(step, Chain) else (step,)


@dataclass(frozen=True)
class Fed:
    """What one block is given: of each batch hidden states, and the rest of its call."""

    module: nn.Module
    batches: Sequence[Batch]
    hidden: Sequence[Tensor]
    calls: Sequence[Call]

    def __len__(self) -> int:
        return len(self.batches)

    def output(self, i: int) -> Tensor:
        """The hidden states that the block makes of a batch; it may write to what it is given, in a copy."""
        found = hidden_of(self.calls[i](self.module, self.hidden[i].clone()))
        assert found is not None
        return found


class Walk:
    """Goes through a model and prunes it.

    Attributes:
        bits: masks of what is pruned so far, packed.
    """

    def __init__(
        self, model: nn.Module, method: PruneMethod, batches: Sequence[Batch], ledger: Ledger | None = None
    ) -> None:
        self.model, self.method, self.batches, self.ledger = model, method, batches, ledger
        self.bits: Bits = {}

    def __call__(self, layers: Sequence[Layer], bar: Callable[[Iterable[str]], Iterable[str]]) -> None:
        """Prune these layers; ``bar`` shows how far it is, given the blocks' names."""
        with as_in_use(self.model):
            steps = plan(self.model, dict(paths_of(self.model).modules), layers, self.batches)
            self.check(steps)
            units = self._units(steps)
            for path in bar([unit.path for step in steps for unit in units_of(step)]):
                unit = next(units)
                assert unit.path == path

    def check(self, steps: Sequence[Step]) -> None:
        """Before anything is changed."""

    def _units(self, steps: Sequence[Step]) -> Iterator[Unit]:
        for step in steps:
            if isinstance(step, Chain):
                yield from self._chain(step)
            else:
                self.finish(step, lambda sums, unit=step: self._by_running(unit, sums))
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
            fed = Fed(unit.module, self.batches, hidden, [call[number] for call in calls])
            if unit.layers:
                self.block(unit, fed)
            if unit is not chain.units[-1]:
                for i in range(len(fed)):
                    hidden[i] = fed.output(i)
            yield unit

    def block(self, unit: Unit, fed: Fed) -> None:
        """Prune a block by what it is fed."""

        def feed(sums: Sums) -> None:
            for i, batch in enumerate(fed.batches):
                sums.batch = batch
                fed.output(i)

        self.finish(unit, feed)

    def _by_running(self, unit: Unit, sums: Sums) -> None:
        """What is in no chain: the whole model, as far as the unit."""

        def stop(*_: Any) -> None:
            raise Reached

        with hooked({}, {unit.module: stop} if unit.calls == 1 else {}):
            for batch in self.batches:
                sums.batch = batch
                run(self.model, batch)

    def finish(self, unit: Unit, feed: Callable[[Sums], None]) -> None:
        """Prune a unit, or take it from what was done before."""
        done = self.ledger.take(unit) if self.ledger is not None else None
        if done is None:
            sums = Sums(unit, self.method)
            with hooked(dict.fromkeys((layer.module for layer in sums.layers), sums.enter)):
                feed(sums)
            # All of it before any of it is written: what is interrupted has whole blocks, kept and pruned.
            made = {layer: self.prune(layer, sums.pop(layer)) for layer in unit.layers}
            done = {layer.name: pack(kept).cpu() for layer, (kept, _) in made.items()}
            if self.ledger is not None:
                self.ledger.put(unit, {layer.name: new for layer, (_, new) in made.items()}, done)
            for layer, (_, new) in made.items():
                layer.weight.copy_(new)
        self.bits |= done

    def prune(self, layer: Layer, sums: InputSums | None) -> tuple[Tensor, Tensor]:
        """The mask of a layer's weight and its new value."""
        if sums is not None and not sums.tokens:
            warn(
                f"optx.prune: {layer.path!r} sees no token any more once what comes before it is pruned; "
                "its inputs are taken to be all alike, so that it is pruned by magnitude."
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


class Sums:
    """Of a unit's layers, if the method needs any; what several are given together is multiplied once.

    Attributes:
        batch: which runs now.
        layers: those that are summed over.
    """

    batch: Batch

    def __init__(self, unit: Unit, method: PruneMethod) -> None:
        self.layers = unit.layers if method.needs_inputs else ()
        self._sums = {layer.module: (layer, layer.sums(method)) for layer in self.layers}
        self._last: tuple[Any, Tensor, int] = (None, torch.empty(0), 0)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer's call."""
        layer, sums = self._sums[module]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        # Under inference_mode tensors don't know whether they were written to.
        key = None if is_conv(module) or x.is_inference() else (x, x._version)
        known = self._last[0]
        if key is None or known is None or known[0] is not x or known[1] != key[1]:
            rows = layer.rows(x, self.batch.counted(x, layer.path))
            self._last = (key, summed(type(sums), rows), len(rows)) if len(rows) else (None, rows, 0)
        if self._last[2]:
            sums.add(self._last[1], self._last[2])

    def pop(self, layer: Layer) -> InputSums | None:
        """A layer's, which are not held any longer."""
        self._last = (None, torch.empty(0), 0)
        return self._sums.pop(layer.module)[1] if self.layers else None
