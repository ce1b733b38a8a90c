"""Class probabilities of what a person calls a model: a module, a callable, an estimator of scikit-learn."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, as_whole, check_choice, check_whole, shown
from optx.pruning._calibration import as_in_use

Output = Literal["auto", "logits", "probabilities"]

_SLACK = 1e-3  # by which half precision rounds a sum of probabilities


class Classifier:
    """The probability of one class, of rows in pieces that memory takes.

    Args:
        who: the function, for messages.
        model: gives (N, K) or, of two classes, (N,) or (N, 1); or has ``predict_proba``.
        target: the class: its column, or what ``classes_`` of an estimator has.
        output: what the model gives.
        chunk: rows of one call, at most.
        like: rows of input, by which ``"auto"`` finds out and the target is checked.
    """

    def __init__(self, who: str, model: Any, target: Any, output: Output, chunk: int, like: Tensor) -> None:
        check_choice(who, "output", output, ("auto", "logits", "probabilities"))
        self.chunk = check_whole(who, "chunk", chunk, 1)
        self._who, self._model, self._output = who, model, output
        self.is_estimator = not isinstance(model, nn.Module) and hasattr(model, "predict_proba")
        if not (self.is_estimator or callable(model)):
            raise OptxError(
                f"{who}: model is a {type(model).__name__}; it must be a module or another callable, or an "
                "estimator with predict_proba."
            )
        if self.is_estimator and output == "logits":
            raise OptxError(f"{who}: output is 'logits'; predict_proba of {type(model).__name__} gives none.")
        self._column = 0
        with self.in_use():
            found = torch.cat([self._raw(part) for part in self.pieces(like)])
        self._logits = self._are_logits(found)
        self._column = self._column_of(target, max(2, found.shape[1]))

    @contextmanager
    def in_use(self) -> Generator[None]:
        """A module in eval mode, which is put back; and no gradients, unless asked for inside."""
        with torch.inference_mode(False):
            if isinstance(self._model, nn.Module):
                with as_in_use(self._model):
                    yield
            else:
                with torch.no_grad():
                    yield

    # ---- what is asked of it ----------------------------------------------------------------------------

    def score(self, x: Tensor) -> Tensor:
        """The target's probability, (N,), in one call and with its gradient where gradients are on."""
        return self._probabilities(x)[:, self._column]

    def scores(self, x: Tensor) -> Tensor:
        """The same of any number of rows, without gradients."""
        return torch.cat([self.score(part) for part in self.pieces(x)])

    def lead(self, x: Tensor) -> Tensor:
        """By how much the target's probability exceeds the largest of the others, (N,), in one call."""
        every = self._probabilities(x)
        others = every.clone()
        others[:, self._column] = -torch.inf
        return every[:, self._column] - others.amax(1)

    def leads(self, x: Tensor) -> Tensor:
        """The same of any number of rows, without gradients."""
        if not len(x):  # which estimators refuse
            return x.new_zeros(0)
        return torch.cat([self.lead(part) for part in self.pieces(x)])

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """As many rows at a time as one call takes."""
        return (x[start : start + self.chunk] for start in range(0, len(x), self.chunk))

    def around(self, x: Tensor, noise: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Which rows and samples, and x + noise of them, (rows * samples, ...), piece by piece."""
        samples = min(len(noise), self.chunk)
        rows = max(1, self.chunk // samples)
        for r in range(0, len(x), rows):
            for s in range(0, len(noise), samples):
                some, these = slice(r, r + rows), slice(s, s + samples)
                yield some, these, (x[some, None] + noise[these]).flatten(0, 1)

    def gradient(self, of: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of a sum over rows; raises if it does not depend on the rows by way of the model."""
        found: list[Tensor | None] = [None]
        if of.requires_grad:
            found = [*torch.autograd.grad(of.sum(), inputs, allow_unused=True)]
        if found[0] is None:
            raise OptxError(
                f"{self._who}: the model's output has no gradient with respect to its input: it was "
                "detached, or computed without gradients. method='nn' needs none."
            )
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))

    # ---- the model --------------------------------------------------------------------------------------

    def _probabilities(self, x: Tensor) -> Tensor:
        """(N, K), K at least 2."""
        raw = self._raw(x)
        if self._logits:
            return _of_logits(raw)
        self._check_probabilities(raw)
        return torch.cat([1 - raw, raw], 1) if raw.shape[1] == 1 else raw

    def _raw(self, x: Tensor) -> Tensor:
        """What the model gives, (N, K or 1), in float32 or wider."""
        if self.is_estimator:
            given = torch.as_tensor(self._model.predict_proba(x.detach().cpu().numpy())).to(x.device)
        else:
            given = self._model(x)
            given = getattr(given, "logits", given)
        if not isinstance(given, Tensor) or not given.is_floating_point():
            what = f"dtype {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise OptxError(f"{self._who}: the model gives {what}; it must give a floating-point tensor.")
        if given.ndim == 1:
            given = given[:, None]
        if given.ndim != 2 or len(given) != len(x) or not given.shape[1]:
            raise OptxError(
                f"{self._who}: of {len(x)} rows the model gives shape {tuple(given.shape)}; it must be "
                f"({len(x)}, K), or ({len(x)},) for the second of two classes."
            )
        if not bool(given.isfinite().all()):
            raise OptxError(f"{self._who}: the model gives numbers that are not finite.")
        return given.to(torch.promote_types(given.dtype, torch.float32))

    def _are_logits(self, found: Tensor) -> bool:
        """What the model's numbers are."""
        if self._output != "auto" or self.is_estimator:
            if self._output != "logits":
                self._check_probabilities(found)
            return self._output == "logits"
        if found.shape[1] > 1:
            return not _are_probabilities(found)
        if bool(((found < 0) | (found > 1)).any()):
            return True
        raise OptxError(
            f"{self._who}: output is 'auto', and the model gives one number a row, here all from 0 to 1: "
            "they may be either. Pass output='logits' or output='probabilities'."
        )

    def _check_probabilities(self, found: Tensor) -> None:
        if not _are_probabilities(found):
            sums = f" whose sums go from {_ends(found.sum(1))}" if found.shape[1] > 1 else ""
            raise OptxError(
                f"{self._who}: output is {self._output!r} and taken for probabilities, but the model gives "
                f"numbers from {_ends(found)}{sums}. Pass output='logits' if they are logits."
            )

    def _column_of(self, target: Any, classes: int) -> int:
        known: list[Any] = list(getattr(self._model, "classes_", range(classes)))
        if self.is_estimator:
            if target not in known:
                raise OptxError(
                    f"{self._who}: target is {shown(target)}; it must be one of the estimator's classes, "
                    f"{', '.join(map(repr, known))}."
                )
            return known.index(target)
        number = as_whole(target)
        if number is None or not 0 <= number < classes:
            raise OptxError(
                f"{self._who}: target is {shown(target)}; it must be a class from 0 to {classes - 1}."
            )
        return number


def _of_logits(raw: Tensor) -> Tensor:
    if raw.shape[1] > 1:
        return raw.softmax(1)
    return torch.cat([(-raw).sigmoid(), raw.sigmoid()], 1)


def _are_probabilities(found: Tensor) -> bool:
    within = bool(((found >= -_SLACK) & (found <= 1 + _SLACK)).all())
    return within and (found.shape[1] == 1 or bool(((found.sum(1) - 1).abs() <= _SLACK).all()))


def _ends(of: Tensor) -> str:
    return f"{float(of.min()):.4g} to {float(of.max()):.4g}"
