"""The files of a model's folder by name, and which optx or transformers wrote there and can make again."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_WEIGHTS = re.compile(
    r"(model|adapter_model|diffusion_pytorch_model)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.safetensors(\.index\.json)?"
)
TOKENIZER = (
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
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer is saved as."""
_TABLES = frozenset(
    (
        *TOKENIZER,
        "config.json",
        "generation_config.json",
        "adapter_config.json",
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
    return next(_unknown(folder, "", sources), None)


def _unknown(folder: Path, prefix: str, sources: Sequence[Path]) -> Iterator[str]:
    for path in sorted((folder / prefix).iterdir()):
        name = f"{prefix}{path.name}"
        below = not path.is_symlink() and path.is_dir() and any((s / name).is_dir() for s in sources)
        if below:  # such as sentence-transformers' 1_Pooling
            yield from _unknown(folder, f"{name}/", sources)
        elif path.is_symlink() or not path.is_file() or not _known(path, name, sources):
            yield name


def _known(path: Path, name: str, sources: Sequence[Path]) -> bool:
    """Whether a file of this name, with its folder, can be made again."""
    if name in _TABLES or _WEIGHTS.fullmatch(name):
        return True
    like = [source / name for source in sources if (source / name).is_file()]
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return bool(like)
    return any(filecmp.cmp(path, other, shallow=False) for other in like)
