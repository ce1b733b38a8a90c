"""Which tensors of a checkpoint are matrices to prune, where there are names and shapes but no modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from optx._errors import OptxError, near
from optx._quantised_entries import quantised
from optx._safetensors import Entry
from optx.inject._injection import Targets
from optx.pruning._prune_layers import without

_BLOCK = re.compile(r"(?:^|\.)\d+\.")
_NO_LAYER = re.compile(
    r"(?:.*\.)?(?:\w*embed\w*|wte|wpe|shared|lm_head|classifier|score|qa_outputs|relative_attention_bias|"
    r"gate|router|shared_expert_gate)(?:\..*)?"
)
"""Embeddings, heads, tables of positions and routers, by the names that transformers' models give them."""


@dataclass(frozen=True)
class Matrix:
    """A tensor as a matrix of outputs and inputs.

    Attributes:
        shape: the tensor's.
        transposed: whether inputs run along its first dimension, as in transformers' ``Conv1D``.
    """

    shape: tuple[int, ...]
    transposed: bool

    @property
    def inputs(self) -> int:
        """How many inputs an output has; of a convolution, all that its kernel sees."""
        numel = 1
        for size in self.shape[1:]:
            numel *= size
        return self.shape[0] if self.transposed else numel


def matrices(
    entries: Mapping[str, Entry],
    where: str,
    targets: str | None,
    exclude: Targets | None,
) -> dict[str, Matrix]:
    """The tensors to prune by name, with how they are matrices.

    Without ``targets``: weights of two or more dimensions inside of numbered blocks, but for embeddings.

    Args:
        entries: of the checkpoint.
        where: what it is, for messages.
        targets: a regex over names of modules, which are the tensors' without ``.weight``.
        exclude: which modules are left out, by names.

    Raises:
        OptxError: nothing is left, experts are in one tensor, ``targets`` is no regular expression, or a
            weight is quantised; names it.
    """
    try:
        re.compile(targets or "")
    except re.error as error:
        raise OptxError(f"prune: targets={targets!r} is not a regular expression ({error}).") from None
    _check_plain(entries, where)
    if targets is None:
        _check_no_stacks(entries, where)
    every = [name for name in entries if name.endswith("weight")]
    known = {name.removesuffix("weight").removesuffix("."): name for name in every}
    if targets is not None:
        chosen = {path: name for path, name in known.items() if re.fullmatch(targets, path)}
    else:
        chosen = {p: n for p, n in known.items() if _BLOCK.search(n) and not _NO_LAYER.fullmatch(p)}
    chosen = {p: n for p, n in chosen.items() if len(entries[n].shape) >= 2 and entries[n].numel}
    by_name = {path: nn.Module() for path in chosen}
    left = [chosen[path] for path in (without(by_name, exclude) if exclude else chosen)]
    if not left:
        paths = [path for path, name in known.items() if len(entries[name].shape) >= 2]
        what = f"that matches {targets!r}" if targets else "in numbered blocks (layers.0, ...)"
        raise OptxError(
            f"prune: {where} has no matrix {what}, but for what exclude= has; give targets=, a regex over "
            f"modules' names. {near(targets or 'layer', paths)}"
        )
    for name in left:
        if not entries[name].dtype.is_floating_point:
            raise OptxError(
                f"prune: {name!r} in {where} is {entries[name].dtype}, codes or a table, not weights; leave "
                "it out with exclude=, or prune before it is quantised."
            )
    turned = _transposed(entries, left)
    return {name: Matrix(entries[name].shape, name in turned) for name in left}


def _check_plain(entries: Mapping[str, Entry], where: str) -> None:
    for name, entry in entries.items():
        eight = entry.dtype.is_floating_point and entry.dtype.itemsize == 1
        if kind := quantised(name, entries) or ("float8" if eight else ""):
            raise OptxError(
                f"prune: {name!r} in {where} belongs to {kind} quantised weights: codes, not numbers. "
                "Dequantise the model (in transformers: model.dequantize()), save it, and prune that one."
            )


def _check_no_stacks(entries: Mapping[str, Entry], where: str) -> None:
    found = [n for n, e in entries.items() if len(e.shape) == 3 and n.endswith("_proj") and _BLOCK.search(n)]
    if found:
        raise OptxError(
            f"prune: {found[0]!r} in {where} is a stack of experts in one tensor ({len(found)} in all), "
            "which is not pruned; pass targets= to say that the rest is meant."
        )


def _transposed(entries: Mapping[str, Entry], names: list[str]) -> set[str]:
    """Those whose inputs run along the first dimension: a bias has as many numbers as there are outputs.

    Square ones, where it says nothing, are as others of the same last name, else as most of all.
    """
    sides = {name: _side(entries, name) for name in names}
    by_leaf: dict[str, Counter[int]] = {}
    for name, side in sides.items():
        by_leaf.setdefault(_leaf(name), Counter())[side] += 1
    every = sum(by_leaf.values(), Counter[int]())

    def turned(name: str) -> bool:
        side = sides[name]
        if side == 0:
            own = by_leaf[_leaf(name)]
            side = (own[-1] < own[1]) - (own[-1] > own[1]) or (every[-1] < every[1]) - (every[-1] > every[1])
        return side < 0

    return {name for name in names if len(entries[name].shape) == 2 and turned(name)}


def _side(entries: Mapping[str, Entry], name: str) -> int:
    """1 if outputs run along the first dimension, -1 if along the second, 0 if its bias can't tell."""
    shape, bias = entries[name].shape, entries.get(name.removesuffix("weight") + "bias")
    if len(shape) != 2 or bias is None or len(bias.shape) != 1 or shape[0] == shape[1]:
        return 0
    return 1 if bias.shape[0] == shape[0] else -1 if bias.shape[0] == shape[1] else 0


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
