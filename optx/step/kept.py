"""In how many bits a param group's state is kept: the settings ``state`` and ``master``, and their errors.

A group has them as numbers, which every checkpoint format takes: ``optx.state`` (32, 16 or 8 bits a moment)
and ``optx.master`` (24 or 32 bits a weight, of which a bfloat16 parameter has 16).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from optx._errors import OptxError
from optx.step.base_update import BaseRules
from optx.step.bases import base_rules
from optx.step.transform import Group, Host, Transform

STATE, MASTER = "optx.state", "optx.master"
STATES: dict[str, int] = {"float32": 32, "bfloat16": 16, "8bit": 8}
MASTERS: dict[str, int] = {"split": 24, "split16": 32}
ROUNDINGS = {24: "split8", 32: "split16"}  # what kernels call them
_SETTINGS = ((STATE, "state", STATES), (MASTER, "master", MASTERS))


def check_setting(name: str, value: Any, wanted: Iterable[str]) -> None:
    """Raise unless a setting is None or one of some words."""
    if value is not None and value not in tuple(wanted):
        raise OptxError(f"wrap: {name} is {value!r}; it must be {' or '.join(map(repr, wanted))}, or None.")


def fill_group(group: Group, state: str | None, master: str | None) -> None:
    """Give a group the numbers for what was asked, of it or of all.

    Raises:
        OptxError: it has another value.
    """
    for (key, name, words), asked in zip(_SETTINGS, (state, master), strict=True):
        value = group.get(key, asked)
        if value is None:
            group.pop(key, None)
            continue
        if value not in words and value not in words.values():
            raise OptxError(
                f"wrap: a param group has {key}={value!r}; it must be {' or '.join(map(repr, words))}, as "
                f"wrap's {name}."
            )
        group[key] = words.get(value, value)


def state_words(bits: int | None) -> str:
    """A format as `wrap` is given it."""
    return next((repr(word) for word, n in STATES.items() if n == bits), "None (the weight's dtype)")


def moments_of(rules: BaseRules | None, transforms: Iterable[Transform], group: Group) -> dict[str, str]:
    """Which of a group's state may be kept in fewer bits: the keys in ``state[p]``, and ``signed`` or not."""
    kept = {name: slot.moment for name, slot in rules.slots.items()} if rules else {}
    for t in transforms:
        if t.serves(group):
            kept |= {f"optx.{t.name}.{name}": slot.moment for name, slot in t.slots.items()}
    return {key: moment for key, moment in kept.items() if moment}


def check_kept(wrapped: Host, index: int, group: Group, why_foreach: str | None, tiled: bool) -> None:
    """Raise where a group can't be kept as it is asked.

    Args:
        wrapped: the optimizer.
        index: the group's number.
        group: with its numbers.
        why_foreach: why no kernel serves it; None where one does.
        tiled: whether its rules see rows or columns: then kernels go over tiles of a matrix.
    """
    asked = [f"{name}={_word(words, group[key])!r}" for key, name, words in _SETTINGS if key in group]
    if not asked:
        return
    base = type(wrapped.base).__name__
    if why_foreach:
        raise OptxError(
            f"wrap: {' and '.join(asked)} cannot be honoured for param group {index}, which is not fused: "
            f"{why_foreach}. {base} itself writes its state and weights, in the weight's dtype. Leave it out."
        )
    if tiled and (group.get(STATE) == 8 or MASTER in group):
        raise OptxError(
            f"wrap: {' and '.join(asked)}, and in param group {index} a rule sums or reads rows or columns, "
            "which kernels do on moments and weights in one part only. Leave it out of this group."
        )
    if STATE in group and not moments_of(base_rules(wrapped.base, group), wrapped.transforms, group):
        raise OptxError(
            f"wrap: {asked[0]}, and in param group {index} neither {base} nor a transform keeps a moment, "
            "which it could be said of. Leave state out, or give the base a momentum."
        )
    if MASTER in group:
        if wrapped.rounding_asked:
            raise OptxError(
                f"wrap: rounding={wrapped.rounding!r} and {asked[-1]}: a weight that keeps what it loses has "
                "nothing to be rounded. Leave rounding out."
            )
        others = {str(p.dtype).removeprefix("torch.") for p in group["params"] if p.dtype != torch.bfloat16}
        if others:
            raise OptxError(
                f"wrap: {asked[-1]} keeps what a bfloat16 weight loses, and param group {index} has "
                f"parameters in {' and '.join(sorted(others))}. Cast the model (model.bfloat16()), or leave "
                "master out."
            )


def _word(words: Mapping[str, int], bits: int) -> str:
    return next(word for word, n in words.items() if n == bits)
