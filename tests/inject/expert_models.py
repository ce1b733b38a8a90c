"""Small mixtures of experts that are one 3-D parameter, and what tests of LoRA on them do with them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

ONE_PARAMETER = pytest.mark.skipif(
    int(version("transformers").split(".")[0]) < 5, reason="transformers 4 holds experts as modules"
)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]

# What every family calls its sizes.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 8},
    "Olmoe": {"num_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
    "DeepseekV3": {
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24},
        **{"first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
        **{"qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2},
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default"}},
}


def moe(family: str = "Mixtral", implementation: str | None = None, **changes: Any) -> Any:
    """Two layers of four experts, every weight random."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.eval()


def experts_of(model: Any, layer: int = 0) -> nn.Module:
    return model.model.layers[layer].mlp.experts


def updates(handle: optx.Handle) -> dict[str, Tensor]:
    """What LoRA adds to each parameter, expert by expert, from the factors as they lie in PEFT's files."""
    found: dict[str, Tensor] = {}
    for one in handle.served:
        for name in one.part.parameter_names:
            pair = one.part.pairs[name]
            E, r, scale = pair.experts, pair.rank, pair.scale
            deltas = [
                scale * sum(torch.outer(pair.B[:, k * E + e], pair.A[e * r + k]) for k in range(r))
                for e in range(E)
            ]
            transposed = getattr(one.module, "is_transposed", False) and not pair.flat
            stack = torch.stack([delta.t() if transposed else delta for delta in deltas])
            found[f"{one.path}.{name}"] = stack[0] if pair.flat else stack
    return found


def expected(model: Any, handle: optx.Handle, x: Tensor) -> Tensor:
    """The logits of a bare model with these sums for weights; differentiable in the factors."""
    weights = {name: model.get_parameter(name) + delta for name, delta in updates(handle).items()}
    with handle.disable():
        return torch.func.functional_call(model, weights, (x,)).logits
