"""SoftThinking on families of models: what their embeddings do, adapters on them, caches, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import optx

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def gemma() -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8))


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8, sliding_window=4)
    )


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=24, num_key_value_heads=1))


def neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=24))


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, sliding_window=5)
    )


FAMILIES = [gpt2, gemma, gemma3, qwen2, neox, mistral]
each_family = pytest.mark.parametrize("build", FAMILIES, ids=lambda one: one.__name__)


def made(build: Any) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():  # less even than freshly drawn models are
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(10, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


@each_family
def test_families(build: Any) -> None:
    """Greedy decoding token for token; caches; the record replays, in the model's own scale."""
    model = made(build)
    ids, mask = prompts()
    own = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 63, "max_new_tokens": 12}
    wanted = model.generate(ids, attention_mask=mask, **own)
    with optx.attach(model, optx.SoftThinking(noise=None, max_topk=1)) as handle:
        found = handle.generate(ids, mask, max_new_tokens=12, stop_ids=63)
        assert torch.equal(found.sequences, wanted)
    handle = optx.attach(model, optx.SoftThinking(top_k=8, temperature=1.0, top_p=1.0))
    one, two = (
        handle.generate(ids, mask, max_new_tokens=12, seed=1, stop_ids=(), use_cache=cache)
        for cache in (True, False)
    )
    assert one.soft.all()
    assert torch.equal(one.ids, two.ids)
    assert torch.allclose(one.weights, two.weights, atol=1e-5)
    own |= {"eos_token_id": None, "custom_generate": handle.custom_generate(seed=1)}
    model.generate(ids, attention_mask=mask, **own)
    assert torch.equal(handle.last.ids, one.ids)
    assert torch.allclose(handle.last.weights, one.weights, atol=1e-5)

    embeds = one.inputs(model)
    where = {"attention_mask": one.attention_mask, "position_ids": one.position_ids}
    logits = model(inputs_embeds=embeds, **where).logits[:, 5:-1]
    pi = logits.log_softmax(-1).gather(-1, one.ids[..., :4]).softmax(-1)
    assert torch.allclose(pi, one.kept[..., :4] / one.kept[..., :4].sum(-1, keepdim=True), atol=1e-4)
    one_hot = torch.zeros(1, 1, 2).index_fill(2, torch.tensor(0), 1.0)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding((torch.tensor([[[5, 6]]]), one_hot)), embedding(torch.tensor([[5]])))


def test_gemma_scales_mixtures_as_it_scales_tokens() -> None:
    model = made(gemma3)
    handle = optx.attach(model, optx.SoftThinking(top_k=4))
    step = handle.step(torch.randn(1, 64))
    rows = model.get_input_embeddings().weight[step.ids[0]]
    assert torch.allclose(step.embeds[0, 0], 4.0 * (step.weights[0, :, None] * rows).sum(0), atol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_on_the_embedding_and_elsewhere(order: str) -> None:
    """A mixture is one of what the adapter makes of each token; switched off, of the bare rows."""
    model = made(qwen2)
    targets = r"model\.embed_tokens|.*\.(q|v)_proj"
    adapter = optx.attach(model, optx.LoRA(rank=2), targets) if order == "before" else None
    handle = optx.attach(model, optx.SoftThinking(top_k=6, record=True, temperature=1.0))
    adapter = adapter or optx.attach(model, optx.LoRA(rank=2), targets)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    ids, mask = prompts()
    trained = handle.generate(ids, mask, max_new_tokens=6, stop_ids=())
    embedding = model.get_input_embeddings()
    rows = embedding(trained.ids)
    assert not torch.allclose(rows, embedding.weight[trained.ids])
    sums = (trained.weights.unsqueeze(-1) * rows).sum(-2)
    assert torch.allclose(trained.inputs(model)[:, 6:], sums, atol=1e-5)
    with torch.no_grad(), handle.mixed(trained.ids, trained.weights):
        fed = model(trained.sequences, attention_mask=trained.attention_mask).logits
    wanted = model(inputs_embeds=trained.inputs(model), attention_mask=trained.attention_mask).logits
    assert torch.allclose(fed[:, 6:], wanted[:, 6:], atol=1e-4)
    with adapter.disable():
        bare = handle.generate(ids, mask, max_new_tokens=6, stop_ids=())
        assert torch.allclose(
            bare.inputs(model)[:, 6:],
            (bare.weights.unsqueeze(-1) * embedding.weight[bare.ids]).sum(-2),
            atol=1e-5,
        )
    assert not torch.equal(bare.weights, trained.weights)
    assert bare.policy == trained.policy  # the weights there are, on or off
    adapter.remove()
    again = handle.generate(ids, mask, max_new_tokens=6, stop_ids=())
    assert torch.equal(again.weights, bare.weights)
    handle.remove()


def test_peft_models() -> None:
    peft = pytest.importorskip("peft")
    inner = made(qwen2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(inner, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_(generator=torch.Generator().manual_seed(2))
    ids, mask = prompts()
    wanted = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    handle = optx.attach(model, optx.SoftThinking(noise=None, max_topk=1))
    assert torch.equal(handle.generate(ids, mask, max_new_tokens=8).sequences, wanted)
    handle.remove()
    handle = optx.attach(model, optx.SoftThinking(top_k=5))
    soft = handle.generate(ids, mask, max_new_tokens=8)
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=8,
        pad_token_id=0,
        custom_generate=handle.custom_generate(),
    )
    assert torch.allclose(handle.last.weights, soft.weights, atol=1e-5)


def test_no_gradient_goes_through_mixtures() -> None:
    model = made(qwen2)
    handle = optx.attach(model, optx.SoftThinking(top_k=5, record=True, temperature=1.0))
    ids, _ = prompts()
    record = handle.rollout(ids, max_new_tokens=4, stop_ids=())
    logits = model(inputs_embeds=record.inputs(model), attention_mask=record.attention_mask).logits
    logits[:, 5:-1].log_softmax(-1).gather(-1, record.ids).mean().backward()
    weight = model.get_input_embeddings().weight
    head = model.lm_head.weight
    assert head.grad is not None
    if weight is not head:
        assert weight.grad is None
    model.zero_grad()
    with handle.mixed(record.ids, record.weights, record.soft):
        model(record.sequences, attention_mask=record.attention_mask).logits[:, -1].sum().backward()
    embedded = weight.grad if weight is not head else None
    if embedded is not None:
        only = set(record.prompts.flatten().tolist())
        assert set(embedded.abs().sum(-1).nonzero().flatten().tolist()) <= only


@pytest.mark.long
def test_a_compiled_model_generates_the_same() -> None:
    model = made(qwen2)
    handle = optx.attach(model, optx.SoftThinking(top_k=5))
    ids, mask = prompts()
    wanted = handle.generate(ids, mask, max_new_tokens=5)
    model.compile(backend="eager", dynamic=True)
    found = handle.generate(ids, mask, max_new_tokens=5)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.allclose(found.weights, wanted.weights, atol=1e-5)
    torch._dynamo.reset()


def test_bfloat16_sums_in_bfloat16() -> None:
    model = made(gemma3).to(torch.bfloat16)
    handle = optx.attach(model, optx.SoftThinking(top_k=6))
    ids, mask = prompts()
    found = handle.generate(ids, mask, max_new_tokens=5)
    assert found.weights.dtype == torch.float32
    assert found.inputs(model).dtype == torch.bfloat16


@pytest.mark.long
def test_smollm2_thinks() -> None:
    """A real model with its tokenizer: greedy decoding token for token, then thought and answer."""
    from optx.recipes import _assets

    model, tokenizer = _assets.language_model(None)
    model.eval()
    tokenizer.padding_side = "left"
    batch = tokenizer(
        ["The capital of France is", "My favourite thing of all is"], return_tensors="pt", padding=True
    )
    wanted = model.generate(**batch, max_new_tokens=12, do_sample=False)
    handle = optx.attach(model, optx.SoftThinking(noise=None, max_topk=1))
    found = handle.generate(batch, max_new_tokens=12)
    assert torch.equal(found.sequences, wanted)
    handle.remove()
    end = tokenizer.encode(".")[0]
    handle = optx.attach(model, optx.SoftThinking(end_id=end, after_top_k=1))
    one = handle.rollout(batch, group=4, max_new_tokens=12, seed=1)
    two = handle.rollout(batch, group=4, max_new_tokens=12, seed=1, use_cache=False)
    assert torch.equal(one.ids[..., 0], two.ids[..., 0])
    assert len({tuple(row) for row in one.tokens[4:].tolist()}) > 1
