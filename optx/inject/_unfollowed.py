"""Steps of optimizers that leave what was attached as it is, and say nothing of it.

An optimizer that was made before `optx.attach` and never told of it trains the rest of the model: weights
that ask for no gradient any more, or all but what was added. And what is merged takes no part, so that a loop
that goes on after ``handle.merge()`` moves nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from optx._errors import warn
from optx._names import RESERVED
from optx.inject._part import Part
from optx.inject._served import Served

_LOOKS = 100  # at steps of whatever optimizer, for one that has a new parameter


class Unfollowed:
    """A hook on the steps of all optimizers; once one has a new parameter, it asks only what is merged.

    A loop may have two optimizers, so that a first step alone says nothing. It holds no tensor, and is gone
    with the parts; torch lets no hook go while it runs.
    """

    def __init__(self, served: Sequence[Served], model: nn.Module | None = None) -> None:
        self._parts: list[tuple[str, weakref.ref[Part]]] = []
        self._resting: set[int] = set()
        self._steps: Counter[int] = Counter()
        self._looks = _LOOKS
        self._model = weakref.ref(model) if model is not None else lambda: None
        self._told_of_merge = False
        for one in served:
            self._parts.append((one.part_path, weakref.ref(one.part)))
            self._resting |= {id(p) for p in one.part.retired(one.module)}
        joined = any(p.requires_grad for _, p in self._new())
        self._hook = register_optimizer_step_post_hook(self._look) if joined else None
        if self._hook is not None:
            weakref.finalize(served[0].part, self._hook.remove)

    def remove(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __reduce__(self) -> Any:
        return Unfollowed, ((),)  # a copied model is trained by loops of its own

    def _here(self) -> Iterator[tuple[str, Part]]:
        return ((path, part) for path, ref in self._parts if (part := ref()) is not None)

    def _new(self, *, merged: bool = False) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{path}.{name}", p)
            for path, part in self._here()
            if part.merged or not merged
            for name, p in part.named_parameters()
        ]

    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if any(part.merged for _, part in self._here()):
            self._look_at_merged(optimizer)
        elif self._looks:
            self._looks -= 1
            self._look_for_new(optimizer)

    def _look_at_merged(self, optimizer: Optimizer) -> None:
        if self._told_of_merge:
            return
        has = _members(optimizer)
        idle = [name for name, p in self._new(merged=True) if id(p) in has]
        if idle:
            self._told_of_merge = True
            warn(
                f"optx: {type(optimizer).__name__} was stepped while {idle[0]!r} and {len(idle) - 1} others "
                "of its parameters are merged: they take no part, so that nothing of them is trained. Call "
                "handle.unmerge() before it goes on; or handle.merge_and_unload(), and train the weights."
            )

    def _look_for_new(self, optimizer: Optimizer) -> None:
        new, has = self._new(), _members(optimizer)
        if any(id(p) in has for _, p in new):
            self._looks = 0
            return
        waiting = [name for name, p in new if p.requires_grad and p.grad is not None]
        resting = bool(has & self._resting)
        if not waiting or not (resting or has & self._of_the_model()):
            return
        self._steps[id(optimizer)] += 1
        if self._steps[id(optimizer)] > 1:
            self._looks = 0
            if resting or not _any_has({id(p) for _, p in new}):
                warn(
                    f"optx: {type(optimizer).__name__} has weights "
                    f"{'that take no part any more' if resting else 'of the model'}, and no optimizer has "
                    f"{'stepped what took their place' if resting else 'what was attached to it'} "
                    f"({waiting[0]!r} and {len(waiting) - 1} others), which stays as it is. Call "
                    "optx.wrap(optimizer, handle), or make the optimizer after attach."
                )

    def _of_the_model(self) -> set[int]:
        """Its parameters, but for what was attached, by this handle or another."""
        model = self._model()
        named = model.named_parameters() if model is not None else ()
        return {id(p) for name, p in named if RESERVED not in name.split(".")}


def _members(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _any_has(wanted: set[int]) -> bool:
    """Whether an optimizer anywhere has one of these: it may step more rarely than the others."""
    for one in gc.get_objects():
        if issubclass(type(one), Optimizer) and "param_groups" in one.__dict__ and _members(one) & wanted:
            return True
    return False
