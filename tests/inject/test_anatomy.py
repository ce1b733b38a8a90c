"""A model that nobody has listed is served wholly by default, or refused with what was and wasn't found."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from unlisted_models import unlisted

import optx


def served(model: nn.Module, injection: optx.Injection) -> dict[str, int]:
    """How many modules of each name, with a * for numbers."""
    found: dict[str, int] = {}
    for one in optx.attach(model, injection).served:
        name = re.sub(r"\b\d+\b", "*", one.path)
        found[name] = found.get(name, 0) + 1
    return found


WHOLE: list[tuple[str, Callable[[], optx.Injection], dict[str, int]]] = [
    (
        "Cohere",
        lambda: optx.IA3(),
        {f"model.layers.*.{n}": 2 for n in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")},
    ),
    ("OLMo 2", lambda: optx.LoRA(), {f"model.layers.*.self_attn.{n}_proj": 2 for n in "qv"}),
    (
        "StableLM",
        lambda: optx.SequentialAdapter(),
        {f"model.layers.*.{n}": 2 for n in ("self_attn.o_proj", "mlp.down_proj")},
    ),
    (
        "MPT",
        lambda: optx.IA3(),
        {f"transformer.blocks.*.{n}": 2 for n in ("attn.Wqkv", "ffn.down_proj")},
    ),
    ("CodeGen", lambda: optx.LoRA(), {"transformer.h.*.attn.qkv_proj": 2}),
    ("Swin", lambda: optx.LoRA(), {f"encoder.layers.*.blocks.*.attention.{n}_proj": 3 for n in "qv"}),
    (
        "wav2vec 2.0",
        lambda: optx.IA3(),
        {
            f"encoder.layers.*.{n}": 2
            for n in ("attention.k_proj", "attention.v_proj", "feed_forward.output_dense")
        },
    ),
    (
        "LLaVA",
        lambda: optx.LoRA(),
        {
            f"model.{tower}.layers.*.self_attn.{n}_proj": 2
            for tower in ("vision_tower.encoder", "language_model")
            for n in "qv"
        },
    ),
    (
        "Qwen2-VL",
        lambda: optx.ParallelAdapter(),
        {"model.visual.blocks.*.mlp": 2, "model.language_model.layers.*.mlp": 2},
    ),
    (
        "Mllama",
        lambda: optx.LoRA(),
        {
            **{f"model.vision_model.transformer.layers.*.self_attn.{n}_proj": 2 for n in "qv"},
            **{f"model.vision_model.global_transformer.layers.*.self_attn.{n}_proj": 1 for n in "qv"},
            **{
                f"model.language_model.layers.*.{kind}_attn.{n}_proj": 1
                for kind in ("self", "cross")
                for n in "qv"
            },
        },
    ),
    (
        "GPT-2 with cross attention",
        lambda: optx.LoRA(),
        {
            f"transformer.h.*.{n}": 2
            for n in ("attn.c_attn", "crossattention.c_attn", "crossattention.q_attn")
        },
    ),
    (
        "Longformer",
        lambda: optx.LoRA(),
        {
            f"encoder.layer.*.attention.self.{n}": 2
            for n in ("query", "value", "query_global", "value_global")
        },
    ),
    (
        "MobileBERT",
        lambda: optx.IA3(),
        {
            **{f"encoder.layer.*.attention.self.{n}": 2 for n in ("key", "value")},
            **{"encoder.layer.*.output.dense": 2, "encoder.layer.*.ffn.*.output.dense": 6},
        },
    ),
    ("SigLIP", lambda: optx.Aside(), {f"{t}_model.encoder.layers.*": 2 for t in ("text", "vision")}),
]


@pytest.mark.parametrize(("label", "make", "wanted"), WHOLE, ids=[label for label, *_ in WHOLE])
def test_served_wholly(label: str, make: Callable[[], optx.Injection], wanted: dict[str, int]) -> None:
    assert served(unlisted(label), make()) == wanted


REFUSED: list[tuple[str, Callable[[], optx.Injection], str]] = [
    ("SigLIP", lambda: optx.LoRA(), r"has attention in 'vision_model\.head\.attention' too, a MultiheadAtt"),
    (
        "Jamba",
        lambda: optx.LoRA(),
        r"found queries in 1 of 2 places in 'model\.layers' .*not in 'model\.layers\.0', which has mamba",
    ),
    ("XLNet", lambda: optx.LoRA(), r"XLNetModel is none of them \(it has attention in 'layer\.0\.rel_attn'"),
    ("ConvNeXt", lambda: optx.FLoRA(), r"ConvNextModel is none of them\. Pass targets="),
    ("MPT", lambda: optx.PrefixTuning(), r"MptForCausalLM computes attention in a way of its own"),
]


@pytest.mark.parametrize(("label", "make", "says"), REFUSED, ids=[label for label, *_ in REFUSED])
def test_refused_by_name(label: str, make: Callable[[], optx.Injection], says: str) -> None:
    model = unlisted(label)
    with pytest.raises(optx.TargetError, match=says):
        optx.attach(model, make())
    assert not [name for name, _ in model.named_modules() if "optx" in name]


# ---- models that someone wrote ------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8))


class Block(nn.Module):
    """As in Llama, with these projections."""

    def __init__(self, *names: str, ffn: str = "down_proj") -> None:
        super().__init__()
        self.self_attn = Attention(*names, "o_proj")
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 8), ffn: nn.Linear(8, 8)})


QKV = ("q_proj", "k_proj", "v_proj")


def crossed(block: nn.Module) -> nn.Module:
    """With a second attention, which has no projection of its own behind it."""
    block.cross_attn = Attention(*QKV)
    return block


def stack(*blocks: nn.Module, **more: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(blocks), **more})


@pytest.mark.parametrize(
    ("make", "injection", "says"),
    [
        (
            lambda: stack(Block(*QKV), Block("q_proj", "kv_proj")),
            optx.LoRA(),
            r"values in 1 of 2 .*not in 'layers\.1\.self_attn', which has q_proj, kv_proj, o_proj",
        ),
        (
            lambda: stack(*(Block("q_proj", "kv_proj") for _ in range(2))),
            optx.IA3(),
            r"serves keys, values, the FFN's inner activation; it found keys in 0 of 2",
        ),
        (
            lambda: stack(Block(*QKV), Block(*QKV, ffn="fc_down")),
            optx.IA3(),
            r"the FFN's inner activation in 1 of 2 .*not in 'layers\.1', which has self_attn, mlp",
        ),
        (
            lambda: stack(Block(*QKV), Block(*QKV), pooler=Attention(*QKV)),
            optx.LoRA(),
            r"all it serves by default in 'layers' \(2 blocks, Llama\), but .* in 'pooler' too, a Attention",
        ),
        (
            lambda: stack(Block(*QKV), text=stack(Block("wq", "wk", "wv"))),
            optx.LoRA(),
            r"queries in 0 of 1 places in 'text\.layers' .*has wq, wk, wv, o_proj",
        ),
        (
            lambda: stack(Block(*QKV), crossed(Block(*QKV))),
            optx.SequentialAdapter(rank=2),
            r"attention's last linear module in 1 of 2 .*not in 'layers\.1', which has self_attn, mlp, cr",
        ),
    ],
    ids=["one block has half", "all have half", "another FFN", "elsewhere", "another tower", "no output"],
)
def test_half_of_it_is_refused(make: Callable[[], nn.Module], injection: Any, says: str) -> None:
    with pytest.raises(optx.TargetError, match=rf"{says}.* Pass targets="):
        optx.attach(make(), injection)


def test_experts_in_one_tensor_are_said() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 8, 8))

    model = stack(Block(*QKV), Block(*QKV))
    model.get_submodule("layers.1.mlp").experts = Experts()  # type: ignore[assignment]
    with pytest.raises(
        optx.TargetError, match=r"layers\.1\.mlp\.experts .*'down_proj', a parameter of shape"
    ):
        optx.attach(model, optx.FLoRA(rank=2))
    assert len(optx.attach(model, optx.LoRA(rank=2))) == 4  # which claims no FFN


class OldExperts(nn.Module):
    """A mixture of experts as transformers 4 has it: each is a module, and the router is an nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        expert = lambda: nn.ModuleDict({n: nn.Linear(*s) for n, s in SIZES.items()})  # noqa: E731
        self.experts = nn.ModuleList(expert() for _ in range(3))


SIZES = {"w1": (8, 12), "w2": (12, 8), "w3": (8, 12)}


def test_experts_that_are_modules() -> None:
    blocks = [Block(*QKV), Block(*QKV)]
    for block in blocks:
        del block.mlp
        block.block_sparse_moe = OldExperts()
    found = served(stack(*blocks), optx.IA3())
    assert found["layers.*.block_sparse_moe.experts.*.w2"] == 6
    parts = optx.attach(stack(*blocks), optx.ParallelAdapter(rank=2), name="second").served
    assert [(one.path, one.part.W_down.shape, one.part.W_up.shape) for one in parts] == [  # type: ignore[union-attr]
        (f"layers.{i}.block_sparse_moe", (2, 8), (8, 2)) for i in range(2)
    ]


def test_cross_attention_that_is_not_called_gets_no_gradient_and_does_no_harm() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=64, is_decoder=True, add_cross_attention=True, **sizes)
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    x = torch.arange(6)[None]
    base, states = model(x).logits, torch.randn(1, 3, 16)
    for injection in (optx.LoRA(rank=2), optx.IA3(), optx.SequentialAdapter(rank=2, form="gelu")):
        handle = optx.attach(model, injection)
        assert torch.equal(model(x).logits, base)
        with torch.no_grad():
            for p in handle.parameters():
                p.add_(0.1)
        for inputs, beyond in (({}, True), ({"encoder_hidden_states": states}, False)):
            loss = model(x, **inputs).logits.square().sum()
            named = dict(handle.named_parameters())
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            reached = {name: g is not None for name, g in zip(named, grads, strict=True)}
            assert [name for name, yes in reached.items() if not yes] == [
                name for name in named if beyond and "crossattention" in name
            ]
        handle.remove()
        assert torch.equal(model(x).logits, base)
