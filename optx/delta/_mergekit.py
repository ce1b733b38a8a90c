"""A merge as a YAML file: mergekit's format for the methods that both have, and for optx's own.

What the format means is taken from mergekit 0.1.5's documentation and behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch

from optx._errors import OptxError, near
from optx.delta._inputs import expanded
from optx.delta._merge_method import MergeMethod
from optx.delta._yaml import load_yaml
from optx.delta.arithmetic import TaskArithmetic
from optx.delta.dare import DARETIES, DARELinear
from optx.delta.pcb import PCB
from optx.delta.ties import TIES

Table = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """What a file asks for.

    Attributes:
        base: path of the base.
        models: paths of the models, in order.
        method: with its options.
        dtype: of the result; None keeps the base's.
        notes: what of the file has no effect, in sentences.
    """

    base: Path
    models: list[Path]
    method: MergeMethod
    dtype: torch.dtype | None
    notes: list[str] = field(default_factory=list[str])


@dataclass
class _Settings:
    """The file's parameters, taken one after the other; what is left at the end is unknown."""

    shared: Table
    each: list[tuple[str, Table]]
    used: set[str] = field(default_factory=set[str])

    def one(self, key: str, default: Any) -> Any:
        """A parameter of the whole merge."""
        self.used.add(key)
        for model, own in self.each:
            if key in own:
                raise OptxError(f"config: {key!r} holds for the whole merge; {model!r} can't have its own.")
        return _plain(key, self.shared.get(key, default), type(default))

    def per_model(self, key: str, default: float | None) -> list[float]:
        """A parameter of each model, or of the whole merge."""
        self.used.add(key)
        found: list[float] = []
        for model, own in self.each:
            value = own.get(key, self.shared.get(key, default))
            if value is None:
                raise OptxError(f"config: {model!r} has no {key!r}; give it under its parameters.")
            found.append(_plain(key, value, float))
        return found


def _rescale(settings: _Settings) -> Any:
    return "l1" if settings.one("rescale", True) else "none"


def _task_arithmetic(s: _Settings, seed: int) -> MergeMethod:
    _no_density(s)
    return TaskArithmetic(s.one("lambda", 1.0), s.per_model("weight", None), s.one("normalize", False))


def _ties(s: _Settings, seed: int) -> MergeMethod:
    if s.one("rescale", False):
        raise OptxError("config: rescale: true is not there for ties; optx.TIES does not rescale.")
    return TIES(
        s.per_model("density", 1.0),
        s.one("lambda", 1.0),
        s.per_model("weight", None),
        normalize=s.one("normalize", True),
        convention="mergekit",
    )


def _dare(kind: type[DARELinear] | type[DARETIES]) -> Callable[[_Settings, int], MergeMethod]:
    return lambda s, seed: kind(
        [1 - density for density in s.per_model("density", 1.0)],
        s.one("lambda", 1.0),
        s.per_model("weight", None),
        seed,
        _rescale(s),
        s.one("normalize", False),
        "mergekit",
    )


def _pcb(s: _Settings, seed: int) -> MergeMethod:
    return PCB(
        s.one("ratio", 0.1),
        s.per_model("lambda", 1.0),
        s.one("score", "code"),
        s.one("inter", "sum"),
        s.one("clip", 1e-4),
        s.one("scope", "global"),
    )


_METHODS: dict[str, Callable[[_Settings, int], MergeMethod]] = {
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_linear": _dare(DARELinear),
    "dare_ties": _dare(DARETIES),
    "pcb": _pcb,
}
_KNOWN = ("models", "parameters", "base_model", "merge_method", "dtype", "out_dtype", "tokenizer_source")
_DEPTH = 3  # how deep mergekit's tables for a model go; one may hold itself
_OTHERS = ("slices", "modules", "tokenizer", "chat_template")
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def read_config(path: str | PathLike[str], seed: int = 0) -> Config:
    """Read a YAML file.

    Args:
        path: the file.
        seed: of random masks.

    Raises:
        FileError: there is no such file, or it is no YAML.
        OptxError: something in it that optx does not do; names it.
    """
    path = expanded(Path(path), "config")
    table = _table(load_yaml(path), f"{str(path)!r}")
    for key in table:
        if key in _OTHERS:
            raise OptxError(f"config: optx does not do {key!r}; it merges whole models, under 'models'.")
        if key not in _KNOWN:
            raise OptxError(f"config: there is no {key!r}. {near(str(key), _KNOWN)}")
    name = table.get("merge_method")
    if not isinstance(name, str):
        raise OptxError(f"config: merge_method is {_shown(name)}; it must be one of {', '.join(_METHODS)}.")
    if name not in _METHODS:
        raise OptxError(f"config: optx does not do merge_method {name!r}. {near(name, _METHODS)}")
    if "base_model" not in table:
        raise OptxError(f"config: {name} needs base_model, the model that the others were fine-tuned from.")
    base = _path(table["base_model"], "base_model")
    each = [(_text(m), _table(m.get("parameters"), "parameters")) for m in _models(table)]
    # mergekit lists the base among the models at times, and uses nothing of it but the name.
    each = [(model, own) for model, own in each if model != _text({"model": table["base_model"]})]
    if not each:
        raise OptxError("config: 'models' names no model besides the base.")
    settings = _Settings(_table(table.get("parameters"), "parameters"), each)
    method = _METHODS[name](settings, seed)
    notes = _notes(table, settings)
    for key in {key for own in (settings.shared, *(own for _, own in each)) for key in own} - settings.used:
        raise OptxError(f"config: {name} has no parameter {key!r}. {near(str(key), settings.used)}")
    return Config(base, [_path(model, "model") for model, _ in each], method, _dtype(table), notes)


def _shown(value: Any) -> str:
    """A value in a message: a list or a table may be of any size, or hold itself."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number too large to show"
    text = "a list" if isinstance(value, list | set) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _table(value: Any, what: str) -> Table:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptxError(f"config: {what} is a {type(value).__name__}; it must be a table of keys and values.")
    return dict(cast(Mapping[str, Any], value))


def _models(table: Table) -> list[Table]:
    models = table.get("models")
    if not isinstance(models, list) or not models:
        raise OptxError("config: 'models' must be a list, each with 'model' and 'parameters'.")
    found = [_table(model, "a model") for model in cast(list[Any], models)]
    for model in found:
        for key in model:
            if key not in ("model", "parameters"):
                raise OptxError(f"config: a model has no {key!r}. {near(str(key), ('model', 'parameters'))}")
    return found


def _text(model: Table) -> str:
    """A model's path; mergekit also writes it as a table."""
    value = model.get("model")
    for _ in range(_DEPTH):
        if not isinstance(value, Mapping):
            break
        inner = _table(cast(Any, value), "model")
        if inner.get("lora") is not None:
            raise OptxError("config: optx does not do 'lora'; merge the adapter into its model first.")
        value = inner.get("model", inner.get("path"))
    if not isinstance(value, str) or not value.strip():  # "" would be the folder one is in
        raise OptxError(f"config: a model is {_shown(value)}; it must be a path.")
    return value


def _path(value: Any, what: str) -> Path:
    text = _text({"model": value})
    path = expanded(Path(text), f"config: {what}")
    if _exists(path):
        return path
    if "+" in text and _exists(expanded(Path(text.partition("+")[0]), f"config: {what}")):
        raise OptxError(f"config: {what} {text!r} adds a LoRA; merge the adapter into its model first.")
    raise OptxError(
        f"config: {what}: there is no file or folder {text!r}. A model of the hub must be downloaded first: "
        f"huggingface_hub.snapshot_download({text!r}) gives its folder."
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _plain(key: str, value: Any, kind: type) -> Any:
    """One value of a parameter; mergekit's gradients and filters are refused."""
    if isinstance(value, list | Mapping):
        parts = [value] if isinstance(value, Mapping) else cast(list[Any], value)
        what = "a filter" if any(isinstance(part, Mapping) for part in parts) else "a gradient"
        raise OptxError(f"config: {key!r} is {what} over layers, which optx does not do; give one value.")
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-1 as text
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, kind):
        return value
    wanted = {float: "a finite number", bool: "true or false", str: "a word"}[kind]
    raise OptxError(f"config: {key!r} is {_shown(value)}; it must be {wanted}.")


def _no_density(settings: _Settings) -> None:
    if any(density != 1 for density in settings.per_model("density", 1.0)):
        raise OptxError("config: task_arithmetic has no density; use ties, dare_linear or dare_ties.")


def _dtype(table: Table) -> torch.dtype | None:
    for key in ("dtype", "out_dtype"):
        name = table.get(key)
        if name is not None and (not isinstance(name, str) or name not in _DTYPES):
            raise OptxError(f"config: {key} is {_shown(name)}; it must be one of {', '.join(_DTYPES)}.")
    wanted = [table[key] for key in ("out_dtype", "dtype") if table.get(key) is not None]
    return _DTYPES[wanted[0]] if wanted else None


def _notes(table: Table, settings: _Settings) -> list[str]:
    notes: list[str] = []
    source = table.get("tokenizer_source")
    if not isinstance(source, str | None):
        raise OptxError(f"config: tokenizer_source is {_shown(source)}; it must be a word, such as base.")
    if source == "union":
        raise OptxError("config: optx does not do tokenizer_source 'union'; models must have one vocabulary.")
    if source not in (None, "base"):
        notes.append(f"tokenizer_source {source!r} is ignored: the base's tokenizer is copied.")
    settings.used.add("int8_mask")
    tables = (settings.shared, *(own for _, own in settings.each))
    masks = [_plain("int8_mask", own["int8_mask"], bool) for own in tables if "int8_mask" in own]
    if any(masks):
        notes.append("int8_mask is ignored: it does not change the result, and memory is bounded without it.")
    return notes
