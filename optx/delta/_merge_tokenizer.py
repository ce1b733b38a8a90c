"""The tokenizer of a merged model: the base's, a model's, or the union of all, as mergekit 0.1.5 has it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from optx._errors import FileError, OptxError
from optx.delta._known_files import TOKENIZER
from optx.delta._merge_config_json import read_json, vocabulary_size, write_json
from optx.delta._merge_file import ModelRef, model_of
from optx.delta._merge_settings import Table, count
from optx.delta._merge_vocabulary import Vocabulary, wishes_of

_ANY = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)


def has_tokenizer(model: ModelRef) -> bool:
    """Whether a model's folder has one."""
    return any((model.path / file).is_file() for file in _ANY)


def vocabulary_of(
    table: Table, models: Sequence[ModelRef], base: ModelRef, notes: list[str]
) -> Vocabulary | None:
    """Build a result's vocabulary.

    Args:
        table: the file's ``tokenizer``.
        models: all that the file names, in its order.
        base: whose tokenizer is taken first.
        notes: takes what a person should know.

    Returns:
        It; None where the base's is asked for and the base has none, so that rows stay as they are.

    Raises:
        OptxError: a source that is not known, or a tokenizer that can't be used.
        FileError: one can't be read.
    """
    wishes = wishes_of(table)
    if not has_tokenizer(base):
        if table["source"] == "base" and not wishes and table.get("pad_to_multiple_of") is None:
            notes.append(
                f"{base.text!r} has no tokenizer: the models' rows are taken to be of the same tokens."
            )
            return None
        raise OptxError(f"config: {base.text!r} has no tokenizer, which the result's is made of.")
    first = _load(base.path)
    whole = dict(first.get_vocab())
    loaded = {base: _stripped(base, first)}
    for model in models:
        if model == base:
            continue
        if has_tokenizer(model):
            loaded[model] = _load(model.path)
        else:
            notes.append(f"{model.text!r} has no tokenizer; it is taken to have that of {base.text!r}.")
    made = _chosen(table["source"], loaded, base)
    made.add_tokens([token for token in wishes if token not in made.get_vocab()])
    ids = made.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))):
        raise OptxError(
            "config: the result's tokens do not have the numbers 0 to their count, and no row each."
        )
    size, multiple = len(ids), table.get("pad_to_multiple_of")
    if multiple is not None:
        step = count("pad_to_multiple_of", multiple)
        if step < 1:
            raise OptxError(f"config: pad_to_multiple_of is {step}; it must be at least 1.")
        size = -(-size // step) * step
    own = {model: dict(loaded.get(model, loaded[base]).get_vocab()) for model in models}
    places = {model: _places(ids, own[model], _rows(model, len(own[model]))) for model in models}
    return Vocabulary(made, whole != dict(ids), ids, size, places, own, wishes)


def _places(ids: Mapping[str, int], own: Mapping[str, int], rows: int) -> torch.Tensor:
    found = torch.full((len(ids),), -1)
    for token, row in ids.items():
        if own.get(token, rows) < rows:
            found[row] = own[token]
    return found


def _rows(model: ModelRef, default: int) -> int:
    return vocabulary_size(read_json(model.path / "config.json")) or default


def _load(path: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise OptxError(
            "config: tokenizers are read by transformers. Type: python -m pip install transformers"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise FileError(
            f"{str(path)!r}: its tokenizer can't be read ({type(error).__name__}: {text})."
        ) from None


def _stripped(model: ModelRef, tokenizer: Any) -> Any:
    """A tokenizer without the tokens that the model has no rows for."""
    rows = _rows(model, len(tokenizer.get_vocab()))
    extra = {token for token, row in tokenizer.get_vocab().items() if row >= rows}
    if not extra:
        return tokenizer
    if not tokenizer.is_fast:
        raise OptxError(
            f"config: {model.text!r} has tokens without rows, and no tokenizer.json to strip them from."
        )
    inner = tokenizer.backend_tokenizer
    table = json.loads(inner.to_str())
    if table["model"]["type"] != "BPE":
        raise OptxError(
            f"config: {model.text!r} has tokens without rows; they can be stripped from a BPE tokenizer, and "
            f"this is {table['model']['type']}."
        )
    table["added_tokens"] = [one for one in table["added_tokens"] if one["id"] < rows]
    for token in extra & table["model"]["vocab"].keys():
        del table["model"]["vocab"][token]

    def kept(merge: Any) -> bool:
        return not extra.intersection(merge.split(" ") if isinstance(merge, str) else merge)

    table["model"]["merges"] = [one for one in table["model"]["merges"] if kept(one)]
    tokenizer._tokenizer = type(inner).from_str(json.dumps(table))
    return tokenizer


def _chosen(source: Any, loaded: Mapping[ModelRef, Any], base: ModelRef) -> Any:
    if source == "base":
        return _copy(loaded[base])
    if source == "union":
        return _union(loaded, base)
    model = model_of(source, "tokenizer source")
    if not has_tokenizer(model):
        raise OptxError(f"config: {model.text!r}, the tokenizer's source, has no tokenizer.")
    return _load(model.path)


def _union(loaded: Mapping[ModelRef, Any], base: ModelRef) -> Any:
    """The base's tokens, then what the others have besides: first plain ones, then added ones."""
    plain, added = dict[str, None](), dict[str, Any]()
    for model, tokenizer in loaded.items():
        rows = _rows(model, len(tokenizer.get_vocab()))
        special = {info.content for info in tokenizer.added_tokens_decoder.values()}
        # In the order of their numbers: get_vocab has another one each time.
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        plain |= dict.fromkeys(token for token, row in tokens if row < rows and token not in special)
        for row, info in tokenizer.added_tokens_decoder.items():
            if row < rows:
                added.setdefault(info.content, info)
    made, old = _copy(loaded[base]), loaded[base].get_vocab()
    made.add_tokens([token for token in plain if token not in added and token not in old])
    made.add_tokens(list(added.values()))
    return made


def _copy(tokenizer: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _load(Path(folder))


# ---- files -------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Put a tokenizer in the place of what was copied."""
    for file in TOKENIZER:
        (folder / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(str(folder))


def template_of(wanted: str, models: Sequence[ModelRef]) -> str | None:
    """A chat template; of ``auto`` the one that most models have.

    Raises:
        OptxError: it is no template, or the name of one of mergekit's.
    """
    if wanted != "auto":
        if "{" not in wanted:
            raise OptxError(
                f"config: chat_template is {wanted[:60]!r}; it must be 'auto' or a Jinja template itself, "
                "not the name of one."
            )
        return wanted
    found = Counter(template for model in models if (template := _template(model.path)))
    return found.most_common(1)[0][0] if found else None


def _template(folder: Path) -> str | None:
    """A model's own."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8").strip() or None
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json(folder / name).get("chat_template")
        if isinstance(value, list):  # several, by name
            named = [cast(Table, one) for one in cast(list[Any], value) if isinstance(one, dict)]
            value = next((one.get("template") for one in named if one.get("name") == "default"), None)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def write_template(folder: Path, template: str) -> None:
    """Give a folder a chat template, and no other."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    if path.exists():
        table = read_json(path)
        if table.pop("chat_template", None) is not None:
            write_json(path, table)
