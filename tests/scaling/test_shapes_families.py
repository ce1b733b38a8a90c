"""What is width in transformers' models, as their classes are, and in timm's where it is installed."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from width_models import FAMILIES, bert, built, gpt2, llama, mixtral, qwen2, qwen3, t5, vit

import optx
from optx.scaling import Shapes

# The kind of each parameter, by a regex; the first that matches the whole name. All else is a vector.
KINDS: dict[str, dict[str, str]] = {
    "llama": {r".*_proj\.weight": "matrix", r".*embed_tokens\.weight": "input", r"lm_head\.weight": "output"},
    "qwen2": {r".*_proj\.weight": "matrix", r".*embed_tokens\.weight": "input"},
    "qwen3": {r".*_proj\.weight": "matrix", r".*embed_tokens\.weight": "input", r"lm_head\.weight": "output"},
    "gpt2": {r".*(attn|mlp)\..*\.weight": "matrix", r".*w[tp]e\.weight": "input"},
    "bert": {
        r".*embeddings\.weight": "input",
        r"cls\.predictions\.bias": "scalar",
        r"(?!.*LayerNorm).*weight": "matrix",
    },
    "vit": {
        r".*(token|embeddings|projection\.weight)": "input",
        r"classifier\.weight": "output",
        r"classifier\.bias": "scalar",
        r"(?!.*norm).*weight": "matrix",
    },
    "t5": {r"shared\.weight": "input", r".*relative.*": "scalar", r"(?!.*norm).*weight": "matrix"},
    "mixtral": {
        r".*_proj(\.weight)?": "matrix",
        r".*embed_tokens\.weight": "input",
        r"(lm_head|.*gate)\.weight": "output",
    },
}
KINDS["qwen3_moe"] = KINDS["mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family(family: str) -> None:
    make = FAMILIES[family]
    shapes = optx.scaling.shapes(make(64), base=make(16))
    model = built(make(64))
    shapes.check(model)
    assert list(shapes) == [name for name, _ in model.named_parameters()]
    for name, width in shapes.items():
        kinds = (kind for pattern, kind in KINDS[family].items() if re.fullmatch(pattern, name))
        assert width.kind == next(kinds, "vector"), name
        assert width.m == (1.0 if width.kind == "scalar" else 4.0), name
        assert (width.fan_in > 1, width.fan_out > 1) == {
            "matrix": (True, True),
            "input": (False, True),
            "vector": (False, True),
            "output": (True, False),
            "scalar": (False, False),
        }[width.kind], name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_with_delta_at_the_bases_width(family: str) -> None:
    """The kinds are those of the wide model, and every ratio is 1."""
    make = FAMILIES[family]
    wide = optx.scaling.shapes(make(64), base=make(16))
    same = optx.scaling.shapes(make(16), base=make(16), delta=make(32))
    assert [(w.name, w.kind) for w in same.values()] == [(w.name, w.kind) for w in wide.values()]
    assert {(w.fan_in, w.fan_out, w.m) for w in same.values()} == {(1.0, 1.0, 1.0)}
    assert optx.scaling.shapes(make(64), base=same) == wide


def test_ratios_are_turned_where_the_weight_is() -> None:
    """GPT-2's Conv1D stores (in, out); its MLP is here four times as wide in the base, and six times here."""
    shapes = optx.scaling.shapes(gpt2(32, n_inner=192), base=gpt2(16, n_inner=64))
    up, down = (shapes[f"transformer.h.0.mlp.{name}.weight"] for name in ("c_fc", "c_proj"))
    assert (up.shape, up.fan_in, up.fan_out) == ((32, 192), 2.0, 3.0)
    assert (down.shape, down.fan_in, down.fan_out) == ((192, 32), 3.0, 2.0)
    model = optx.scaling.shapes(llama(32, intermediate_size=192), base=llama(16, intermediate_size=64))
    up, down = (model[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert (up.fan_in, up.fan_out, down.fan_in, down.fan_out) == (2.0, 3.0, 3.0, 2.0)
    experts = optx.scaling.shapes(mixtral(32, intermediate_size=96), base=mixtral(16, intermediate_size=32))
    both, down = (experts[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    assert (both.fan_in, both.fan_out, down.fan_in, down.fan_out) == (2.0, 3.0, 3.0, 2.0)


def test_only_one_side_of_experts_grows() -> None:
    shapes = optx.scaling.shapes(mixtral(32, intermediate_size=48), base=mixtral(16, intermediate_size=48))
    both, down = (shapes[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    assert (both.kind, both.fan_in, down.kind, down.fan_out) == ("output", 2.0, "input", 2.0)


def test_tied_tensors_are_one_with_both_names() -> None:
    shapes = optx.scaling.shapes(qwen2(64), base=qwen2(16))
    assert shapes["model.embed_tokens.weight"].tied == ("lm_head.weight",)
    assert shapes["lm_head.weight"] is shapes["model.embed_tokens.weight"]
    assert shapes["lm_head.weight"].kind == "input"
    assert "lm_head.weight" in shapes
    assert "lm_head.weight" not in list(shapes)
    names = optx.scaling.shapes(t5(64), base=t5(16))["shared.weight"].tied
    assert set(names) == {
        f"{part}.weight" for part in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }


def test_a_vocabulary_is_never_width() -> None:
    """Nor are positions: the proxy may have fewer of both, and heads of either sort say so too."""
    shapes = optx.scaling.shapes(llama(64, vocab_size=96), base=llama(16, vocab_size=24))
    assert shapes["model.embed_tokens.weight"].kind == "input"
    assert (shapes["lm_head.weight"].kind, shapes["lm_head.weight"].fan_out) == ("output", 1.0)
    made = [bert(width, vocab_size=size) for width, size in ((64, 96), (16, 24))]
    shapes = optx.scaling.shapes(made[0], base=made[1])
    assert shapes["cls.predictions.bias"].kind == "scalar"
    shapes = optx.scaling.shapes(gpt2(64, n_positions=64), base=gpt2(16, n_positions=8))
    assert (shapes["transformer.wpe.weight"].kind, shapes["transformer.wpe.weight"].m) == ("input", 4.0)


def test_rows_that_grow_as_the_width_does_are_rows() -> None:
    [table] = optx.scaling.shapes(nn.Embedding(64, 64), base=nn.Embedding(16, 16)).values()
    assert (table.kind, table.fan_in, table.fan_out) == ("input", 1.0, 4.0)


def test_heads_may_be_more_or_wider() -> None:
    more = optx.scaling.shapes(qwen3(64, num_attention_heads=8, head_dim=8), base=qwen3(16))
    wider = optx.scaling.shapes(qwen3(64), base=qwen3(16))
    name = "model.layers.0.self_attn"
    assert (more.heads[name].width, more.heads[name].base_width) == (8, 8)
    assert (wider.heads[name].width, wider.heads[name].base_width) == (32, 8)
    assert (more[f"{name}.q_norm.weight"].kind, wider[f"{name}.q_norm.weight"].kind) == ("scalar", "vector")
    assert more[f"{name}.k_proj.weight"].kind == "output"  # one head of keys, as wide as before
    assert more.set(matrix=r".*\.k_proj\.weight")[f"{name}.k_proj.weight"].kind == "matrix"


def test_a_model_of_70_billion_costs_neither_memory_nor_time() -> None:
    def config(width: int, heads: int) -> Any:
        return llama(
            width,
            intermediate_size=width * 7 // 2,
            num_hidden_layers=80,
            num_attention_heads=heads,
            num_key_value_heads=heads // 8,
            vocab_size=128256,
        )

    optx.scaling.shapes(llama(32), base=llama(16))  # imports
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shapes = optx.scaling.shapes(config(8192, 64), base=config(1024, 8))
    seconds = time.perf_counter() - begin
    numbers = sum(torch.Size(width.shape).numel() for width in shapes.values())
    assert numbers > 69e9
    assert seconds < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    assert len(repr(shapes).splitlines()) < 20


class ReadsANumber(nn.Module):
    """Like those whose constructors compute depths or rates from tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rate = float(torch.rand(3).tolist()[1])
        self.up = nn.Linear(4, width)
        self.out = nn.Linear(width, 4)
        self.register_buffer("steps", torch.arange(width))


@pytest.mark.parametrize("make", [bert, lambda width: lambda: ReadsANumber(width)])
def test_building_draws_no_random_numbers(make: Callable[[int], Callable[[], nn.Module]]) -> None:
    before = torch.get_rng_state()
    shapes = optx.scaling.shapes(make(32), base=make(16))
    assert torch.equal(torch.get_rng_state(), before)
    shapes.check(make(32)())


def test_a_constructor_that_reads_a_number_is_built_without_memory() -> None:
    def make(width: int) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(ReadsANumber(8), *[nn.Linear(4096, width) for _ in range(32)])

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shapes = optx.scaling.shapes(make(2048), base=make(1024))  # 1.6 GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert shapes["32.weight"].kind == "input"


def wrapped(model: nn.Module) -> list[nn.Module]:
    """As torch.compile and DDP have it."""
    parallel = nn.DataParallel(model)
    return [torch.compile(model), parallel, torch.compile(parallel)]


def test_wrappers_do_not_show() -> None:
    plain = optx.scaling.shapes(llama(32), base=llama(16))
    for model in wrapped(built(llama(32))):
        assert optx.scaling.shapes(model, base=built(llama(16))) == plain
        plain.check(model)
    for base in wrapped(built(llama(16))):
        assert optx.scaling.shapes(built(llama(32)), base=base) == plain


def test_an_attached_method_with_parameters_is_named() -> None:
    model = built(llama(32))
    shapes = optx.scaling.shapes(model, base=llama(16))
    handle = optx.attach(model, optx.LoRA(rank=2))
    with pytest.raises(optx.OptxError, match=r"model has 'model\.layers\.0\..*\.lora\.\w+' attached"):
        optx.scaling.shapes(model, base=llama(16))
    shapes.check(model)
    handle.remove()
    assert optx.scaling.shapes(model, base=llama(16)) == shapes


def test_pefts_lora_is_read_as_any_linear_module() -> None:
    peft = pytest.importorskip("peft")
    made = [
        peft.get_peft_model(built(llama(width)), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        for width in (32, 16)
    ]
    shapes = optx.scaling.shapes(made[0], base=made[1])
    kinds = {name.split(".")[-3]: width.kind for name, width in shapes.items() if ".lora_" in name}
    assert kinds == {"lora_A": "output", "lora_B": "input"}
    with pytest.raises(optx.OptxError, match="base has no parameter 'base_model"):
        optx.scaling.shapes(made[0], base=llama(16))


# ---- timm ---------------------------------------------------------------------------------------------


def timms(name: str, *sizes: dict[str, Any]) -> Shapes:
    timm = pytest.importorskip("timm")
    made: list[Callable[[], nn.Module]] = [
        lambda size=size: timm.create_model(name, num_classes=3, **size) for size in sizes
    ]
    return optx.scaling.shapes(made[0], base=made[1])


def test_timms_vit() -> None:
    same = {"depth": 2, "num_heads": 2, "img_size": 32}
    shapes = timms("vit_tiny_patch16_224", {"embed_dim": 64, **same}, {"embed_dim": 16, **same})
    kinds = {name: width.kind for name, width in shapes.items()}
    assert {kinds[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {"input"}
    assert {kind for name, kind in kinds.items() if re.search(r"(qkv|proj|fc\d)\.weight$", name)} > {"matrix"}
    assert kinds["blocks.1.attn.qkv.weight"] == "matrix"
    assert (kinds["head.weight"], kinds["head.bias"]) == ("output", "scalar")
    assert shapes.heads["blocks.1.attn"].base_width == 8


def test_timms_resnet() -> None:
    sizes = [{"channels": tuple(n * width for n in (1, 2, 4, 8))} for width in (32, 16)]
    shapes = timms("resnet18", *sizes)
    kinds = {name: (width.kind, width.m) for name, width in shapes.items()}
    assert kinds["conv1.weight"] == ("scalar", 1.0)  # timm's stem keeps its width
    assert kinds["layer1.0.conv1.weight"] == ("input", 2.0)
    assert kinds["layer4.1.conv2.weight"] == ("matrix", 2.0)
    assert kinds["layer2.0.downsample.1.bias"] == ("vector", 2.0)
    assert kinds["fc.weight"] == ("output", 2.0)


def test_one_model_may_be_a_module_and_the_other_a_config() -> None:
    plain = optx.scaling.shapes(vit(32), base=vit(16))
    import transformers

    config = transformers.ViTConfig(**{**built(vit(16)).config.to_dict()})
    assert optx.scaling.shapes(built(vit(32)), base=config) == plain
    config.architectures = None
    with pytest.raises(optx.OptxError, match=r"base=ViTConfig doesn't say which model it is of"):
        optx.scaling.shapes(vit(32), base=config)
