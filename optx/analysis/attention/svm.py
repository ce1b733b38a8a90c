"""The support vector machine that attention trained to the end converges to.

Source: Tarzanagh, Li, Thrampoulidis, Oymak, "Transformers as Support Vector Machines", arXiv 2308.16898,
problems (Att-SVM) and (Att-SVM⋆), theorems 1 and 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_choice, check_whole
from optx.analysis._directions import cosine
from optx.analysis.attention._algebra import length, nuclear, singular_values
from optx.analysis.attention._constraints import Constraints
from optx.analysis.attention._least_distance import least_distance
from optx.analysis.attention._low_rank import least_of_rank
from optx.analysis.attention._nuclear import Certified, least_nuclear

Norm = Literal["fro", "nuc"]


@dataclass(frozen=True, eq=False)
class AttentionSVM:
    """What `attention_svm` found; plain float64 tensors on the CPU.

    Attributes:
        W: (d, e), by which scores are X W z; nan where there is none.
        duals: (R,), the multipliers of the constraints, none negative. With the Frobenius norm W is their
            sum of λ (x_chosen - x_t) zᵀ; with the nuclear norm this sum has spectral norm 1, and λ sum up to
            the norm but for ``gap``. Where nothing is feasible they sum to 1, and that sum of matrices is 0,
            which proves it. nan with a rank that had to be enforced, where none are known.
        feasible: whether there is a W at all.
        margins: (R,), (x_chosen - x_t)ᵀ W z, at least 1; nan where there is no W.
        support: (R,) bool, which constraints are active: their tokens are the support.
        sequence: (R,) int64, whose constraint it is, and
        token: (R,) int64, of which token against the chosen one.
        norm: ``"fro"`` or ``"nuc"``.
        value: W's norm.
        gap: by how much of itself ``value`` can be above the least: 0 for the Frobenius norm (exact but for
            rounding), certified by the duals for the nuclear one; inf where a rank had to be enforced.
    """

    W: Tensor
    duals: Tensor
    feasible: bool
    margins: Tensor
    support: Tensor
    sequence: Tensor
    token: Tensor
    norm: str
    value: float
    gap: float

    def __repr__(self) -> str:
        if not self.feasible:
            return f"AttentionSVM({self.norm}: infeasible, {len(self.duals)} constraints)"
        return (
            f"AttentionSVM({self.norm}: norm {self.value:.4g}, gap {self.gap:.1g}, "
            f"{int(self.support.sum())} of {len(self.duals)} constraints active)"
        )


def attention_svm(
    X: Any, z: Any, chosen: Any, norm: Norm = "fro", *, rank: int | None = None
) -> AttentionSVM:
    """The shortest W that separates each sequence's chosen token from its others, as attention scores them.

    Minimises W's norm subject to (x_chosen - x_t)ᵀ W z >= 1 for every other token t of every sequence. With a
    fixed head behind it, attention softmax(X W z) that is trained by normalised gradient descent
    (`optx.NormalizedGrad`) grows without bound in the direction of this W: in the Frobenius norm if W is
    trained, in the nuclear norm if W = K Qᵀ is by its factors, which is of lower rank.

    The Frobenius norm's is exact (least-distance programming by an active set). The nuclear norm's is solved
    until the duals prove its norm to be within 1e-8 of the least (at most 1e-4, or it raises; ``gap`` says).

    Args:
        X: tokens, (n, T, d), or a list of n tensors (T_i, d); computed in float64.
        z: queries, (n, e): a row of each X_i, or anything.
        chosen: (n,), each sequence's chosen token: what softmax attends to at the end of training, and not
            the one that would have the best score.
        norm: ``"fro"``, or ``"nuc"``.
        rank: of W at most, for ``"nuc"``: the width of a head. The solution without it, if its rank is no
            larger, and else a stationary point of the factorised problem, the best of five starts.

    Returns:
        W, its multipliers, margins and support. A token that equals the chosen one, or a query of 0, makes it
        infeasible (0 >= 1): drop exact duplicates.

    Paper values:
        ``norm="fro"``: W trained (the default). n=6, T=8, d=10, unit tokens, learning rate 0.1: its figures.
        ``norm="nuc"``: K and Q trained.
        ``rank``: the width of K and Q, where it is below d.

    Limits: A W whose norm, in units of 1 over the longest (x_chosen - x_t) zᵀ, is above 1e6 counts as none.
        Time grows with the cube of the number of support tokens (thousands of constraints take seconds); the
        nuclear norm takes thousands of SVDs.

    Keywords: implicit bias, max-margin, hard-margin SVM, token selection, attention, diagnostics.

    Evidence: ``optx run explain``; ``test_attention_svm.py``, ``test_attention_svm_training.py``.

    Raises:
        ShapeError: X, z or chosen do not fit one another.
        OptxError: an unknown norm, a rank below 1 or with ``"fro"``, no constraint at all, or no end of the
            solver.

    Example:
        >>> import torch, optx
        >>> X = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
        >>> found = optx.analysis.attention_svm(X, torch.tensor([[1.0, 2.0]]), chosen=[0])
        >>> found.W.float()
        tensor([[ 0.0800,  0.1600],
                [-0.0400, -0.0800]])

    Source: arXiv 2308.16898, (Att-SVM) and (Att-SVM⋆).
    """
    check_choice("attention_svm", "norm", norm, ("fro", "nuc"))
    if rank is not None:
        rank = check_whole("attention_svm", "rank", rank, 1)
        if norm == "fro":
            raise OptxError(
                f"attention_svm: rank is {rank} with norm='fro'; only the nuclear norm's problem, of K and "
                "Q, has one. Pass norm='nuc', or no rank."
            )
    made = Constraints.read(X, z, chosen)
    if not len(made):
        raise OptxError("attention_svm: every sequence has one token, so there is nothing to separate.")
    gram = made.gram()
    unit = float(gram.diagonal().amax())
    stuck = gram.diagonal() == 0.0
    if bool(stuck.any()):
        return _infeasible(made, stuck.double() / stuck.sum(), norm)
    duals, feasible = least_distance(gram / unit)
    if not feasible:
        return _infeasible(made, duals, norm)
    duals = duals / unit
    if norm == "nuc":
        left, right = made.bases()
        A, Z = made.differences @ left, (made.queries @ right)[made.of]
        found = least_nuclear(A, Z, left.T @ made.combined(duals) @ right)
        if rank is not None and _rank(found.M) > rank:
            of_rank = least_of_rank(A, Z, found.M, rank)
            found = Certified(of_rank, torch.full_like(duals, torch.nan), math.inf)
        return _feasible(made, left @ found.M @ right.T, found.duals, norm, found.gap)
    return _feasible(made, made.combined(duals), duals, norm, 0.0)


def _feasible(made: Constraints, W: Tensor, duals: Tensor, norm: str, gap: float) -> AttentionSVM:
    margins = made.margins(W)
    least = float(margins.amin())
    if not least > 1.0 - 1e-6:
        raise OptxError(
            f"attention_svm: the least margin came out as {least}, not 1: the tokens are too nearly "
            "dependent for float64. Take fewer sequences."
        )
    tolerance = 1e-9 if norm == "fro" else 1e-4
    active = margins <= 1.0 + tolerance
    value = length(W) if norm == "fro" else nuclear(W)
    return AttentionSVM(W, duals, True, margins, active, made.of, made.tokens, norm, value, gap)


def _infeasible(made: Constraints, proof: Tensor, norm: str) -> AttentionSVM:
    shape = (made.differences.shape[1], made.queries.shape[1])
    nowhere = torch.full(shape, torch.nan, dtype=proof.dtype)
    none = torch.zeros(len(made), dtype=torch.bool)
    margins = torch.full_like(proof, torch.nan)
    return AttentionSVM(nowhere, proof, False, margins, none, made.of, made.tokens, norm, math.nan, math.nan)


def _rank(M: Tensor) -> int:
    """Of a solution whose smallest singular values are what the solver left of 0."""
    S = singular_values(M)
    return int(S.gt(1e-5 * S[0]).sum())


def corr(A: Tensor, B: Tensor) -> float:
    """How far two matrices point in one direction: ⟨A, B⟩ / (‖A‖ ‖B‖).

    By it one compares a trained W with `attention_svm`'s.

    Args:
        A: any shape, floating.
        B: the same shape.

    Returns:
        A number in [-1, 1], computed in float64: 1 if A is B times a number above 0. 0 where one is all
        zeros, and has no direction; nan where one holds inf or nan, as the W of an infeasible problem does.

    Paper values:
        There is nothing to set. At the end of training it is about 1.

    Limits: Finite training stays below 1: the norm grows as the logarithm of the steps. Mind the orientation:
        a Linear module's weight is W transposed, which halves it in silence.

    Keywords: cosine similarity, direction, correlation, diagnostics.

    Evidence: ``optx run explain``; ``test_attention_svm.py``.

    Raises:
        ShapeError: the shapes differ.

    Example:
        >>> import torch, optx
        >>> optx.analysis.corr(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        0.6

    Source: arXiv 2308.16898, section 3, its figures' correlation.
    """
    _check_alike(A, B)
    return float(cosine(A.detach().to("cpu", torch.float64), B.detach().to("cpu", torch.float64)))


def _check_alike(A: Any, B: Any) -> None:
    """Raise unless both are floating tensors of one shape."""
    for name, one in (("A", A), ("B", B)):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            what = f"a tensor of dtype {one.dtype}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
            raise OptxError(f"corr: {name} is {what}; it must be a floating tensor.")
    if A.shape != B.shape:
        raise ShapeError(f"corr: A has shape {tuple(A.shape)}, B {tuple(B.shape)}; they must be the same.")
