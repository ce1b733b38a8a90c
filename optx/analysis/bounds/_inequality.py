"""The matrix inequality of a system, its least rho for given multipliers, and its check with rounding errors.

With T = diag(t), slopes [a, b], p = P zeta what activations are given and q = E zeta what they return, every
true pair of inputs has 2 t (q - a p)(b p - q) >= 0 in each row. Of K(t), the matrix of minus their sum,
bound^2 is

    the least rho with  rho E_0^T E_0 + K(t) - O^T O >= 0   (positive semidefinite), over t >= 0.

Source: arXiv 2401.14033, equations 5 and 7; LipSDP: arXiv 1906.04893, theorem 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optx.analysis.bounds._system import Block, System

_UNIT = 2.0**-53  # of rounding, float64


@dataclass(frozen=True)
class Inequality:
    """The numbers of one inequality: inputs have ``inputs`` coordinates, and row i of P returns coordinate
    inputs + i.

    Attributes:
        inputs: d.
        P: (m, d + m).
        O: (p, d + m), of norm 1.
        low: (m,).
        high: (m,).
        cells: (m,) int64, which multiplier a row has.
        blocks: (m,) int64, which activation a row is of.
        scale: the bound is scale * sqrt(rho).
        is_box: the input is one number, that bounds a box (`System.row`).
    """

    inputs: int
    P: Tensor
    O: Tensor
    low: Tensor
    high: Tensor
    cells: Tensor
    blocks: Tensor
    scale: float
    is_box: bool = False

    @property
    def size(self) -> int:
        """Rows of the inequality."""
        return self.P.shape[1]

    @property
    def multipliers(self) -> int:
        """How many t there are."""
        return int(self.cells.max()) + 1 if len(self.cells) else 0

    def matrix(self, t: Tensor) -> Tensor:
        """K(t), (N, N)."""
        T, d, P = t[self.cells], self.inputs, self.P
        cross = -((self.low + self.high) * T)[:, None] * P
        K = 2 * P.T @ ((self.low * self.high * T)[:, None] * P)
        lower = torch.cat([torch.zeros(d, self.size, dtype=P.dtype), cross])
        diagonal = torch.cat([torch.zeros(d, dtype=P.dtype), 2 * T])
        return K + lower + lower.T + torch.diag(diagonal)

    def gain(self, t: Tensor) -> tuple[Tensor, Tensor] | None:
        """The (d, d) matrix whose largest eigenvalue is the least rho, and how far inside t lies.

        Of a box the least over all multiples of t: mu's sum times o^T N^-1 o. How far: the log determinant
        of the hidden block with its diagonal made 1, which is 0 at most, and -inf where no rho is enough.
        None beyond.
        """
        d, K = self.inputs, self.matrix(t)
        G = K if self.is_box else K - self.O.T @ self.O
        A, right = G[d:, d:], self.O[:, d:].T if self.is_box else G[d:, :d]
        L, failed = torch.linalg.cholesky_ex(A)
        if bool(failed) or not bool(L.isfinite().all()):
            return None
        half = torch.linalg.solve_triangular(L, right, upper=False)
        S = half.T @ half
        depth = 2 * L.diagonal().log().sum() - A.diagonal().log().sum()
        return (-K[:1, :1] * S if self.is_box else S - G[:d, :d]), depth

    def balanced(self, t: Tensor) -> Tensor:
        """The multiple of t that has its least rho; t itself but for a box."""
        if not self.is_box:
            return t
        K, o = self.matrix(t), self.O[0, 1:]
        return t * float(o @ torch.linalg.solve(K[1:, 1:], o)) * (1 + 1e-9)

    def least_rho(self, t: Tensor) -> float:
        """The least rho, but for rounding; inf where there is none."""
        found = self.gain(t)
        return float("inf") if found is None else float(torch.linalg.eigvalsh(found[0])[-1].clamp_min(0))

    def holds(self, t: Tensor, rho: float) -> bool:
        """Whether the inequality holds beyond rounding errors: a Cholesky factor of it exists, less a margin.

        If one of G - c I exists in floating point, G is positive semidefinite as soon as c is above the
        errors of the factorisation, (N + 2) u trace(G), and those of G's own sums (Rump, BIT 46, 2006,
        "Verification of positive definiteness").
        """
        P, T, N, d = self.P.abs(), t[self.cells], self.size, self.inputs
        ones = torch.ones(N, dtype=P.dtype)
        through = P.T @ (2 * (self.low * self.high).abs() * T * (P @ ones))
        cross = (self.low + self.high).abs() * T
        through += P.T @ cross + self.O.abs().T @ (self.O.abs() @ ones)
        through[d:] += cross * (P @ ones) + 2 * T
        through[:d] += rho
        G = self.matrix(t) - self.O.T @ self.O
        G.diagonal()[:d] += rho
        error = (N + len(P) + 64) * _UNIT * float(through.max())  # of a symmetric matrix: its largest row sum
        margin = 2 * (error + (N + 2) * _UNIT * float(G.diagonal().clamp_min(0).sum()))
        G.diagonal().sub_(margin)
        L, failed = torch.linalg.cholesky_ex(G)
        return not bool(failed) and bool(L.isfinite().all())

    def inside(self) -> Tensor | None:
        """Multipliers with which some rho is enough, one for each activation; None if none are found.

        From the last activation back, each is doubled until it outweighs what later ones make of it: this
        ends wherever no activation is fed by itself.
        """
        t = torch.zeros(self.multipliers, dtype=self.P.dtype)
        for block in self.blocks.unique().flip(0).tolist():
            rows = self.blocks == block
            first = self.inputs + int(rows.nonzero()[0])
            tau = 1.0
            while True:
                t[self.cells[rows]] = tau
                G = (self.matrix(t) - (0.0 if self.is_box else self.O.T @ self.O))[first:, first:]
                if not int(torch.linalg.cholesky_ex(G - 0.1 * tau * torch.eye(len(G), dtype=G.dtype))[1]):
                    break
                if not int(torch.linalg.cholesky_ex(G - 1e-3 * torch.eye(len(G), dtype=G.dtype))[1]):
                    break
                tau *= 2
                if tau > 2.0**60:
                    return None
        return t


def inequality(system: System, *, layers: bool) -> Inequality:
    """The inequality of a system.

    Args:
        system: with at least one activation.
        layers: one multiplier for each activation (LipSDP-Layer); else for each unit or group
        (LipSDP-Neuron).
    """
    p, o, kept = _without_the_dead(*_whole(system), system.inputs)
    rows = _Rows.of(system.blocks).chosen(kept)
    p, o, d = _rotated(p, o, system.inputs)
    p, o, scale = _scaled(p, o, d, rows.blocks)
    cells = torch.unique(rows.blocks if layers else rows.cells, return_inverse=True)[1]
    return Inequality(d, p, o, rows.low, rows.high, cells, rows.blocks, scale, system.is_box)


@dataclass(frozen=True)
class _Rows:
    low: Tensor
    high: Tensor
    cells: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, blocks: list[Block]) -> _Rows:
        none = [torch.zeros(0, dtype=torch.float64)]
        cells, numbers, first = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)], 0
        for number, block in enumerate(blocks):
            cells.append(block.cells + first)
            numbers.append(torch.full((block.rows,), number))
            first += block.rows
        low, high = (torch.cat(none + one) for one in ([b.low for b in blocks], [b.high for b in blocks]))
        return cls(low, high, torch.cat(cells), torch.cat(numbers))

    def chosen(self, which: Tensor) -> _Rows:
        return _Rows(self.low[which], self.high[which], self.cells[which], self.blocks[which])


def _whole(system: System) -> tuple[Tensor, Tensor]:
    """P and O over all coordinates."""
    sizes = [system.inputs, *(block.rows for block in system.blocks)]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    N = sum(sizes)

    def placed(terms: dict[int, Tensor], rows: int) -> Tensor:
        out = torch.zeros(rows, N, dtype=torch.float64)
        for block, matrix in terms.items():
            out[:, starts[block] : starts[block] + sizes[block]] = matrix
        return out

    rows = [placed(block.terms, block.rows) for block in system.blocks]
    P = torch.cat([torch.zeros(0, N, dtype=torch.float64), *rows])
    return P, placed(system.output, system.outputs)


def _without_the_dead(p: Tensor, o: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Without units that are given nothing, or that nothing reads; their multipliers would grow without
    end."""
    kept = torch.arange(len(p))
    while True:
        given = (p != 0).any(1)
        own = torch.zeros(p.shape, dtype=torch.bool)
        own[torch.arange(len(p)), d + torch.arange(len(p))] = True
        read = ((p != 0) & ~own).any(0)[d:] | (o != 0).any(0)[d:]
        alive = given & read
        if bool(alive.all()):
            return p, o, kept
        columns = torch.cat([torch.ones(d, dtype=torch.bool), alive])
        p, o, kept = p[alive][:, columns], o[:, columns], kept[alive]


def _rotated(p: Tensor, o: Tensor, d: int) -> tuple[Tensor, Tensor, int]:
    """With as few input coordinates as are seen: turned into the row space of what reads them."""
    seen = torch.cat([p[:, :d], o[:, :d]])
    if d <= len(seen):
        return p, o, d
    basis = torch.linalg.qr(seen.T).Q  # (d, r): directions orthogonal to it change nothing
    return (
        torch.cat([p[:, :d] @ basis, p[:, d:]], 1),
        torch.cat([o[:, :d] @ basis, o[:, d:]], 1),
        basis.shape[1],
    )


def _scaled(p: Tensor, o: Tensor, d: int, blocks: Tensor) -> tuple[Tensor, Tensor, float]:
    """Coordinates in units in which what each activation is given has norm 1, and the output has."""
    p, o = p.clone(), o.clone()
    for block in blocks.unique().tolist():
        rows = (blocks == block).nonzero().flatten()
        unit = float(torch.linalg.matrix_norm(p[rows][:, : d + int(rows[0])], 2)) if d + int(rows[0]) else 1.0
        unit = unit or 1.0
        p[rows] /= unit
        p[:, d + rows] *= unit
        o[:, d + rows] *= unit
    scale = float(torch.linalg.matrix_norm(o, 2)) if o.numel() else 0.0
    return p, o / (scale or 1.0), scale
