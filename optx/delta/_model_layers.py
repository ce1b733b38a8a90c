"""Which layer of a model a tensor is in, and whether it has rows of tokens, told from the tensors' names.

optx has no table of architectures: a layer is what stands after the first number in a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from optx._errors import OptxError

_NUMBER = re.compile(r"\.(\d+)\.")
_FIRST = re.compile(r"(embed|\bwte\b|\bwpe\b|\bshared\b|rotary|relative_pe)")
_LAST = re.compile(r"^(lm_head|embed_out|output|cls|classifier|score|pooler)\b")
_ROWS = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|embed_out"
    r"|lm_head(\.decoder|\.linear)?"
    r"|cls\.predictions\.decoder|vocab_projector|output|output_layer|backbone\.embeddings)\.(weight|bias)$"
    r"|(^|\.)(cls\.predictions|lm_head)\.bias$|^embeddings\.weight$"
)
_DERIVED = re.compile(
    r"(^|\.)(inv_freq|position_ids|token_type_ids|rotary_emb\.\w+)$|(^|\.)h\.\d+\.attn\.(masked_)?bias$"
)
# A head and the embeddings that it is, where they are one tensor and only one of them is in the file.
_HEADS = {
    "lm_head.weight": (
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "wte.weight",
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "backbone.embeddings.weight",
        "model.decoder.embed_tokens.weight",
        "transformer.word_embeddings.weight",
        "shared.weight",
    ),
    "output.weight": ("model.tok_embeddings.weight",),
    "embed_out.weight": ("gpt_neox.embed_in.weight",),
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
    "lm_head.decoder.weight": ("roberta.embeddings.word_embeddings.weight",),
    "lm_head.decoder.bias": ("lm_head.bias",),
    "vocab_projector.weight": ("distilbert.embeddings.word_embeddings.weight",),
}


def has_rows_of_tokens(name: str) -> bool:
    """Whether a tensor has a row, or a number, for each token of the vocabulary."""
    return place_of(name).layer is None and _ROWS.search(name) is not None


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the configuration (positions, rotary frequencies): nothing to merge."""
    return _DERIVED.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a tensor may be the embeddings, and not be in the file then."""
    return name in _HEADS


def tied_to(name: str, names: Mapping[str, object]) -> str | None:
    """The tensor that a head is, in a file that has not got the head itself."""
    return next((other for other in _HEADS.get(name, ()) if other in names), None)


@dataclass(frozen=True)
class Place:
    """Where a tensor's name is.

    Attributes:
        stack: what stands before the number of its layer.
        layer: its number; None: in no layer.
        rest: what stands after it; the whole name of what is in no layer.
    """

    stack: str
    layer: int | None
    rest: str

    def at(self, layer: int) -> str:
        """The same tensor of another layer."""
        return f"{self.stack}.{layer}.{self.rest}"


def place_of(name: str) -> Place:
    """Split a name at the first number in it."""
    found = _NUMBER.search(name)
    if found is None:
        return Place("", None, name)
    return Place(name[: found.start()], int(found[1]), name[found.end() :])


@dataclass(frozen=True)
class Layers:
    """The layers of one model.

    Attributes:
        counts: how many layers each stack has, by its name.
        first: tensors in no layer that come before the layers (embeddings).
        last: those that come after (norms, heads).
        inner: by stack and layer, the tensors' names within it.
    """

    counts: dict[str, int]
    first: list[str]
    last: list[str]
    inner: dict[tuple[str, int], list[str]]

    def only(self, what: str) -> str:
        """The name of its one stack.

        Raises:
            OptxError: it has none or several, so that 'slices' don't say which layers they mean.
        """
        if len(self.counts) != 1:
            found = " and ".join(map(repr, self.counts)) or "no layers"
            raise OptxError(
                f"config: {what} has layers under {found}; 'slices' are for models with one row of layers."
            )
        return next(iter(self.counts))


def layers_of(names: Iterable[str]) -> Layers:
    """Sort a model's tensors by layer."""
    found = Layers({}, [], [], {})
    for name in names:
        place = place_of(name)
        if place.layer is None:
            early = _FIRST.search(name) is not None and _LAST.search(name) is None
            (found.first if early else found.last).append(name)
            continue
        found.counts[place.stack] = max(found.counts.get(place.stack, 0), place.layer + 1)
        found.inner.setdefault((place.stack, place.layer), []).append(place.rest)
    return found
