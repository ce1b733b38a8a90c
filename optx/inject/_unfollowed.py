"""Optimizers that step weights of which others took the place, and do not have those.

An optimizer that was made before `optx.attach` and never told of it trains the rest of the model, and nothing
says so: the weights that it has ask for no gradient any more. Steps are looked at until one answers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from optx._errors import warn
from optx.inject._part import Part
from optx.inject._served import Served

_LOOKS = 100  # at steps of whatever optimizer; then it rests


class Unfollowed:
    """A hook on the steps of all optimizers, idle after one that has a new parameter, or after a warning.

    A loop may have two optimizers, so that a first step alone says nothing. It holds no tensor, and is gone
    with the parts; torch lets no hook go while it runs.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self._parts: list[tuple[str, weakref.ref[Part]]] = []
        self._resting: set[int] = set()
        self._steps: Counter[int] = Counter()
        self._looks = _LOOKS
        for one in served:
            self._parts.append((one.part_path, weakref.ref(one.part)))
            self._resting |= {id(p) for p in one.part.retired(one.module)}
        joined = any(p.requires_grad for _, p in self._new())
        self._hook = register_optimizer_step_post_hook(self._look) if self._resting and joined else None
        if self._hook is not None:
            weakref.finalize(served[0].part, self._hook.remove)

    def remove(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __reduce__(self) -> Any:
        return Unfollowed, ((),)  # a copied model is trained by loops of its own

    def _new(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{path}.{name}", p)
            for path, ref in self._parts
            if (part := ref()) is not None
            for name, p in part.named_parameters()
        ]

    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._looks or torch.compiler.is_compiling():
            return
        self._looks -= 1
        new = self._new()
        has = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in has for _, p in new):
            self._looks = 0
            return
        waiting = [name for name, p in new if p.requires_grad and p.grad is not None]
        if not waiting or not has & self._resting:
            return
        self._steps[id(optimizer)] += 1
        if self._steps[id(optimizer)] > 1:
            self._looks = 0
            warn(
                f"optx: {type(optimizer).__name__} has weights that take no part any more, and no optimizer "
                f"has stepped what took their place ({waiting[0]!r} and {len(waiting) - 1} others), which "
                "stays as it is. Call optx.wrap(optimizer, handle), or make the optimizer after attach."
            )
