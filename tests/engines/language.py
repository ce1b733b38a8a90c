"""Rows of the table of engines as a language model has them, for trainers that know nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import injections
import torch
from engines.task import Batch, Row, Task
from engines.tasks import Domains, Instead, of_table, shapes_of, small_llama
from torch import Tensor, nn
from torch.nn import functional as F

import optx


def biased() -> nn.Module:
    """A Llama whose attention has biases."""
    from transformers import LlamaForCausalLM

    config: Any = injections.llama().config
    config.attention_bias = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def pruned() -> nn.Module:
    """A Llama with half of each row of its layers' matrices 0."""
    return injections.pruned(injections.llama(), "model.layers.")


def _moved(injection: Callable[[], optx.Injection]) -> Callable[[nn.Module], optx.Handle]:
    def attach(net: nn.Module) -> optx.Handle:
        torch.manual_seed(2)
        handle = optx.attach(net, injection())
        injections.move(handle)
        return handle

    return attach


class Halves(Domains):
    """DSPReg, with every other sequence of a batch as a domain."""

    def domains(self, batch: Batch) -> Tensor:
        return torch.arange(len(next(iter(batch.values())))) % 2


class Averaged(Task):
    """MESA, of the positions that have a next token."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return super().loss(logits, x, y, index) + self.signal(logits, where=_known(x), input_ids=x)


class Past(Task):
    """SAF, of the positions that have a next token."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return super().loss(logits, x, y, index) + self.signal(logits, index, where=_known(x))


def _known(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[1]) < x.shape[1] - 1).expand(x.shape)


class PerSample(Task):
    """LossReweight, of the sequences' mean losses."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        tokens = F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none")
        return self.signal(tokens.mean(1))


def _perp() -> optx.Injection:
    return optx.Perp(adapter="mask", rank=4)


# What stands in the place of a row's own parts.
LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    **{
        key: {}
        for key in (
            "AdamR",
            "BackSlash",
            "Clip",
            "NormalizedGrad",
            "PerpGrad",
            "SaRA",
            "SubGM",
            "KeepMask",
            "SVFit",
            "ScaledParallelAdapter",
        )
    },
    "HFT": {"transform": lambda task, call: optx.HFT(call, seed=1, rounds_every=2)},
    "DSPReg": {"task": Halves},
    "MuAdamW": {
        "net": lambda: small_llama(16),
        "transform": lambda *_: optx.MuAdamW(shapes_of(small_llama, 16, 8)),
    },
    "MuReadout": {
        "net": lambda: small_llama(16),
        "attach": lambda net: optx.attach(net, optx.MuReadout(shapes_of(small_llama, 16, 8))),
    },
    "BitFit": {"net": biased, "attach": _moved(optx.BitFit)},
    "Perp": {
        "net": pruned,
        "attach": _moved(_perp),
        "adamw": {"eps": 1e-1, "lr": 2e-3},
    },
    "StableMaxCrossEntropy": {"task": Instead},
    "ZLoss": {"task": Instead},
    "MESA": {"task": Averaged},
    "SAF": {"task": Past},
    "LossReweight": {"task": PerSample, "adamw": {"eps": 1e-2}},
    **{
        label.partition(",")[0]: {"attach": of_table(label).attach}
        for label in (
            *("IA3, Llama", "SequentialAdapter, Llama", "MAM, Llama"),
            *("Aside, layerwise", "IAA, Llama"),
        )
    },
}


def language(row: Row) -> Row:
    """A row with a language model."""
    if row.name not in LANGUAGE:
        return row
    return dataclasses.replace(row, **{"net": injections.llama, **LANGUAGE[row.name]})


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of sequences of one length, with the samples' numbers."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    every = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return {**every, "index": torch.tensor([row["index"] for row in rows])}
