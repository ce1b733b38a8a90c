"""The flow recipe's sequences: windows of a genome, a repeated motif; their k-mers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _assets
from ._run import SettingsError, device

BASES = "ACGT"
MOTIF, MUTATED, MOTIF_LENGTH = "GATC", 0.1, 16
BLOCK = 2048  # bases; of each five one is held out


@dataclass(frozen=True)
class Sequences:
    """What is trained on and what is not.

    Attributes:
        length: of all sequences.
        batch: so many to train on, by a generator.
        test: those held out, (n, length).
    """

    length: int
    batch: Callable[[torch.Generator, int], Tensor]
    test: Tensor


def genome(source: str | None) -> Tensor:
    """The bases of a GenBank or FASTA file, 0 to 3; the chloroplast's if None. Other letters are left out."""
    brought = (
        _assets.unpacked(_assets.CHLOROPLAST) / _assets.CHLOROPLAST.pattern if source is None else source
    )
    path = Path(brought).expanduser()
    if not path.is_file():
        raise SettingsError(f"--data: {path} is not a file; give one in GenBank's or the FASTA format.")
    text = path.read_text(encoding="ascii", errors="replace")
    if "\nORIGIN" in text:
        text = "".join(re.findall(r"\nORIGIN.*\n([\s\S]*?)\n//", text))
    else:
        text = re.sub(r"^>.*$", "", text, flags=re.MULTILINE)
    found = [BASES.index(letter) for letter in text.upper() if letter in BASES]
    if len(found) < 10 * BLOCK:
        raise SettingsError(f"--data: {path} has {len(found)} bases; at least {10 * BLOCK} are needed.")
    return torch.tensor(found)


def dna(bases: Tensor, length: int) -> Sequences:
    """Windows of a genome from anywhere in four of five blocks of 2,048 bases; the fifths are held out."""
    blocks = bases[: len(bases) // BLOCK * BLOCK].reshape(-1, BLOCK)
    out = torch.arange(len(blocks)) % 5 == 4
    train, test = blocks[~out], blocks[out]
    usable = BLOCK // length * length

    def batch(draws: torch.Generator, size: int) -> Tensor:
        block = torch.randint(len(train), (size, 1), generator=draws)
        start = torch.randint(BLOCK - length + 1, (size, 1), generator=draws)
        return train[block, start + torch.arange(length)].to(device())

    return Sequences(length, batch, test[:, :usable].reshape(-1, length))


def motifs() -> Sequences:
    """GATC again and again from any of its letters on, in sequences of 16; a tenth is drawn anew."""
    motif = torch.tensor([BASES.index(letter) for letter in MOTIF])

    def drawn(draws: torch.Generator, size: int) -> Tensor:
        phase = torch.randint(len(motif), (size, 1), generator=draws)
        clean = motif[(phase + torch.arange(MOTIF_LENGTH)) % len(motif)]
        noise = torch.randint(4, clean.shape, generator=draws)
        return torch.where(torch.rand(clean.shape, generator=draws) < MUTATED, noise, clean)

    def batch(draws: torch.Generator, size: int) -> Tensor:
        return drawn(draws, size).to(device())

    return Sequences(MOTIF_LENGTH, batch, drawn(torch.Generator().manual_seed(10**6), 4096))


def law(vocab: int) -> tuple[Tensor, Sequences]:
    """How often each token is drawn, by 1 / rank, and sequences of one of them."""
    shares = 1 / torch.arange(1, vocab + 1).double()

    def batch(draws: torch.Generator, size: int) -> Tensor:
        return torch.multinomial(shares, size, True, generator=draws)[:, None].to(device())

    return shares, Sequences(1, batch, shares)


def kmers(sequences: Tensor, k: int, vocab: int = 4) -> Tensor:
    """How often each of the vocab^k words of k tokens is read."""
    words = sequences.cpu().unfold(1, k, 1) @ (vocab ** torch.arange(k))
    return torch.bincount(words.flatten(), minlength=vocab**k).double()


def divergence(data: Tensor, model: Tensor) -> float:
    """KL of two tables of counts, in nats, with half a count more in each cell of the second."""
    p, q = data / data.sum(), (model + 0.5) / (model + 0.5).sum()
    return float((p * (p.clamp_min(1e-300).log() - q.log())).sum())


def kmer_divergences(test: Tensor, found: Tensor) -> dict[str, float]:
    """KL of held-out words of two and three tokens to those of samples."""
    return {f"{k}-mers": divergence(kmers(test, k), kmers(found, k)) for k in (2, 3)}


def baselines(kinds: dict[str, Sequences], seed: int) -> dict[str, Any]:
    """What is to be expected of sequences that no model made, by kind."""
    return {name: _baselines(data, seed) for name, data in kinds.items()}


def _baselines(data: Sequences, seed: int) -> dict[str, dict[str, float]]:
    """Of uniform sequences, of independent bases as frequent as in training, and of training data."""
    draws = torch.Generator().manual_seed(seed)
    train = data.batch(draws, 4096).cpu()
    shares = kmers(train, 1)
    independent = torch.multinomial(shares, train.numel(), True, generator=draws).reshape(train.shape)
    uniform = torch.randint(4, train.shape, generator=draws)
    made = {"uniform": uniform, "independent bases": independent, "training data": train}
    return {name: kmer_divergences(data.test, sequences) for name, sequences in made.items()}


def gc(sequences: Tensor) -> float:
    """The share of G and C."""
    return float(((sequences == 1) | (sequences == 2)).double().mean())


def diversity(sequences: Tensor) -> dict[str, float]:
    """The mean share of places where two sequences differ, and the entropy of 3-mers, in nats."""
    onehot = torch.nn.functional.one_hot(sequences.cpu(), 4).flatten(1).double()
    n, length = sequences.shape
    same = onehot @ onehot.T
    differ = 1 - (same.sum() - same.diagonal().sum()) / (n * (n - 1) * length)
    p = kmers(sequences, 3) / kmers(sequences, 3).sum()
    return {"differ": float(differ), "entropy": float(-(p * p.clamp_min(1e-300).log()).sum())}
