"""Which modules are served by default, in models as transformers, timm, torchvision and torch name them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from family_models import BY_LABEL
from torch import nn
from unlisted_models import UNLISTED, unlisted

import optx
from optx.inject._families import FAMILIES
from optx.inject._targets import family_of


def transformer(kind: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A model of one block, on no device: only names count here."""

    def make() -> nn.Module:
        import transformers

        with torch.device("meta"):
            return getattr(transformers, kind)(getattr(transformers, config)(**sizes))

    return make


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 64, **SIZES}
BART = {f"{n}_{k}": v for n in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 2))}


def named(*paths: str) -> Callable[[], nn.Module]:
    """Modules under the names that a library which is not installed gives them."""

    def make() -> nn.Module:
        root = nn.Module()
        for path in paths:
            *parents, leaf = path.removesuffix("?").split(".")
            module = root
            for name in parents:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name]  # type: ignore[assignment]
            kind = nn.BatchNorm2d(4) if path.endswith("?") else nn.Linear(4, 4)
            module.add_module(leaf, nn.Conv2d(4, 4, 1) if "conv" in leaf or leaf == "0" else kind)
        return root

    return make


TIMM = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
VIT4 = [
    f"vit.encoder.layer.0.{name}"
    for name in (
        *(f"attention.attention.{which}" for which in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]

# Per model: its family, and for each role the ends of the paths that are served in its first block.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, str]]] = {
    "Llama": (
        transformer("LlamaForCausalLM", "LlamaConfig", **TEXT),
        "Llama",
        {
            "query_value": "self_attn.q_proj self_attn.v_proj",
            "ia3": "self_attn.k_proj self_attn.v_proj mlp.down_proj",
            "attention": "self_attn",
            "ffn": "mlp",
            "sublayers": "self_attn.o_proj mlp.down_proj",
            "branches": "self_attn mlp",
            "linears": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
            "mlp.gate_proj mlp.up_proj mlp.down_proj",
        },
    ),
    "Mixtral": (
        transformer("MixtralForCausalLM", "MixtralConfig", num_local_experts=2, **TEXT),
        "Llama",
        {
            "query_value": "self_attn.q_proj self_attn.v_proj",
            "attention": "self_attn",
            "ffn_out": "mlp",  # its experts are no modules, but it is one
            "ia3": "",
            "linears": "",
        },
    ),
    "BERT": (
        transformer("BertForSequenceClassification", "BertConfig", **TEXT),
        "BERT",
        {
            "query_value": "attention.self.query attention.self.value",
            "ia3": "attention.self.key attention.self.value output.dense",
            "attention": "attention.self",
            "ffn": "output",
            "sublayers": "attention.output.dense output.dense",
            "linears": "attention.self.query attention.self.key attention.self.value attention.output.dense "
            "intermediate.dense output.dense",
        },
    ),
    "BERT decoder": (
        transformer("BertLMHeadModel", "BertConfig", is_decoder=True, add_cross_attention=True, **TEXT),
        "BERT",
        {"attention": "attention.self crossattention.self", "ffn": "output"},
    ),
    "RoBERTa": (
        transformer("RobertaModel", "RobertaConfig", **TEXT),
        "BERT",
        {"query_value": "attention.self.query attention.self.value", "ffn": "output"},
    ),
    "GPT-2": (
        transformer("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=16, n_layer=1, n_head=2),
        "GPT-2",
        {
            "query_value": "attn.c_attn",
            "ia3": "attn.c_attn mlp.c_proj",
            "attention": "attn",
            "ffn": "mlp",
            "sublayers": "attn.c_proj mlp.c_proj",
            "linears": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        },
    ),
    "BART": (
        transformer("BartModel", "BartConfig", vocab_size=64, d_model=16, **BART),
        "BART and OPT",
        {
            "query_value": "self_attn.v_proj self_attn.q_proj encoder_attn.v_proj encoder_attn.q_proj",
            "attention": "self_attn encoder_attn",
            "sublayers": "self_attn.out_proj encoder_attn.out_proj fc2",
            "linears": "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj "
            "encoder_attn.k_proj encoder_attn.v_proj encoder_attn.q_proj encoder_attn.out_proj fc1 fc2",
        },
    ),
    "OPT": (
        transformer("OPTForCausalLM", "OPTConfig", ffn_dim=24, word_embed_proj_dim=16, **TEXT),
        "BART and OPT",
        {"query_value": "self_attn.v_proj self_attn.q_proj", "attention": "self_attn", "ffn_out": "fc2"},
    ),
    "CLIP": (
        transformer("CLIPVisionModel", "CLIPVisionConfig", image_size=8, patch_size=4, **SIZES),
        "CLIP",
        {"attention": "self_attn", "ffn": "mlp", "sublayers": "self_attn.out_proj mlp.fc2"},
    ),
    "DistilBERT": (
        transformer(
            "DistilBertModel", "DistilBertConfig", vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24
        ),
        "DistilBERT",
        {
            "query_value": "attention.q_lin attention.v_lin",
            "branches": "attention ffn",
            "sublayers": "attention.out_lin ffn.lin2",
        },
    ),
    "T5": (
        transformer(
            "T5Model", "T5Config", vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
        ),
        "T5",
        {
            "attention": "layer.0.SelfAttention layer.1.EncDecAttention",
            "ffn": "layer.2.DenseReluDense",
            "attention_out": "layer.0.SelfAttention.o layer.1.EncDecAttention.o",
            "linears": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v "
            "layer.0.SelfAttention.o layer.1.EncDecAttention.q layer.1.EncDecAttention.k "
            "layer.1.EncDecAttention.v layer.1.EncDecAttention.o layer.2.DenseReluDense.wi "
            "layer.2.DenseReluDense.wo",
        },
    ),
    "ViT": (
        transformer("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, **SIZES),
        "ViT",
        {
            "query_value": "attention.q_proj attention.v_proj",
            "attention": "attention",
            "ffn": "mlp",
            "sublayers": "attention.o_proj mlp.fc2",
        },
    ),
    "ViT, transformers 4": (
        named(*VIT4),
        "ViT (transformers 4)",
        {
            "query_value": "attention.attention.query attention.attention.value",
            "attention": "attention.attention",
            "sublayers": "attention.output.dense output.dense",
        },
    ),
    "ViT, timm": (
        named(*TIMM),
        "ViT (timm)",
        {"query_value": "attn.qkv", "branches": "attn mlp", "sublayers": "attn.proj mlp.fc2"},
    ),
    "torch's encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        "torch.nn.Transformer",
        {"attention": "self_attn", "ffn_out": "linear2", "linears": "linear1 linear2"},
    ),
    "ResNet": (
        transformer("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[16], depths=[1]),
        "ResNet (transformers)",
        {
            "convolutions": "shortcut.convolution layer.0.convolution layer.1.convolution "
            "layer.2.convolution",
        },
    ),
    "ResNet, torchvision": (
        named(*(f"layer1.0.{name}" for name in ("conv1", "bn1?", "conv2", "downsample.0", "downsample.1?"))),
        "ResNet",
        {"convolutions": "conv1 conv2 downsample.0"},
    ),
}


class Served(optx.Injection):
    """An injection that only says what it serves."""

    name = "served"
    serves = "modules"

    def __init__(self, role: str) -> None:
        self.chosen = role

    def role_in(self, model: nn.Module) -> str:
        return self.chosen

    def part(self, module: nn.Module, path: str) -> optx.Part:
        return optx.Part()


CASES = [(name, role) for name, (_, _, roles) in MODELS.items() for role in roles]


@pytest.mark.parametrize(("name", "role"), CASES, ids=[f"{name}: {role}" for name, role in CASES])
def test_default_targets(name: str, role: str) -> None:
    make, family, roles = MODELS[name]
    model = make()
    found = family_of(model)
    assert found is not None
    assert found.name == family
    if not roles[role]:
        with pytest.raises(optx.TargetError, match=r"mlp\.experts of this MixtralForCausalLM computes with"):
            optx.attach(model, Served(role))
        return
    inside = pytest.warns(UserWarning, match="leaves out .*self_attn.out_proj, inside an nn.MultiheadAtt")
    with inside if name == "torch's encoder" and role == "linears" else nullcontext():
        served = [one.path for one in optx.attach(model, Served(role)).served]
    # Of an encoder and a decoder, the decoder has everything.
    block = max(
        (path for path in dict(model.named_modules()) if re.fullmatch(found.block, path)), key=_size(model)
    )
    assert [path.removeprefix(f"{block}.") for path in served if path.startswith(f"{block}.")] == roles[
        role
    ].split()
    assert all(re.match(found.block, path) for path in served)


def _size(model: nn.Module) -> Callable[[str], int]:
    return lambda path: len(list(model.get_submodule(path).modules()))


def test_every_family_is_in_the_table() -> None:
    covered = {family for _, family, _ in MODELS.values()} | {family for _, family in OTHERS}
    assert {family.name for family in FAMILIES} - covered == {"ViT (torchvision)"}


OTHERS = [
    ("Phi", "Phi"),
    ("Phi-3", "Phi-3"),
    ("GPT-NeoX", "GPT-NeoX"),
    ("GPT-Neo", "GPT-Neo"),
    ("GPT-J", "GPT-J"),
    ("Bloom", "Bloom and Falcon"),
    ("Falcon", "Bloom and Falcon"),
    ("DeBERTa-v2", "DeBERTa"),
    ("ModernBERT", "ModernBERT"),
    ("DeepSeek-V3", "DeepSeek"),
    ("Mamba", "Mamba"),
    ("CodeGen", "CodeGen"),
    ("MPT", "MPT"),
    ("wav2vec 2.0", "wav2vec 2.0"),
]


@pytest.mark.parametrize(("label", "family"), OTHERS)
def test_families_that_the_page_lists(label: str, family: str) -> None:
    found = family_of(unlisted(label) if label in UNLISTED else BY_LABEL[label].make())
    assert found is not None
    assert found.name == family


def test_torchvisions_vit() -> None:
    """Its FFN is an nn.Sequential, and its projections are inside an nn.MultiheadAttention."""
    root = nn.Module()
    block = nn.ModuleDict(
        {
            "self_attention": nn.MultiheadAttention(8, 2),
            "mlp": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8)),
        }
    )
    root.encoder = nn.ModuleDict({"layers": nn.ModuleDict({"encoder_layer_0": block})})
    start = "encoder.layers.encoder_layer_0"
    assert [one.path for one in optx.attach(root, optx.PrefixTuning()).served] == [f"{start}.self_attention"]
    sequential = optx.attach(root, optx.SequentialAdapter(position="ffn"))
    assert [one.path for one in sequential.served] == [f"{start}.mlp.3"]
    with pytest.raises(
        optx.TargetError, match=r"LoRA has default targets for Llama, BERT, .* is a ViT \(torchvis"
    ):
        optx.attach(root, optx.LoRA())


def test_what_a_family_has_not_is_said() -> None:
    model = MODELS["OPT"][0]()
    with pytest.raises(
        optx.TargetError,
        match=r"ScaledParallelAdapter has no default targets in .* of this OPTForCausalLM, a BART and OPT "
        r"model: its FFN is fc1 and fc2 of the layer itself",
    ):
        optx.attach(model, optx.ScaledParallelAdapter())
    with pytest.raises(optx.TargetError, match=r"MAM|ScaledParallelAdapter"):
        optx.attach(model, optx.MAM())
    assert not [path for path, _ in model.named_modules() if "optx" in path]


def test_defaults_are_the_same_after_attaching() -> None:
    """What was attached has names of its own, which are no part of a family."""
    model = MODELS["Llama"][0]()
    first = [one.path for one in optx.attach(model, optx.LoRA(rank=2)).served]
    second = optx.attach(model, optx.LoRA(rank=2), name="again")
    assert [one.path for one in second.served] == first


def test_no_family() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert family_of(model) is None
    with pytest.raises(optx.TargetError, match="Sequential is none of them"):
        optx.attach(model, optx.PrefixTuning())
