"""Edges of the interaction graph: squared attributions between two layers' features."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from optx.analysis.interaction._jacobian import check_reached, positions, pulled
from optx.analysis.interaction._passes import Passes, wide


class Basis(Protocol):
    """What is asked of a layer's basis."""

    @property
    def C(self) -> Tensor:
        """(d, dim)."""
        ...

    @property
    def C_pinv(self) -> Tensor:
        """(dim, d)."""
        ...

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        ...


def edges_between(
    passes: Passes, pair: tuple[str, str], bases: tuple[Basis, Basis], nodes: int, keep: int | None
) -> Tensor:
    """E (features of the later layer, of the earlier), float64.

    E_ij = 1/n sum_x ( int_0^1 d fhat_i(a fhat) / d fhat_j da  fhat_j )^2, with a sum over the earlier
    layer's positions inside the brackets and one over the later's outside.
    """
    earlier, later = bases
    C_out, C_pinv = later.C[:, :keep], earlier.C_pinv[:keep]
    total, n, rule = torch.zeros(C_out.shape[1], len(C_pinv)).to(C_pinv), 0, _rule(nodes)
    for batch in passes.batches():
        found, rows = torch.zeros(()).to(C_pinv), 0
        for a, weight in rule:
            part, rows = _at(passes, batch, pair, earlier, C_out, keep, a)
            found = found + weight * part
        total += found.square().sum((0, 1))
        n += rows
    return total / max(n, 1)


def _rule(nodes: int) -> list[tuple[float, float]]:
    """Places in (0, 1) and their weights; the end alone without nodes."""
    if not nodes:
        return [(1.0, 1.0)]
    x, w = np.polynomial.legendre.leggauss(nodes)
    return [(float(a), float(b)) for a, b in zip((x + 1) / 2, w / 2, strict=True)]


def _at(
    passes: Passes,
    batch: object,
    pair: tuple[str, str],
    earlier: Basis,
    C_out: Tensor,
    keep: int | None,
    a: float,
) -> tuple[Tensor, int]:
    """d fhat_i / d fhat_j  fhat_j at a share of the features, (B, later positions, i, j); and the rows."""
    features: list[Tensor] = []

    def shrunk(f: Tensor) -> Tensor:
        fhat = (wide(f) - earlier.mean) @ earlier.C
        features.append(fhat)
        return (earlier.mean + a * fhat @ earlier.C_pinv).to(f)

    one = passes.run(batch, pair, until=pair[1], change=shrunk)
    f, g = one.seen[pair[0]].value, one.seen[pair[1]].value
    fhat, kept = features[0][..., :keep], one.kept(f)
    if kept is not None:
        fhat = fhat * kept[..., None]
    C_pinv, C_out = earlier.C_pinv[:keep], C_out.to(g)
    B, P = len(g), positions(g)
    found = torch.zeros(B, P, C_out.shape[1], fhat.shape[-1]).to(fhat)
    kept_later = one.kept(g)
    for t in range(P):
        for i in range(C_out.shape[1]):
            v = torch.zeros_like(g).view(B, P, -1)
            v[:, t] = C_out[:, i]
            gradient = check_reached(passes.owner, pair[0], pulled(g, v.view_as(g), [f])[0], repr(pair[1]))
            each = wide(gradient) @ C_pinv.T * fhat
            found[:, t, i] = each.sum(1) if each.ndim > 2 else each
    if kept_later is not None:
        found = found * kept_later.reshape(B, P, 1, 1)
    return found, int(kept.sum()) if kept is not None else fhat[..., 0].numel()
