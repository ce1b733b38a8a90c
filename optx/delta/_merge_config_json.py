"""The configuration of a merged model: its number of layers, what holds for each of them, its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from optx._errors import FileError, OptxError
from optx.delta._merge_settings import Table

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Lists of layers by number. Lists with a value for each layer are known by their length and name.
_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")
_EACH = ("layer", "block", "pattern")


def read_json(path: Path) -> Table:
    """A model's configuration, or another table; empty if there is none.

    Raises:
        FileError: it is there, and can't be read.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} can't be read ({type(error).__name__}).") from None
    if not isinstance(found, dict):
        raise FileError(f"{str(path)!r} is no table of keys and values.")
    return cast(Table, found)


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """A table, as transformers writes it."""
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def relayered(config: Table, tables: Sequence[Table], numbers: Sequence[int], depth: int) -> Table:
    """A configuration for other layers.

    Args:
        config: of the model that it is taken from.
        tables: for each new layer, the configuration of the model that it is from.
        numbers: its number there.
        depth: how many layers that configuration's own model has.

    Raises:
        OptxError: it has a value for each layer, and another model's has not.
    """
    made = dict(config)
    for key, value in config.items():
        if key in _DEPTHS and value == depth:
            made[key] = len(numbers)
        elif isinstance(value, dict) and any(cast(Table, value).get(k) == depth for k in _DEPTHS):
            inner = [_table(table.get(key)) for table in tables]
            made[key] = relayered(cast(Table, value), inner, numbers, depth)
        elif isinstance(value, list) and key in _NUMBERS:
            own = [cast(list[Any], table.get(key) or []) for table in tables]
            made[key] = [i for i, (at, of) in enumerate(zip(numbers, own, strict=True)) if at in of]
        elif isinstance(value, list) and _is_each(key, cast(list[Any], value), depth):
            made[key] = [_of_layer(key, table, at) for table, at in zip(tables, numbers, strict=True)]
    return made


def depth_is_told(config: Table, depth: int) -> bool:
    """Whether a configuration says how many layers the model has."""
    own = [config, *(cast(Table, value) for value in config.values() if isinstance(value, dict))]
    return any(table.get(key) == depth for table in own for key in _DEPTHS)


def vocabulary_size(config: Table) -> int | None:
    """How many rows the embeddings are said to have."""
    for table in (config, _table(config.get("text_config"))):
        if isinstance(table.get("vocab_size"), int):
            return table["vocab_size"]
    return None


def with_vocabulary(config: Table, size: int) -> Table:
    """A configuration for embeddings of another number of rows."""
    if "vocab_size" not in config and isinstance(config.get("text_config"), dict):
        return config | {"text_config": _table(config["text_config"]) | {"vocab_size": size}}
    return config | {"vocab_size": size}


def _table(value: Any) -> Table:
    return cast(Table, value) if isinstance(value, dict) else {}


def _is_each(key: str, value: list[Any], depth: int) -> bool:
    return len(value) == depth and any(part in key for part in _EACH)


def _of_layer(key: str, table: Table, number: int) -> Any:
    value = table.get(key)
    if not isinstance(value, list) or number >= len(cast(list[Any], value)):
        raise OptxError(
            f"config: one model's config.json has {key!r}, a value for each layer, and another's has not, or "
            "for fewer layers; they don't go together."
        )
    return cast(list[Any], value)[number]
