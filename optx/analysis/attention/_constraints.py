"""Tokens of sequences as the constraints of a support vector machine, in the span that they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError
from optx.analysis.attention._algebra import span

F64 = torch.float64


@dataclass(frozen=True, eq=False)
class Constraints:
    """(x_chosen - x_t)ᵀ W z >= 1 for each token t that was not chosen, row r of each tensor being one.

    Attributes:
        differences: (R, d) float64, x_chosen - x_t.
        queries: (n, e) float64.
        of: (R,) int64, whose query each constraint has.
        tokens: (R,) int64, t.
    """

    differences: Tensor
    queries: Tensor
    of: Tensor
    tokens: Tensor

    @classmethod
    def read(cls, X: Any, z: Any, chosen: Any) -> Constraints:
        """From what `attention_svm` is given; on the CPU."""
        sequences, z = _sequences(X), _matrix(z)
        n = len(sequences)
        if len(z) != n:
            raise ShapeError(
                f"attention_svm: z has shape {tuple(z.shape)}; for {n} sequences it must be ({n}, width)."
            )
        index = _choices(chosen, [len(x) for x in sequences])
        differences, of, tokens = list[Tensor](), list[Tensor](), list[Tensor]()
        for i, (x, choice) in enumerate(zip(sequences, index, strict=True)):
            others = torch.arange(len(x))[torch.arange(len(x)) != choice]
            differences.append(x[choice] - x[others])
            of.append(torch.full_like(others, i))
            tokens.append(others)
        return cls(torch.cat(differences), z, torch.cat(of), torch.cat(tokens))

    def __len__(self) -> int:
        return len(self.of)

    def margins(self, W: Tensor) -> Tensor:
        """(R,): (x_chosen - x_t)ᵀ W z."""
        return (self.differences * (self.queries @ W.T)[self.of]).sum(1)

    def combined(self, duals: Tensor) -> Tensor:
        """(d, e): the sum of λ_r (x_chosen - x_t) zᵀ."""
        return (self.differences * duals[:, None]).T @ self.queries[self.of]

    def gram(self) -> Tensor:
        """(R, R): products of the constraints' matrices (x_chosen - x_t) zᵀ."""
        queries = self.queries @ self.queries.T
        return (self.differences @ self.differences.T) * queries[self.of][:, self.of]

    def bases(self) -> tuple[Tensor, Tensor]:
        """Orthonormal columns whose span has all differences, and all queries.

        Of a W only what lies between them has a part in margins, so a shortest one lies there whole.
        """
        return span(self.differences), span(self.queries)


def _sequences(X: Any) -> list[Tensor]:
    if isinstance(X, Tensor) and X.ndim != 3:
        raise ShapeError(
            f"attention_svm: X has shape {tuple(X.shape)}; it must be (sequences, tokens, width), or a list "
            "of (tokens, width)."
        )
    if not isinstance(X, Tensor | Sequence):
        raise OptxError(
            f"attention_svm: X is a {type(X).__name__}; it must be a tensor (sequences, tokens, width), or a "
            "list of (tokens, width)."
        )
    given: list[Any] = list(X)  # pyright: ignore[reportUnknownArgumentType]
    if not given:
        raise OptxError("attention_svm: X is empty; there must be a sequence at least.")
    for i, x in enumerate(given):
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != given[0].shape[1]:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"attention_svm: X[{i}] is {shape}; each sequence must be a tensor (tokens, width), all "
                "equally wide."
            )
    return [_finite(x, f"X[{i}]") for i, x in enumerate(given)]


def _matrix(z: Any) -> Tensor:
    if not isinstance(z, Tensor) or z.ndim != 2:
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ShapeError(f"attention_svm: z is {shape}; it must be a tensor (sequences, width).")
    return _finite(z, "z")


def _finite(x: Tensor, name: str) -> Tensor:
    if not x.is_floating_point():
        raise OptxError(f"attention_svm: {name} is of dtype {x.dtype}; it must be floating.")
    x = x.detach().to("cpu", F64)
    if not bool(x.isfinite().all()):
        raise OptxError(f"attention_svm: {name} holds inf or nan; tokens must be finite.")
    return x


def _choices(chosen: Any, lengths: Sequence[int]) -> list[int]:
    index = torch.as_tensor(chosen).cpu()
    whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    if not whole or index.shape != (len(lengths),):
        raise ShapeError(
            f"attention_svm: chosen has shape {tuple(index.shape)} and dtype {index.dtype}; it must be one "
            f"whole number for each of {len(lengths)} sequences."
        )
    choices: list[int] = index.tolist()  # pyright: ignore
    for i, (choice, T) in enumerate(zip(choices, lengths, strict=True)):
        if not 0 <= choice < T:
            raise OptxError(
                f"attention_svm: chosen[{i}] is {choice}; sequence {i} has {T} tokens, so it must be between "
                f"0 and {T - 1}."
            )
    return choices
