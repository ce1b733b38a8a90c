"""Modules that share a weight or a bias: each is served by itself, and merged when it has one of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_close, by_peft, ids, llama, move, outputs
from torch import Tensor, nn

import optx

peft = pytest.importorskip("peft")


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.emb(index).tanh())


def twins(bias: bool = False) -> nn.Sequential:
    """One weight and two biases, or one of both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    if bias:
        model[2].bias = model[0].bias
    return model


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("injection", [optx.LoRA(rank=2), optx.FLoRA(rank=2), optx.SVFit(rank=2)])
def test_both_sides_are_served(injection: optx.Injection) -> None:
    """The case tied.py: each by its own adapter on its own call."""
    torch.manual_seed(0)
    model, index = Tied(), torch.arange(5)
    base = model(index)
    handle = optx.attach(model, injection, targets=["emb", "head"])
    assert [one.path for one in handle.served] == ["emb", "head"]
    assert torch.equal(model(index), base)
    move(handle)
    wanted = model(index)
    with pytest.raises(
        optx.MergeError, match=r"emb\.weight is tied: emb\.weight, head\.weight are one tensor"
    ):
        handle.merge()
    handle.merge(untie=True)
    assert model.head.weight is not model.emb.weight
    assert_close(model(index), wanted)
    handle.unmerge()
    assert model.head.weight is model.emb.weight
    assert torch.equal(model(index), wanted)
    handle.remove()
    assert torch.equal(model(index), base)


def test_files_of_both_sides_are_pefts(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    adapted = by_peft(llama(tie_word_embeddings=True), config, tmp_path)
    tied: Any = llama(tie_word_embeddings=True)
    handle = optx.attach(tied, tmp_path)
    assert [one.path for one in handle.served] == ["model.embed_tokens", "lm_head"]
    assert_close(outputs(tied), outputs(adapted), 1e-6)
    back = tmp_path / "back"
    handle.save(back)
    loaded = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), back).eval()
    assert_close(outputs(loaded), outputs(tied), 1e-6)


def test_one_side_alone_is_what_was_asked() -> None:
    tied = llama(tie_word_embeddings=True)
    assert [one.path for one in optx.attach(tied, optx.LoRA(rank=2), targets=["lm_head"]).served] == [
        "lm_head"
    ]
    tied(ids())


def test_one_weight_and_two_biases_are_two_for_bitfit() -> None:
    model = twins()
    handle = optx.attach(model, optx.BitFit())
    assert [one.path for one in handle.served] == ["0", "2"]
    move(handle)
    wanted = model(X)
    handle.merge(untie=True)
    assert_close(model(X), wanted, 1e-6)
    handle.remove()
    assert torch.equal(model(X), twins()(X))


def test_one_bias_of_two_is_merged_when_untied() -> None:
    model = twins(bias=True)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())  # only the bias is shared
    handle = optx.attach(model, optx.BitFit())
    move(handle)
    wanted = model(X)
    with pytest.raises(
        optx.MergeError, match=r"0\.bias is tied: 0\.bias, 2\.bias are one .* a bias of its own"
    ):
        handle.merge()
    handle.merge(untie=True)
    assert_close(model(X), wanted, 1e-6)
    handle.unmerge()
    assert model[0].bias is model[2].bias
    assert torch.equal(model(X), wanted)


def test_copies_keep_their_ties() -> None:
    model = Tied()
    handle = optx.attach(model, optx.LoRA(rank=2), targets=["emb", "head"])
    other = copy.deepcopy(model)
    assert other.head.weight is other.emb.weight
    assert other.head.optx.lora.A is not model.head.optx.lora.A
    assert len(handle) == 2
