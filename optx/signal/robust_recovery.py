"""The loss of robust matrix recovery: mean absolute residuals of linear measurements of U V^T.

Source: Ma, Fattahi, "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small
Initialization, Noisy Measurements, and Over-parameterization", arXiv 2202.08788, section 1.
"""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError

__all__ = ["RobustRecoveryLoss"]

_FLOATS = (torch.float32, torch.float64)


@runtime_checkable
class Measurements(Protocol):
    """Linear measurements of a matrix, where a tensor of all A_i would be too large."""

    def measure(self, X: Tensor) -> Tensor:
        """<A_i, X> for every i: (m,) of (d, e)."""
        ...

    def adjoint(self, weights: Tensor) -> Tensor:
        """sum_i weights_i A_i: (d, e) of (m,)."""
        ...


class _Dense:
    """A tensor of all A_i, of which each product reads everything once."""

    def __init__(self, A: Tensor) -> None:
        self.A = A

    def measure(self, X: Tensor) -> Tensor:
        return self.A.flatten(1) @ X.flatten()

    def adjoint(self, weights: Tensor) -> Tensor:
        return (weights @ self.A.flatten(1)).view(self.A.shape[1:])


class RobustRecoveryLoss(nn.Module):
    """f(U, V) = mean_i |<A_i, U V^T> - y_i|, whose minimum gross outliers in y hardly move.

    With V = U (by default) a positive semidefinite matrix is sought. The sub-gradient is (Q + Q^T) U, Q =
    mean_i sign(residual_i) A_i with sign(0) = 0; Q is found in the forward pass, and what `SubGM` divides by,
    its norm, is left in ``q_norm``. Use float32 or float64: a small start's products (1e-6) are lost in
    bfloat16.

    In several processes (``torch.distributed``) each is to have as many measurements of its own, and DDP
    averages gradients: value and Q are averaged over the processes, in one all-reduce of Q's size.

    Args:
        A: the measurements: a tensor (m, d, e), not necessarily symmetric; or an object with two functions,
            as for entries of a matrix, where nobody needs such a tensor (see the example).
        y: what was measured, (m,), of A's dtype.
        process_group: of the processes; None: all of them.

    Attributes:
        value: the last forward's loss, a scalar without a graph.
        q_norm: the Frobenius norm of its Q.
        forwards: how many forward passes with gradients there were.

    Paper values:
        None: the loss has no number of its own.

    Limits: No minibatches of measurements: take them by an ``A`` of your own. The global minimum may lie away
    from the matrix sought where there are few measurements (m < d r'): decaying steps end beside it.

    Keywords: robust matrix recovery, low-rank, matrix sensing, matrix completion, robust PCA, l1 loss,
    outliers.

    Evidence: ``optx run recover``; ``test_robust_recovery.py``.

    Raises:
        ShapeError: A, y, U and V do not fit one another.
        OptxError: a dtype other than float32 and float64, or A or y that are not finite.

    Example:
        >>> import torch, optx
        >>> A = torch.randn(200, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> truth = torch.outer(torch.arange(5.0), torch.arange(5.0))
        >>> loss = optx.RobustRecoveryLoss(A, A.flatten(1) @ truth.flatten())
        >>> round(float(loss(torch.arange(5.0)[:, None])), 5)
        0.0

        Some entries of a matrix (row i, column j):

        >>> class Entries:
        ...     def __init__(self, i, j, size): self.i, self.j, self.size = i, j, size
        ...     def measure(self, X): return X[self.i, self.j]
        ...     def adjoint(self, weights):
        ...         zeros = weights.new_zeros(self.size, self.size)
        ...         return zeros.index_put_((self.i, self.j), weights, accumulate=True)
        >>> i, j = torch.tensor([0, 1, 4]), torch.tensor([1, 1, 2])
        >>> loss = optx.RobustRecoveryLoss(Entries(i, j, 5), truth[i, j])
        >>> float(loss(torch.arange(5.0)[:, None]))
        0.0

    Source: arXiv 2202.08788, section 1.
    """

    y: Tensor

    def __init__(
        self, A: Tensor | Measurements, y: Tensor, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        if isinstance(A, Tensor):
            if A.ndim != 3 or y.shape != A.shape[:1]:
                raise ShapeError(
                    f"RobustRecoveryLoss: A has shape {tuple(A.shape)} and y {tuple(y.shape)}; they must be "
                    "(m, d, e) and (m,)."
                )
            if A.dtype != y.dtype:
                raise OptxError(f"RobustRecoveryLoss: A is {A.dtype} and y {y.dtype}; give them one dtype.")
            self.register_buffer("A", A, persistent=False)
        elif not isinstance(A, Measurements):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"RobustRecoveryLoss: A is a {type(A).__name__}; it must be a tensor (m, d, e), or have "
                "measure(X) and adjoint(weights)."
            )
        if y.ndim != 1 or not len(y):
            raise ShapeError(f"RobustRecoveryLoss: y has shape {tuple(y.shape)}; it must be (m,), m >= 1.")
        for name, t in (("A", A), ("y", y)):
            if isinstance(t, Tensor) and (t.dtype not in _FLOATS or not bool(t.isfinite().all())):
                raise OptxError(
                    f"RobustRecoveryLoss: {name} must be finite and float32 or float64; it is {t.dtype}"
                    f"{'' if bool(t.isfinite().all()) else ' with inf or nan'}."
                )
        self._others = None if isinstance(A, Tensor) else A
        self.process_group = process_group
        self.register_buffer("y", y, persistent=False)
        self.value = self.q_norm = y.new_tensor(torch.nan)
        self.forwards = 0

    @property
    def measurements(self) -> Measurements:
        """What measures a matrix."""
        return _Dense(cast(Tensor, self.A)) if self._others is None else self._others

    def forward(self, U: Tensor, V: Tensor | None = None) -> Tensor:
        """The loss of U V^T, U (d, r) and V (e, r); of U U^T without V."""
        other = U if V is None else V
        self._check(U, other)
        with torch.no_grad():
            residuals = self.measurements.measure(U @ other.t()) - self.y
            weights = residuals.sign() / len(self.y)
            Q = self.measurements.adjoint(weights)
            value = residuals.abs().mean()
        if torch.is_grad_enabled():
            self.forwards += 1
            self.value, self.q_norm = self._of_all(value, Q)
        # Where no residual is 0, Q is constant around U: this has the sub-gradient by torch's own rules.
        linear = (Q * (U @ other.t())).sum()
        return value + (linear - linear.detach())

    def _of_all(self, value: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        if dist.is_available() and dist.is_initialized():
            world = dist.get_world_size(self.process_group)
            if world > 1:
                every = torch.cat([value.reshape(1), Q.flatten()])
                dist.all_reduce(every, group=self.process_group)
                return every[0] / world, (every[1:] / world).norm()
        return value, Q.norm()

    def _check(self, U: Tensor, V: Tensor) -> None:
        for name, t in (("U", U), ("V", V)):
            if t.ndim != 2 or t.dtype != self.y.dtype:
                raise ShapeError(
                    f"RobustRecoveryLoss: {name} is {t.dtype} of shape {tuple(t.shape)}; it must be a matrix "
                    f"(d, r) in {self.y.dtype}, as y."
                )
        A = getattr(self, "A", None)
        if isinstance(A, Tensor) and (len(U), len(V)) != A.shape[1:]:
            raise ShapeError(
                f"RobustRecoveryLoss: U and V have {len(U)} and {len(V)} rows, and A measures matrices of "
                f"{tuple(A.shape[1:])}."
            )

    @torch.no_grad()
    def spectral(self, rank: int | None = None) -> Tensor:
        """A direction to start from: B (d, rank) with B B^T = the positive part of mean_i sign(y_i) A_i.

        `optx.scaling.small_init_` scales it. Fewer than ``rank`` positive eigenvalues leave columns of 0,
        which stay 0 in training.

        Raises:
            ShapeError: the matrices are not square.
            OptxError: there is no positive eigenvalue, or a rank out of range.
        """
        C = self.measurements.adjoint(self.y.sign() / len(self.y))
        if C.shape[0] != C.shape[1]:
            raise ShapeError(
                f"RobustRecoveryLoss.spectral: matrices of {tuple(C.shape)} have no eigenvectors; start from "
                "small random factors instead (optx.scaling.small_init_)."
            )
        rank = len(C) if rank is None else rank
        if not 1 <= rank <= len(C):
            raise OptxError(f"RobustRecoveryLoss.spectral: rank is {rank}; it must be in 1 to {len(C)}.")
        found, vectors = torch.linalg.eigh(((C + C.t()) / 2).double())
        if not bool(found[-1] > 0):
            raise OptxError(
                "RobustRecoveryLoss.spectral: mean sign(y_i) A_i has no positive eigenvalue; start from "
                "small random factors instead (optx.scaling.small_init_)."
            )
        top = found.flip(0)[:rank].clamp_min(0)
        return (vectors.flip(1)[:, :rank] * top.sqrt()).to(C.dtype)
