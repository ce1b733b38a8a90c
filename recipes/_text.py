"""Text as blocks of tokens: what a language model trains on and is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _assets
from ._run import SettingsError, device


class TextData(NamedTuple):
    """Blocks of token numbers, each tensor of shape (count, length)."""

    train: Tensor
    held_out: Tensor
    general: Tensor

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The blocks of one step, a function of step and seed alone: a resumed run sees the same ones."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train[order[torch.arange(step * size, (step + 1) * size) % len(order)]].to(device())


def bring(args: Any) -> None:
    """Download the default model and texts, where they are wanted and not here yet."""
    if args.model is None:
        _assets.smollm2()
    for given, asset in ((args.data, _assets.SHAKESPEARE), (args.general, _assets.NEWS)):
        if given is None:
            _assets.unpacked(asset)


def load(tokenizer: Any, args: Any) -> TextData:
    """The first 90 % of ``args.data`` to train on; blocks spread over the rest, and over ``args.general``.

    General English is news: plain modern prose of the kind that such models were trained on, far from
    Shakespeare, carried by a package. (What is at hand without one is not prose: documentation, licences; and
    the encyclopaedia article that comes with the plays is about Shakespeare.)
    """

    def blocks(text: str) -> Tensor:
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        if len(tokens) < args.length:
            raise SettingsError(f"--length {args.length}: a text for it has only {len(tokens)} tokens.")
        return tokens[: len(tokens) // args.length * args.length].view(-1, args.length)

    def spread(found: Tensor) -> Tensor:
        return found[torch.linspace(0, len(found) - 1, min(args.eval_blocks, len(found))).long()]

    text = _assets.text(args.data)
    general = _assets.text(args.general, _assets.NEWS)
    cut = len(text) * 9 // 10
    return TextData(blocks(text[:cut]), spread(blocks(text[cut:])), spread(blocks(general)))


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def context(blocks: Tensor) -> int:
    """How many tokens of each block are not measured: the first quarter, which only gives context.

    A block begins in mid-sentence, without the tokens that documents begin with; how well a model guesses
    there says more about such beginnings than about the text.
    """
    return blocks.shape[1] // 4


@torch.no_grad()
def loss_on(model: nn.Module, blocks: Tensor) -> float:
    """Mean loss per token, but for each block's `context`."""
    total = 0.0
    with evaluated(model):
        for tokens in blocks.to(device()).split(4):
            labels = tokens.clone()
            labels[:, : context(blocks)] = -100
            total += float(model(input_ids=tokens, labels=labels).loss) * len(tokens)
    return total / len(blocks)
