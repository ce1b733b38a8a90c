"""A user's model as the flow calls it: x and t in its own dtype, logits in float32; and its modes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, check_range


class Network:
    """``model(x, t)``, or ``model(x, t, condition)``, with x (B, L, V) on the simplex and t (B,).

    Args:
        owner: for messages.
        model: any callable that returns logits (B, L, V), or an object with them as ``logits``.
        condition: what it is told besides, one entry a row; None: nothing, it is called with x and t alone.
        null: the condition of a row that is told nothing.
        scale: of classifier-free guidance: logits are null's and so many times what the condition adds.
    """

    def __init__(
        self,
        owner: str,
        model: Any,
        condition: Tensor | None = None,
        null: Any = None,
        scale: float = 1.0,
    ) -> None:
        if not callable(model):
            raise OptxError(f"{owner}: model is a {type(model).__name__}; it must be called as model(x, t).")
        self.owner, self.model, self.condition, self.scale = owner, model, condition, scale
        weights = list(model.parameters()) if isinstance(model, nn.Module) else []
        first = next((p for p in weights if p.is_floating_point()), None)
        self.dtype = first.dtype if first is not None else None
        self.device = first.device if first is not None else None
        check_range(owner, "guidance_scale", scale, -1e30, 1e30)
        if condition is not None and not isinstance(condition, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"{owner}: condition is a {type(condition).__name__}; it must be a tensor, an entry a row."
            )
        if scale != 1 and (condition is None or null is None):
            raise OptxError(
                f"{owner}: guidance_scale is {scale}; it needs condition= and null=, the condition that "
                "stood for none in training (drop_condition=)."
            )
        self.without = None if condition is None or null is None else nulled(owner, condition, null)

    @property
    def wide(self) -> torch.dtype:
        """What the flow computes in: float32, or float64 for a model that does."""
        return torch.promote_types(self.dtype or torch.float32, torch.float32)

    def check_rows(self, rows: int) -> None:
        """Raise unless there is a condition for every row."""
        if self.condition is not None and (self.condition.ndim == 0 or len(self.condition) != rows):
            raise ShapeError(
                f"{self.owner}: condition has shape {tuple(self.condition.shape)}; it must have an entry for "
                f"each of the {rows} rows."
            )

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """Of points and times, in the points' dtype."""
        if self.condition is None:
            return self._called(x, t)
        if self.scale == 1:
            return self._called(x, t, self.condition)
        free = self._called(x, t, self.without)
        return free + self.scale * (self._called(x, t, self.condition) - free)

    def _called(self, x: Tensor, t: Tensor, *condition: Any) -> Tensor:
        dtype = self.dtype or x.dtype
        found: Any = self.model(x.to(dtype), t.to(dtype), *condition)
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(
                f"{self.owner}: the model gave {got} for x of shape {tuple(x.shape)}; it must give logits of "
                "that shape, (batch, length, vocabulary)."
            )
        return found.to(x.dtype)


def nulled(owner: str, condition: Tensor, null: Any) -> Tensor:
    """``null`` in the shape of a condition."""
    try:
        return torch.as_tensor(null, dtype=condition.dtype, device=condition.device).expand_as(condition)
    except (RuntimeError, TypeError, ValueError):
        raise ShapeError(
            f"{owner}: null is {null!r:.60}; it must fit a condition's row, {tuple(condition.shape[1:])}."
        ) from None


@contextmanager
def in_use(*modules: Any) -> Generator[None]:
    """Modules in eval mode, and every part of them back in its own mode afterwards; no gradients."""
    modes = [(m, m.training) for one in modules if isinstance(one, nn.Module) for m in one.modules()]
    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.callback(lambda: [setattr(m, "training", mode) for m, mode in modes])
        for module, _ in modes:
            module.training = False
        yield
