"""Objects as the Python that makes them again: ``LoRA(rank=4)``, with the arguments that are not defaults."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from os import PathLike, fspath
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class HasArguments(Protocol):
    """What says how it was made; its ``repr`` is that call."""

    def arguments(self) -> dict[str, Any]:
        """Its constructor's arguments by name, with the values in force."""
        ...


class Unwritable(ValueError):
    """A value that no short piece of text stands for; the message says what it is."""


class NotKept:
    """In the place of an argument that an object does not keep."""


def expression(maker: Callable[..., Any], arguments: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """The call that makes an object, in a namespace that has what optx has.

    Args:
        maker: the class or function.
        arguments: its arguments by name. What no text stands for (a model, tensors) is written as a
            variable of the argument's name: ``HFT(model=model)``.
        always: those that are written even if they are the defaults.
    """
    usual = defaults(maker)
    shown = [n for n, v in arguments.items() if n in always or n not in usual or not same(v, usual[n])]
    return f"{maker.__name__}({', '.join(f'{name}={_or_name(arguments[name], name)}' for name in shown)})"


def defaults(maker: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a function's or class's arguments, of those that have one."""
    parameters = inspect.signature(maker).parameters.values()
    made = {
        field.name: field.default_factory()
        for field in (dataclasses.fields(maker) if dataclasses.is_dataclass(maker) else ())
        if field.default_factory is not dataclasses.MISSING
    }
    return {p.name: p.default for p in parameters if p.default is not p.empty} | made


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of one kind; 1 is not True, and tensors are never equal."""
    if one is other:
        return True
    if (
        isinstance(one, Tensor)
        or isinstance(other, Tensor)
        or isinstance(one, bool) != isinstance(other, bool)
    ):
        return False
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # an array
        return False


def plain_number(value: Any) -> Any:
    """A number of NumPy's or a tensor of one as Python's; anything else as it is."""
    known = isinstance(value, Tensor) or type(value).__module__ == "numpy"
    return value.item() if known and getattr(value, "ndim", 1) == 0 else value


def _or_name(value: Any, name: str) -> str:
    try:
        return literal(value)
    except Unwritable:
        return name


def literal(value: Any) -> str:
    """A value as it is typed.

    Raises:
        Unwritable: there is no such text.
    """
    value = plain_number(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype) or _tells(value):
        return repr(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, PathLike):
        return repr(fspath(cast("PathLike[str]", value)))
    if isinstance(value, type):
        return torch_type(value)
    if isinstance(value, tuple | list):
        return _row(cast("tuple[Any, ...] | list[Any]", value))
    if isinstance(value, dict):
        table = cast("dict[Any, Any]", value)
        return f"{{{', '.join(f'{literal(k)}: {literal(v)}' for k, v in table.items())}}}"
    raise Unwritable(what(value))


def _tells(value: Any) -> bool:
    """Whether its ``repr`` is a call."""
    if isinstance(value, nn.Module) and type(value).__repr__ is nn.Module.__repr__:
        return False
    return isinstance(value, HasArguments) and not isinstance(value, type)


def _row(values: tuple[Any, ...] | list[Any]) -> str:
    inside = ", ".join(map(literal, values))
    if isinstance(values, list):
        return f"[{inside}]"
    return f"({inside},)" if len(values) == 1 else f"({inside})"


def torch_type(kind: type) -> str:
    """The name of one of torch's module types.

    Raises:
        Unwritable: it is another type.
    """
    if getattr(nn, kind.__name__, None) is not kind:
        raise Unwritable(f"the type {kind.__name__}")
    return f"torch.nn.{kind.__name__}"


def what(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, NotKept):
        return "not kept by the object"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values()):
        return f"tensors (a {type(value).__name__})"
    return f"a {type(value).__name__}"
