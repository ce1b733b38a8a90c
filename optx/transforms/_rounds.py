"""What a round of HFT trains: the tensors that its draw decided on, by name in the model."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from optx.step.transform import Group
from optx.transforms._blocks import Layer, clean_names, layers_of
from optx.transforms._half_selection import Draw, Row


@dataclass(frozen=True)
class Round:
    """What was drawn when a round began; it stays until the next, whatever is frozen or added meanwhile.

    Attributes:
        known: the model's tensors then.
        drawn: those that the draw decided on.
        trained: those of them that are trained.
        checksum: of the names that were trained then.
    """

    known: Set[str] = frozenset()
    drawn: Set[str] = frozenset()
    trained: Set[str] = frozenset()
    checksum: int = 0

    def with_thawed(self, names: Iterable[str]) -> Round:
        """The same, with some of what was drawn trained after all."""
        return replace(self, trained=self.trained | (self.drawn & set(names)))

    def with_new(self, new: Round) -> Round:
        """The same, with what was drawn of tensors that came since."""
        known, drawn, trained = self.known | new.known, self.drawn | new.drawn, self.trained | new.trained
        return replace(self, known=known, drawn=drawn, trained=trained)

    def rows(
        self,
        layers: Iterable[Layer],
        params: Mapping[str, nn.Parameter],
        wish: Mapping[str, bool],
        left_out: Set[str],
    ) -> list[Row]:
        """What becomes of every parameter: the draw decides where the person wants it trained."""
        rows: dict[str, Row] = {}
        for layer in layers:
            for name in layer.tensors:
                drawn = name in self.drawn and wish[name] and name not in left_out
                trainable = name in self.trained if drawn else wish[name]
                numel = params[name].numel()
                rows[name] = Row(name, layer.name, layer.category, layer.block or "", numel, trainable, drawn)
        return [rows[name] for name in params]


class SavedRound(NamedTuple):
    """A round in numbers, as every param group has them, and so every checkpoint."""

    round: int
    seed: int
    steps: int  # taken in it
    selection: int = 0  # the checksum of its draw; 0: not known
    kept: int = 0  # how many of the frozen have state

    def found_in(self, group: Group, name: str) -> SavedRound:
        """What a group has under ``optx.<name>.``; these numbers where it has none."""
        return SavedRound(*(int(group.get(f"optx.{name}.{k}", v)) for k, v in self._asdict().items()))


def draw_round(
    draw: Draw, layers: Sequence[Layer], names: Collection[str], unwanted: Set[str], undrawn: Set[str]
) -> Round:
    """A round's draw.

    Args:
        draw: what to draw.
        layers: of the model.
        names: of its tensors.
        unwanted: those that the person froze.
        undrawn: others that are not drawn from: left out, or known already.
    """
    out = unwanted | undrawn
    pool = [layer for layer in layers if not set(layer.tensors) <= out]
    chosen = draw.of(pool)
    blocks = [layer for layer in pool if layer.block is not None]
    drawn = {t for layer in blocks for t in layer.tensors if t not in out}
    trained = drawn & {t for layer in blocks if layer.name in chosen for t in layer.tensors}
    kept = [name for name in names if (name in trained if name in drawn else name not in unwanted)]
    return Round(frozenset(names), drawn, trained, zlib.crc32("\n".join(kept).encode()))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By clean name, each once; read anew each time, since parameter objects may be replaced."""
    named = dict(model.named_parameters())
    clean = clean_names(named)
    return {clean[name]: p for name, p in named.items()}


class ModelLayers:
    """A model's layers, found anew where its tensors are others than before.

    Args:
        blocks: a regular expression that matches the blocks' names, if they are not to be recognised.
    """

    def __init__(self, blocks: str | None) -> None:
        self.pattern = blocks
        self._looked_at: Any = None
        self._found: list[Layer] = []

    def of(self, model: nn.Module) -> list[Layer]:
        """The layers.

        Raises:
            OptxError: there are no blocks.
        """
        named = dict(model.named_parameters(remove_duplicate=False))
        clean = clean_names(named)
        first: dict[Tensor, str] = {}
        same = {clean[name]: first.setdefault(p, clean[name]) for name, p in named.items()}
        shapes = {clean[name]: tuple(p.shape) for name, p in named.items()}
        if (shapes, same) != self._looked_at:  # with 10,000 experts it takes a second
            again = {name: other for name, other in same.items() if name != other}
            self._found = layers_of(shapes, self.pattern, again)
            self._looked_at = (shapes, same)
        return self._found
