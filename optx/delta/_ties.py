"""Tied tensors that one checkpoint has once and the other twice: an output head that is the embedding.

A module says which of its tensors are one. A file holds such a tensor once, or as two that are equal; which
they are then is told by the other checkpoint, or by the configuration beside it.
"""

from __future__ import annotations

import re

from optx._errors import OptxError
from optx.delta._checkpoint_source import Files, Source

_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|tok_embeddings|word_embeddings|wte|shared|embed_in)\.weight")
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|decoder|output|proj_out|output_projection)\.weight")


def same_content(one: Source, name: str, other: Source, other_name: str) -> bool:
    """Whether two tensors have the same numbers, in the same shape; reads them, piece by piece."""
    mine, theirs = one.entries[name], other.entries[other_name]
    if mine.shape != theirs.shape:
        return False
    pieces = zip(one.pieces(name), other.pieces(other_name), strict=True)
    return all(bool((a.to("cpu") == b.to("cpu")).all()) for a, b in pieces)


def stands_for(name: str, source: Source, like: Source) -> str | None:
    """The tensor of ``source`` that is its ``name`` too, which it lacks; None if there is none.

    Args:
        name: a tensor of ``like``.
        source: the checkpoint that has it once, under another name.
        like: the other checkpoint.
    """
    if name in source.tied:
        return source.tied[name]
    tied = [first for first in like.tied.values() if first in (name, like.tied.get(name))]
    for alias in [*(other for other, first in like.tied.items() if first == name), *tied]:
        if alias in source.entries:
            return alias
    if name not in like.entries or not (_HEAD.fullmatch(name) or _EMBEDDING.fullmatch(name)):
        return None
    options = [
        other
        for other, entry in source.entries.items()
        if entry.shape == like.entries[name].shape and (_EMBEDDING.fullmatch(other) or _HEAD.fullmatch(other))
    ]
    for other in options:
        if other in like.entries and same_content(like, name, like, other):
            return other  # there it is stored twice
    says = _says_tied(source)
    if len(options) == 1 and (says is True or (says is None and _HEAD.fullmatch(name))):
        return options[0]
    return None


def is_copy(name: str, source: Source, like: Source, who: str, where: str) -> bool:
    """Whether a tensor that ``like`` lacks is the copy of one that both have.

    Raises:
        OptxError: the two are tied in ``like``, and not equal in ``source``: ``like`` has no place for both.
    """
    if name in like.tied:
        first = like.tied[name]
        firsts = [first] if first in source.entries else []
    else:
        if not (_HEAD.fullmatch(name) or _EMBEDDING.fullmatch(name)):
            return False
        shape = source.entries[name].shape
        firsts = [
            other
            for other in source.entries
            if other in like.entries
            and source.entries[other].shape == shape
            and (_EMBEDDING.fullmatch(other) or _HEAD.fullmatch(other))
        ]
    if any(same_content(source, name, source, first) for first in firsts):
        return True
    if firsts and (name in like.tied or _says_tied(like) is True):
        raise OptxError(
            f"{who}: {name!r} is tied to {firsts[0]!r} in base, and has values of its own in {where}. Untie "
            "them in base (save it with tie_word_embeddings=False and both tensors), or leave it out with "
            "exclude=."
        )
    return False


def _says_tied(source: Source) -> bool | None:
    """What the configuration in a folder says; None if there is none, or it says nothing."""
    if not isinstance(source, Files):
        return None
    config = source.config()
    inner = config.get("text_config")
    for table in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(said := table.get("tie_word_embeddings"), bool):
            return said
    return None
