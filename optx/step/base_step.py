"""The base's own step: its hooks, which run once on every path, and the function that they hang on.

torch calls an optimizer's hooks around its ``step``. Here they must run before anything of a step is looked
at (one may scale a gradient, or set the lr), also where a kernel replaces the base's step; so they are run
by us, and the base's function is called without them.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from optx._errors import OptxError

# What torch puts around the step of every optimizer class.
_HOOKED = Optimizer.profile_hook_step(lambda: None).__code__
_DYNAMO = os.path.join("torch", "_dynamo", "eval_frame.py")


class Guard:
    """A step pre-hook of a wrapped base: raises where the base is stepped by its old name.

    Our own steps run the base's hooks without it. It does not keep its owner alive, and is silent when that
    is gone.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)

    def owner(self, base: Optimizer) -> Any:
        """Who wraps the base, if it still does."""
        owner = self._owner()
        return owner if owner is not None and owner.base is base else None

    def __call__(self, base: Optimizer, *_: Any) -> None:
        """Refuse the step."""
        if self.owner(base) is not None:
            raise OptxError(
                f"optx: step() was called on the {type(base).__name__} that optx.wrap wraps, where no "
                "transform acts. Call step() on what wrap returned; opt.remove() gives the plain one back."
            )

    def __reduce__(self) -> Any:
        # A copy of the base alone is nobody's; a copy of its owner guards its own copy of the base.
        return (_nobody, ())


def _nobody() -> Guard:
    return Guard(Guard)  # a class is no owner of any base: it has no attribute ``base``


def owner_of(base: Optimizer) -> Any:
    """The wrapped optimizer that a base belongs to, or None."""
    hooks = getattr(base, "_optimizer_step_pre_hooks", {})  # some call themselves optimizers and have none
    guards = (h for h in hooks.values() if isinstance(h, Guard))
    return next((owner for guard in guards if (owner := guard.owner(base)) is not None), None)


def has_modes(base: Optimizer) -> bool:
    """Whether a base moves its weights in ``train()`` and ``eval()``, as schedulefree's do."""
    return all(callable(getattr(base, name, None)) for name in ("train", "eval"))


def guard(base: Optimizer, owner: Any) -> None:
    """Let the base be stepped by its owner only."""
    release(base)
    base.register_step_pre_hook(Guard(owner))


def release(base: Optimizer) -> None:
    """Take the guard off."""
    hooks = base._optimizer_step_pre_hooks  # pyright: ignore
    for number in [n for n, hook in hooks.items() if isinstance(hook, Guard)]:
        del hooks[number]


def run_pre_hooks(base: Optimizer, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
    """Run the base's step pre-hooks; the closure, or what a hook put in its place."""
    args: Any = (base,) if closure is None else (base, closure)
    kwargs: Any = {}
    for hook in list(base._optimizer_step_pre_hooks.values()):  # pyright: ignore
        if isinstance(hook, Guard):
            continue
        result: Any = hook(base, args, kwargs)
        if result is not None:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise OptxError(
                    f"optx: a step pre-hook of {type(base).__name__} returned {result!r}; it must return "
                    "None or (args, kwargs)."
                )
            args, kwargs = result
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def run_post_hooks(base: Optimizer, closure: Callable[[], Any] | None) -> None:
    """Run the base's step post-hooks."""
    args = (base,) if closure is None else (base, closure)
    for hook in list(base._optimizer_step_post_hooks.values()):  # pyright: ignore
        hook(base, args, {})


def step_without_hooks(base: Optimizer, closure: Callable[[], Any] | None) -> Any:
    """The base's step as its class defines it: neither its hooks nor those of all optimizers run again."""
    arguments = () if closure is None else (closure,)
    step: Any = type(base).step
    # torch.compile, once used, puts a wrapper of its own around the steps that it can't follow (LBFGS).
    while _code(step) is not None and _code(step).co_filename.endswith(_DYNAMO):
        step = step.__wrapped__
    # Set aside also for super().step(): torch puts hooks around every class's step, the guard among them.
    with _hooks_set_aside(base):
        if not step_replaced(base) and _code(step) is _HOOKED:
            return step.__wrapped__(base, *arguments)
        return base.step(*arguments)


def step_replaced(base: Optimizer) -> bool:
    """Whether a person put another ``step`` on this optimizer; schedulers do so only to count."""
    own: Any = vars(base).get("step")
    return own is not None and not hasattr(own, "_wrapped_by_lr_sched")


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


@contextmanager
def _hooks_set_aside(base: Optimizer) -> Generator[None]:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: vars(base)[name] for name in names if name in vars(base)}
    vars(base).update({name: OrderedDict[int, Any]() for name in hooks})
    try:
        yield
    finally:
        vars(base).update(hooks)
