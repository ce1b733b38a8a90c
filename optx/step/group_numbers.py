"""The numbers of a param group by the names that rules have for them, and what must hold of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optx._errors import OptxError
from optx.step.numbers import as_float, as_number
from optx.step.transform import Group

# What torch itself does without where a group lacks it.
_LENIENT = frozenset(("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"))


def base_numbers(group: Group) -> dict[str, float | Tensor]:
    """What rules may read of a base's param group: every number in it.

    Those of a tuple go by its key without the plural's s, and their place: ``betas`` as beta1, beta2.
    """
    numbers: dict[str, float | Tensor] = {}
    for key, value in group.items():
        if key == "params":
            continue
        if several(value):
            found = [as_number(one) for one in value]
            stem = key.removesuffix("s")
            numbers.update({f"{stem}{i}": one for i, one in enumerate(found, 1) if one is not None})
        elif (number := as_number(value)) is not None:
            numbers[key] = number
    return numbers


def several(value: Any) -> bool:
    """Whether a setting holds numbers in a row, as ``betas`` does."""
    if isinstance(value, Tensor):
        return value.ndim == 1 and len(value) > 1
    return issubclass(type(value), tuple | list) and bool(value) and as_number(value[0]) is not None


def rule_numbers(group: Group, names: Iterable[str]) -> dict[str, float | Tensor]:
    """The numbers of those names, as the group has them now: the base's, and options (``adamr_weight``).

    Raises:
        OptxError: one of them is no number any more.
    """
    numbers: dict[str, float | Tensor] = {}
    for name in names:
        value = _setting(group, name)
        number = value if type(value) is float else as_number(value)
        if number is None:
            key, rows, _ = _places(name)
            key = next((row for row in rows if row in group), key)
            raise OptxError(f"optx: a param group has {key}={group.get(key)!r}; it must be one number.")
        numbers[name] = number
    return numbers


def _setting(group: Group, name: str) -> Any:
    """What a group has under a rule's name for it."""
    key, rows, index = _places(name)
    if key in group or not rows:
        return group.get(key)
    values: Any = next((group[row] for row in rows if row in group), ())
    return values[index] if several(values) and len(values) > index else None


def keys_of(name: str) -> tuple[str, ...]:
    """The keys of a group that a rule's name for a number may be read from."""
    key, rows, _ = _places(name)
    return key, *rows


@functools.cache
def _places(name: str) -> tuple[str, tuple[str, ...], int]:
    """The key of a rule's name; where that is of a row of numbers, the keys it may have, and the place."""
    key = name.replace(".", "_")
    numbered = re.fullmatch(r"(.*\D)([1-9]\d*)", key)
    if numbered is None:
        return key, (), 0
    return key, (f"{numbered[1]}s", numbered[1]), int(numbered[2]) - 1


def check_numbers(base: Optimizer, group: Group) -> None:
    """Raise unless a group has the settings that its base has defaults for, and those are numbers still."""
    name = type(base).__name__
    for key, default in base.defaults.items():
        if key in _LENIENT or not (isinstance(default, bool) or several(default) or _is_number(default)):
            continue
        if key not in group:
            raise OptxError(
                f"optx: a param group of {name} has no {key!r}. Add groups with add_param_group, which fills "
                "in the defaults."
            )
        row: Any = default
        if key == "betas" and len(row) == 2 and type(base).__module__.startswith("torch."):
            check_betas(group[key])
        elif several(default):
            _check_row(key, default, group[key])
        elif not isinstance(default, bool) and as_number(group[key]) is None:
            raise OptxError(f"optx: a param group has {key}={group[key]!r}; it must be one number.")


def _is_number(value: Any) -> bool:
    return as_number(value) is not None


def _check_row(key: str, default: Any, given: Any) -> None:
    values: Any = given if several(given) else ()
    if len(values) != len(default) or not all(map(_is_number, values)):
        raise OptxError(f"optx: a param group has {key}={given!r}; it must be {len(default)} numbers.")


def check_betas(betas: Any) -> None:
    """Raise unless these are two numbers from 0 to below 1, as torch's constructors want them."""
    pair = list(map(as_number, betas)) if issubclass(type(betas), tuple | list | Tensor) else []
    numbers = [None if beta is None else as_float(beta) for beta in pair]
    if len(numbers) != 2 or not all(beta is not None and 0.0 <= beta < 1.0 for beta in numbers):
        raise OptxError(
            f"optx: a param group has betas={betas!r}; they must be two numbers from 0 to below 1."
        )
