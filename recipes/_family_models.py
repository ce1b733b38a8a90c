"""Small random models of the families that transformers has: how each is made and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 64
WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 32, "pad_token_id": 0, **WIDE}
GROUPED = {**TEXT, "num_key_value_heads": 1}
MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ENCODER_DECODER = {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
}
DEEPSEEK = {
    **GROUPED,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def tokens() -> Tensor:
    """A batch of token numbers."""
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    """Numbers of a shape, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Tensor]:
    """What a model of text is called with."""
    return {"input_ids": tokens()}


def pairs() -> dict[str, Tensor]:
    """What an encoder with a decoder is called with."""
    return {"input_ids": tokens(), "decoder_input_ids": tokens()}


def pictures() -> dict[str, Tensor]:
    """What a model of images is called with."""
    return {"pixel_values": noise(2, 3, 8, 8)}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        label: what people call it.
        kind: its class in transformers.
        config: its configuration's class.
        sizes: what makes it small.
        inputs: what it is called with.
    """

    label: str
    kind: str
    config: str
    sizes: dict[str, Any] = field(default_factory=dict[str, Any])
    inputs: Callable[[], dict[str, Tensor]] = text

    def make(self, **changes: Any) -> Any:
        """The model, in eval mode, with biases and norms that are not what they start as."""
        import transformers

        config = getattr(transformers, self.config)(**{**self.sizes, **changes})
        torch.manual_seed(0)
        model = getattr(transformers, self.kind)(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.add_(0.1 * torch.randn_like(p))
        return model

    def run(self, model: nn.Module) -> Tensor:
        """The model's main output on its standard input."""
        return main_output(model(**self.inputs()))


def main_output(output: Any) -> Tensor:
    """What a loss would be taken of."""
    for name in ("logits", "last_hidden_state", "logits_per_text"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return output if isinstance(output, Tensor) else output[0]


def causal(name: str, sizes: dict[str, Any], label: str = "") -> Family:
    """A causal language model, by what transformers calls it."""
    return Family(label or name, f"{name}ForCausalLM", f"{name}Config", sizes)


def encoder(name: str, sizes: dict[str, Any], label: str = "") -> Family:
    """An encoder with a classifier."""
    return Family(label or name, f"{name}ForSequenceClassification", f"{name}Config", sizes)


def clip() -> Family:
    """A tower of text and one of images."""
    tower = {**WIDE, "num_hidden_layers": 2}
    sizes = {
        "text_config": {**tower, "vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": 2},
        "vision_config": {**tower, "image_size": 8, "patch_size": 4},
        "projection_dim": 16,
    }
    return Family("CLIP", "CLIPModel", "CLIPConfig", sizes, lambda: {**text(), **pictures()})


FAMILIES = [
    causal("Llama", GROUPED),
    causal("Mistral", GROUPED),
    causal("Qwen2", GROUPED),
    causal("Qwen3", {**GROUPED, "head_dim": 8}),
    causal("Gemma", {**GROUPED, "head_dim": 8}),
    causal("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    Family(
        "Gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 8}
    ),
    causal("Phi", TEXT),
    causal("Phi3", GROUPED, "Phi-3"),
    Family(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    causal("GPTNeoX", TEXT, "GPT-NeoX"),
    causal(
        "GPTNeo",
        {
            "vocab_size": VOCAB,
            "max_position_embeddings": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        "GPT-Neo",
    ),
    causal(
        "GPTJ",
        {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
        "GPT-J",
    ),
    causal("Bloom", {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}),
    causal("Falcon", {**TEXT, "multi_query": True, "new_decoder_architecture": False}),
    causal("OPT", {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1}),
    encoder("Bert", TEXT, "BERT"),
    encoder("Roberta", {**TEXT, "pad_token_id": 1}, "RoBERTa"),
    Family(
        "DistilBERT",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
        },
    ),
    encoder("Electra", {**TEXT, "embedding_size": 16}, "ELECTRA"),
    encoder(
        "DebertaV2",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        "DeBERTa-v2",
    ),
    encoder(
        "ModernBert",
        {
            **TEXT,
            "local_attention": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "ModernBERT",
    ),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        pairs,
    ),
    Family(
        "BART",
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": VOCAB, "max_position_embeddings": 32, "d_model": 16, **ENCODER_DECODER},
        pairs,
    ),
    Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCAB,
            "num_mel_bins": 8,
            "d_model": 16,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            **ENCODER_DECODER,
        },
        lambda: {"input_features": noise(2, 8, 16), "decoder_input_ids": tokens()},
    ),
    Family(
        "ViT",
        "ViTForImageClassification",
        "ViTConfig",
        {**WIDE, "image_size": 8, "patch_size": 4},
        pictures,
    ),
    clip(),
    causal("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    causal("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 12}, "Qwen2-MoE"),
    causal("Qwen3Moe", {**MOE, "head_dim": 8}, "Qwen3-MoE"),
    causal("DeepseekV2", {**DEEPSEEK, "topk_method": "greedy"}, "DeepSeek-V2"),
    causal("DeepseekV3", DEEPSEEK, "DeepSeek-V3"),
    causal(
        "Mamba",
        {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
    ),
]

BY_LABEL = {family.label: family for family in FAMILIES}
