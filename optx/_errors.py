"""Errors a person can act on: what, where, got, wanted, one way out."""

from __future__ import annotations

import difflib
import operator
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any


class OptxError(ValueError):
    """Base of every error that optx raises for bad input."""


class TransformError(OptxError):
    """A transform that cannot serve this base, these parameters or these arguments."""


class TargetError(OptxError):
    """``targets`` that match nothing, or a module that an injection cannot serve; names it."""


class MergeError(OptxError):
    """An injection that has no equal in weights, or weights that changed since they were merged."""


class FileError(OptxError):
    """A file that is damaged, or was written for another model; names the key."""


class FusedError(OptxError):
    """``fused=`` asked for a path that cannot be taken; the message says why."""


class ShapeError(OptxError):
    """Two tensors that must have one shape have two; names the parameter."""


def near(name: str, names: Iterable[str], count: int = 3) -> str:
    """A sentence part listing names like ``name``: ``Near: 'a', 'b' (24 in all).``"""
    everything = list(names)
    close = difflib.get_close_matches(name, everything, n=count, cutoff=0.4) or everything[:count]
    return (
        f"Near: {', '.join(map(repr, close))} ({len(everything)} in all)."
        if everything
        else "There are none."
    )


def wanted_shape(logits: Sequence[int], target: Sequence[int], wanted: Sequence[int]) -> str:
    """What a classification's target of another shape is told: where logits have their classes."""
    dim = min(1, len(logits) - 1)
    last = len(logits) > 2 and tuple(target) == tuple(logits[:-1])
    way_out = " If yours are the last, pass logits.movedim(-1, 1)." if last else ""
    return (
        f"for logits of shape {tuple(logits)} it must be {tuple(wanted)}: classes are dimension {dim}, as in "
        f"torch's cross_entropy.{way_out}"
    )


_INSIDE = ("optx.", "torch.")  # schedulers, GradScaler and torch's own hooks wrap a step


def warn(message: str) -> None:
    """Warn at the line outside optx and torch that led here, through however many of their functions."""
    frame, levels = sys._getframe(1), 2  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, levels = frame.f_back, levels + 1
    warnings.warn(message, stacklevel=levels)


def check_range(owner: str, argument: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raise unless ``low <= value <= high``, in one sentence."""
    number = isinstance(value, int | float) or hasattr(value, "item")  # a tensor or a NumPy number too
    if not (number and _is_one(value) and _holds(lambda: low <= value <= high)):
        wanted = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise OptxError(f"{owner}: {argument} is {shown(value)}; it must be {wanted}.")


def check_above_0(owner: str, argument: str, value: Any) -> float:
    """The finite number above 0 that a value is, as Python, NumPy or a tensor has it; raise unless it is."""
    number = isinstance(value, int | float) or hasattr(value, "item")
    if isinstance(value, bool) or not (
        number and _is_one(value) and _holds(lambda: 0 < value < float("inf"))
    ):
        raise OptxError(f"{owner}: {argument} is {shown(value)}; it must be a finite number above 0.")
    return float(value)


def as_whole(value: Any) -> int | None:
    """A whole number as Python, NumPy or a tensor has it; None if it is none, a bool, or a row of one."""
    truth = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if truth or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # a tensor without data
        return None


def check_whole(owner: str, argument: str, value: Any, low: int | None = None, wanted: str = "") -> int:
    """The whole number that a value is; raise unless it is one, of at least ``low``.

    Args:
        owner: whose argument it is.
        argument: its name.
        value: what was given.
        low: the least that it may be; None: anything.
        wanted: what it must be, in words, for either fault.
    """
    number = as_whole(value)
    if number is None or (wanted and low is not None and number < low):
        raise OptxError(f"{owner}: {argument} is {shown(value)}; it must be {wanted or 'a whole number'}.")
    if low is not None:
        check_range(owner, argument, number, low)
    return number


def check_choice(owner: str, argument: str, value: object, choices: Collection[object]) -> None:
    """Raise unless an option is one of its values."""
    if not (_is_one(value) and any(_holds(lambda one=one: value == one) for one in choices)):
        wanted = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise OptxError(f"{owner}: {argument} is {shown(value)}; it must be one of {wanted}.")


def shown(value: object) -> str:
    """What was given, in one line of a sentence, however many numbers it has."""
    return textwrap.shorten(repr(value), 100, placeholder=" ...")


def _is_one(value: object) -> bool:
    """Whether it is no array or tensor with axes: one of a single number compares as that number does."""
    return not getattr(value, "shape", ())


def _holds(comparison: Callable[[], Any]) -> bool:
    """Whether it is true; one that cannot be made (of an array, or what knows no order) is not."""
    try:
        return bool(comparison())
    except (TypeError, ValueError, RuntimeError):
        return False
