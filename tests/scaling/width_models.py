"""Small random models of a given width, of the families that `optx.scaling` is tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def llama(width: int, **options: Any) -> Any:
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    ends = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlamaConfig(**{**sizes, **heads, **ends, **options})


def qwen2(width: int, **options: Any) -> Any:
    import transformers

    return transformers.Qwen2Config(**{**_same(llama(width)), "tie_word_embeddings": True, **options})


def qwen3(width: int, **options: Any) -> Any:
    import transformers

    return transformers.Qwen3Config(**{**_same(llama(width)), "head_dim": width // 2, **options})


PLAIN = {"experts_implementation": "eager"}  # the faster ones take no float64


def mixtral(width: int, **options: Any) -> Any:
    import transformers

    return transformers.MixtralConfig(**{**_same(llama(width)), "num_local_experts": 4, **PLAIN, **options})


def qwen3_moe(width: int, **options: Any) -> Any:
    import transformers

    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "head_dim": width // 2,
    }
    return transformers.Qwen3MoeConfig(**{**_same(llama(width)), **experts, **PLAIN, **options})


def _same(config: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id")
    return {name: getattr(config, name) for name in (*names, *more)}


def gpt2(width: int, **options: Any) -> Any:
    import transformers

    ends = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(
        **{**ends, **quiet, "n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 32, **options}
    )


def t5(width: int, **options: Any) -> Any:
    import transformers

    sizes = {"d_model": width, "d_kv": width // 2, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    return transformers.T5Config(
        **{**sizes, "vocab_size": 48, "decoder_start_token_id": 0, "dropout_rate": 0.0, **options}
    )


def bert(width: int, **options: Any) -> Callable[[], nn.Module]:
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    more = {"num_attention_heads": 2, "vocab_size": 48, "max_position_embeddings": 32}
    config = transformers.BertConfig(**{**sizes, **quiet, **more, **options})
    return lambda: transformers.BertForMaskedLM(config)


def vit(width: int, **options: Any) -> Callable[[], nn.Module]:
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "num_labels": 3}
    config = transformers.ViTConfig(**{**sizes, **more, **options})
    return lambda: transformers.ViTForImageClassification(config)


def built(source: Any) -> Any:
    """The model of a config or callable, with memory; the same weights for the same width."""
    import torch
    import transformers

    torch.manual_seed(0)
    if callable(source):
        return source().eval()
    seq2seq = source.model_type == "t5"
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return auto.from_config(source).eval()


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}
