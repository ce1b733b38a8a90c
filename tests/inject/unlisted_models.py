"""Models of families that no row of a table is made for, on no device: only their names count."""

from __future__ import annotations

from typing import Any

import torch

WIDE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {"vocab_size": 64, **WIDE}
IMAGE = {**WIDE, "image_size": 8, "patch_size": 4}
CONVS = {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2]}

# By label: the model's class without "Model" or "ForCausalLM", and the sizes of its configuration.
UNLISTED: dict[str, tuple[str, dict[str, Any]]] = {
    "Cohere": ("CohereForCausalLM", TEXT),
    "OLMo 2": ("Olmo2ForCausalLM", TEXT),
    "StableLM": ("StableLmForCausalLM", TEXT),
    "MPT": ("MptForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 64}),
    "CodeGen": (
        "CodeGenForCausalLM",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "Swin": (
        "SwinModel",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "window_size": 2,
        },
    ),
    "ConvNeXt": ("ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}),
    "wav2vec 2.0": (
        "Wav2Vec2Model",
        {**TEXT, **CONVS, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
    "SigLIP": ("SiglipModel", {"text_config": TEXT, "vision_config": IMAGE}),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", **IMAGE},
            "text_config": {"model_type": "llama", **TEXT},
        },
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "num_key_value_heads": 2},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        },
    ),
    "Mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "num_key_value_heads": 2,
                "cross_attention_layers": [1],
                "pad_token_id": 0,
            },
            "vision_config": {
                **IMAGE,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            },
        },
    ),
    "Jamba": (
        "JambaForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "use_mamba_kernels": False,
            "pad_token_id": 0,
        },
    ),
    "Longformer": ("LongformerModel", {**TEXT, "attention_window": 4}),
    "MobileBERT": (
        "MobileBertModel",
        {**TEXT, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
    ),
    "XLNet": ("XLNetModel", {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
    "GPT-2 with cross attention": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 64,
            "n_positions": 32,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "add_cross_attention": True,
        },
    ),
}


def unlisted(label: str) -> Any:
    import transformers

    kind, sizes = UNLISTED[label]
    name = kind.replace("ForCausalLM", "").replace("ForConditionalGeneration", "")
    config = name.removesuffix("LMHeadModel").removesuffix("Model") + "Config"
    with torch.device("meta"):
        return getattr(transformers, kind)(getattr(transformers, config)(**sizes))
