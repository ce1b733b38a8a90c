"""Who froze a parameter: the person, or the round. ``requires_grad`` alone does not tell."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from optx._errors import TransformError


class Flags:
    """What the person wants of every parameter, beside what a round has made of it.

    Attributes:
        wish: by name, ``requires_grad`` as the person left it.
    """

    def __init__(self) -> None:
        self.wish: dict[str, bool] = {}
        self._left: dict[str, bool] = {}  # as it was set here, or seen here
        self._watched: list[tuple[str, nn.Parameter]] = []
        self._last: list[bool] = []  # the flags of all of these when `follow` last looked

    def watch(self, params: Mapping[str, nn.Parameter]) -> None:
        """Look after these parameters; objects may be others than before, names count."""
        for name, p in params.items():
            self.wish.setdefault(name, p.requires_grad)
            self._left.setdefault(name, p.requires_grad)
        self._watched = list(params.items())
        self._last = []

    def follow(self) -> list[str] | None:
        """Take on what the person has changed since.

        Returns:
            What was thawed although the round holds it (it is frozen again); None where no flag has changed.
        """
        flags = [p.requires_grad for _, p in self._watched]
        if flags == self._last:
            return None
        thawed: list[str] = []
        for name, p in self._watched:
            now = p.requires_grad
            if now == self._left[name]:
                continue
            if now and self.wish[name]:  # only a round can have frozen it
                p.requires_grad_(False)
                thawed.append(name)
            else:
                self.wish[name] = self._left[name] = now
        self._last = [p.requires_grad for _, p in self._watched]
        return thawed

    def set(self, name: str, p: nn.Parameter, trainable: bool) -> None:
        """Make a parameter what the round wants of it."""
        p.requires_grad_(trainable)
        self._left[name] = trainable
        self._last = []

    def want(self, names: Iterable[str], trainable: bool) -> None:
        """The person says it in words."""
        self.wish.update(dict.fromkeys(names, trainable))

    def give_back(self) -> None:
        """Every parameter as the person wants it; forget them all."""
        self.follow()
        for name, p in self._watched:
            p.requires_grad_(self.wish[name])
        self.wish.clear()
        self._left.clear()
        self._watched.clear()
        self._last = []

    def unwanted(self) -> set[str]:
        """What the person froze."""
        return {name for name, wanted in self.wish.items() if not wanted}


# Whose flags a model has: an optimizer may be dropped without remove(), and its frozen half is still frozen.
_SERVED: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], Flags]] = weakref.WeakKeyDictionary()


def serve(model: nn.Module, optimizer: weakref.ref[Any], flags: Flags) -> None:
    """From now on a model's flags are those of this optimizer's rounds."""
    _SERVED[model] = (optimizer, flags)


def serve_no_more(model: nn.Module) -> None:
    """They are the person's again."""
    _SERVED.pop(model, None)


def inherited_flags(model: nn.Module) -> Flags:
    """The person's flags: as they are, or as an optimizer knew them that was dropped without remove()."""
    last, flags = _SERVED.get(model, (None, Flags()))
    if last is not None and last() is not None:
        gc.collect()  # a scheduler makes a cycle of its optimizer
        if last() is not None:
            raise TransformError(
                "HFT: another optimizer's HFT serves this model, and its frozen half would look as if "
                "you had frozen it. Call remove() on that optimizer first."
            )
    return flags
