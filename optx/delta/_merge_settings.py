"""Parameters of a merge's file: one value, a gradient over the layers, or several with filters by name.

What they mean is mergekit 0.1.5's: `value_at` gives what it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from optx._errors import OptxError

Table = dict[str, Any]
Kind = Callable[[str, Any], Any]
"""Makes one value of a parameter; takes its name for messages."""

_TRUE = ("true", "yes", "on", "y", "t", "1")
_FALSE = ("false", "no", "off", "n", "f", "0")


def number(key: str, value: Any) -> float:
    """A finite number; YAML reads 1e-1 as text."""
    if not isinstance(value, bool):
        try:
            found = float(value)
            if math.isfinite(found):
                return found
        except (TypeError, ValueError, OverflowError):
            pass
    raise OptxError(f"config: {key!r} is {shown(value)}; it must be a finite number.")


def count(key: str, value: Any) -> int:
    """A whole number."""
    found = number(key, value)
    if found != int(found):
        raise OptxError(f"config: {key!r} is {shown(value)}; it must be a whole number.")
    return int(found)


def truth(key: str, value: Any) -> bool:
    """True or false, also in quotes or as 1 and 0."""
    word = str(value).strip().lower() if isinstance(value, str | bool | int) else ""
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise OptxError(f"config: {key!r} is {shown(value)}; it must be true or false.")


def word(key: str, value: Any) -> str:
    """A word."""
    if isinstance(value, str):
        return value
    raise OptxError(f"config: {key!r} is {shown(value)}; it must be a word.")


def shown(value: Any) -> str:
    """A value in a message: a list or a table may be of any size, or hold itself."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number too large to show"
    text = "a list" if isinstance(value, list | set) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_setting(key: str, setting: Any, kind: Kind) -> None:
    """Raise unless every value of a setting, whether a filter lets it through or not, is of a kind."""
    for condition in _conditions(key, setting):
        value = condition["value"]
        for one in cast(list[Any], value) if isinstance(value, list) else [value]:
            kind(key, one)


def value_at(key: str, settings: Iterable[Mapping[str, Any]], kind: Kind, name: str, t: float) -> Any:
    """The value of a parameter for one tensor.

    Args:
        key: of the parameter.
        settings: tables that may have it; the first that has a value for this tensor counts.
        kind: what a value is.
        name: of the tensor, for filters.
        t: where its layer is, 0 to 1, for gradients.

    Returns:
        The value; None if there is none.
    """
    for table in settings:
        if key not in table or table[key] is None:
            continue
        for condition in _conditions(key, table[key]):
            filter_ = condition.get("filter")
            if filter_ is None or filter_ == "*" or filter_ in name:
                found = _at(key, condition["value"], kind, t)
                if found is None:
                    break
                return found
    return None


def _at(key: str, value: Any, kind: Kind, t: float) -> Any:
    if not isinstance(value, list):
        return kind(key, value)
    points = [kind(key, one) for one in cast(list[Any], value)]
    if not points:
        return None
    if kind not in (number, count):
        return points[int(t * (len(points) - 1))]
    scaled = t * (len(points) - 1)
    before = int(scaled)
    after, share = min(len(points) - 1, before + 1), scaled - before
    return kind(key, (1 - share) * points[before] + share * points[after])


def _conditions(key: str, setting: Any) -> list[Table]:
    """A setting as a list of tables, each with a value and perhaps a filter."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return [{"value": setting}]
    given = cast(list[Any], setting)
    if not any(isinstance(one, Mapping) for one in given):
        if any(isinstance(one, list) for one in given):
            raise OptxError(f"config: {key!r} is a list of lists; a gradient is a list of values.")
        return [{"value": given}]
    for one in given:
        if not isinstance(one, Mapping) or "value" not in one or set(one) - {"value", "filter"}:
            raise OptxError(
                f"config: {key!r} has filters; each of its entries must be a table of 'value' and perhaps "
                f"'filter', not {shown(one)}."
            )
        filter_, value = (cast(Mapping[str, Any], one).get(part) for part in ("filter", "value"))
        if not isinstance(filter_, str | None):
            raise OptxError(f"config: a filter of {key!r} is {shown(filter_)}; it must be a part of a name.")
        inner = cast(list[Any], value) if isinstance(value, list) else [value]
        if any(isinstance(v, Mapping | list | None) for v in inner):
            raise OptxError(
                f"config: a value of {key!r} is {shown(value)}; it must be a value or a gradient."
            )
    return [dict(cast(Mapping[str, Any], one)) for one in given]
