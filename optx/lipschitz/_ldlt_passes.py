"""A chain's weights with a backward pass of their own, of one Cholesky factor a layer and few solves.

With U_k = P_k^{-1} V_k and C_k = s U_k P_{k-1}^{-T}, what a loss does to the C reaches V_k as

    Ubar_k = s Cbar_k P_{k-1}^{-1},    Z_k = -(Ubar_k U_k^T + Cbar_{k+1}^T C_{k+1}),
    Vbar_k = P_k^{-T} (Ubar_k + sym(Z_k) U_k),

where sym mirrors the lower triangle: the factor's backward pass and the solves' fall together. A chain does
not change under (V, alpha) -> (t V, t^2 alpha), so that d loss / d log(alpha) = -<V, Vbar> / 2.
"""

# Letters are those of the paper.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from optx.lipschitz._ldlt_linalg import solve_triangular
from optx.lipschitz._ldlt_weights import Link, Roots, sequential

Make = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Link], float, Roots], list[Tensor]]
"""`sequential`, `residual` or `around_identity`."""


def weights(
    make: Make, V: Sequence[Tensor], a: Sequence[Tensor], links: Sequence[Link], L: float
) -> list[Tensor]:
    """The chain's weights in the dtype of V, float32 at least; a is log(alpha).

    Float64 where float32 would not do, and always under torch.compile, where nothing can be looked at.

    Raises:
        OptxError: there is no Cholesky factor in float64 either.
    """
    device = V[0].device.type
    with torch.autocast(device, enabled=False):
        dtype = torch.promote_types(V[0].dtype, torch.float32)
        if torch.compiler.is_compiling():
            made = _in(torch.float64, make, V, a, links, L, Roots(trusted=True))
            return [one.to(dtype) for one in made]
        if make is sequential and all(not link.groups and link.low == 0.0 for link in links) and _is_plain():
            return list(_Chain.apply(links, L, dtype, *V, *a))  # pyright: ignore
        return _in_enough(dtype, make, V, a, links, L)


def _is_plain() -> bool:
    """Whether no torch.func transform is at work, which a pass of its own would have to know."""
    return torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore


def _in(
    dtype: torch.dtype,
    make: Make,
    V: Sequence[Tensor],
    a: Sequence[Tensor],
    links: Sequence[Link],
    L: float,
    roots: Roots,
) -> list[Tensor]:
    return make([one.to(dtype) for one in V], [one.to(dtype).exp() for one in a], links, L, roots)


def _in_enough(
    dtype: torch.dtype, make: Make, V: Sequence[Tensor], a: Sequence[Tensor], links: Sequence[Link], L: float
) -> list[Tensor]:
    """Differentiated by autograd."""
    if dtype == torch.float32:
        roots = Roots()
        made = _in(dtype, make, V, a, links, L, roots)
        if roots.worst() <= Roots.MOST:
            return made
    roots = Roots()
    made = _in(torch.float64, make, V, a, links, L, roots)
    if math.isinf(roots.worst()):
        raise roots.refuse(links)
    return [one.to(dtype) for one in made]


class _Chain(torch.autograd.Function):
    """`sequential` of Linear layers behind activations of slopes [0, high]."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, links: Sequence[Link], L: float, dtype: torch.dtype, *given: Tensor
    ) -> tuple[Tensor, ...]:
        """C of every layer."""
        half = len(given) // 2
        roots = Roots()
        wide = dtype if dtype == torch.float64 else torch.float32
        made = _passed(links, L, [one.to(wide) for one in given], roots)
        if wide == torch.float32 and not roots.worst() <= Roots.MOST:
            roots = Roots()
            made = _passed(links, L, [one.double() for one in given], roots)
        if math.isinf(roots.worst()):
            raise roots.refuse(links)
        C, U, P = made
        ctx.links, ctx.L, ctx.half, ctx.dtype = links, L, half, dtype
        ctx.save_for_backward(*given, *C, *U, *P)
        return tuple(one.to(dtype) for one in C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of V and a."""
        n = ctx.half
        saved: list[Tensor] = list(ctx.saved_tensors)
        given, (C, U, P) = saved[: 2 * n], (saved[i * n : (i + 1) * n] for i in (2, 3, 4))
        if torch.is_grad_enabled():  # to be differentiated again: as autograd does it
            made = _in_enough(ctx.dtype, sequential, given[:n], given[n:], ctx.links, ctx.L)
            kept = [(one, grad) for one, grad in zip(made, grads, strict=True) if grad is not None]
            wanted = [one for one in given if one.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [one for one, _ in kept],
                    wanted,
                    [g for _, g in kept],
                    create_graph=True,
                    allow_unused=True,
                )
            )
            return None, None, None, *(next(found) if one.requires_grad else None for one in given)
        bars = [
            torch.zeros_like(c) if grad is None else grad.to(c.dtype)
            for c, grad in zip(C, grads, strict=True)
        ]
        V_bar = _back(ctx.links, ctx.L, given[n:], C, U, P, bars)
        V_bar = [bar.to(v.dtype) for bar, v in zip(V_bar, given, strict=False)]
        a_bar = [
            torch.dot(v.flatten(), bar.flatten()).mul(-0.5).view_as(a)
            for v, bar, a in zip(given[:n], V_bar, given[n:], strict=True)
        ]
        return None, None, None, *V_bar, *a_bar


def _shares(links: Sequence[Link], alpha: Sequence[Tensor], L: float) -> list[Tensor | float]:
    """s of each layer: what its U P^{-T} is multiplied by."""
    reach = [*(link.reach for link in links[:-1]), 1.0]
    return [
        reach[0] * L,
        *(one * (2.0 * a).sqrt() for one, a in zip(reach[1:], alpha[:-1], strict=True)),
    ]


def _passed(
    links: Sequence[Link], L: float, given: Sequence[Tensor], roots: Roots
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """C, U and P of every layer."""
    n = len(given) // 2
    V, alpha = given[:n], [one.exp() for one in given[n:]]
    C: list[Tensor] = []
    U: list[Tensor] = []
    P: list[Tensor] = []
    for k, (v, a, s) in enumerate(zip(V, alpha, _shares(links, alpha, L), strict=True)):
        turned = _is_turned(v, k == n - 1)
        P.append(roots.of(_gram(v.mT if turned else v, a)))
        U.append(
            solve_triangular(P[-1].mT, v, upper=True, left=False)
            if turned
            else solve_triangular(P[-1], v, upper=False)
        )
        C.append(s * (solve_triangular(P[k - 1].mT, U[-1], upper=True, left=False) if k else U[-1]))
    return C, U, P


def _is_turned(V: Tensor, is_last: bool) -> bool:
    """Whether a layer's contraction is V R^{-1}, by its inputs' Gram matrix: the last's, if smaller."""
    return is_last and V.shape[0] > V.shape[1]


def _back(
    links: Sequence[Link],
    L: float,
    a: Sequence[Tensor],
    C: Sequence[Tensor],
    U: Sequence[Tensor],
    P: Sequence[Tensor],
    bars: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of V, the last layer's first."""
    n = len(C)
    shares = _shares(links, [one.to(C[0].dtype).exp() for one in a], L)
    found: list[Tensor] = []
    for k in reversed(range(n)):
        U_bar = shares[k] * (solve_triangular(P[k - 1], bars[k], upper=False, left=False) if k else bars[k])
        if _is_turned(U[k], k == n - 1):
            Z = torch.mm(U_bar.mT, U[k]).neg_()
            found.append(solve_triangular(P[k], U_bar + U[k] @ _mirrored(Z), upper=False, left=False))
            continue
        Z = torch.mm(U_bar, U[k].mT).neg_()
        if k + 1 < n:
            Z.addmm_(bars[k + 1].mT, C[k + 1], alpha=-1)
        found.append(solve_triangular(P[k].mT, torch.addmm(U_bar, _mirrored(Z), U[k]), upper=True))
    return found[::-1]


def _mirrored(Z: Tensor) -> Tensor:
    """The lower triangle, on both sides; Z is written to."""
    low = Z.tril_()
    both = low + low.mT
    both.diagonal().mul_(0.5)
    return both


def _gram(V: Tensor, alpha: Tensor) -> Tensor:
    """V V^T + alpha I, in the memory of one matrix."""
    G = V @ V.mT
    G.diagonal().add_(alpha)
    return G
