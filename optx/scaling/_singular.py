"""Largest singular values of a model's matrices: block power iteration, many matrices of one shape at once.

A block of k orthonormal vectors V is multiplied by W and then by W^T, and made orthonormal again. The values
that W has within the block (Rayleigh-Ritz) grow towards its largest singular values, never past them. A block
forgets its start as (sigma_{k+1} / sigma_1)^2 to the number of iterations, where a single vector does as
(sigma_2 / sigma_1)^2, at the same traffic: W is read twice an iteration, whatever k is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx._names import whole
from optx.scaling._parameters import made_of_it

# Numbers that are copied next to each other for one batched product; a larger matrix is read where it lies.
_TOGETHER = 2**18


@dataclass(frozen=True, eq=False)
class Matrices:
    """A parameter, seen as matrices.

    Attributes:
        name: the parameter's.
        parameter: it.
        shape: how many matrices, rows, columns.
        each: whether each matrix is one of its own (experts), or all are blocks of one (groups of a
            convolution).
    """

    name: str
    parameter: Tensor
    shape: tuple[int, int, int]
    each: bool = False

    def read(self) -> Tensor:
        """(count, rows, columns), float32 or wider; a sharded one is gathered: all ranks must call."""
        full = whole(self.parameter.detach())
        return full.to(torch.promote_types(full.dtype, torch.float32)).reshape(self.shape)

    def names(self) -> list[str]:
        """What is reported: one name, or one for each expert."""
        return [f"{self.name}[{i}]" for i in range(self.shape[0])] if self.each else [self.name]


@dataclass(frozen=True)
class TopValue:
    """The largest singular value of one matrix: an estimate, from below.

    Attributes:
        value: the estimate; it is at most the true one (but for rounding), and nan if the matrix has inf or
            nan.
        residual: ``r = |W^T W v - value^2 v| / value^2``: some singular value, though not surely the largest,
            lies between ``value * sqrt(1 - r)`` and ``value * sqrt(1 + r)``. It is 0 for a matrix of zeros.
        iterations: that were made on this matrix.
        converged: whether the residual is within the tolerance that was asked for.
        shape: rows and columns.
    """

    value: float
    residual: float
    iterations: int
    converged: bool
    shape: tuple[int, int]


def matrices_of(model: nn.Module, embeddings: bool) -> tuple[list[Matrices], dict[str, str]]:
    """A model's matrices, each tensor once; and why parameters with two dimensions or more are left out."""
    kinds, places = _modules_of_parameters(model), dict(model.named_modules())
    found: list[Matrices] = []
    left_out: dict[str, str] = {}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        path, _, leaf = name.rpartition(".")
        if made_of_it(path, places[path], leaf, places):
            left_out[name] = "what a parametrization computes the weight from"
        elif isinstance(reason := _as_matrices(name, p, kinds[id(p)], embeddings), str):
            left_out[name] = reason
        else:
            found.append(reason)
    return found, left_out


def _modules_of_parameters(model: nn.Module) -> dict[int, list[nn.Module]]:
    """By the id of a parameter, the modules that hold it: a tied one has several."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(module)
    return holders


def _as_matrices(name: str, p: Tensor, holders: Sequence[nn.Module], embeddings: bool) -> Matrices | str:
    if p.is_meta:
        return "on the meta device"
    if not p.is_floating_point() or p.layout != torch.strided or p.dtype.itemsize == 1:
        return f"{p.dtype}, {p.layout}: not a dense floating tensor"
    if p.numel() == 0:
        return "empty"
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in holders):
        return Matrices(name, p, (1, p.shape[0], p.shape[1])) if embeddings else "an embedding"
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in holders):  # pyright: ignore[reportPrivateUsage]
        return _convolution(name, p, holders)
    if p.ndim == 2:
        return Matrices(name, p, (1, p.shape[0], p.shape[1]))
    if p.ndim == 3 and p.shape[0] > 1:
        return Matrices(name, p, (p.shape[0], p.shape[1], p.shape[2]), each=True)
    return f"of shape {tuple(p.shape)}, which is no matrix and no stack of experts"


def _convolution(name: str, p: Tensor, holders: Sequence[nn.Module]) -> Matrices:
    """Kernels as (groups, rows, inputs x positions); in a transposed one the rows are inputs."""
    convs = [m for m in holders if isinstance(m, nn.modules.conv._ConvNd)]  # pyright: ignore[reportPrivateUsage]
    groups = convs[0].groups if p.shape[0] % convs[0].groups == 0 else 1
    rows = p.shape[0] // groups
    return Matrices(name, p, (groups, rows, p.numel() // p.shape[0]))


@dataclass
class Block:
    """One parameter's vectors, from iteration to iteration.

    Attributes:
        matrices: what they belong to.
        v: (count, columns, k), orthonormal.
    """

    matrices: Matrices
    v: Tensor

    @classmethod
    def start(cls, matrices: Matrices, k: int) -> Block:
        """The same vectors for the same number of columns, from a generator of their own."""
        count, _, columns = matrices.shape
        generator = torch.Generator().manual_seed(columns)
        p = matrices.parameter
        dtype = torch.promote_types(p.dtype, torch.float32)
        v = torch.linalg.qr(torch.randn(columns, min(k, columns), generator=generator, dtype=torch.float64))[
            0
        ]
        return cls(matrices, v.to(p.device, dtype).expand(count, -1, -1).clone())


def iterate(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration on matrices of one shape.

    Args:
        w: (count, rows, columns), float32 or 64.
        v: (count, columns, k), orthonormal, of w's dtype.

    Returns:
        The largest singular value within the block and its residual, both (count,), and the next block. Of a
        matrix that holds inf or nan, nan, and the block as it was.
    """
    scale = torch.maximum(w.amax((1, 2)), -w.amin((1, 2)))  # vector_norm takes several times as long on a CPU
    finite = scale.isfinite()
    if not bool(finite.all()):
        w = torch.where(finite[:, None, None], w, 0)
    # Divided by its largest entry after each product: squares of 1e25 would overflow, those of 1e-25 vanish.
    unit = torch.where(finite & (scale > 0), scale, 1)[:, None, None]
    y = (w @ v) / unit
    z = (y.mT @ w).mT / unit  # not w.mT @ y, which takes five times as long on a CPU
    values, rotation = torch.linalg.eigh(y.mT @ y)
    square, top = values[:, -1].clamp_min(0), rotation[:, :, -1:]
    off = torch.linalg.vector_norm(z @ top - square[:, None, None] * (v @ top), dim=(1, 2))
    residual = torch.where(square > 0, off / torch.where(square > 0, square, 1), 0)
    sigma = square.sqrt() * unit[:, 0, 0]
    nan = torch.full_like(sigma, torch.nan)
    moved = torch.where((finite & (square > 0))[:, None, None], torch.linalg.qr(z)[0], v)
    return torch.where(finite, sigma, nan), torch.where(finite, residual, nan), moved


def sweep(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """One iteration on every block of one shape, dtype and device; moves their vectors.

    Returns:
        Values and residuals, both (sum of counts,).
    """
    ws = [block.matrices.read() for block in blocks]
    w = ws[0] if len(ws) == 1 else torch.cat(ws)
    counts = [block.matrices.shape[0] for block in blocks]
    sigma, residual, v = iterate(w, torch.cat([block.v for block in blocks]))
    for block, part in zip(blocks, v.split(counts), strict=True):
        block.v = part
    return sigma, residual


def batches(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks that one batched product serves: alike, and small enough to be worth copying together."""
    alike: dict[object, list[Block]] = {}
    for block in blocks:
        key = (block.matrices.shape[1:], block.v.shape[2], block.v.dtype, block.v.device)
        alike.setdefault(key, []).append(block)
    for some in alike.values():
        batch: list[Block] = []
        for block in some:
            numbers = sum(b.matrices.parameter.numel() for b in batch) + block.matrices.parameter.numel()
            if batch and numbers > _TOGETHER:
                yield batch
                batch = []
            batch.append(block)
        yield batch


def top_values(blocks: Sequence[Block], iterations: int, tol: float) -> dict[str, TopValue]:
    """Iterate on each batch of blocks until all residuals in it are within ``tol``, or so many times."""
    found: dict[str, TopValue] = {}
    for batch in batches(blocks):
        sigma, residual = sweep(batch)
        made = 1
        while made < iterations and float(residual.max()) > tol:  # nan ends it too
            sigma, residual = sweep(batch)
            made += 1
        found |= named(batch, sigma.tolist(), residual.tolist(), made, tol)
    return found


def named(
    batch: Sequence[Block], sigma: Sequence[float], residual: Sequence[float], made: int, tol: float
) -> dict[str, TopValue]:
    """Values by name; of the blocks of one matrix (a convolution's groups) the largest."""
    found: dict[str, TopValue] = {}
    at = 0
    for block in batch:
        m = block.matrices
        pairs = list(zip(sigma[at : at + m.shape[0]], residual[at : at + m.shape[0]], strict=True))
        at += m.shape[0]
        if not m.each:  # nan is no maximum's business: one block of nan makes the matrix nan
            pairs = [max(pairs, key=lambda pair: (pair[0] != pair[0], pair[0]))]
        for name, (value, off) in zip(m.names(), pairs, strict=True):
            found[name] = TopValue(value, off, made, off <= tol, m.shape[1:])
    return found


def refuse_nonfinite(owner: str, values: Mapping[str, TopValue]) -> None:
    """Raise if a matrix holds inf or nan, or is so large that its singular value does not fit."""
    bad = [name for name, top in values.items() if not top.value < float("inf")]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise OptxError(f"{owner}: {bad[0]!r}{more} holds inf or nan; it has no singular values.")
