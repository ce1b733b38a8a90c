"""Small models whose attention is exchanged, and the same attention by loops, in transformers' registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from reference.softplus_attention import weights
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = torch.tensor([[5, 9, 7, 30, 22, 11], [3, 3, 40, 12, 6, 18]])
CACHE = "past_key_values" if version("transformers") < "5" else "cache"
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 48, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
BOTH = {
    **{
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))
    },
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


def config(kind: str, **options: Any) -> Any:
    import transformers

    makes: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
        "window": ("MistralConfig", {**TEXT, "num_key_value_heads": 2, "sliding_window": 3, "head_dim": 4}),
        "gpt2": (
            "GPT2Config",
            {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 48, "n_positions": 32},
        ),
        "bert": ("BertConfig", TEXT),
        "t5": (
            "T5Config",
            {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4},
        ),
        "bart": ("BartConfig", {"vocab_size": 48, "d_model": 16, "max_position_embeddings": 32, **BOTH}),
    }
    name, sizes = makes[kind]
    return getattr(transformers, name)(**{**sizes, **options})


def built(kind: str, implementation: str = "sdpa", **options: Any) -> Any:
    """In float64, with weights large enough for attention to matter."""
    import transformers

    classes = {
        "llama": "LlamaForCausalLM",
        "window": "MistralForCausalLM",
        "gpt2": "GPT2LMHeadModel",
        "bert": "BertForMaskedLM",
        "t5": "T5ForConditionalGeneration",
        "bart": "BartForConditionalGeneration",
    }
    torch.manual_seed(0)
    made = config(kind, **options)
    made._attn_implementation = implementation
    model = getattr(transformers, classes[kind])(made).double().eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(6)
    return model


def padded() -> dict[str, Tensor]:
    """Tokens of which the first two of the first row are padding on the left."""
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    return {"input_ids": TOKENS, "attention_mask": mask}


def logits(model: Any, **inputs: Tensor) -> Tensor:
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": TOKENS.flip(1)[:, :4]}
    return model(**(inputs or {"input_ids": TOKENS})).logits


def by_loops(power: float | None) -> Any:
    """An attention function of transformers'."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        rows = (*query.shape[:3], key.shape[2])
        seen = torch.ones(rows).bool() if attention_mask is None else attention_mask.expand(rows)
        seen = seen if seen.dtype == torch.bool else seen == 0  # BART's of 4.56 are added to scores
        out = torch.empty(*query.shape[:3], value.shape[-1], dtype=query.dtype)
        for b in range(len(query)):
            for h in range(query.shape[1]):
                share = weights(query[b, h], key[b, h // groups], seen[b, h], power)
                out[b, h] = share @ value[b, h // groups]
        return out.transpose(1, 2), None

    return attend


@contextmanager
def loops_in_registry(power: float | None) -> Iterator[str]:
    """The name under which `by_loops` is in there, and takes masks of all rows and keys."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    type(MASKS).register("loops", mask)
    ALL_ATTENTION_FUNCTIONS["loops"] = by_loops(power)
    try:
        with mock.patch.dict(bert_classes(), loops=bert_by_loops(power)):
            yield "loops"
    finally:
        del ALL_ATTENTION_FUNCTIONS["loops"]
        type(MASKS)._global_mapping.pop("loops")


def bert_classes() -> dict[str, type[nn.Module]]:
    """Where BERT of 4.56 looks for its attention, in the place of the registry."""
    from transformers.models.bert import modeling_bert

    return getattr(modeling_bert, "BERT_SELF_ATTENTION_CLASSES", {})


def bert_by_loops(power: float | None) -> type[nn.Module] | None:
    """That which calls torch's attention, with `by_loops` in the place of it."""
    base: Any = bert_classes().get("sdpa")
    if base is None:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
        return by_loops(power)(None, query, key, value, attn_mask)[0].transpose(1, 2)

    class Loops(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(F, "scaled_dot_product_attention", attend):
                return super().forward(*args, **kwargs)

    return Loops
