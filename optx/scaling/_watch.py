"""Hooks on an optimizer that has multipliers: looked at before every step, and before every load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from optx.scaling._multipliers import Multipliers


class _Before:
    """A hook of an optimizer; a class of its own, so that it is found among others' hooks."""

    def __init__(self, multipliers: Multipliers, load: bool) -> None:
        self.multipliers, self.load = multipliers, load

    def __call__(self, base: Optimizer, *given: Any) -> None:
        if self.load:
            self.multipliers.check_load(base, given[0])
        else:
            self.multipliers.follow(base)


def watch(base: Optimizer, multipliers: Multipliers) -> None:
    """Look before every step and every load. A deepcopy is not watched: torch drops hooks."""
    base.register_step_pre_hook(_Before(multipliers, load=False))
    base.register_load_state_dict_pre_hook(_Before(multipliers, load=True))


def unwatch(base: Optimizer) -> None:
    """Look no more."""
    for hooks in _hooks(base):
        for number in [n for n, hook in hooks.items() if isinstance(hook, _Before)]:
            del hooks[number]


def watched_by(base: Optimizer) -> Multipliers | None:
    """What looks after an optimizer's groups."""
    found: Iterable[Any] = (hook for hooks in _hooks(base) for hook in hooks.values())
    return next((hook.multipliers for hook in found if isinstance(hook, _Before)), None)


def _hooks(base: Any) -> tuple[dict[int, Any], ...]:
    return base._optimizer_step_pre_hooks, base._optimizer_load_state_dict_pre_hooks
