"""Whether an optimizer class still steps by the functions that its rules were written for."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch.optim import Optimizer

_TORCH = os.path.dirname(torch.__file__) + os.sep


class Methods:
    """The functions of an optimizer class and its parents below ``torch.optim.Optimizer``.

    Args:
        cls: the class.
        own_file: whether each must come from the file of the class that has it: for classes that are looked
            at long after they were made, and may have been patched meanwhile.
    """

    def __init__(self, cls: type[Optimizer], own_file: bool) -> None:
        self._classes = [c for c in cls.__mro__ if c not in Optimizer.__mro__]
        self._seen = [_functions(c) for c in self._classes]
        self._names = {name for functions in self._seen for name in functions}
        self._step = cls, getattr(cls, "step", None)
        foreign = filter(None, map(_foreign, self._classes, self._seen)) if own_file else iter(())
        self._foreign = next(foreign, None)

    def step_changed(self) -> bool:
        """Whether the class has another ``step``; every step asks."""
        cls, step = self._step
        now = getattr(cls, "step", None)
        if now is step:
            return False
        if _core(now) is not _core(step):
            return True
        self._step = cls, now  # torch has put its own wrapper around it
        return False

    def why_changed(self, base: Optimizer) -> str | None:
        """What was put in the place of one of the functions, on the class or on this optimizer; in words."""
        if self._foreign is not None:
            return self._foreign
        for cls, seen in zip(self._classes, self._seen, strict=True):
            now = _functions(cls)
            for name, function in seen.items():
                if now.get(name) is not function:
                    return f"{cls.__name__}.{name} was replaced by another"
        own = sorted(self._names.intersection(vars(base)) - {"step"})  # of `step` others know more
        return f"its {own[0]}() was replaced by another" if own else None


def _functions(cls: type) -> dict[str, Any]:
    """A class's own functions by name, without what torch wraps around them."""
    found = {name: _core(value) for name, value in vars(cls).items()}
    return {name: value for name, value in found.items() if hasattr(value, "__code__")}


def _core(function: Any) -> Any:
    """A function without the wrappers that torch puts around it (hooks, ``no_grad``, ``compile``'s)."""
    function = getattr(function, "__func__", function)
    while hasattr(function, "__wrapped__") and _file(function).startswith(_TORCH):
        function = function.__wrapped__
    return function


def _file(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else code.co_filename


def _foreign(cls: type, functions: dict[str, Any]) -> str | None:
    """The first function of a class that another file defines, in words."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    for name, function in functions.items() if file else ():
        own = name == "__init__" or not name.startswith("__")  # a dataclass has others from elsewhere
        if own and _file(function) != file:
            return f"{cls.__name__}.{name} was replaced by another"
    return None
