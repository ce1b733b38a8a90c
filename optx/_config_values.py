"""Values of a config file: made into what a constructor takes, and written down from what it was given.

What an argument may be is read off its annotation. YAML has no paths, dtypes or tuples, and YAML 1.1 reads
``1e-4`` as a word; all of these are understood where the argument can be nothing else.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from optx._errors import OptxError, near, shown
from optx._expression import defaults
from optx._masks import Masks
from optx.inject._hparams import HParam, HParams, hp
from optx.scaling._shapes import Shapes

_TABLES = (dict, collections.abc.Mapping)
_ROWS = (list, collections.abc.Sequence)
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_TYPE = "torch.nn."


def plain(value: Any) -> Any:
    """Any mapping and sequence (OmegaConf's too) as dicts and lists; what is none is kept as it is."""
    if isinstance(value, Masks | Shapes | nn.Module):
        return value
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | range):
        return [plain(one) for one in cast("Sequence[Any]", value)]
    return value


def accepted(maker: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """What each argument may be, by name: the parts of its annotation; () where that says nothing.

    Without an annotation, what its default is.
    """
    usual = defaults(maker)
    found: dict[str, tuple[Any, ...]] = {}
    for name, p in inspect.signature(maker).parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        hint = _hint(maker, name, p.annotation)
        known = type(usual.get(name)) if isinstance(usual.get(name), bool | int | float | str) else None
        found[name] = _parts(hint) if hint is not inspect.Parameter.empty else (known,) if known else ()
    return found


def _hint(maker: Callable[..., Any], name: str, annotation: Any) -> Any:
    """An annotation as it is meant; none where it names what is imported for type checkers alone."""
    if not isinstance(annotation, str):
        return annotation
    # A dataclass inherits fields, whose annotations mean what they do in the module that they are written in.
    owners = [one for one in getattr(maker, "__mro__", ()) if name in vars(one).get("__annotations__", {})]
    init: Any = maker.__init__ if isinstance(maker, type) else maker
    module = owners[0].__module__ if dataclasses.is_dataclass(maker) and owners else init.__module__
    try:
        return eval(annotation, dict(vars(sys.modules[module])))
    except NameError:
        return inspect.Parameter.empty


def _parts(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(part for one in typing.get_args(hint) for part in _parts(one))
    return (hint,)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the values of one entry of a config.

    Attributes:
        model: what stands for an argument that is the model; None if there is none.
        make: makes what a nested table with a ``name`` describes.
    """

    model: nn.Module | None
    make: Callable[[Any, str, type], Any]

    def read(self, who: str, name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
        """One argument as its constructor takes it.

        Args:
            who: whose it is, for errors.
            name: the argument's.
            value: as the file has it.
            kinds: what it may be, see `accepted`.

        Raises:
            OptxError: it can't be that.
        """
        if not kinds or Any in kinds or collections.abc.Hashable in kinds:
            return value
        if _has(kinds, nn.Module) and isinstance(value, bool):
            return self._the_model(who, name, value)
        if value is None:
            if type(None) not in kinds:
                raise OptxError(f"{who}: {name} is null; leave it out for its default.")
            return None
        if isinstance(value, bool | int | float):
            return _number(who, name, value, kinds)
        if isinstance(value, str):
            return self._word(who, name, value, kinds)
        if isinstance(value, dict):
            return self._table(who, name, cast("dict[Any, Any]", value), kinds)
        if isinstance(value, list):
            return self._row(who, name, cast("list[Any]", value), kinds)
        return value  # an object that a program put there; the constructor looks at it

    def _the_model(self, who: str, name: str, value: bool) -> nn.Module | None:
        if value and self.model is None:
            raise OptxError(f"{who}: {name} is the model; pass it as optx.from_config(config, model=model).")
        return self.model if value else None

    def _word(self, who: str, name: str, value: str, kinds: tuple[Any, ...]) -> Any:
        literals = [kind for kind in kinds if typing.get_origin(kind) is Literal]
        choices = [one for kind in literals for one in typing.get_args(kind)]
        if type in _origins(kinds) and value.startswith(_TYPE):
            return _dotted(who, name, value)
        if str in kinds or value in choices:
            return value
        if torch.dtype in kinds:
            return _dtype(who, name, value)
        for kind in (Masks, Shapes):
            if kind in kinds:
                return kind.load(value)
        if float in kinds or int in kinds:
            return _parsed(who, name, value, kinds)
        if collections.abc.Callable in _origins(kinds):
            return _dotted(who, name, value)
        if bool in kinds:
            raise OptxError(f"{who}: {name} is the word {shown(value)}; write true or false, without quotes.")
        if choices:
            return value  # the constructor lists them
        if _has(kinds, nn.Module):
            raise OptxError(f"{who}: {name} is {shown(value)}; it is the model: true stands for model=.")
        raise OptxError(f"{who}: {name} is the word {shown(value)}, and can't be one.")

    def _table(self, who: str, name: str, value: dict[Any, Any], kinds: tuple[Any, ...]) -> Any:
        if HParams in kinds:
            return HParams(**{key: self._hparam(f"{who}: {name}", key, one) for key, one in value.items()})
        if Shapes in kinds:
            return Shapes.from_data(value)
        nested = [one for one in kinds if isinstance(one, type) and hasattr(one, "arguments")]
        if nested and "name" in value:
            return self.make(value, f"{who}: {name}", nested[0])
        for kind in kinds:
            if (typing.get_origin(kind) or kind) in _TABLES:
                of = (typing.get_args(kind) or (None, Any))[1]
                return {k: self.read(who, f"{name}[{k!r}]", one, _parts(of)) for k, one in value.items()}
        raise OptxError(f"{who}: {name} is a table, {shown(value)}, and can't be one.")

    def _hparam(self, who: str, key: str, value: Any) -> HParam:
        table = cast("dict[str, Any]", value) if isinstance(value, dict) else {"value": value}
        kinds = accepted(hp)
        check_known(f"{who}[{key!r}]", table, kinds)
        return hp(**{one: self.read(f"{who}[{key!r}]", one, v, kinds[one]) for one, v in table.items()})

    def _row(self, who: str, name: str, value: list[Any], kinds: tuple[Any, ...]) -> Any:
        for kind in kinds:
            origin = typing.get_origin(kind) or kind
            if origin is tuple or origin in _ROWS:
                of = typing.get_args(kind)
                alike = len(value) != len(of) or ... in of  # or each place has a kind of its own, as betas
                each = [of[0] if of else Any] * len(value) if alike else list(of)
                rows = enumerate(zip(value, each, strict=True))
                read = [self.read(who, f"{name}[{i}]", one, _parts(k)) for i, (one, k) in rows]
                return tuple(read) if origin is tuple else read
        raise OptxError(f"{who}: {name} is a list, {shown(value)}, and can't be one.")


def check_known(who: str, given: Mapping[Any, Any], known: Mapping[str, Any] | Sequence[str]) -> None:
    """Raise if a table has a key that nothing reads."""
    for key in given:
        if key not in known:
            raise OptxError(f"{who}: there is no {key!r}. {near(str(key), known)}")


def _has(kinds: tuple[Any, ...], base: type) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, base) for kind in kinds)


def _origins(kinds: tuple[Any, ...]) -> set[Any]:
    return {typing.get_origin(kind) or kind for kind in kinds}


def _number(who: str, name: str, value: bool | int | float, kinds: tuple[Any, ...]) -> Any:
    """A number, or true or false, where it may be one."""
    if isinstance(value, bool):
        choices = {one for kind in kinds for one in typing.get_args(kind) if isinstance(one, bool)}
        if bool not in kinds and value not in choices:
            raise OptxError(f"{who}: {name} is {str(value).lower()}, and is not a switch.")
        return value
    if bool in kinds and not {int, float} & set(kinds):
        raise OptxError(f"{who}: {name} is {value!r}; it must be true or false.")
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)  # JSON's 1e3
    return value


def _parsed(who: str, name: str, value: str, kinds: tuple[Any, ...]) -> float | int:
    """The number that a word is: YAML 1.1 takes 1e-4 for one."""
    if not _NUMBER.fullmatch(value):
        raise OptxError(f"{who}: {name} is the word {shown(value)}; it must be a number.")
    number = float(value.replace("_", ""))
    return int(number) if int in kinds and number.is_integer() else number


def _dtype(who: str, name: str, value: str) -> torch.dtype:
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise OptxError(f"{who}: {name} is {shown(value)}; it must be a dtype's name, as float16.")
    return found


def _dotted(who: str, name: str, value: str) -> Any:
    """What a dotted path names."""
    try:
        return dotted(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptxError(f"{who}: {name} is {shown(value)}, which can't be imported ({error}).") from None


def dotted(path: str) -> Any:
    """What ``package.module.thing`` names.

    Raises:
        ImportError: there is no such module.
        AttributeError: there is no such thing in it.
    """
    module, _, thing = path.rpartition(".")
    if not module:
        raise ImportError("it must be a dotted path, as package.module.thing")
    return getattr(importlib.import_module(module), thing)
