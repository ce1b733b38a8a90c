"""Sentences with a class each: film reviews that people found good or bad, or a file of one's own."""

from __future__ import annotations

import csv
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _assets
from ._run import device

_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences and their classes.

    Attributes:
        tokens: (n, length) padded with ``pad``.
        labels: (n,).
        pad: the token of padding.
    """

    tokens: Tensor
    labels: Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    def cut(self, count: int) -> tuple[Sentences, Sentences]:
        """All but the first ``count`` sentences, and those."""
        return (
            Sentences(self.tokens[count:], self.labels[count:], self.pad),
            Sentences(self.tokens[:count], self.labels[:count], self.pad),
        )

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """A model's keyword arguments, cut to the longest sentence of the batch."""
        tokens = self.tokens[index]
        tokens = tokens[:, : int((tokens != self.pad).sum(1).max())]
        mask = (tokens != self.pad).long()
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": self.labels[index]}
        return {name: tensor.to(device()) for name, tensor in batch.items()}


@torch.no_grad()
def accuracy(model: nn.Module, data: Sentences) -> float:
    """Share of sentences that the model puts into the right class."""
    model.eval()
    right = 0
    for index in torch.arange(len(data)).split(64):
        batch = data.batch(index)
        right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
    return right / len(data)


def load(tokenizer: Any, source: str | None, test: int, length: int) -> tuple[Sentences, Sentences]:
    """Train and test sentences; the split is always the same.

    Args:
        tokenizer: of the model.
        source: a file of ``class<TAB>sentence`` lines; the film reviews if None.
        test: how many sentences are kept for testing.
        length: sentences are cut after so many tokens.
    """
    rows = _reviews() if source is None else _own(Path(source).expanduser())
    names = sorted({name for name, _ in rows})
    if len(names) < 2 or len(rows) <= test:
        raise _assets.AssetError(
            f"--data: {source} has {len(rows)} sentences of {len(names)} classes; it takes more than --test "
            f"({test}) of at least 2."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [rows[i][1] for i in order]
    labels = torch.tensor([names.index(rows[i][0]) for i in order])
    tokens = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt").input_ids
    return Sentences(tokens, labels, tokenizer.pad_token_id).cut(test)


def _reviews() -> list[tuple[str, str]]:
    """Sentences whose mean rating is at least 0.5 away from neutral (10,072 of 10,605)."""
    [archive] = _assets.unpacked(_assets.REVIEWS).glob("*.tar.gz")
    with tarfile.open(archive) as files:
        stream = files.extractfile(_RATINGS)
        assert stream is not None  # the archive is pinned by its checksum
        lines = [line.split("\t") for line in io.TextIOWrapper(stream, encoding="utf-8")]
    rated = [(float(rating), text.strip()) for _, rating, text in lines]
    return [("good" if rating > 0 else "bad", text) for rating, text in rated if abs(rating) >= 0.5]


def _own(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise _assets.AssetError(f"--data: there is no file {path}.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise _assets.AssetError(f"--data: {path} has a line that is not class<TAB>sentence: {wrong!r:.60}.")
    return [(name, text) for name, text in rows]
