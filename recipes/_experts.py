"""Fine-tuned encoders as the merge recipe needs them: a file, and the task that it is tested on."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optx
from optx._files import written_aside

from ._reviews import Sentences, accuracy
from ._run import device


class Expert:
    """One encoder with its head, fine-tuned on one task.

    Pruning and merging concern the encoder; the head has no pretrained weights and stays the expert's own.

    Args:
        model: as `_assets.classifier` makes it; its encoder is the pretrained one.
        file: of the fine-tuned weights; see `save`.
        train: sentences it is trained on. Some, without their labels, are what `find_q` and Wanda look at.
        valid: sentences to choose numbers by.
        test: sentences for the tables.
    """

    def __init__(self, model: Any, file: Path, train: Sentences, valid: Sentences, test: Sentences) -> None:
        self.model: Any = model.to(device())
        self.file, self.train, self.valid, self.test = file, train, valid, test
        prefix = f"{model.base_model_prefix}."
        self.inside = re.escape(prefix) + ".*"
        self.base: dict[str, Tensor] = {
            name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(prefix)
        }
        self.found_q: dict[float, Any] = {}

    def encoder_and_head(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that have pretrained weights, and those that are new."""
        named = list(self.model.named_parameters())
        return [p for n, p in named if n in self.base], [p for n, p in named if n not in self.base]

    def save(self) -> None:
        """Write the fine-tuned weights."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(self.file) as aside:
            save_file({name: t.contiguous() for name, t in self.model.state_dict().items()}, aside)

    def load(self) -> Expert:
        """The fine-tuned weights, from the file."""
        self.model.load_state_dict(load_file(self.file))
        return self

    @cached_property
    def delta(self) -> optx.Delta:
        """What fine-tuning changed in the encoder."""
        return optx.Delta.between(self.base, self.file, include=self.inside)

    def accuracy(self, encoder: Any, data: Sentences | None = None) -> float:
        """Of another encoder under this expert's head, on its test sentences or other ones."""
        self.model.load_state_dict(encoder, strict=False)
        return accuracy(self.model, data or self.test)

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """48 training sentences of one length, the commonest but for those that were cut: no padding.

        With hidden states: by the last of them `find_q` compares encoders.
        """
        lengths = (self.train.tokens != self.train.pad).sum(1)
        whole = lengths[lengths < self.train.tokens.shape[1]]
        common = (whole if len(whole) else lengths).mode().values
        index = (lengths == common).nonzero().flatten()[:48]
        batch = self.train.batch(index)
        return [{"input_ids": batch["input_ids"], "output_hidden_states": True}]

    @cached_property
    def stats(self) -> Any:
        """What the fine-tuned encoder's linear layers are given."""
        stats = optx.analysis.input_stats(self.load().model, self.batches)
        return {name: found for name, found in stats.items() if name in self.base}

    def q(self, p: float) -> Any:
        """What DAREx-q divides by, found on sentences without labels."""
        if p not in self.found_q:
            self.found_q[p] = self.delta.find_q(self.load().model, self.batches, p, seeds=(0, 1))
        return self.found_q[p]


def size(delta: optx.Delta) -> float:
    """Root mean square of a change, over the numbers that changed (rows of words never seen did not)."""
    squares = count = 0.0
    for _, change in delta.items():
        squares += float(change.double().square().sum())
        count += int(torch.count_nonzero(change))
    return (squares / max(1.0, count)) ** 0.5
