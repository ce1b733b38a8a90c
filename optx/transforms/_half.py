"""Half of a model: its blocks and categories, read from parameter names, and a reproducible draw of a share.

Only names and shapes are looked at, so a state dict on disk (`half_reset`) and a live model (`HFT`) give the
same selection for the same seed.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_range, near

Level = Literal["category", "layer", "model"]
Balance = Literal["count", "params"]
Key = TypeVar("Key", bound=Hashable)

# What a tensor is to its layer: the layer's name is what is left of it, so that a bias follows its matrix.
_TENSOR = re.compile(r"[._]?(?:parametrizations\.)?(weight|bias)(?:_[gv]|\.original\d*)?$")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_INDEX = re.compile(r"((?:\w*(?:layer|block|stage)_?)?)(\d+)$", re.IGNORECASE)  # 3, layer3, encoder_layer_3

# First match wins; all are searched in the layer's name inside its block.
_EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e$|rel\w*_(?:pos\w*_)?bias|pos\w*_bias|rel_pos", re.IGNORECASE)
_NORM = re.compile(r"norm|(?:^|[._])(?:ln|bn|gn|rms)(?:[._\d]|$)", re.IGNORECASE)
_MATRICES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("cross_attention", re.compile(r"cross\w*att|EncDecAtt|enc\w*_att|multihead_attn", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention", re.IGNORECASE)),
    ("router", re.compile(r"router|(?:^|\.)gate$", re.IGNORECASE)),
    (
        "ffn",
        re.compile(
            r"mlp|ffn|feed_?forward|DenseReluDense|expert|intermediate|(?:^|\.)(?:ff(?:\.|$)|output\.dense$"
            r"|(?:fc|linear|lin)_?(?:\d|in|out)$|w[123]$|wi_\d$|(?:up|gate|down|gate_up)_proj$|c_fc$"
            r"|dense_h_to_4h$|dense_4h_to_h$)",
            re.IGNORECASE,
        ),
    ),
    (
        "attention",
        re.compile(r"(?:^|\.)(?:query|key|value|qkv|w?[qkvo])(?:_?(?:proj|lin\w*))?$", re.IGNORECASE),
    ),
)
_VECTORS = ("norm", "vector")


@dataclass(frozen=True)
class Layer:
    """What is drawn as one: a matrix with its bias (a fused qkv too), a norm, or a bare tensor.

    Attributes:
        name: of the module, or of a bare tensor.
        tensors: parameter names.
        numel: numbers in all its tensors.
        dims: the most dimensions that one of them has.
        category: ``attention``, ``cross_attention``, ``ffn``, ``router``, ``norm``, ``matrix`` (another
            matrix), ``vector`` (another bare vector), ``embedding`` or ``outside`` (of all blocks).
        block: the block's name; None for what is never drawn.
    """

    name: str
    tensors: tuple[str, ...]
    numel: int
    dims: int
    category: str = "outside"
    block: str | None = None


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
        check_range("HFT", "round", self.round, 0)
        for argument, value, choices in (
            ("level", self.level, get_args(Level)),
            ("balance", self.balance, get_args(Balance)),
        ):
            if value not in choices:
                wanted = ", ".join(map(repr, choices))
                raise OptxError(f"HFT: {argument} is {value!r}; it must be one of {wanted}.")

    def of(self, layers: Sequence[Layer]) -> set[str]:
        """Names of the layers to train, among those that belong to a block."""
        # Seeded by text (sha512), and used through random() only: both are promised to stay as they are.
        rng = random.Random(f"{int(self.seed)}/{int(self.round)}")
        share = Fraction(str(float(self.ratio)))
        pool = [layer for layer in layers if layer.block is not None]
        if self.level == "layer":
            blocks = _grouped(pool, lambda layer: layer.block)
            sizes = {name: sum(layer.numel for layer in inside) for name, inside in blocks.items()}
            chosen = self._pick(sizes, _nearest(len(sizes) * share), share, rng)
            return {layer.name for layer in pool if layer.block in chosen}
        if self.level == "model":
            pools = _grouped(pool, lambda layer: layer.category in _VECTORS).values()
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
        in_blocks = _grouped(pool, lambda layer: (layer.category, layer.block))
        pools: list[list[Layer]] = []
        counts: list[int] = []
        # Pools of one category and size share their remainder: 1.5 of 3 is 2 in half of the blocks.
        for alike in _grouped(in_blocks.values(), lambda layers: (layers[0].category, len(layers))).values():
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


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# ---- blocks ----------------------------------------------------------------------------------------------


def clean_names(names: Sequence[str]) -> dict[str, str]:
    """Every name as it is in the user's own model, without what DDP, compile, FSDP or checkpointing add."""
    kept = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
    while kept and all(name.startswith("module.") for name in kept):
        kept = [name.removeprefix("module.") for name in kept]
    return dict(zip(names, kept, strict=True))


def layers_of(
    shapes: Mapping[str, Sequence[int]], blocks: str | None = None, always: Iterable[str] = ()
) -> list[Layer]:
    """The layers of a model, each with its block and category.

    Args:
        shapes: shape by (clean) parameter name, in the model's order.
        blocks: a regular expression that matches a block's whole name, where blocks can't be recognised.
        always: parameters never to draw: those also used outside of their block.

    Raises:
        OptxError: there are no blocks, or ``blocks`` matches nothing.
    """
    layers = [
        Layer(
            name or tensors[0],  # a model that is one layer has tensors without a prefix
            tuple(tensors),
            sum(math.prod(shapes[t]) for t in tensors),
            max(len(shapes[t]) for t in tensors),
        )
        for name, tensors in _grouped(shapes, lambda tensor: _TENSOR.sub("", tensor)).items()
    ]
    homes = _given_blocks(layers, blocks) if blocks is not None else _found_blocks(layers)
    if not homes:
        raise OptxError(_no_blocks(layers, blocks))
    never = set(always)
    return [_placed(layer, homes.get(layer.name), never) for layer in layers]


def _placed(layer: Layer, block: str | None, never: set[str]) -> Layer:
    if block is None:
        category = "embedding" if _EMBEDDING.search(layer.name) else "outside"
        return Layer(layer.name, layer.tensors, layer.numel, layer.dims, category)
    category = _category(layer, block)
    drawn = category != "embedding" and not never.intersection(layer.tensors)
    return Layer(layer.name, layer.tensors, layer.numel, layer.dims, category, block if drawn else None)


def _category(layer: Layer, block: str) -> str:
    """The category of a layer, by its name inside the block (the block's own name may say anything)."""
    inside = layer.name.removeprefix(block).removeprefix(".")
    if _EMBEDDING.search(inside):
        return "embedding"
    if layer.dims <= 1:
        is_norm = _NORM.search(inside) or any(t.endswith("weight") for t in layer.tensors)
        return "norm" if is_norm else "vector"
    return next((category for category, words in _MATRICES if words.search(inside)), "matrix")


def _given_blocks(layers: Sequence[Layer], pattern: str) -> dict[str, str]:
    try:
        words = re.compile(rf"(?:{pattern})(?=\.|$)")
    except re.error as error:
        raise OptxError(f"HFT: blocks={pattern!r} is no regular expression: {error}.") from error
    found = {layer.name: words.match(layer.name) for layer in layers}
    return {name: match[0] for name, match in found.items() if match and match[0]}


def _found_blocks(layers: Sequence[Layer]) -> dict[str, str]:
    """Block name by layer name."""
    stacks: list[dict[str, list[Layer]]] = []
    _search(layers, "", stacks)
    with_attention = [s for s in stacks if "attention" in _kinds(s)]
    # Beside transformer blocks, other lists (a convolutional stem, a head) are not what the paper halves.
    return {
        layer.name: block
        for stack in with_attention or stacks
        for block, own in stack.items()
        for layer in own
    }


def _search(layers: Sequence[Layer], prefix: str, stacks: list[dict[str, list[Layer]]]) -> None:
    """Collect the outermost lists of blocks under a module."""
    children = _grouped(layers, lambda layer: _child(layer.name, prefix))
    for numbered in _grouped(children, lambda name: _list_name(name, prefix)).items():
        container, names = numbered
        stack = {name: children[name] for name in names if _is_block(name, children[name])}
        if container is not None and stack and _alike(stack):
            inner = [_inner(name, inside, _kinds({name: inside})) for name, inside in stack.items()]
            # A list of stages (Swin, ResNet) is a list of lists of blocks.
            stacks += [s for part in inner for s in part] if all(inner) else [stack]
            names = [name for name in names if name not in stack]
        for name in names:
            if any(layer.name != name for layer in children[name]):
                _search([layer for layer in children[name] if layer.name != name], name + ".", stacks)


def _inner(name: str, layers: Sequence[Layer], kinds: set[str]) -> list[dict[str, list[Layer]]]:
    """The lists inside of ``name`` whose entries each have what makes it a block; a list of experts has not."""
    stacks: list[dict[str, list[Layer]]] = []
    _search(layers, name + ".", stacks)
    return [s for s in stacks if all(_kinds({block: own}) >= kinds for block, own in s.items())]


def _child(name: str, prefix: str) -> str:
    return prefix + name[len(prefix) :].split(".", 1)[0]


def _list_name(child: str, prefix: str) -> str | None:
    """The list that a child is an entry of, if it is numbered."""
    match = _INDEX.fullmatch(child[len(prefix) :])
    return prefix + match[1] if match else None


def _is_block(name: str, layers: Sequence[Layer]) -> bool:
    """Whether an entry of a list holds a matrix in a module of its own; a list of plain layers has none."""
    return any(
        layer.dims >= 2 and layer.name != name and _category(layer, name) != "embedding" for layer in layers
    )


def _alike(stack: Mapping[str, Sequence[Layer]]) -> bool:
    """Whether every entry shares a layer's name with another one: else it is a chain of unlike parts."""
    insides = {name: {layer.name[len(name) :] for layer in own} for name, own in stack.items()}
    count = Counter(inside for names in insides.values() for inside in names)
    return len(stack) == 1 or all(any(count[inside] > 1 for inside in names) for names in insides.values())


def _kinds(stack: Mapping[str, Sequence[Layer]]) -> set[str]:
    found = {_category(layer, name) for name, own in stack.items() for layer in own}
    return found & {"attention", "ffn"} or found & {"matrix"}


def _no_blocks(layers: Sequence[Layer], blocks: str | None) -> str:
    names = [layer.name for layer in layers]
    if blocks is not None:
        return f"HFT: blocks={blocks!r} matches no module. {near(blocks, names)}"
    shown = ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
    return (
        "HFT: no list of blocks found. Looked for numbered modules ('layers.0', 'h.0', 'block.0', 'layer_0', "
        f"any ModuleList) with matrices in modules of their own; the model has {shown or 'no parameters'}. "
        r"Name the blocks with a regular expression: blocks=r'hidden\.\d+'."
    )


# ---- Half-Reset ------------------------------------------------------------------------------------------


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
    clean = clean_names(list(tuned))
    layers = layers_of({clean[name]: tensor.shape for name, tensor in tuned.items()}, blocks)
    kept = Draw(ratio, level, balance, seed).of(layers)
    reset = {
        t for layer in layers if layer.block is not None and layer.name not in kept for t in layer.tensors
    }
    return {name: _earlier(base, name, t) if clean[name] in reset else t for name, t in tuned.items()}


def _earlier(base: Mapping[str, Tensor], name: str, tuned: Tensor) -> Tensor:
    if name not in base:
        raise OptxError(f"half_reset: {name!r} is not in the base's state dict. {near(name, base)}")
    old: torch.Size = base[name].shape
    if old != tuned.shape:
        raise ShapeError(
            f"half_reset: {name!r} has shape {tuple(old)} in the base and {tuple(tuned.shape)} in the tuned model; "
            "give two state dicts of one architecture."
        )
    return base[name]
