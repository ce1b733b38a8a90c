"""Small models for the tests of HFT, and what is to be found in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn


def llama(layers: int = 4, **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 13,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **more}))


def hugging(kind: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        name = "T5ForConditionalGeneration" if kind == "T5" else kind
        config_name = kind.split("For")[0].removesuffix("Model").removesuffix("LMHead") + "Config"
        tokens = {} if kind in ("ViTForImageClassification", "SwinModel") else {"vocab_size": 13}
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} if tokens else {}
        return getattr(transformers, name)(getattr(transformers, config_name)(**tokens, **special, **config))

    return build


def encoder(layers: int = 4, width: int = 8) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class Residual(nn.Module):
    """The paper's idea on a plain MLP: an input layer, residual blocks of two matrices, a head."""

    def __init__(self, layers: int = 4, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(layers)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + 0.3 * block(x)
        return self.head(x)


SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
T5 = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
BART = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
ATTENTION4 = {"attention": 4, "norm": 2}

# Name: (builder, number of blocks, layers of each category in a block; the last block's where they differ).
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "llama": (llama, 4, {**ATTENTION4, "ffn": 3}),
    "smollm (GQA, tied)": (
        lambda: llama(3, num_key_value_heads=2, tie_word_embeddings=True),
        3,
        {**ATTENTION4, "ffn": 3},
    ),
    "qwen3": (
        hugging("Qwen3ForCausalLM", **SMALL, num_key_value_heads=1, head_dim=4),
        3,
        {"norm": 4, "ffn": 3},
    ),
    "phi3 (fused qkv, gate_up)": (
        hugging("Phi3ForCausalLM", **SMALL, num_key_value_heads=1),
        3,
        {"attention": 2, "ffn": 2, "norm": 2},
    ),
    "mixtral": (
        hugging("MixtralForCausalLM", **SMALL, num_key_value_heads=1, num_local_experts=2),
        3,
        {**ATTENTION4, "ffn": 2, "router": 1},
    ),
    "gpt2 (Conv1D, fused)": (
        hugging("GPT2LMHeadModel", n_embd=8, n_layer=3, n_head=2, n_positions=8),
        3,
        {"attention": 2, "ffn": 2, "norm": 2},
    ),
    "neox": (hugging("GPTNeoXForCausalLM", **SMALL), 3, {"attention": 2, "ffn": 2, "norm": 2}),
    "bert": (hugging("BertForMaskedLM", **SMALL), 3, {**ATTENTION4, "ffn": 2}),
    "albert (one block)": (hugging("AlbertModel", **SMALL, embedding_size=8), 1, {**ATTENTION4, "ffn": 2}),
    "vit": (
        hugging("ViTForImageClassification", **SMALL, image_size=8, patch_size=4),
        3,
        {**ATTENTION4, "ffn": 2},
    ),
    "swin (stages of blocks)": (
        hugging(
            "SwinModel",
            embed_dim=8,
            image_size=32,
            patch_size=4,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
        3,
        {**ATTENTION4, "ffn": 2},
    ),
    "t5": (hugging("T5", **T5), 5, {"attention": 4, "cross_attention": 4, "ffn": 2, "norm": 3}),
    "t5 gated": (
        hugging("T5", **T5, feed_forward_proj="gated-gelu"),
        5,
        {"attention": 4, "cross_attention": 4, "ffn": 3, "norm": 3},
    ),
    "bart": (
        hugging("BartForConditionalGeneration", **BART, encoder_attention_heads=2, decoder_attention_heads=2),
        4,
        {"attention": 4, "cross_attention": 4, "ffn": 2, "norm": 3},
    ),
    "mamba (no attention)": (
        hugging("MambaForCausalLM", hidden_size=8, num_hidden_layers=3, state_size=4),
        3,
        {"matrix": 6, "vector": 1, "norm": 1},
    ),
    "nn.TransformerEncoder": (encoder, 4, {"attention": 2, "ffn": 2, "norm": 2}),
    "nn.Transformer": (
        lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
        4,
        {"attention": 2, "cross_attention": 2, "ffn": 2, "norm": 3},
    ),
    "residual MLP": (Residual, 4, {"matrix": 2}),
}


ratios = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.4, 0.5, 0.6, 1.0]), st.floats(0.0, 1.0))


class Tied(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(1).blocks[0] for _ in range(4)])
        self.head = nn.Linear(8, 8)
        if kind == "head":
            self.blocks[1][0].weight = self.head.weight
        elif kind == "blocks":
            self.blocks = nn.ModuleList([self.blocks[0]] * 4)


def fresh(dtype: torch.dtype = torch.float32) -> Residual:
    torch.manual_seed(0)
    return Residual().to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
