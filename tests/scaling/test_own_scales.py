"""What models multiply by a power of width themselves is told apart: latent attention, embeddings, CLIP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from width_models import built, llama

import optx

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor([[5, 9, 7, 30, 22], [3, 3, 40, 12, 6]])


def deepseek(width: int) -> Any:
    """Of a head's queries width / 2 entries are its own, and 8 are rotated at any width."""
    latent = {"q_lora_rank": width // 2, "kv_lora_rank": width // 2, "v_head_dim": width // 2}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": width // 2, "num_key_value_heads": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    plain = {n: getattr(llama(width), n) for n in ("hidden_size", "intermediate_size", "vocab_size")}
    dense = {"moe_intermediate_size": width, "first_k_dense_replace": 2, "num_hidden_layers": 2}
    return transformers.DeepseekV3Config(
        **plain, **latent, **heads, **experts, **dense, num_attention_heads=2, bos_token_id=1, eos_token_id=2
    )


def test_latent_attention_is_scaled_by_the_whole_of_its_queries() -> None:
    model = built(deepseek(64)).double()
    shapes = optx.scaling.shapes(deepseek(64), base=deepseek(16))
    assert {(head.width, head.base_width) for head in shapes.heads.values()} == {(40, 16)}
    handle = optx.attach(model, optx.MuAttention(shapes))
    assert [one.part.scale for one in handle.served] == pytest.approx([4 / 40] * 2, rel=1e-12)
    again = optx.scaling.shapes(deepseek(128), base=shapes)
    assert {(head.width, head.base_width) for head in again.heads.values()} == {(72, 16)}


class Own(nn.Module):
    """Attention with a scale of its own."""

    def __init__(self, width: int, scale: float, fused: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = 1, width, fused
        self.scale = width**-0.5 if fused else scale
        self.inner = scale
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, scale=self.inner)
        return torch.softmax(self.scale * q @ k.mT, -1) @ v


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_scale_that_goes_with_the_heads_is_replaced(power: float) -> None:
    model = nn.Sequential(Own(32, 0.3 * 4**-power))
    shapes = optx.scaling.shapes(model, base=nn.Sequential(Own(8, 0.3)))
    handle = optx.attach(model, optx.MuAttention(shapes))
    assert handle.served[0].part.scale == pytest.approx(0.3 / 4, rel=1e-12)


def test_a_scale_that_does_not_go_with_the_heads_is_refused() -> None:
    model = nn.Sequential(Own(32, 0.2))
    shapes = optx.scaling.shapes(model, base=nn.Sequential(Own(8, 0.3)))
    with pytest.raises(optx.TargetError, match=r"'0', a Own, multiplies its logits by 0\.2 and .* by 0\.3"):
        optx.attach(model, optx.MuAttention(shapes))


def test_a_call_with_a_scale_of_its_own_is_refused() -> None:
    model = nn.Sequential(Own(32, 1.0, fused=True))
    optx.attach(
        model, optx.MuAttention(optx.scaling.shapes(model, base=nn.Sequential(Own(8, 1.0, fused=True))))
    )
    with pytest.raises(optx.TargetError, match=r"on '0' expects torch's own scale.* multiplies by 1,"):
        model(torch.randn(2, 3, 32))


def clip(width: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=4)
    )


def test_clips_scale() -> None:
    torch.manual_seed(0)
    model = clip(64).eval().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    handle = optx.attach(model, optx.MuAttention(optx.scaling.shapes(model, base=lambda: clip(16))))
    served = model(x).last_hidden_state
    handle.remove()
    assert not torch.allclose(model(x).last_hidden_state, served)
    with torch.no_grad():
        attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
        for p in attention.q_proj.parameters():
            p.mul_(math.sqrt(8 / 32))
    torch.testing.assert_close(model(x).last_hidden_state, served, rtol=1e-9, atol=1e-9)


# ---- embeddings ---------------------------------------------------------------------------------------


def gemma3(width: int) -> Any:
    plain = {n: getattr(llama(width), n) for n in ("hidden_size", "intermediate_size", "vocab_size")}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2}
    return transformers.Gemma3TextConfig(
        **plain, **heads, num_hidden_layers=1, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )


def bart(width: int, scaled: bool = True) -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 48}
    sizes = {"encoder_ffn_dim": width, "decoder_ffn_dim": width, "max_position_embeddings": 32}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=width, scale_embedding=scaled, forced_eos_token_id=2, **layers, **heads, **sizes, **ends
        )
    )


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("make", [gemma3, bart])
def test_an_embedding_that_grows_with_width_does_no_longer(make: Callable[[int], Any], meta: bool) -> None:
    """What enters the blocks is the embedding times what the base model multiplies by: 16 ** 0.5."""
    model = built(make(64))
    shapes = optx.scaling.shapes(make(64) if meta else model, base=make(16))
    optx.attach(model, optx.MuReadout(shapes))
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and hasattr(m, "embed_scale")]
    for table in tables:
        torch.testing.assert_close(table(TOKENS), F.embedding(TOKENS, table.weight) * 4)
    assert tables


def test_an_embedding_that_does_not_grow_is_left_alone() -> None:
    shapes = optx.scaling.shapes(bart(64, False), base=bart(16, False))
    served = optx.attach(built(bart(64, False)), optx.MuReadout(shapes)).served
    assert [one.path for one in served] == ["lm_head"]
    assert optx.scaling.shapes(gemma3(16), base=gemma3(16), delta=gemma3(32)).readouts == {
        "model.embed_tokens": 1.0
    }


def test_flex_attention_takes_the_scale() -> None:
    """Its kernels are not compiled here, which takes a minute and changes nothing of the scale."""
    models = []
    for implementation in ("flex_attention", "eager"):
        model = built(llama(64, attn_implementation=implementation))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(6 if p.ndim > 1 else 1)
        models.append(model)
    plain = models[1](TOKENS).logits
    shapes = optx.scaling.shapes(llama(64), base=llama(16))
    for model in models:
        optx.attach(model, optx.MuAttention(shapes))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        flex, eager = (model(TOKENS).logits for model in models)
    torch.testing.assert_close(flex, eager, rtol=1e-4, atol=1e-4)
    assert (eager - plain).abs().max() > 1e-2
