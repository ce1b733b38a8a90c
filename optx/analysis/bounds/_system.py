"""A network as what certificates need of it: linear maps between activations, and each activation's slopes.

Coordinates are increments: of the input (block 0), then of each activation's output. A value in the network
is a linear map of them, kept block by block; biases never enter.

An activation that permutes or reflects groups (MaxMin, GroupSort, Householder) keeps one part of each group
(its sum; what is orthogonal to v), and maps the rest with slope at most 1. The part that is kept goes on as a
linear map, and only the rest is a new block. That is the paper's constraint with its multipliers of the kept
part let to infinity, in fewer coordinates: its P and S have nothing left to do.

Source: arXiv 2401.14033, section 4 and appendix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Terms = dict[int, Tensor]  # block -> (rows, coordinates of the block), float64


@dataclass(frozen=True)
class Value:
    """What a node of the graph is: a map of coordinates, its shape without the batch, and its naive bound."""

    terms: Terms
    shape: tuple[int, ...]
    gain: float


@dataclass(frozen=True)
class Slopes:
    """An elementwise activation: each difference quotient lies in [low, high].

    Attributes:
        low: (n,) float64.
        high: (n,) float64.
    """

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Groups:
    """An activation that acts on groups: it keeps one part of each, and is 1-Lipschitz in the rest.

    Attributes:
        index: (N, g), where each group's units lie.
        free: (N, f, g), orthonormal rows: the directions that are not kept.
        max_gain: the Lipschitz constant in the l_inf norm.
    """

    index: Tensor
    free: Tensor
    max_gain: float


@dataclass(frozen=True)
class Block:
    """One activation: what it is given, and the slopes of its rows.

    Attributes:
        name: where it is in the model.
        terms: what it is given, as a map of the coordinates; of its own block too in an implicit network.
        low: (rows,) least slope.
        high: (rows,) largest slope.
        cells: (rows,) int64; rows of one cell have one multiplier in every method, as those of a group.
    """

    name: str
    terms: Terms
    low: Tensor
    high: Tensor
    cells: Tensor

    @property
    def rows(self) -> int:
        """How many coordinates it adds."""
        return len(self.low)


@dataclass(frozen=True)
class System:
    """A network, or a part of one between two cuts.

    Attributes:
        inputs: coordinates of the input.
        blocks: its activations, in order; the first is block 1.
        output: the output, as a map of all coordinates.
        is_box: one of `row`.
    """

    inputs: int
    blocks: list[Block]
    output: Terms
    is_box: bool = False

    @property
    def outputs(self) -> int:
        """How many numbers it returns."""
        return len(next(iter(self.output.values())))

    def row(self, number: int) -> System:
        """The same with one output, and with one input of which all old inputs are made.

        |dx_i| <= 1 for all i is what a slope in [-1, 1] says of dx_i against a coordinate that is 1: the
        bound from l_inf to one output is that from this coordinate (the paper's constraint with its
        multipliers mu).
        """
        box = torch.ones(self.inputs, dtype=torch.float64)
        first = Block("the input", {0: box[:, None]}, -box, box, torch.arange(self.inputs))
        later = [Block(one.name, _shifted(one.terms), one.low, one.high, one.cells) for one in self.blocks]
        output = _shifted({block: matrix[number : number + 1] for block, matrix in self.output.items()})
        return System(1, [first, *later], output, is_box=True)


def _shifted(terms: Terms) -> Terms:
    return {block + 1: matrix for block, matrix in terms.items()}


@dataclass
class Builder:
    """The blocks so far of a system that is being read."""

    inputs: int
    blocks: list[Block] = field(default_factory=list[Block])

    def start(self) -> Terms:
        """The input."""
        return {0: torch.eye(self.inputs, dtype=torch.float64)}

    def slopes(self, name: str, terms: Terms, activation: Slopes) -> Terms:
        """The output of an elementwise activation; units whose two slopes are one are linear, and no
        block."""
        low, high = activation.low, activation.high
        bent = low != high
        out = {k: torch.where(bent, 0.0, low)[:, None] * m for k, m in terms.items()}
        if not bool(bent.any()):
            return out
        rows = {k: m[bent] for k, m in terms.items()}
        selector = torch.eye(len(low), dtype=torch.float64)[:, bent]
        out = {k: m for k, m in out.items() if bool((m != 0).any())}
        return out | {self._add(name, rows, low[bent], high[bent]): selector}

    def groups(self, name: str, terms: Terms, activation: Groups) -> Terms:
        """The output of an activation of groups: what is kept of its input, and the rest as a block."""
        index, free = activation.index, activation.free
        N, f, g = free.shape
        # (N f, n): each row takes one free direction of one group.
        take = torch.zeros(N * f, N * g, dtype=torch.float64)
        take.scatter_(1, index[:, None].expand(N, f, g).reshape(N * f, g), free.reshape(N * f, g))
        rows = {k: take @ m for k, m in terms.items()}
        kept = {k: m - take.T @ rows[k] for k, m in terms.items()}
        one = torch.ones(N * f, dtype=torch.float64)
        return kept | {self._add(name, rows, -one, one, torch.arange(N).repeat_interleave(f)): take.T}

    def implicit(self, name: str, terms: Terms, W: Tensor, activation: Slopes) -> Terms:
        """z of z = phi(W z + terms)."""
        number = self._add(name, terms, activation.low, activation.high)
        terms[number] = W  # the block is given itself
        return {number: torch.eye(len(W), dtype=torch.float64)}

    def _add(self, name: str, terms: Terms, low: Tensor, high: Tensor, cells: Tensor | None = None) -> int:
        cells = torch.arange(len(low)) if cells is None else cells
        self.blocks.append(Block(name, terms, low, high, cells))
        return len(self.blocks)
