"""What a merge's YAML file asks for, as mergekit 0.1.5 writes it: models or slices, method, parameters.

Only the form is checked here; what a method needs of it is `_merge_methods`' matter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from optx._errors import OptxError, near
from optx.delta._inputs import expanded
from optx.delta._merge_settings import Table, count, shown

_TOP = (
    "models",
    "slices",
    "parameters",
    "base_model",
    "merge_method",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_DEPTH = 3  # how deep mergekit's tables for a model go; one may hold itself


@dataclass(frozen=True)
class ModelRef:
    """A model of the file, perhaps with a LoRA on it.

    Attributes:
        text: as it is written there.
        path: of the model.
        adapter: folder of the LoRA.
    """

    text: str = field(compare=False)
    path: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Part:
    """Some layers of a model, and parameters of their own.

    Attributes:
        model: whose.
        layers: the first, and the one after the last; None: all.
        parameters: as in the file.
    """

    model: ModelRef
    layers: tuple[int, int] | None
    parameters: Table


@dataclass(frozen=True)
class Slice:
    """Layers of the result.

    Attributes:
        parts: what they are made of, each with as many layers.
        base: the base; None: the file's.
        parameters: of this slice.
    """

    parts: Sequence[Part]
    base: ModelRef | None
    parameters: Table


@dataclass(frozen=True)
class MergeFile:
    """A whole file.

    Attributes:
        method: its name.
        slices: of the result, in order; one that has all layers, if the file lists models.
        whole: whether the file lists models.
        base: of the whole file.
        parameters: of the whole file.
        dtype: that inputs are converted to; None: the widest of them.
        out_dtype: of the result; None: that of the computation.
        tokenizer: the table ``tokenizer``, or one made of ``tokenizer_source``; None without either.
        chat_template: a template, or a name.
        notes: what of the file has no effect, in sentences.
    """

    method: str
    slices: Sequence[Slice]
    whole: bool
    base: ModelRef | None
    parameters: Table
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    tokenizer: Table | None
    chat_template: str | None
    notes: list[str]

    @property
    def models(self) -> list[ModelRef]:
        """Every model that is named, in order, the base first."""
        found = dict.fromkeys([self.base] if self.base else [])
        for one in self.slices:
            found |= dict.fromkeys([one.base] if one.base else [])
            found |= dict.fromkeys(part.model for part in one.parts)
        return list(found)


def parse(raw: Any, what: str, methods: Sequence[str]) -> MergeFile:
    """Read a file's content.

    Args:
        raw: as YAML gives it.
        what: the file, for messages.
        methods: that it may name.

    Raises:
        OptxError: something in it that is not mergekit's format, or that optx does not do; names it.
    """
    top = table_of(raw, what)
    if "modules" in top:
        raise OptxError("config: optx does not do 'modules'; give the model under 'models' or 'slices'.")
    known(top, _TOP, "config: there is no")
    method, base = top.get("merge_method"), None
    if not isinstance(method, str):
        raise OptxError(f"config: merge_method is {shown(method)}; it must be one of {', '.join(methods)}.")
    if method not in methods:
        raise OptxError(
            f"config: optx does not do merge_method {shown(method)}. {near(method.lower()[:80], methods)}"
        )
    if top.get("base_model") is not None:
        base = model_of(top["base_model"], "base_model")
    if top.get("models") is not None and top.get("slices") is not None:
        raise OptxError("config: 'models' and 'slices' are both there; give the one that is meant.")
    whole, notes = top.get("slices") is None, list[str]()
    slices = [_of_models(top.get("models"), base)] if whole else _slices(top["slices"], notes)
    template = top.get("chat_template")
    if not isinstance(template, str | None):
        raise OptxError(f"config: chat_template is {shown(template)}; it must be a template or 'auto'.")
    return MergeFile(
        method,
        slices,
        whole,
        base,
        table_of(top.get("parameters"), "parameters"),
        _dtype(top, "dtype"),
        _dtype(top, "out_dtype"),
        _tokenizer(top),
        template or None,
        notes,
    )


def table_of(value: Any, what: str) -> Table:
    """A table, empty if there is nothing."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptxError(f"config: {what} is a {type(value).__name__}; it must be a table of keys and values.")
    return dict(cast(Mapping[str, Any], value))


def known(table: Mapping[Any, Any], keys: Sequence[str], sentence: str) -> None:
    """Raise if a table has another key."""
    for key in table:
        if key not in keys:
            raise OptxError(f"{sentence} {shown(key)}. {near(str(key)[:80], keys)}")


def _list_of(value: Any, what: str, wanted: str) -> list[Table]:
    if not isinstance(value, list) or not value:
        raise OptxError(f"config: {what} must be a list, each with {wanted}.")
    return [table_of(one, f"one of {what}") for one in cast(list[Any], value)]


def _of_models(value: Any, base: ModelRef | None) -> Slice:
    parts = list[Part]()
    for one in _list_of(value, "'models'", "'model' and 'parameters'"):
        known(one, ("model", "parameters"), "config: a model has no")
        model = model_of(one.get("model"), "model")
        parts.append(Part(model, None, table_of(one.get("parameters"), "parameters")))
    _twice(parts, "'models'")
    return Slice(parts, base, {})


def _slices(value: Any, notes: list[str]) -> list[Slice]:
    found = list[Slice]()
    for i, one in enumerate(_list_of(value, "'slices'", "'sources'")):
        where = f"slices[{i}]"
        known(one, ("sources", "base_model", "residual_weight", "parameters"), f"config: {where} has no")
        if one.get("residual_weight") is not None:
            notes.append(f"residual_weight of {where} has no effect, here and in mergekit.")
        parts = [_part(part, where) for part in _list_of(one.get("sources"), f"{where}.sources", "'model'")]
        _twice(parts, where)
        sizes = {end - begin for begin, end in (part.layers or (0, 0) for part in parts)}
        if len(sizes) > 1:
            raise OptxError(
                f"config: the sources of {where} have {' and '.join(map(str, sorted(sizes)))} layers; each "
                "must have as many."
            )
        base = one.get("base_model")
        base = None if base is None else model_of(base, f"{where}.base_model")
        found.append(Slice(parts, base, table_of(one.get("parameters"), f"{where}.parameters")))
    return found


def _part(part: Table, where: str) -> Part:
    known(part, ("model", "layer_range", "parameters"), f"config: a source of {where} has no")
    model = model_of(part.get("model"), f"{where}: model")
    ends = part.get("layer_range")
    if not isinstance(ends, list) or len(cast(list[Any], ends)) != 2:
        raise OptxError(
            f"config: layer_range in {where} is {shown(ends)}; it must be a list of two numbers, such as "
            "[0, 24] for the first 24 layers."
        )
    begin, end = (count("layer_range", one) for one in cast(list[Any], ends))
    if not 0 <= begin < end:
        raise OptxError(f"config: layer_range in {where} is [{begin}, {end}]; it must be 0 <= begin < end.")
    return Part(model, (begin, end), table_of(part.get("parameters"), f"{where}: parameters"))


def _twice(parts: Sequence[Part], where: str) -> None:
    for i, part in enumerate(parts):
        if any(part.model == other.model for other in parts[:i]):
            raise OptxError(f"config: {where} has {part.model.text!r} twice; list it once, with one weight.")


def model_of(value: Any, what: str) -> ModelRef:
    """A model: a path, ``path+adapter``, or mergekit's tables of these.

    Raises:
        OptxError: it is none of them, or isn't there.
    """
    text, adapter = _texts(value)
    path = expanded(Path(text), f"config: {what}")
    if adapter is None and "+" in text and not _exists(path):
        text, _, adapter = text.partition("+")
        path = expanded(Path(text), f"config: {what}")
    if not _exists(path):
        name, _, revision = text.partition("@")
        if revision and _exists(expanded(Path(name), f"config: {what}")):
            raise OptxError(f"config: {what} {text!r} names a revision; a folder has none. Write {name!r}.")
        raise OptxError(
            f"config: {what}: there is no file or folder {text[:400]!r}. A model of the hub must be "
            f"downloaded first: huggingface_hub.snapshot_download({name[:100]!r}) gives its folder."
        )
    if adapter is None:
        return ModelRef(text, _tidy(path))
    folder = expanded(Path(adapter), f"config: {what}")
    if not _exists(folder):
        raise OptxError(f"config: {what}: there is no adapter {adapter!r} for {text!r}.")
    return ModelRef(f"{text}+{adapter}", _tidy(path), _tidy(folder))


def _texts(value: Any) -> tuple[str, str | None]:
    """The paths of a model and of its adapter, if it has one."""
    adapter = None
    for _ in range(_DEPTH):
        if not isinstance(value, Mapping):
            break
        inner = table_of(cast(Any, value), "model")
        known(inner, ("model", "path", "lora", "revision", "override_architecture"), "config: a model has no")
        if inner.get("override_architecture") is not None:
            raise OptxError(
                "config: optx does not do 'override_architecture'; it goes by the tensors' names."
            )
        if inner.get("revision") is not None:
            raise OptxError(
                f"config: a model names revision {shown(inner['revision'])}; download that one, and give its "
                "folder."
            )
        if inner.get("lora") is not None:
            adapter, more = _texts(inner["lora"])
            if more is not None:
                raise OptxError(f"config: the adapter {adapter!r} has an adapter {more!r} of its own.")
        value = inner.get("model", inner.get("path"))
    if not isinstance(value, str) or not value.strip():  # "" would be the folder one is in
        raise OptxError(f"config: a model is {shown(value)}; it must be a path.")
    return value, adapter


def _tidy(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _dtype(top: Table, key: str) -> torch.dtype | None:
    name = top.get(key)
    if name is None:
        return None
    word = name.removeprefix("torch.") if isinstance(name, str) else ""
    if word not in _DTYPES:
        raise OptxError(f"config: {key} is {shown(name)}; it must be one of {', '.join(_DTYPES)}.")
    return _DTYPES[word]


def _tokenizer(top: Table) -> Table | None:
    """The table of a tokenizer, its source first."""
    source, table = top.get("tokenizer_source"), top.get("tokenizer")
    if source is not None and table is not None:
        raise OptxError("config: tokenizer_source and tokenizer are both there; give the one that is meant.")
    if source is not None:
        if not isinstance(source, str | Mapping):
            raise OptxError(f"config: tokenizer_source is {shown(source)}; it must be a word, such as base.")
        return {"source": source}
    return None if table is None else {"source": "union"} | table_of(table, "tokenizer")
