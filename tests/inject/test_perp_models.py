"""optx.Perp on transformers' models: what it finds there, heads, norms, and files that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from injections import assert_same, bert, llama, move, pruned_bert, run, snapshot, tokens
from torch import Tensor, nn

import optx
from optx import Masks, Perp
from optx.inject._perp_norms import is_norm


def pruned_llama(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Masks]:
    model = llama(1)
    for p in model.parameters():  # and not buffers, which transformers keeps in float32
        p.data = p.data.to(dtype)
    return model, optx.prune(model, optx.Magnitude(0.5, **options))


def train(model: nn.Module, handle: optx.Handle, steps: int = 3) -> None:
    optx.trainable_only(model, handle)
    optimizer = torch.optim.AdamW(handle.param_groups(lr=0.02))
    for _ in range(steps):
        logits = run(model).float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["mask", "scale"])
def test_a_merged_model_loads_in_transformers(adapter: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, masks = pruned_llama(dtype, pattern="2:4")
    before = run(model)
    handle = optx.attach(model, Perp(adapter=adapter, rank=4), masks=masks)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    train(model, handle)
    trained = run(model)
    handle.merge_and_unload()
    assert torch.equal(run(model), trained)
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa").eval()
    assert torch.equal(run(loaded), trained)
    masks.verify(loaded)
    assert Masks.of(loaded) == masks
    assert {row.pattern for row in masks.report().rows} == {"2:4"}


def test_what_llama_has_to_train() -> None:
    model, masks = pruned_llama()
    with pytest.raises(
        optx.TargetError, match=r"no trainable parameter in this LlamaForCausalLM: it has no bias"
    ):
        optx.attach(model, Perp(norm=False))
    handle = optx.attach(model, Perp())
    norms = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"]
    assert [one.path for one in handle.served] == norms
    assert sum(p.numel() for p in handle.parameters()) == 3 * 16
    handle.remove()
    handle = optx.attach(
        model, Perp(adapter="mask", rank=4), masks=masks, layers=0, exclude=[r"v_proj", r"k_proj"]
    )
    assert len(handle) == 7
    handle.remove()
    handle = optx.attach(model, Perp(norm=False, head=True))
    assert [one.path for one in handle.served] == ["lm_head"]
    handle.remove()
    block = model.model.layers[0]
    inside = Masks.from_bool({name.removeprefix("model.layers.0."): masks[name] for name in masks})
    assert len(optx.attach(block, Perp(adapter="mask", rank=4), masks=inside)) == 9


def test_a_tied_head_is_trained_by_a_path_of_its_own() -> None:
    model, masks = pruned_llama()
    before, embedding = snapshot(model), model.get_input_embeddings()
    handle = optx.attach(model, Perp(adapter="mask", rank=4, head=True), masks=masks)
    weight = embedding.weight.clone()
    train(model, handle)
    trained = run(model)
    assert torch.equal(embedding.weight, weight)
    with pytest.raises(optx.MergeError, match=r"lm_head\.weight is tied.*untie=True"):
        handle.merge()
    handle.merge(untie=True)
    torch.testing.assert_close(run(model), trained, rtol=1e-5, atol=1e-5)
    assert torch.equal(embedding.weight, weight)
    handle.unmerge()
    assert model.lm_head.weight is embedding.weight
    handle.remove()
    assert_same(model, before)


class Unnamed(nn.Module):
    """An RMS norm by what it does."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class Gain(Unnamed):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Gate(Unnamed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.weight * x)


def test_what_a_norm_is() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    norms = [nn.LayerNorm(6), nn.RMSNorm(6), nn.BatchNorm2d(6), nn.GroupNorm(2, 6), Unnamed(torch.ones(6))]
    norms += [T5LayerNorm(6), GemmaRMSNorm(6), Unnamed(torch.randn(6)).to(torch.bfloat16)]
    assert all(map(is_norm, norms))
    others = [
        nn.Linear(6, 6),
        nn.PReLU(6),
        Gain(torch.ones(6)),
        Gate(torch.ones(6)),
        Unnamed(torch.ones(2, 6)),
    ]
    others += [nn.LayerNorm(6, elementwise_affine=False), nn.Sequential(nn.LayerNorm(6)), nn.ReLU()]
    assert not any(map(is_norm, others))
    model = nn.Sequential(nn.Linear(6, 6), Unnamed(torch.ones(6)))
    handle = optx.attach(model, Perp(bias=False))
    assert [one.path for one in handle.served] == ["1"]
    move(handle)
    y = model(x := torch.randn(3, 6))
    handle.merge()
    assert torch.equal(model(x), y)


def test_biases_of_every_kind() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "conv": nn.Conv1d(4, 4, 1), "two": nn.Bilinear(4, 4, 4)})
    handle = optx.attach(model, Perp(norm=False))
    assert [(one.path, type(one.part).__name__) for one in handle.served] == [
        ("norm", "Shift"),
        ("conv", "BiasShift"),
        ("two", "Shift"),
    ]
    x, two = torch.randn(3, 4), model["two"]
    before = two(x, x)
    move(handle)
    y = two(x, x)
    assert not torch.equal(y, before)
    handle.merge()
    assert torch.equal(two(x, x), y)
    attention = nn.ModuleDict({"norm": nn.LayerNorm(4), "attn": nn.MultiheadAttention(4, 2)})
    with pytest.warns(
        UserWarning, match=r"2 biases are left as they are.*attn\.in_proj_bias, attn\.out_proj"
    ):
        optx.attach(attention, Perp())


def test_gpt2_has_its_inputs_first() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).eval()
    masks = optx.prune(model, optx.Magnitude(0.5, pattern="2:4"))
    handle = optx.attach(model, Perp(adapter="mask", rank=4), masks=masks)
    train(model, handle)
    trained = run(model)
    handle.merge()
    torch.testing.assert_close(run(model), trained)
    masks.verify(model)


# ---- files that others read --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("build", [llama, pruned_bert], ids=["llama", "bert"])
def test_plain_lora_is_written_for_peft(build: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    def model() -> Any:
        made = build(1)
        if build is llama:
            optx.prune(made, optx.Magnitude(0.5))
        return made

    own = model()
    handle = optx.attach(own, Perp(adapter="lora", rank=4))
    move(handle)
    trained, before = run(own), snapshot(own)
    optx.export_lora(handle, tmp_path)
    assert_same(own, before)
    theirs = PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(run(theirs), trained, rtol=1e-5, atol=1e-5)
    again = model()
    optx.attach(again, tmp_path)
    torch.testing.assert_close(run(again), trained, rtol=1e-5, atol=1e-5)


def test_what_peft_has_no_word_for(tmp_path: Path) -> None:
    model = bert(1)
    masks = optx.prune(model, optx.Magnitude(0.5))
    handle = optx.attach(model, Perp(adapter="mask", rank=4), masks=masks)
    with pytest.raises(optx.OptxError, match=r"adapter='mask' is no plain LoRA.*save_pretrained"):
        optx.export_lora(handle, tmp_path / "a")
    handle = optx.attach(model, Perp(adapter="lora", rank=4), ".*query", masks=masks, name="queries")
    with pytest.raises(optx.OptxError, match=r"all biases or none.*bias=False"):
        optx.export_lora(handle, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_codes_take_plain_lora_alone() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    plain = nn.Sequential(nn.Linear(64, 64))
    masks = optx.prune(plain, optx.Magnitude(0.5))
    made = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    made.load_state_dict(plain[0].state_dict())
    model = nn.Sequential(made.to("cpu"))
    for adapter in ("mask", "scale", "lora_prune"):
        with pytest.raises(
            optx.TargetError, match=rf"is bitsandbytes nf4.*adapter='{adapter}'.*adapter='lora'"
        ):
            optx.attach(model, Perp(adapter=adapter, rank=4), masks=masks)  # type: ignore[arg-type]
    with pytest.raises(optx.TargetError, match=r"zeros are codes.*Pass masks="):
        optx.attach(model, Perp(adapter="lora", rank=4))
    handle = optx.attach(model, Perp(adapter="lora", rank=4), masks=masks)
    assert handle.masks == masks
