"""A model's blocks and categories, read from parameter names and shapes alone.

So a state dict on disk (`half_reset`) and a live model (`HFT`) are seen alike.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optx._errors import OptxError, near

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
        re.compile(
            r"(?:^|\.)(?:query|key|value|query_key_value|w?qkv|w?[qkvo])(?:_?(?:proj|lin\w*))?$",
            re.IGNORECASE,
        ),
    ),
)
VECTORS = ("norm", "vector")


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


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Items by key, in the order of their first appearance."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Every name as it is in the user's own model, without what DDP, compile, FSDP or checkpointing add."""
    names = list(names)
    kept = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
    while kept and all(name.startswith("module.") for name in kept):
        kept = [name.removeprefix("module.") for name in kept]
    return dict(zip(names, kept, strict=True))


def layers_of(
    shapes: Mapping[str, Sequence[int]], blocks: str | None = None, same: Mapping[str, str] | None = None
) -> list[Layer]:
    """The layers of a model, each with its block and category.

    Args:
        shapes: shape by (clean) parameter name, in the model's order.
        blocks: a regular expression that matches a block's whole name, where blocks can't be recognised.
        same: for each further name of a tensor that has several, the first one. The layers hold first
            names only; a tensor that is also used outside of the blocks (a tied head) belongs to none.

    Raises:
        OptxError: there are no blocks, or ``blocks`` matches nothing.
    """
    layers = [_layer(name, tensors, shapes) for name, tensors in grouped(shapes, _layer_name).items()]
    homes = _given_blocks(layers, blocks) if blocks is not None else _found_blocks(layers)
    if not homes:
        raise OptxError(_no_blocks(layers, blocks))
    pairs = (same or {}).items()
    outside = {first for name, first in pairs if not {_layer_name(name), _layer_name(first)} <= homes.keys()}
    again = {name for name, _ in pairs}
    placed: list[Layer] = []
    for layer in layers:
        own = [t for t in layer.tensors if t not in again]
        if own:
            once = _layer(layer.name, own, shapes)
            block = None if outside.intersection(own) else homes.get(layer.name)
            placed.append(_placed(once, block))
    return placed


def _layer_name(tensor: str) -> str:
    """The module of a tensor; a tensor without one, of a model that is one layer, stands for itself."""
    return _TENSOR.sub("", tensor) or tensor


def _layer(name: str, tensors: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> Layer:
    numel = sum(math.prod(shapes[t]) for t in tensors)
    return Layer(name, tuple(tensors), numel, max(len(shapes[t]) for t in tensors))


def _placed(layer: Layer, block: str | None) -> Layer:
    if block is None:
        category = "embedding" if _EMBEDDING.search(layer.name) else "outside"
        return replace(layer, category=category)
    category = _category(layer, block)
    return replace(layer, category=category, block=None if category == "embedding" else block)


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
    children = grouped(layers, lambda layer: prefix + layer.name[len(prefix) :].split(".", 1)[0])
    for container, names in grouped(children, lambda name: _list_name(name, prefix)).items():
        stack = {name: children[name] for name in names if _is_block(name, children[name])}
        found = container is not None and bool(stack) and _alike(stack)
        if found:
            inner = [_inner(name, inside, _kinds({name: inside})) for name, inside in stack.items()]
            # A list of stages (Swin, ResNet) is a list of lists of blocks.
            stacks += [s for part in inner for s in part] if all(inner) else [stack]
        for name in names:
            deeper = [layer for layer in children[name] if layer.name != name]
            if deeper and not (found and name in stack):
                _search(deeper, name + ".", stacks)


def _inner(name: str, layers: Sequence[Layer], kinds: set[str]) -> list[dict[str, list[Layer]]]:
    """The lists inside ``name`` whose entries each have what makes it a block: stages, not experts."""
    stacks: list[dict[str, list[Layer]]] = []
    _search(layers, name + ".", stacks)
    return [s for s in stacks if all(_kinds({block: own}) >= kinds for block, own in s.items())]


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
