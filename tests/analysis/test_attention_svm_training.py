"""Attention trained by normalised gradients comes to the direction of `optx.analysis.attention_svm`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

import optx
from optx.analysis import attention_svm, corr

F64 = torch.float64


def drawn(seeds: int, n: int, T: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit tokens (S, n, T, d), heads (S, d) and labels (S, n) of one run a seed."""
    found = list[tuple[Tensor, Tensor, Tensor]]()
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        X = normalize(torch.randn(n, T, d, generator=g, dtype=F64), dim=-1)
        v = normalize(torch.randn(d, generator=g, dtype=F64), dim=0)
        found.append((X, v, torch.randint(2, (n,), generator=g).double() * 2 - 1))
    X, v, Y = zip(*found, strict=True)
    return torch.stack(X), torch.stack(v), torch.stack(Y)


def scores(W: Tensor, X: Tensor) -> Tensor:
    """X W z with z each sequence's first token, (S, n, T)."""
    return torch.einsum("sntd,sde,sne->snt", X, W, X[:, :, 0])


def loss_of(logits: Tensor, X: Tensor, v: Tensor, Y: Tensor) -> Tensor:
    """The runs' mean logistic losses, added: one has no part in another's gradient.

    What the head says of tokens counts from what it says of the heaviest: then gradients keep all their
    digits, however full softmax is, and no floor is needed above where float64 ends.
    """
    heads = torch.einsum("sntd,sd->snt", X, v)
    own = heads.gather(-1, logits.argmax(-1, keepdim=True))
    return softplus(-Y * (own[..., 0] + (logits.softmax(-1) * (heads - own)).sum(-1))).mean(-1).sum()


def test_w_comes_to_the_frobenius_norms() -> None:
    """The paper's figure 3: the choice is that which softmax has made in the end."""
    X, v, Y = drawn(4, 6, 8, 10)
    Ws = [nn.Parameter(torch.zeros(10, 10, dtype=F64)) for _ in X]
    opt = optx.wrap(torch.optim.SGD(Ws, lr=0.1), optx.NormalizedGrad())
    for _ in range(1000):
        opt.zero_grad()
        loss_of(scores(torch.stack(list(Ws)), X), X, v, Y).backward()
        opt.step()
    weights = scores(torch.stack(list(Ws)).detach(), X).softmax(-1)
    assert float(weights.amax(-1).mean()) > 0.99
    for W, x, chosen in zip(Ws, X, weights.argmax(-1), strict=True):
        found = attention_svm(x, x[:, 0], chosen)
        assert found.feasible
        assert corr(W, found.W) > 0.99
        assert corr(W.T, found.W) < 0.6  # the orientation matters


def test_k_and_q_come_to_the_nuclear_norms() -> None:
    """And not to the Frobenius norm's; they begin at 0.1 randn and 0, as in the authors' code."""
    X, v, Y = drawn(4, 6, 8, 10)
    g = torch.Generator().manual_seed(0)
    Ks = [nn.Parameter(0.1 * torch.randn(10, 10, generator=g, dtype=F64)) for _ in X]
    Qs = [nn.Parameter(torch.zeros(10, 10, dtype=F64)) for _ in X]
    opt = optx.wrap(torch.optim.SGD([*Ks, *Qs], lr=0.1), optx.NormalizedGrad(floor=1e-250))
    for _ in range(500):
        opt.zero_grad()
        loss_of(scores(torch.stack(list(Ks)) @ torch.stack(list(Qs)).mT, X), X, v, Y).backward()
        opt.step()
    W = torch.stack(list(Ks)).detach() @ torch.stack(list(Qs)).detach().mT
    chosen = scores(W, X).argmax(-1)
    with_fro, with_nuc = (
        [corr(w, attention_svm(x, x[:, 0], c, norm).W) for w, x, c in zip(W, X, chosen, strict=True)]
        for norm in ("fro", "nuc")
    )
    assert sum(with_nuc) / 4 > 0.92  # .974 .988 .802 .951
    assert sum(with_fro) / 4 < 0.85  # .786 .885 .771 .885
    assert min(a - b for a, b in zip(with_nuc, with_fro, strict=True)) > 0.02


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_saturation_is_frozen_by_the_floor(fused: bool) -> None:
    """Softmax over two tokens is full after 60 steps; from there on it is rounding that is followed."""
    X = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    z, v = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    wanted = attention_svm(X[None], z[None], [0]).W
    corrs = dict[float | None, list[float]]()
    for floor in (None, 0.0):
        W = nn.Parameter(torch.zeros(2, 2, dtype=F64))
        opt = optx.wrap(torch.optim.SGD([W], lr=0.1), optx.NormalizedGrad(floor=floor), fused=fused)
        corrs[floor] = []
        for step in range(1, 401):
            opt.zero_grad()
            softplus(-(v @ X.T @ torch.softmax(X @ W @ z, 0))).backward()
            opt.step()
            if step in (60, 80, 100, 200, 400):
                corrs[floor].append(corr(W, wanted))
        if floor is None:
            assert opt.metrics()["normalized_grad/frozen"] == 1.0
    assert corrs[None] == pytest.approx([1.0] * 5, abs=1e-7)
    assert corrs[0.0][0] == pytest.approx(1.0, abs=1e-9)
    assert min(corrs[0.0]) < 0.999
