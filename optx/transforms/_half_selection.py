"""Half of a model: a reproducible draw, the table that shows it, and Half-Reset."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_choice, check_range, check_whole, near
from optx.transforms._blocks import VECTORS, Layer, clean_names, grouped, layers_of

Level = Literal["category", "layer", "model"]
Balance = Literal["count", "params"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Draw:
    """What to draw; equal draws of equal layers are equal on every machine and rank.

    Args:
        ratio: the share that is trained. A block's category of n layers trains floor(n * ratio) or one more;
            as many blocks train one more as come nearest to the share of all blocks' layers, the lower
            number in a tie. So an odd pool at ratio 0.5 trains a little less than half.
        level: ``"category"`` draws within every category of every block, ``"layer"`` whole blocks,
            ``"model"`` all matrices of the model from one pool, and all norms from another.
        balance: ``"count"`` draws each layer with the same chance; ``"params"`` the same number of layers,
            but among the sets whose share of numbers (not of layers) is nearest to ``ratio``.
        seed: with ``round``, the seed of a generator of its own.
        round: the round.

    Raises:
        OptxError: an argument out of range.
    """

    ratio: float = 0.5
    level: Level = "category"
    balance: Balance = "count"
    seed: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        check_range("HFT", "ratio", self.ratio, 0.0, 1.0)
        for argument, number in (("seed", self.seed), ("round", self.round)):
            object.__setattr__(self, argument, check_whole("HFT", argument, number))
        check_range("HFT", "round", self.round, 0)
        check_choice("HFT", "level", self.level, get_args(Level))
        check_choice("HFT", "balance", self.balance, get_args(Balance))

    def of(self, layers: Sequence[Layer]) -> set[str]:
        """Names of the layers to train, among those that belong to a block."""
        # Seeded by text (sha512), and used through random() only: both are promised to stay as they are.
        rng = random.Random(f"{self.seed}/{self.round}")
        share = Fraction(str(float(self.ratio)))
        pool = [layer for layer in layers if layer.block is not None]
        if self.level == "layer":
            blocks = grouped(pool, lambda layer: layer.block)
            sizes = {name: sum(layer.numel for layer in inside) for name, inside in blocks.items()}
            chosen = self._pick(sizes, _nearest(len(sizes) * share), share, rng)
            return {layer.name for layer in pool if layer.block in chosen}
        if self.level == "model":
            pools = grouped(pool, lambda layer: layer.category in VECTORS).values()
            counts = [_nearest(len(layers) * share) for layers in pools]
        else:
            pools, counts = self._category_pools(pool, share, rng)
        chosen: set[str] = set()
        for layers, count in zip(pools, counts, strict=True):
            chosen |= self._pick({layer.name: layer.numel for layer in layers}, count, share, rng)
        return chosen

    def _category_pools(
        self, pool: Sequence[Layer], share: Fraction, rng: random.Random
    ) -> tuple[list[list[Layer]], list[int]]:
        """One pool per block and category, and how many of each to train."""
        in_blocks = grouped(pool, lambda layer: (layer.category, layer.block))
        pools: list[list[Layer]] = []
        counts: list[int] = []
        # Pools of one category and size share their remainder: 1.5 of 3 is 2 in half of the blocks.
        for alike in grouped(in_blocks.values(), lambda layers: (layers[0].category, len(layers))).values():
            down, rest = divmod(len(alike[0]) * share, 1)
            up = set(_shuffled(range(len(alike)), rng)[: _nearest(len(alike) * rest)])
            pools += alike
            counts += [down + (i in up) for i in range(len(alike))]
        return pools, counts

    def _pick(self, sizes: Mapping[Key, int], count: int, share: Fraction, rng: random.Random) -> set[Key]:
        if self.balance == "count" or len(set(sizes.values())) < 2:
            return set(_shuffled(sizes, rng)[:count])
        target = share * sum(sizes.values())
        # The first of the best among many draws: uniform over the best sets, and sure to find one where
        # there are few (2 of 4); where there are many, near enough.
        draws = [_shuffled(sizes, rng)[:count] for _ in range(256)]
        return set(min(draws, key=lambda names: abs(sum(sizes[name] for name in names) - target)))


def _nearest(x: Fraction) -> int:
    """The nearest whole number, the lower one in a tie."""
    return math.ceil(x - Fraction(1, 2))


def _shuffled(items: Iterable[Key], rng: random.Random) -> list[Key]:
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


@dataclass(frozen=True)
class Ratio:
    """A share, counted in layers (a matrix with its bias, or a norm) and in numbers."""

    count: float
    params: float


@dataclass(frozen=True)
class Row:
    """One parameter in a `Selection`.

    Attributes:
        name: as in ``model.named_parameters()``, without DDP's and compile's prefixes.
        layer: what it was drawn with: a matrix and its bias are one layer.
        category: ``attention``, ``ffn``, ``norm``, ...; ``embedding`` and ``outside`` are always trained.
        block: the name of its block, or "".
        numel: how many numbers it has.
        trainable: whether it is trained in this round.
        drawn: whether the draw decided that.
    """

    name: str
    layer: str
    category: str
    block: str
    numel: int
    trainable: bool
    drawn: bool


class Selection:
    """What a round trains: a table with one `Row` per parameter. Print it."""

    def __init__(self, rows: Iterable[Row], round: int) -> None:
        self.rows = tuple(rows)
        self.round = round

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that are trained."""
        return tuple(row.name for row in self.rows if row.trainable)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that are not."""
        return tuple(row.name for row in self.rows if not row.trainable)

    @property
    def ratio(self) -> Ratio:
        """The share of what was drawn from that is trained; nan where there was nothing to draw from."""
        return self.ratio_of()

    def ratio_of(self, category: str | None = None) -> Ratio:
        """The same within one category."""
        drawn = [row for row in self.rows if row.drawn and category in (None, row.category)]
        trained = [row for row in drawn if row.trainable]
        layers, numbers = len({row.layer for row in drawn}), sum(row.numel for row in drawn)
        return Ratio(
            len({row.layer for row in trained}) / layers if layers else math.nan,
            sum(row.numel for row in trained) / numbers if numbers else math.nan,
        )

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<Selection of round {self.round}: {len(self.trainable)} of {len(self)} tensors trained>"

    def __str__(self) -> str:
        table = [("name", "category", "block", "trainable")]
        table += [(row.name, row.category, row.block or "-", _word(row)) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        for category in dict.fromkeys(row.category for row in self.rows if row.drawn):
            ratio = self.ratio_of(category)
            lines.append(f"{category}: {ratio.count:.1%} of the layers, {ratio.params:.1%} of the numbers")
        total = sum(row.numel for row in self.rows)
        trained = sum(row.numel for row in self.rows if row.trainable)
        lines.append(f"round {self.round}: {trained:,} of {total:,} numbers trained ({trained / total:.1%})")
        return "\n".join(lines)


def _word(row: Row) -> str:
    if row.drawn:
        return "yes" if row.trainable else "no"
    return "always" if row.trainable else "never"  # never: frozen by the person


def half_reset(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    seed: int = 0,
    ratio: float = 0.5,
    level: Level = "category",
    balance: Balance = "count",
    blocks: str | None = None,
) -> dict[str, Tensor]:
    """Put a random half of a tuned model back to what it was before tuning (Half-Reset).

    The selection is that of `HFT` in round 0 with the same arguments: what HFT would train stays tuned.

    Source: arXiv 2404.18466, section 2 (the pilot experiment).

    Args:
        base: state dict before tuning; may hold more.
        tuned: state dict after tuning.
        seed: of the draw.
        ratio: the share that stays tuned.
        level: see `Draw`.
        balance: see `Draw`.
        blocks: see `layers_of`.

    Returns:
        A new state dict with ``tuned``'s keys; its tensors are those of ``base`` and ``tuned``, not copies.

    Raises:
        OptxError: no blocks, a bad argument, or a tensor to be reset is not in ``base``.
        ShapeError: a tensor has another shape in ``base``.
    """
    clean = clean_names(tuned)
    same = _shared({clean[name]: tensor for name, tensor in tuned.items()})
    layers = layers_of({clean[name]: tensor.shape for name, tensor in tuned.items()}, blocks, same)
    kept = Draw(ratio, level, balance, seed).of(layers)
    reset = {t for layer in layers if layer.block and layer.name not in kept for t in layer.tensors}
    return {
        name: _earlier(base, name, tensor) if same.get(clean[name], clean[name]) in reset else tensor
        for name, tensor in tuned.items()
    }


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name of memory that has a name already, that first name."""
    first: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    for name, t in tensors.items():
        if t.numel() and t.data_ptr():
            earlier = first.setdefault((t.device, t.data_ptr(), t.shape, t.stride()), name)
            if earlier != name:
                same[name] = earlier
    return same


def _earlier(base: Mapping[str, Tensor], name: str, tuned: Tensor) -> Tensor:
    if name not in base:
        raise OptxError(f"half_reset: {name!r} is not in the base's state dict. {near(name, base)}")
    old: torch.Size = base[name].shape
    if old != tuned.shape:
        raise ShapeError(
            f"half_reset: {name!r} has shape {tuple(old)} in the base and {tuple(tuned.shape)} in the tuned "
            "model. Give two state dicts of one architecture."
        )
    return base[name]
