"""LDLT as its paper writes it, with inverses and no care for time, and LipSDP's matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import optx


def papers_contraction(V: Tensor, alpha: float) -> Tensor:
    """U = V R^{-1}, R^T R = V^T V + alpha I."""
    eye = torch.eye(V.shape[1], dtype=V.dtype)
    return V @ torch.linalg.inv(torch.linalg.cholesky(V.T @ V + alpha * eye, upper=True))


def papers_root(V: Tensor, alpha: float) -> Tensor:
    """S with S^T S = 2 alpha (V V^T + alpha I)^{-1}."""
    eye = torch.eye(V.shape[0], dtype=V.dtype)
    return (2.0 * alpha) ** 0.5 * torch.linalg.inv(torch.linalg.cholesky(V @ V.T + alpha * eye))


def papers_chain(V: Sequence[Tensor], alpha: Sequence[float], L: float) -> list[Tensor]:
    """Sequential, slopes [0, 1]."""
    S = L * torch.eye(V[0].shape[1], dtype=V[0].dtype)
    found: list[Tensor] = []
    for one, a in zip(V[:-1], alpha[:-1], strict=True):
        found.append(2.0**0.5 * papers_contraction(one, a) @ S)
        S = papers_root(one, a)
    return [*found, papers_contraction(V[-1], alpha[-1]) @ S]


def released_chain(V: Sequence[Tensor], alpha: Sequence[float], L: float) -> list[Tensor]:
    """Defect 1 of the code that its first author released: it solves with L I where it has to multiply."""
    return papers_chain(V, alpha, 1.0 / L)


def papers_residual(
    V: Sequence[Tensor],
    V_out: Tensor,
    alpha: float,
    L: float,
    turned: bool = False,
    squared: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """C, A and B of the exact residual form.

    Args:
        turned: defect 2: D^{-1} = R^T R / (2 alpha) where it is R R^T, of the inputs' side.
        squared: defect 3: sum T T^T with T = Gamma D^{-1}, where Sigma has Gamma D^{-1} Gamma^T.
    """
    eye = torch.eye(V[0].shape[1], dtype=V[0].dtype)
    S, D_inv = L * eye, eye / L**2
    gamma, sigma = eye, torch.zeros_like(eye)
    C: list[Tensor] = []
    for one in V:
        sigma = sigma + ((gamma @ D_inv) @ (gamma @ D_inv).T if squared else gamma @ D_inv @ gamma.T)
        C.append(2.0**0.5 * papers_contraction(one, alpha) @ S)
        gamma = gamma @ D_inv @ C[-1].T
        P = torch.linalg.cholesky(one @ one.T + alpha * torch.eye(len(one), dtype=one.dtype))
        S = papers_root(one, alpha)
        D_inv = (P.T @ P if turned else P @ P.T) / (2.0 * alpha)
    U = papers_contraction(V_out, alpha)
    A = U[:, : len(eye)] @ torch.linalg.inv(torch.linalg.cholesky(sigma))
    root = torch.linalg.inv(torch.linalg.cholesky(D_inv)).T if turned else S
    return C, A, U[:, len(eye) :] @ root - A @ gamma


def lmi(
    C: Sequence[Tensor], L: float, A: Tensor | None, B: Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """LipSDP's quadratic form from the inequalities: L^2 |x|^2 - 2 sum of (w - low z)(high z - w) - |y|^2.

    Each is written by selectors of x and w_k, as matrices of the whole.
    """
    sizes = [C[0].shape[1] if C else B.shape[1], *(len(one) for one in C)]
    every = torch.eye(sum(sizes), dtype=B.dtype)
    E = list(every.split(sizes))
    form = L**2 * E[0].T @ E[0]
    for k, one in enumerate(C, 1):
        z, w = one @ E[k - 1], E[k]
        product = (w - low * z).T @ (high * z - w)
        form = form - (product + product.T)
    y = B @ E[-1] + (0.0 if A is None else A @ E[0])
    return form - y.T @ y


def least(form: Tensor) -> float:
    return float(torch.linalg.eigvalsh((form + form.T) / 2)[0])


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    """Linear layers with an activation between them: the layers are "0", "2", "4", ..."""
    torch.manual_seed(seed)
    found: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        found += [nn.Linear(before, after), activation()]
    return nn.Sequential(*found[:-1])


def layers(model: nn.Module) -> list[str]:
    return [path for path, one in model.named_modules() if type(one) in (nn.Linear, nn.Conv1d, nn.Conv2d)]


def spoil(handle: optx.Handle, scale: float, seed: int = 0) -> None:
    """Random V of a scale, and a around 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in handle.named_parameters():
            p.copy_(torch.randn(p.shape) * (scale if name.endswith("V") else 0.5))


def steepest(
    model: Callable[[Tensor], Tensor], size: Sequence[int], pairs: int, steps: int, seed: int = 0
) -> float:
    """The largest ratio over random pairs, and after ascent on the best of them; in float64."""
    torch.manual_seed(seed)

    def ratio(x: Tensor, y: Tensor) -> Tensor:
        return (model(x) - model(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)

    with torch.no_grad():
        x = torch.randn(pairs, *size, dtype=torch.float64)
        y = x + torch.randn(pairs, *size, dtype=torch.float64) * 10.0 ** torch.empty(
            pairs, *(1 for _ in size)
        ).uniform_(-2, 1)
        found = ratio(x, y)
    best = float(found.max())
    chosen = found.topk(16).indices
    ends = torch.stack([x[chosen], y[chosen]]).requires_grad_()
    optimizer = torch.optim.Adam([ends], lr=0.03)
    for _ in range(steps):
        value = ratio(ends[0], ends[1])
        best = max(best, value.max().item())
        (gradient,) = torch.autograd.grad(-value.log().sum(), ends)
        ends.grad = gradient
        optimizer.step()
    return best
