"""Sentences with a class each: reviews and tweets that people found good or bad, or a file of one's own."""

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

_RATINGS = {
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""Kinds of text, and how their files of ratings begin."""


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
    for index in (data.tokens != data.pad).sum(1).argsort(stable=True).split(64):  # little padding
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
    rows = _judged("films") if source is None else _own(Path(source).expanduser())
    if len({name for name, _ in rows}) < 2 or len(rows) <= test:
        raise _assets.AssetError(
            f"--data: {source} has {len(rows)} sentences of {len({name for name, _ in rows})} classes; it "
            f"takes more than --test ({test}) of at least 2."
        )
    return _tokenised(tokenizer, _shuffled(rows), length).cut(test)


def tasks(
    tokenizer: Any, source: str | None, test: int, length: int
) -> dict[str, tuple[Sentences, Sentences]]:
    """Several tasks, each with train and test sentences.

    Args:
        tokenizer: of the model.
        source: a folder with a file ``TASK.tsv`` of ``class<TAB>sentence`` lines for each task. If None,
            three: whether films are found good or bad, the same of tweets, and what kind of text a sentence
            is from; no task trains on a sentence that another is tested on.
        test: how many sentences of each task are kept for testing.
        length: sentences are cut after so many tokens.
    """
    if source is None:
        rows = _three_tasks(test)
    else:
        files = sorted(Path(source).expanduser().glob("*.tsv"))
        if len(files) < 2:
            raise _assets.AssetError(f"--data: {source!r} must be a folder with at least two files TASK.tsv.")
        rows = {file.stem: _shuffled(_own(file)) for file in files}
    return {task: _tokenised(tokenizer, found, length).cut(test) for task, found in rows.items()}


def _three_tasks(test: int) -> dict[str, list[tuple[str, str]]]:
    """Those to be tested on first."""
    judged = {kind: _shuffled(_judged(kind)) for kind in _RATINGS}
    share, few = test // len(judged), min(len(rows) for rows in judged.values()) - test
    kinds = {kind: [(kind, text) for _, text in rows] for kind, rows in judged.items()}
    tested = _shuffled([row for rows in kinds.values() for row in rows[:share]])
    trained = _shuffled([row for rows in kinds.values() for row in rows[test : test + few]])
    return {"films": judged["films"], "tweets": judged["tweets"], "kind": tested + trained}


def _shuffled(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order.tolist()]


def _tokenised(tokenizer: Any, rows: list[tuple[str, str]], length: int) -> Sentences:
    names = sorted({name for name, _ in rows})
    labels = torch.tensor([names.index(name) for name, _ in rows])
    texts = [text for _, text in rows]
    tokens = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt").input_ids
    return Sentences(tokens, labels, tokenizer.pad_token_id)


def _judged(kind: str) -> list[tuple[str, str]]:
    """Sentences whose mean rating is at least 0.5 away from neutral (of the films, 10,072 of 10,605)."""
    [archive] = _assets.unpacked(_assets.REVIEWS).glob("*.tar.gz")
    with tarfile.open(archive) as files:
        stream = files.extractfile(f"hutto_ICWSM_2014/{_RATINGS[kind]}_GroundTruth.txt")
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
