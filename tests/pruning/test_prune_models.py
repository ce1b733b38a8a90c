"""Models of other kinds: encoders with decoders, masks that differ by layer, stages, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_models import BY_LABEL
from torch import nn
from walk_by_hand import assert_same, walk

import optx


@pytest.mark.parametrize(
    ("label", "blocks"),
    [
        ("T5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        ("BART", [f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)]),
        ("Gemma3", ["model.layers.0", "model.layers.1"]),
        ("ModernBERT", ["model.layers.0", "model.layers.1"]),
        ("CLIP", [f"{tower}_model.encoder.layers.{i}" for tower in ("text", "vision") for i in range(2)]),
    ],
)
def test_it_is_what_running_the_whole_model_for_each_block_gives(label: str, blocks: list[str]) -> None:
    family = BY_LABEL[label]
    changes = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 3,
    }
    changes = changes if label == "Gemma3" else {}
    model, by_hand = family.make(**changes), family.make(**changes)
    batches: list[Any] = [family.inputs(), {k: v.roll(1, -1) for k, v in family.inputs().items()}]
    masks = optx.prune(model, optx.Wanda(), batches)
    assert_same(masks, walk(by_hand, blocks, lambda: [by_hand(**batch) for batch in batches]))


def test_cross_attention_is_given_what_the_pruned_encoder_makes() -> None:
    """And padding of either side is left out where the other is longer."""
    family = BY_LABEL["BART"]
    model, ids = family.make(), family.inputs()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    decoder = {"decoder_input_ids": ids[:, :5], "decoder_attention_mask": mask[:, :5]}
    masks = optx.prune(model, optx.Wanda(), [{"input_ids": ids, "attention_mask": mask, **decoder}])
    alone = [
        {"input_ids": ids[:1, :4], "decoder_input_ids": ids[:1, :4]},
        {"input_ids": ids[1:], "decoder_input_ids": ids[1:, :5]},
    ]
    assert_same(masks, dict(optx.prune(family.make(), optx.Wanda(), alone)))
    same = {
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([6]), 0),
    }
    with pytest.raises(optx.OptxError, match=r"two masks of shape .* that differ"):
        optx.prune(family.make(), optx.Wanda(), [{"input_ids": ids, "attention_mask": mask, **same}])
    whole = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    for given in (whole, {"decoder_input_ids": ids}, {"labels": ids}):
        with pytest.raises(optx.OptxError, match=r"two masks of shape .* that differ"):
            optx.prune(family.make(), optx.Wanda(), [{"input_ids": ids, "attention_mask": mask, **given}])


def test_a_decoder_without_padding_beside_an_encoder_with() -> None:
    family = BY_LABEL["BART"]
    ids = family.inputs()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}
    masks = optx.prune(family.make(), optx.Wanda(), [batch])
    alone = [
        {"input_ids": ids[:1, :4], "decoder_input_ids": ids[:1, :5]},
        {"input_ids": ids[1:], "decoder_input_ids": ids[1:, :5]},
    ]
    assert_same(masks, dict(optx.prune(family.make(), optx.Wanda(), alone)))


def test_experts_in_one_tensor_are_not_left_out_in_silence() -> None:
    family = BY_LABEL["Mixtral"]
    model = family.make()
    with pytest.raises(optx.TargetError, match=r"'model.layers.0.mlp.experts' computes with 'gate_up_proj'"):
        optx.prune(model, optx.Wanda(), [family.inputs()])
    masks = optx.prune(model, optx.Wanda(), [family.inputs()], targets=nn.Linear, exclude=["lm_head"])
    assert {name.split(".")[-2] for name in masks} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_network_of_images() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
    model = ResNetForImageClassification(config).train()
    batches = list(torch.randn(3, 2, 3, 32, 32))
    state = {name: b.clone() for name, b in model.named_buffers()}
    masks = optx.prune(model, optx.SparseGPT(0.7), batches)
    assert all(
        torch.equal(b, state[name]) for name, b in model.named_buffers()
    )  # no running statistics moved
    assert all(name.startswith("resnet.encoder.stages.") for name in masks)
    for name in masks:
        assert int((~masks[name]).sum()) == int(masks[name].numel() * 0.7)


def test_saved_and_loaded_by_transformers(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = BY_LABEL["Llama"].make()
    ids = BY_LABEL["Llama"].inputs()["input_ids"]
    masks = optx.prune(model, optx.SparseGPT(pattern="2:4"), [ids])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    masks.verify(again)
