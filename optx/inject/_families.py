"""Where the parts of known kinds of models are: one row a family, as regexes over names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# What each role is made of, in terms of a family's parts.
ROLES: dict[str, tuple[str, ...]] = {
    "query_value": ("query", "value"),
    "key_value": ("key", "value"),
    "ia3": ("key", "value", "ffn_inner"),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "whole_ffn": ("whole_ffn",),
    "ffn_out": ("ffn_out",),
    "attention_out": ("attention_out",),
    "branches": ("attention", "ffn"),
    "sublayers": ("attention_out", "ffn_out"),
    "linears": ("linears",),
    "convolutions": ("convolutions",),
    "block": ("block",),
}

# What messages call a part.
WORDS = {
    "query": "queries",
    "key": "keys",
    "value": "values",
    "attention": "attention",
    "attention_out": "attention's last linear module",
    "ffn": "the FFN",
    "whole_ffn": "the FFN",
    "ffn_out": "the FFN's last module",
    "ffn_inner": "the FFN's inner activation",
    "linears": "linear modules",
    "convolutions": "convolutions",
    "block": "layers",
}

# The parts of attention that are looked for in each attention module, and not in the block.
PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class Family:
    """Where the parts of one kind of model are, as regexes over module paths; empty where it has none.

    Attributes:
        name: for messages.
        block: one layer of the stack, by its path in the model.
        attention: the module that calls scaled_dot_product_attention; this and what follows, if not said
            otherwise, by the path in the block.
        query: the projection to queries, by the path in the attention module, and
        key: to keys, and
        value: to values. Where one module computes several of them, it is all of these.
        attention_out: the last linear module of attention.
        ffn: the FFN sub-layer as one module, or the module that adds its output to the residual.
        ffn_out: the module whose output is the FFN's, its last linear one.
        ffn_inner: the modules whose input IA3 scales; ``ffn_out`` if not given.
        whole_ffn: the modules that are together the FFN, without its residual and norm; ``ffn`` if not given.
        convolutions: a convolution that a block of this family has.
        mixer: what stands in the place of attention and FFN.
        lacks: why it has no such part, by part.
    """

    name: str
    block: str
    attention: str = ""
    query: str = ""
    key: str = ""
    value: str = ""
    attention_out: str = ""
    ffn: str = ""
    ffn_out: str = ""
    ffn_inner: str = ""
    whole_ffn: str = ""
    convolutions: str = ""
    mixer: str = ""
    lacks: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        object.__setattr__(self, "ffn_inner", self.ffn_inner or self.ffn_out)
        object.__setattr__(self, "whole_ffn", self.whole_ffn or self.ffn)

    def part(self, name: str) -> str:
        """The regex of a part, empty if there is none; every block has linear modules, or may have."""
        return ".*" if name in ("linears", "block") else getattr(self, name)

    def has(self, role: str) -> bool:
        """Whether it has all parts of a role."""
        if role == "linears":
            return not (self.convolutions or self.mixer)
        return all(self.part(part) for part in ROLES[role])

    def lack(self, role: str) -> str:
        """Why it has not, if that is known."""
        return next((self.lacks[part] for part in ROLES[role] if part in self.lacks), "")

    def score(self, paths: Collection[str]) -> int:
        """How many of its parts are among paths in blocks; 0 without the one that it is known by."""
        sign = self.attention or self.convolutions or self.mixer
        cores = [path for path in paths if re.fullmatch(sign, path)]
        if not cores:
            return 0
        inside = {path[len(core) + 1 :] for core in cores for path in paths if path.startswith(f"{core}.")}
        found = [_any(self.part(part), inside) for part in PROJECTIONS if self.part(part)]
        rest = ("attention_out", "ffn", "ffn_out")
        return 1 + sum(found) + sum(_any(self.part(part), paths) for part in rest if self.part(part))


def _any(pattern: str, paths: Collection[str]) -> bool:
    matches = re.compile(pattern).fullmatch
    return any(matches(path) for path in paths)


_LAYERS = r"(?:.*\.)?layers\.\d+"
_H = r"(?:.*\.)?h\.\d+"
_ENCODER_LAYER = r"(?:.*\.)?encoder\.layer\.\d+"
_EXPERTS = r"(?:(?:experts\.\d+|shared_experts?)\.)?"
_QKV: dict[str, Any] = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def _fused(name: str) -> dict[str, Any]:
    """Where one module computes queries, keys and values."""
    return dict.fromkeys(PROJECTIONS, name)


_LATENT = (
    "its keys and values are made from a compressed latent, and a part of the keys (kv_a_proj_with_mqa's) is "
    "shared by all heads, so no module's output is the keys"
)
_NO_ATTENTION = "its mixer has neither queries, keys and values nor an FFN"

# Of the families whose parts are found, a stack is of the one with most of them: the first, among equals.
FAMILIES = (
    Family(
        "Llama",  # Mistral, Qwen, Gemma, Cohere, OLMo, Granite; and those with experts
        block=_LAYERS,
        attention=r"self_attn|cross_attn",
        **_QKV,
        attention_out=r"(?:self_attn|cross_attn)\.o_proj",
        ffn=r"mlp|block_sparse_moe|feed_forward",
        ffn_out=r"(?:mlp|feed_forward)\.down_proj",
        ffn_inner=rf"(?:mlp|block_sparse_moe|feed_forward)\.{_EXPERTS}(?:down_proj|w2)",
    ),
    Family(
        "BERT",  # RoBERTa, ELECTRA; Longformer has projections for global attention, MobileBERT several FFNs
        block=_ENCODER_LAYER,
        attention=r"(?:cross)?attention\.self",
        query="query(?:_global)?",
        key="key(?:_global)?",
        value="value(?:_global)?",
        attention_out=r"(?:cross)?attention\.output\.dense",
        ffn=r"(?:ffn\.\d+\.)?output",  # LayerNorm(dense(h) + u): its second argument is the FFN's input u
        ffn_out=r"(?:ffn\.\d+\.)?output\.dense",
        whole_ffn=r"(?:ffn\.\d+\.)?(?:intermediate|output\.dense)",
    ),
    Family(
        "GPT-2",
        block=_H,
        attention=r"attn|crossattention",
        query="c_attn|q_attn",
        key="c_attn",
        value="c_attn",
        attention_out=r"(?:attn|crossattention)\.c_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.c_proj",
    ),
    Family(
        "ViT (timm)",  # and the image towers of Qwen's models
        block=r"(?:.*\.)?blocks\.\d+",
        attention=r"attn",
        **_fused("qkv"),
        attention_out=r"attn\.proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.(?:fc2|down_proj|linear_fc2)",
    ),
    Family(
        "ViT",  # DINOv2, Swin
        block=r"(?:.*\.)?(?:layers?|blocks)\.\d+",
        attention=r"attention",
        **_QKV,
        attention_out=r"attention\.o_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.fc2",
    ),
    Family(
        "ViT (transformers 4)",
        block=_ENCODER_LAYER,
        attention=r"attention\.attention",
        query="query",
        key="key",
        value="value",
        attention_out=r"attention\.output\.dense",
        ffn_out=r"output\.dense",
        whole_ffn=r"intermediate|output\.dense",
    ),
    Family(
        "ViT (torchvision)",
        block=r"(?:.*\.)?layers\.encoder_layer_\d+",
        attention=r"self_attention",
        ffn_out=r"mlp\.3",
        whole_ffn=r"mlp\.[03]",
    ),
    Family(
        "torch.nn.Transformer",
        block=_LAYERS,
        attention=r"self_attn|multihead_attn",
        ffn_out=r"linear2",
        whole_ffn=r"linear[12]",
    ),
    Family(
        "CLIP",  # SigLIP
        block=_LAYERS,
        attention=r"self_attn",
        **_QKV,
        attention_out=r"self_attn\.(?:out|o)_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.fc2",
    ),
    Family(
        "BART and OPT",  # and Whisper; their FFN is two linear modules of the block, and no module by itself
        block=_LAYERS,
        attention=r"(?:self|encoder)_attn",
        **_QKV,
        attention_out=r"(?:self|encoder)_attn\.out_proj",
        ffn_out=r"fc2",
        whole_ffn=r"fc[12]",
        lacks={"ffn": "its FFN is fc1 and fc2 of the layer itself, and no module"},
    ),
    Family(
        "DistilBERT",
        block=r"(?:.*\.)?transformer\.layer\.\d+",
        attention=r"attention",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        attention_out=r"attention\.out_lin",
        ffn=r"ffn",
        ffn_out=r"ffn\.lin2",
    ),
    Family(
        "T5",
        block=r"(?:.*\.)?block\.\d+",
        attention=r"layer\.\d+\.(?:SelfAttention|EncDecAttention)",
        query="q",
        key="k",
        value="v",
        attention_out=r"layer\.\d+\.(?:SelfAttention|EncDecAttention)\.o",
        ffn=r"layer\.\d+\.DenseReluDense",
        ffn_out=r"layer\.\d+\.DenseReluDense\.wo",
    ),
    Family(
        "Phi",
        block=_LAYERS,
        attention=r"self_attn",
        **_QKV,
        attention_out=r"self_attn\.dense",
        ffn=r"mlp",
        ffn_out=r"mlp\.fc2",
    ),
    Family(
        "Phi-3",
        block=_LAYERS,
        attention=r"self_attn",
        **_fused("qkv_proj"),
        attention_out=r"self_attn\.o_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.down_proj",
    ),
    Family(
        "GPT-NeoX",  # Persimmon
        block=_LAYERS,
        attention=r"attention|self_attn",
        **_fused("query_key_value"),
        attention_out=r"(?:attention|self_attn)\.dense",
        ffn=r"mlp",
        ffn_out=r"mlp\.dense_4h_to_h",
    ),
    Family(
        "Bloom and Falcon",
        block=_H,
        attention=r"self_attention",
        **_fused("query_key_value"),
        attention_out=r"self_attention\.dense",
        ffn=r"mlp",
        ffn_out=r"mlp\.dense_4h_to_h",
    ),
    Family(
        "GPT-Neo",
        block=_H,
        attention=r"attn\.attention",
        **_QKV,
        attention_out=r"attn\.attention\.out_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.c_proj",
    ),
    Family(
        "GPT-J",
        block=_H,
        attention=r"attn",
        **_QKV,
        attention_out=r"attn\.out_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.fc_out",
    ),
    Family(
        "CodeGen",
        block=_H,
        attention=r"attn",
        **_fused("qkv_proj"),
        attention_out=r"attn\.out_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.fc_out",
    ),
    Family(
        "MPT",
        block=r"(?:.*\.)?blocks\.\d+",
        attention=r"attn",
        **_fused("Wqkv"),
        attention_out=r"attn\.out_proj",
        ffn=r"ffn",
        ffn_out=r"ffn\.down_proj",
    ),
    Family(
        "DeBERTa",
        block=_ENCODER_LAYER,
        attention=r"attention\.self",
        query="query_proj|in_proj",
        key="key_proj|in_proj",
        value="value_proj|in_proj",
        attention_out=r"attention\.output\.dense",
        ffn=r"output",
        ffn_out=r"output\.dense",
        whole_ffn=r"intermediate|output\.dense",
    ),
    Family(
        "ModernBERT",
        block=_LAYERS,
        attention=r"attn",
        **_fused("Wqkv"),
        attention_out=r"attn\.Wo",
        ffn=r"mlp",
        ffn_out=r"mlp\.Wo",
    ),
    Family(
        "wav2vec 2.0",  # HuBERT
        block=_LAYERS,
        attention=r"attention",
        **_QKV,
        attention_out=r"attention\.out_proj",
        ffn=r"feed_forward",
        ffn_out=r"feed_forward\.output_dense",
    ),
    Family(
        "DeepSeek",
        block=_LAYERS,
        attention=r"self_attn",
        query=r"q_proj|q_b_proj",
        value=r"kv_b_proj",
        attention_out=r"self_attn\.o_proj",
        ffn=r"mlp",
        ffn_out=r"mlp\.down_proj",
        ffn_inner=rf"mlp\.{_EXPERTS}down_proj",
        lacks={"key": _LATENT},
    ),
    Family(
        "Mamba",
        block=_LAYERS,
        mixer=r"mixer",
        lacks={
            **dict.fromkeys(
                ("query", "key", "attention", "attention_out", "ffn", "ffn_out", "whole_ffn"), _NO_ATTENTION
            ),
            "linears": "its mixer uses weights of its linear modules without calling them",
        },
    ),
    Family(
        "ResNet",  # torchvision's and timm's
        block=r"(?:.*\.)?layer\d+\.\d+",
        convolutions=r"conv\d+",
    ),
    Family(
        "ResNet (transformers)",
        block=r"(?:.*\.)?stages\.\d+\.layers\.\d+",
        convolutions=r"layer\.\d+\.convolution",
    ),
)
