"""Adapters of strangers: options are of their kinds, and sizes those of the tensors beside them.

Looked at before anything is made for them: a rank of a billion is a line of JSON, and its matrices are
terabytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from optx._errors import FileError, OptxError
from optx._safetensors import brief
from optx.inject._file_patterns import check_simple
from optx.inject._injection import Injection, values_of
from optx.inject._stored import Stored
from optx.inject.lora import LoRA

_SMALL = 4096
"""Options up to here may be of any use; a larger one is a size, and the file must have a tensor with it."""


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _word(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _words(value: Any) -> bool:
    every = isinstance(value, list) and all(isinstance(word, str) for word in value)
    return value is None or isinstance(value, str) or every


def _list_of_words(value: Any) -> bool:
    return not isinstance(value, str) and _words(value)


def _layers(value: Any) -> bool:
    return (
        value is None
        or type(value) is int
        or (isinstance(value, list) and all(type(n) is int for n in value))
    )


def _table_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(kind, value.values())))


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_positive, "a whole number above 0"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (_number, "a number"),
    "use_rslora": (_flag, "true or false"),
    "use_dora": (_flag, "true or false"),
    "lora_bias": (_flag, "true or false"),
    "fan_in_fan_out": (_flag, "true or false"),
    "bias": (_word, "a word"),
    "task_type": (_word, "a word"),
    "peft_type": (_word, "a word"),
    "rank_pattern": (_table_of(_positive), "a table of whole numbers above 0"),
    "alpha_pattern": (_table_of(_number), "a table of numbers"),
    "target_modules": (_words, "a pattern or a list of names"),
    "exclude_modules": (_words, "a pattern or a list of names"),
    "feedforward_modules": (_words, "a pattern or a list of names"),
    "layers_pattern": (_words, "a pattern or a list of them"),
    "modules_to_save": (_list_of_words, "a list of names"),
    "layers_to_transform": (_layers, "a number or a list of them"),
    "num_virtual_tokens": (_positive, "a whole number above 0"),
    "num_attention_heads": (_positive, "a whole number above 0"),
    "token_dim": (_positive, "a whole number above 0"),
    "num_layers": (_positive, "a whole number above 0"),
}
_PREFIX = ("num_virtual_tokens", "num_attention_heads", "token_dim")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise unless a PEFT configuration's options are of their kinds.

    Raises:
        FileError: names the option.
    """
    prefix = config.get("peft_type") == "PREFIX_TUNING"
    for option, (right, wanted) in _OPTIONS.items():
        if option not in config and not (prefix and option in _PREFIX):
            continue
        value = config.get(option)
        if not (right(value) or (value is None and option not in _PREFIX)):
            raise FileError(f"{where} has {option}={brief(value)}; it must be {wanted}.")
    for option in ("r", "lora_alpha", "lora_dropout"):
        if option in config and config[option] is None:
            raise FileError(f"{where} has {option}=None; it must be {_OPTIONS[option][1]}.")
    stacks = config.get("layers_pattern") or ()
    for stack in (stacks,) if isinstance(stacks, str) else stacks:
        check_simple(stack, f"{where}: layers_pattern")


_NO_SIZES = ("seed", "stabilize_every", "recompute_every")


def check_sizes(stored: Stored, where: str) -> Stored:
    """Raise unless the sizes that the options name are those of the tensors.

    Raises:
        FileError: names the option, and the tensor if it is one.
    """
    if isinstance(stored.injection, LoRA):
        for key, tensor in stored.tensors.items():
            path, dot, suffix = key.rpartition(".lora_")
            if dot and suffix in ("A.weight", "embedding_A"):
                check_rank(stored.injection, path, key, tensor, where)
    members = list(_injections(stored.injection))
    largest = max((max(tensor.shape, default=1) for tensor in stored.tensors.values()), default=0)
    for injection in members:
        _check_types(injection, where)
        for option, value in values_of(injection).items():
            if type(value) is int and value > max(_SMALL, largest) and option not in _NO_SIZES:
                raise FileError(
                    f"{where} has {option}={value}, and no tensor of that size: its largest dimension is "
                    f"{largest}."
                )
        pattern = getattr(injection, "feedforward", None)
        if isinstance(pattern, str):
            check_simple(pattern, f"{where}: feedforward")
    return stored


def check_rank(lora: LoRA, path: str, key: str, tensor: Tensor, where: str) -> None:
    """Raise if a factor has fewer rows than the options say; what has others is refused with its shape."""
    rank = lora.rank_at(path)
    rows = len(tensor) if tensor.ndim else 0
    if rows < rank:  # experts that are one parameter have more, by names of their own
        raise FileError(
            f"{where}: {key!r} has shape {tuple(tensor.shape)}, and the options say rank {rank} for it: they "
            "are another adapter's, or were changed."
        )


_PLAIN: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "float": _number,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
}


def _check_types(injection: Injection, where: str) -> None:
    """Raise unless options of plain types are of them."""
    values = values_of(injection)
    for field in dataclasses.fields(injection):
        if field.name not in values:
            continue
        kinds = str(field.type).replace(" ", "").split("|")
        value = values[field.name]
        if all(kind in _PLAIN for kind in kinds) and not any(_PLAIN[kind](value) for kind in kinds):
            raise FileError(f"{where} has {field.name}={brief(value)}; it must be of type {field.type}.")


def _injections(injection: Any) -> list[Injection]:
    found = [injection] if isinstance(injection, Injection) else []
    values: Any = values_of(injection).values() if found else injection
    if isinstance(values, Mapping):
        values = values.values()
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        return found
    return [*found, *(inner for value in values for inner in _injections(value))]


def decoded(make: Callable[[], Any], where: str) -> Injection:
    """The injection that a file's options make.

    Raises:
        FileError: they make none.
    """
    try:
        made = make()
    except OptxError as error:
        raise FileError(f"{where}: {brief(error, quote=False, most=400)}") from error
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else brief(str(error), quote=False)
        raise FileError(f"{where} is damaged: its options make no injection ({why}).") from None
    if not isinstance(made, Injection):
        raise FileError(f"{where} is damaged: its options make no injection.")
    return made


def words_of(value: Any, where: str, what: str) -> list[str]:
    """A list of module paths.

    Raises:
        FileError: it is none.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise FileError(f"{where} is damaged: {what} is no list of modules.")
    return list(value)
