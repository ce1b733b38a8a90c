"""The README of an adapter's folder: what was trained on which base, in the form of the Hub's model cards."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optx._module_paths import paths_of
from optx.inject._served import OnModel

CARD = "README.md"
_MARK = "<!-- written by optx, and again with every save; take this line out to keep what you write here -->"

# What a card may call the base: a name of the Hub's, and no folder of somebody's machine.
_HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")


def is_ours(file: Path) -> bool:
    """Whether a card is one that `card_of` made, and nobody has taken over."""
    try:
        return _MARK in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def card_of(handle: OnModel, config: Mapping[str, Any] | None, version: str) -> str:
    """The card.

    Args:
        handle: what is saved.
        config: its configuration as PEFT has it; None: PEFT can't read it.
        version: of optx.
    """
    base = _base(handle)
    head: dict[str, Any] = {"base_model": base} if base else {}
    head["library_name"] = "peft" if config else "optx"
    if config and config.get("task_type") == "CAUSAL_LM":
        head["pipeline_tag"] = "text-generation"
    head["tags"] = [handle.injection.name.replace("_", "-"), "optx"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", _MARK, ""]
    lines += [f"# {type(handle.injection).__name__}{f' for {base}' if base else ''}", ""]
    rows = _rows(handle, base, version)
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(text)} |" for key, text in rows)]
    reads = 'With the base model loaded, `optx.attach(model, "this folder")` puts it on'
    theirs = ', and so does PEFT\'s `PeftModel.from_pretrained(model, "this folder")`'
    return "\n".join([*lines, "", f"{reads}{theirs if config else ''}.", ""])


def _rows(handle: OnModel, base: str, version: str) -> list[tuple[str, str]]:
    plain = paths_of(handle.model).plain
    parts = Counter(one.path.rpartition(".")[2] for one in handle.served)
    trained = sum(one.part.trainable() for one in handle.served)
    trained += sum(p.numel() for kept in handle.saved for p in kept.module.parameters())
    total = sum(p.numel() for p in handle.model.parameters())
    rows = [
        ("base", f"{base or 'not named'}, {type(handle.model).__name__}"),
        ("method", f"`{handle.injection}`"),
        ("on", ", ".join(f"{count} x `{name}`" for name, count in parts.items())),
        ("trained", f"{trained:,} of {total:,} numbers ({100 * trained / max(total, 1):.3g} %)"),
        ("optx", version),
    ]
    whole = ", ".join(f"`{plain[kept.path]}`" for kept in handle.saved)
    return [*rows[:3], *([("trained whole", whole)] if whole else []), *rows[3:]]


def _base(handle: OnModel) -> str:
    name = getattr(getattr(handle.model, "config", None), "_name_or_path", None)
    known = isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists()
    return str(name) if known else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
