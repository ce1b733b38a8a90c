"""Which files of a model's folder can be made again: those that optx or transformers wrote there."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Sequence
from pathlib import Path

_WEIGHTS = re.compile(
    r"(model|adapter_model|diffusion_pytorch_model)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.safetensors(\.index\.json)?"
)
_TABLES = frozenset(
    (
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.json",
        "chat_template.jinja",
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    )
)


def unknown_file(folder: Path, sources: Sequence[Path]) -> str | None:
    """The name of one thing in a folder that would be lost with it, if there is any.

    Args:
        folder: what would be replaced.
        sources: folders of the models it may have been made from. Weights are named as theirs, and their
            other files (a model card, code) lie in it as copies: one that was changed since is unknown.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file() or not _known(path, sources):
            return path.name
    return None


def _known(path: Path, sources: Sequence[Path]) -> bool:
    if path.name in _TABLES or _WEIGHTS.fullmatch(path.name):
        return True
    like = [source / path.name for source in sources if (source / path.name).is_file()]
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return bool(like)
    return any(filecmp.cmp(path, other, shallow=False) for other in like)
