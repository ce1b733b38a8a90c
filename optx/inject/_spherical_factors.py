"""An output matrix W = V U + 1 omega^T with W^T W and W^T 1: exact steps of SGD that touch few rows.

Source: "Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets",
arXiv 1412.7091, and its extension to the spherical family, arXiv 1604.08859. Examples are rows here (X is H^T
there), labels one per example.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from optx._errors import OptxError

_linalg: Any = torch.linalg  # whose functions have no types
_ROWS = 1 << 13  # of V that are float64 for a moment
_SAFE = 0.5  # a step whose change of U is below this share of it can't make it singular
_LEAST = 1e-2  # the least that a direction of U may keep in a step; below, the step is taken on W itself


class Batch(NamedTuple):
    """Examples, and what a forward pass knew of them; float64 but for the labels.

    Attributes:
        X: (m, d).
        labels: int64 (m,).
        XQ: X W^T W, (m, d).
        targets: rows of W, (m, d).
    """

    X: Tensor
    labels: Tensor
    XQ: Tensor
    targets: Tensor


class Sums(NamedTuple):
    """What a loss knows of each example's outputs W x, (m,) each; or its derivatives by them."""

    total: Tensor
    squares: Tensor
    target: Tensor


class Pending(NamedTuple):
    """A backward pass that has not been stepped by yet."""

    batch: Batch
    grads: Sums


def joined(pending: Sequence[Pending]) -> Pending:
    """Several backward passes as one: their gradients add up."""
    if len(pending) == 1:
        return pending[0]
    batches, grads = zip(*pending, strict=True)
    return Pending(
        Batch(*(torch.cat(each) for each in zip(*batches, strict=True))),
        Sums(*(torch.cat(each) for each in zip(*grads, strict=True))),
    )


class Factors(NamedTuple):
    """The factors, changed in place. All but V are float64, whatever the model is.

    Attributes:
        V: (D, d).
        U: (d, d).
        inverse: of U.
        omega: (d,).
        Q: W^T W, (d, d).
        columns: W^T 1, (d,).
    """

    V: Tensor
    U: Tensor
    inverse: Tensor
    omega: Tensor
    Q: Tensor
    columns: Tensor

    # ---- the passes -----------------------------------------------------------------------------------

    def forward(self, X: Tensor, labels: Tensor) -> tuple[Batch, Sums]:
        """The sums of the outputs W x of each example."""
        XQ = X @ self.Q
        targets = self.V[labels].to(X.dtype) @ self.U + self.omega
        batch = Batch(X, labels, XQ, targets)
        return batch, Sums(X @ self.columns, (XQ * X).sum(1), (targets * X).sum(1))

    def input_grad(self, batch: Batch, grads: Sums) -> Tensor:
        """d loss / d X."""
        through = (2 * grads.squares)[:, None] * batch.XQ
        return through + grads.target[:, None] * batch.targets + torch.outer(grads.total, self.columns)

    def step(self, pending: Pending, lr: float, weight_decay: float) -> float:
        """W <- (1 - lr decay) W - lr dloss/dW, as SGD's step on W would be.

        Returns:
            A bound on how far U's singular values have moved, as a difference of logarithms.

        Raises:
            OptxError: a number has overflowed; nothing is changed.
        """
        keep = 1 - lr * weight_decay
        rate = lr / keep  # W is scaled after the step, so the step itself is the larger
        (X, labels, _, targets), (total, squares, target) = pending
        rows, pull = _by_row(labels, target[:, None] * X)
        squared = squares[:, None] * X  # D_q H^T
        dX = self.input_grad(*pending)
        P = dX.T @ X  # W^T G of W's gradient G = 2 W B + Y + 1 t^T, with B = squared^T X
        r = X.T @ (2 * squares * (X @ self.columns) + len(self.V) * total + target)  # G^T 1
        t, y = X.T @ total, X.T @ target
        C = (target[:, None] * targets).T @ X  # W^T Y
        of_squares = 2 * squared.T @ (X @ P) + 2 * (X @ C).T @ squared
        G2 = of_squares + pull.T @ pull + torch.outer(y, t) + torch.outer(t, r)  # G^T G
        after = self.Q - rate * (P + P.T) + rate * rate * G2
        Q = (after + after.T) * (keep**2 / 2)
        columns = keep * (self.columns - rate * r)
        omega = keep * (self.omega - rate * (X.T @ (2 * squares * (X @ self.omega)) + t))
        _check_finite(Q, columns, omega, pull)
        moved = _change(X, squares, squared, rate)
        if moved is None:
            self._dense_step(X, squared, t, rows, pull, rate, keep)
            return 0.0
        U = self.U - 2 * rate * (X @ self.U.T).T @ squared
        inverse = self._new_inverse(X, squares, squared, rate)
        self.V[rows] = (self.V[rows].to(pull.dtype) - rate * (pull @ inverse)).to(self.V.dtype)
        for old, new in zip(self[1:], (keep * U, inverse / keep, omega, Q, columns), strict=True):
            old.copy_(new)
        return moved - math.log(keep)

    def _new_inverse(self, X: Tensor, squares: Tensor, squared: Tensor, rate: float) -> Tensor:
        """(I - 2 rate B)^-1 U^-1: of as many equations as there are examples (Woodbury), or dimensions."""
        examples, width = X.shape
        if examples >= width:
            system = torch.eye(width, dtype=X.dtype, device=X.device) - 2 * rate * squared.T @ X
            return _linalg.solve(system, self.inverse)
        system = torch.eye(examples, dtype=X.dtype, device=X.device) - 2 * rate * squared @ X.T
        return self.inverse + 2 * rate * X.T @ _linalg.solve(system, squared @ self.inverse)

    def _dense_step(
        self, X: Tensor, squared: Tensor, t: Tensor, rows: Tensor, pull: Tensor, rate: float, keep: float
    ) -> None:
        """The same step on W itself, where U would become (nearly) singular."""
        self.unfactorise()
        B = squared.T @ X
        for piece in pieces_of(self.V):
            wide = piece.to(X.dtype)
            piece.copy_(keep * (wide - rate * (2 * wide @ B + t)))
        self.V[rows] = (self.V[rows].to(X.dtype) - keep * rate * pull).to(self.V.dtype)
        self.recompute()

    # ---- the whole matrix -----------------------------------------------------------------------------

    def pieces(self) -> Iterator[Tensor]:
        """W, some rows at a time, in float64."""
        for piece in pieces_of(self.V):
            yield piece.to(self.U.dtype) @ self.U + self.omega

    def outputs(self, X: Tensor) -> Tensor:
        """W x of each example in X's dtype, (m, D); W itself is not made."""
        inner = (X.to(self.U.dtype) @ self.U.T).to(X.dtype)
        shift = (X.to(self.U.dtype) @ self.omega).to(X.dtype)
        return torch.addmm(shift[:, None], inner, self.V.to(X.dtype).T)

    def unfactorise(self) -> None:
        """V becomes W, and U the identity."""
        for piece, own in zip(pieces_of(self.V), self.pieces(), strict=True):
            piece.copy_(own)
        self.U.copy_(torch.eye(len(self.U)))
        self.inverse.copy_(self.U)
        self.omega.zero_()
        self.recompute()

    def recompute(self) -> None:
        """W^T W and W^T 1 from the factors: what V's rounding has changed since is in them again."""
        gram, columns = torch.zeros_like(self.Q), torch.zeros_like(self.columns)
        for piece in pieces_of(self.V):
            wide = piece.to(gram.dtype)
            gram += wide.T @ wide
            columns += wide.sum(0)
        columns = self.U.T @ columns
        cross = torch.outer(columns, self.omega)
        Q = self.U.T @ gram @ self.U + cross + cross.T
        self.Q.copy_(Q + len(self.V) * torch.outer(self.omega, self.omega))
        self.columns.copy_(columns + len(self.V) * self.omega)

    def stabilise(self) -> int:
        """Bring the singular values of U that are outside [1/2, 2] back to 1; W stays as it is.

        Returns:
            How many there were.
        """
        left: Tensor
        values: Tensor
        left, values, _ = _linalg.svd(self.U)
        off = (values < 0.5) | (values > 2)
        count = int(off.sum())
        if count > len(values) // 3:
            self.unfactorise()
            return count
        if count:
            u, s = left[:, off], values[off]
            scale = s - 1  # beta = -alpha / (1 + alpha), alpha = (1 - s) / s
            for piece in pieces_of(self.V):
                wide = piece.to(u.dtype)
                piece.copy_(wide + (wide @ u * scale) @ u.T)
            self.U.add_(((1 - s) / s * u) @ (u.T @ self.U))
        self.inverse.copy_(_linalg.inv(self.U))
        return count


def pieces_of(V: Tensor) -> Sequence[Tensor]:
    """Rows of V, so many at a time; views."""
    return torch.split(V, _ROWS)


def _by_row(labels: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of V there are, and the sum of the values of each: in one order on every device."""
    unique: Any = torch.unique
    rows, where = cast("tuple[Tensor, Tensor]", unique(labels, return_inverse=True))
    if values.is_cuda:  # index_add adds in any order there
        chosen = torch.zeros(len(rows), len(labels), dtype=values.dtype, device=values.device)
        return rows, chosen.scatter_(0, where[None], 1.0) @ values
    return rows, torch.zeros(len(rows), values.shape[1], dtype=values.dtype).index_add_(0, where, values)


def _change(X: Tensor, squares: Tensor, squared: Tensor, rate: float) -> float | None:
    """How far I - 2 rate B can move singular values, in logarithms; None if it is nearly singular."""
    examples, width = X.shape
    if examples < width:  # |B|^2 = sum of g_i g_j (x_i x_j)^2
        norm = (squares @ (X @ X.T).square() @ squares).clamp_min(0).sqrt()
    else:
        norm = (squared.T @ X).square().sum().sqrt()
    moved = float(2 * rate * norm)
    if moved < _SAFE:
        return -math.log1p(-moved)
    kept: Tensor = (1 - 2 * rate * _linalg.eigvalsh(squared.T @ X)).abs()
    return None if float(kept.min()) < _LEAST else float(kept.log().abs().max())


def _check_finite(*found: Tensor) -> None:
    if not all(bool(one.isfinite().all()) for one in found):
        raise OptxError(
            "SphericalHead: the step has a number that is not finite, so the weights' scale, the learning "
            "rate or the loss has overflowed; nothing was changed. Lower lr, or add weight_decay, which "
            "holds the scale."
        )
