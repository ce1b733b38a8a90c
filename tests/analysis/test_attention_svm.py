"""`optx.analysis.attention_svm` and `corr`: the properties of the paper, and other solvers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls
from torch import Tensor
from torch.nn.functional import normalize

import optx
from optx.analysis import AttentionSVM, attention_svm, corr

F64 = torch.float64


def drawn(n: int, T: int, d: int, seed: int, e: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Unit tokens, queries (a row of each sequence, or of another width) and chosen tokens."""
    g = torch.Generator().manual_seed(seed)
    X = normalize(torch.randn(n, T, d, generator=g, dtype=F64), dim=-1)
    z = X[:, 0] if e is None else torch.randn(n, e, generator=g, dtype=F64)
    return X, z, torch.randint(T, (n,), generator=g)


def rows_of(X: Any, z: Tensor, chosen: Any) -> Tensor:
    """(R, d e): the constraints' matrices, by loops."""
    rows = [
        torch.outer(x[int(a)] - x[t], q).flatten()
        for x, q, a in zip(X, z, chosen, strict=True)
        for t in range(len(x))
        if t != int(a)
    ]
    return torch.stack(rows)


def nuclear(W: Tensor) -> float:
    return float(torch.linalg.matrix_norm(W, "nuc"))


# ---- the paper's properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_one_sequence_of_two_tokens_is_in_closed_form(norm: Any) -> None:
    """Property 1: rank 1, so both norms' solution."""
    X = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], dtype=F64)
    found = attention_svm(X, torch.tensor([[1.0, 2.0]], dtype=F64), [0], norm)
    wanted = torch.tensor([[0.08, 0.16], [-0.04, -0.08]], dtype=F64)
    assert torch.allclose(found.W, wanted, atol=1e-9, rtol=0)
    assert found.value == pytest.approx(0.2, abs=1e-9)
    assert found.feasible
    assert found.support.tolist() == [True]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(6, 8, 10), (3, 4, 4), (5, 10, 15)])
def test_margins_are_1_and_w_is_the_sum_of_its_support(shape: tuple[int, int, int], seed: int) -> None:
    """Properties 2, 6 and 7."""
    X, z, chosen = drawn(*shape, seed)
    fro, nuc = (attention_svm(X, z, chosen, norm) for norm in ("fro", "nuc"))
    G = rows_of(X, z, chosen)
    margins = G @ fro.W.flatten()
    assert float(margins.min()) == pytest.approx(1.0, abs=1e-9)
    assert torch.allclose(margins, fro.margins, atol=1e-12)
    assert float(fro.duals.min()) >= 0.0
    assert torch.allclose((fro.duals @ G).view_as(fro.W), fro.W, atol=1e-10)
    assert float((fro.duals * (margins - 1.0)).abs().max()) < 1e-9  # only the support weighs
    assert torch.equal(fro.support, margins <= 1.0 + 1e-9)
    assert nuclear(nuc.W) <= nuclear(fro.W) * (1 + 1e-8)
    assert fro.value <= float(torch.linalg.matrix_norm(nuc.W)) * (1 + 1e-12)
    n, _, d = shape
    assert int(torch.linalg.matrix_rank(fro.W, tol=1e-7)) <= min(n, d)
    assert [(int(i), int(t)) for i, t in zip(fro.sequence, fro.token, strict=True)] == [
        (i, t) for i in range(n) for t in range(shape[1]) if t != int(chosen[i])
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_nuclear_norms_duals_prove_it(seed: int) -> None:
    """No feasible W has a norm below the multipliers' sum, since their matrix is 1 in spectral norm."""
    X, z, chosen = drawn(6, 8, 10, seed)
    found = attention_svm(X, z, chosen, "nuc")
    G = rows_of(X, z, chosen)
    assert float((G @ found.W.flatten()).min()) >= 1.0 - 1e-12
    assert float(found.duals.min()) >= 0.0
    assert float(torch.linalg.matrix_norm((found.duals @ G).view_as(found.W), 2)) <= 1.0 + 1e-12
    assert found.value == pytest.approx(nuclear(found.W), rel=1e-12)
    assert float(found.duals.sum()) == pytest.approx(found.value * (1 - found.gap), rel=1e-10)
    assert found.gap <= 1e-8


def test_scaling_tokens_by_s_scales_w_by_its_inverse() -> None:
    """Property 3, at scales whose squares differ by 1e12 too."""
    X, z, chosen = drawn(4, 5, 6, 0)
    for norm in ("fro", "nuc"):
        W = attention_svm(X, z, chosen, norm).W
        for s in (3.0, 1e-6, 1e5):
            assert torch.allclose(attention_svm(s * X, z, chosen, norm).W * s, W, atol=1e-6)
            assert torch.allclose(attention_svm(X, s * z, chosen, norm).W * s, W, atol=1e-6)


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_a_token_that_equals_the_chosen_one_is_infeasible(norm: Any) -> None:
    """Property 5: 0 >= 1, which is said and proved and does not raise."""
    X, z, chosen = drawn(3, 4, 5, 0)
    X[1, (int(chosen[1]) + 1) % 4] = X[1, chosen[1]]
    found = attention_svm(X, z, chosen, norm)
    assert not found.feasible
    assert bool(found.W.isnan().all())
    assert math.isnan(found.value)
    assert math.isnan(corr(found.W, torch.ones_like(found.W)))
    check_proof(found, X, z, chosen)


def check_proof(found: AttentionSVM, X: Any, z: Tensor, chosen: Any) -> None:
    assert float(found.duals.min()) >= 0.0
    assert float(found.duals.sum()) == pytest.approx(1.0)
    assert float((found.duals @ rows_of(X, z, chosen)).norm()) < 1e-5


def test_a_chosen_token_amid_others_is_infeasible() -> None:
    X = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]]], dtype=F64)
    z = torch.tensor([[1.0, 1.0]], dtype=F64)
    found = attention_svm(X, z, [0])
    assert not found.feasible
    check_proof(found, X, z, [0])
    assert attention_svm(X, z, [1]).feasible


def test_a_query_of_zeros_is_infeasible() -> None:
    X, z, chosen = drawn(3, 4, 5, 0)
    assert not attention_svm(X, torch.cat([z[:2], torch.zeros(1, 5, dtype=F64)]), chosen).feasible


def test_corr() -> None:
    """Property 3: of multiples 1 and -1, of any size."""
    W = torch.randn(5, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert corr(3e-200 * W, W) == pytest.approx(1.0, abs=1e-15)
    assert corr(-W, W) == pytest.approx(-1.0, abs=1e-15)
    assert corr(W.float() * 1e-30, W) == pytest.approx(1.0, abs=1e-13)
    V = torch.randn(5, 7, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert corr(V, W) == pytest.approx(float((V * W).sum() / V.norm() / W.norm()), abs=1e-15)
    assert corr(torch.zeros_like(W), W) == 0.0


# ---- other solvers -----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    n=st.integers(1, 5),
    T=st.integers(2, 6),
    d=st.integers(1, 8),
    e=st.none() | st.integers(1, 6),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float32, F64, torch.bfloat16]),
)
def test_it_is_what_scipys_nnls_says(
    n: int, T: int, d: int, e: int | None, seed: int, dtype: torch.dtype
) -> None:
    """Least-distance programming by the matrix itself, as the spec has it."""
    X, z, chosen = drawn(n, T, d, seed, e)
    X, z = X.to(dtype), z.to(dtype)
    found = attention_svm(X, z, chosen)
    G = rows_of(X.double(), z.double(), chosen).numpy()
    unit = np.linalg.norm(G, axis=1).max() or 1.0
    E = np.vstack([G.T / unit, np.ones(len(G))])
    f = np.zeros(len(E))
    f[-1] = 1.0
    u, _ = nnls(E, f, maxiter=1000)
    r = E @ u - f
    if -r[-1] < 1e-10:
        assert not found.feasible
        check_proof(found, X.double(), z.double(), chosen)
    elif -r[-1] > 1e-8:
        assert found.feasible
        wanted = torch.from_numpy(-r[:-1] / r[-1] / unit).view_as(found.W)
        assert torch.allclose(found.W, wanted, rtol=1e-6, atol=1e-6 * found.value)


def test_the_nuclear_norm_is_what_a_penalty_method_finds() -> None:
    """By factors, with scipy's BFGS and a growing penalty; it can but come from above."""
    X, z, chosen = drawn(3, 4, 4, 3)
    G = rows_of(X, z, chosen).numpy()

    def objective(flat: np.ndarray, weight: float) -> tuple[float, np.ndarray]:
        K, Q = flat[:16].reshape(4, 4), flat[16:].reshape(4, 4)
        short = np.maximum(1.0 - G @ (K @ Q.T).ravel(), 0.0)
        slope = -weight * (short @ G).reshape(4, 4)
        value = (flat @ flat) / 2 + weight * (short @ short) / 2
        return value, np.concatenate([(K + slope @ Q).ravel(), (Q + slope.T @ K).ravel()])

    flat = np.random.default_rng(0).normal(size=32)
    for weight in (1.0, 10.0, 1e2, 1e3, 1e4, 1e5):
        flat = minimize(objective, flat, (weight,), jac=True, method="BFGS", options={"maxiter": 2000}).x
    W = flat[:16].reshape(4, 4) @ flat[16:].reshape(4, 4).T
    found = attention_svm(X, z, chosen, "nuc")
    assert np.linalg.norm(W, "nuc") == pytest.approx(found.value, rel=1e-3)
    assert corr(torch.from_numpy(W), found.W) > 0.9999


def test_both_norms_are_what_cvxpy_says() -> None:
    cvxpy = pytest.importorskip("cvxpy")
    X, z, chosen = drawn(4, 6, 6, 5)
    for norm in ("fro", "nuc"):
        W = cvxpy.Variable((6, 6))
        margins = [(X[i, chosen[i]] - x).numpy() @ W @ z[i].numpy() for i in range(4) for x in X[i]]
        others = [m >= 1 for k, m in enumerate(margins) if k % 6 != int(chosen[k // 6])]
        value = cvxpy.Problem(cvxpy.Minimize(cvxpy.norm(W, norm)), others).solve()
        assert attention_svm(X, z, chosen, norm).value == pytest.approx(value, rel=1e-4)


# ---- a rank ------------------------------------------------------------------------------------------------


def test_a_rank_that_binds_costs_norm_and_one_that_does_not_nothing() -> None:
    X, z, chosen = drawn(6, 8, 10, 0)
    free = attention_svm(X, z, chosen, "nuc")
    own = int(torch.linalg.matrix_rank(free.W, tol=1e-5 * free.value))
    loose, tight = (attention_svm(X, z, chosen, "nuc", rank=k) for k in (own, own - 1))
    assert torch.equal(loose.W, free.W)
    assert int(torch.linalg.matrix_rank(tight.W, tol=1e-9)) == own - 1
    assert float(tight.margins.min()) == pytest.approx(1.0, abs=1e-9)
    assert free.value < tight.value < 1.5 * free.value
    assert tight.gap == math.inf
    assert bool(tight.duals.isnan().all())


def test_a_rank_below_all_solutions_is_told() -> None:
    X = torch.stack([torch.eye(4, dtype=F64)] * 4)
    with pytest.raises(optx.OptxError, match="no W of rank 1 was found"):
        attention_svm(X, torch.eye(4, dtype=F64), [0, 1, 2, 3], "nuc", rank=1)


# ---- what it is given --------------------------------------------------------------------------------------


def test_sequences_of_several_lengths_and_of_one_token() -> None:
    X, z, _ = drawn(3, 6, 8, 0)
    some = [X[0], X[1, :1], X[2, :3]]
    found = attention_svm(some, z, torch.tensor([5, 0, 1]))
    assert found.sequence.tolist() == [0] * 5 + [2] * 2
    assert found.token.tolist() == [0, 1, 2, 3, 4, 0, 2]
    assert torch.allclose(found.W, attention_svm([some[0], some[2]], z[[0, 2]], [5, 1]).W)


X3, Z3, C3 = drawn(2, 3, 4, 0)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "norm": ({"norm": "l2"}, optx.OptxError, "norm is 'l2'; it must be one of 'fro', 'nuc'"),
    "rank": ({"norm": "nuc", "rank": 0}, optx.OptxError, "rank is 0; it must be at least 1"),
    "rank of fro": ({"rank": 2}, optx.OptxError, "rank is 2 with norm='fro'"),
    "X flat": ({"X": X3[0]}, optx.ShapeError, r"X has shape \(3, 4\); it must be \(sequences, tokens"),
    "X empty": ({"X": []}, optx.OptxError, "X is empty"),
    "X of widths": ({"X": [X3[0], X3[1, :, :2]]}, optx.ShapeError, r"X\[1\] is \(3, 2\)"),
    "X int": ({"X": X3.long()}, optx.OptxError, r"X\[0\] is of dtype torch.int64"),
    "X nan": ({"X": X3 * math.nan}, optx.OptxError, r"X\[0\] holds inf or nan"),
    "X a number": ({"X": 3}, optx.OptxError, "X is a int"),
    "z of others": ({"z": Z3[:1]}, optx.ShapeError, r"z has shape \(1, 4\); for 2 sequences"),
    "z flat": ({"z": Z3[0]}, optx.ShapeError, r"z is \(4,\); it must be a tensor"),
    "chosen too large": ({"chosen": [0, 3]}, optx.OptxError, r"chosen\[1\] is 3; sequence 1 has 3 tokens"),
    "chosen negative": ({"chosen": [-1, 0]}, optx.OptxError, r"chosen\[0\] is -1"),
    "chosen of others": ({"chosen": [0]}, optx.ShapeError, r"chosen has shape \(1,\)"),
    "chosen floating": ({"chosen": [0.0, 1.0]}, optx.ShapeError, "dtype torch.float32"),
    "nothing": ({"X": X3[:, :1], "chosen": [0, 0]}, optx.OptxError, "nothing to separate"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    changed, kind, words = MISTAKES[case]
    with pytest.raises(kind, match=f"attention_svm: .*{words}"):
        attention_svm(**{"X": X3, "z": Z3, "chosen": C3, **changed})


def test_corrs_mistakes() -> None:
    with pytest.raises(optx.ShapeError, match=r"corr: A has shape \(2, 3\), B \(3, 2\)"):
        corr(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(optx.OptxError, match=r"corr: B is a tensor of dtype torch.int64"):
        corr(torch.ones(2), torch.ones(2).long())


def test_it_follows_neither_gradients_nor_the_generator() -> None:
    X, z, chosen = drawn(6, 8, 10, 0)
    before = torch.get_rng_state()
    with torch.no_grad():
        found = attention_svm(X.requires_grad_(), z, chosen, "nuc", rank=2)
    assert not found.W.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_found_is_one_line() -> None:
    X, z = torch.tensor([[[2.0, 0], [0, 1]]]), torch.tensor([[1.0, 2]])
    assert repr(optx.analysis.attention_svm(X, z, [0])) == (
        "AttentionSVM(fro: norm 0.2, gap 0, 1 of 1 constraints active)"
    )
    twice = optx.analysis.attention_svm(X[:, [0, 0]], z, [0])
    assert repr(twice) == "AttentionSVM(fro: infeasible, 1 constraints)"
