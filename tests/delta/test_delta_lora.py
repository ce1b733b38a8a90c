"""A LoRA adapter as a delta: of the merged weights, or of its factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import gpt2, llama
from delta_cases import normal
from prune_cases import Holder
from safetensors.torch import load_file, save_file

import optx
from optx import Delta, OptxError


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft's
@pytest.mark.parametrize("conv1d", [False, True])
def test_a_lora_as_a_delta_is_its_merged_weights(conv1d: bool, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    model = gpt2() if conv1d else llama()
    base = {name: t.clone() for name, t in model.state_dict().items()}
    names = ["c_attn", "c_fc"] if conv1d else ["q_proj", "down_proj"]
    options = {"rank_pattern": {names[1]: 5}, "alpha_pattern": {names[1]: 7}, "use_rslora": conv1d}
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, fan_in_fan_out=conv1d, **options),
    )
    with torch.no_grad():
        for number, (name, p) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                p.copy_(normal(*p.shape, seed=number))
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload().state_dict()
    delta = Delta.lora(tmp_path)
    assert all(name.endswith(tuple(f"{n}.weight" for n in names)) for name in delta)
    made: Any = delta.apply(base)
    for name, tensor in merged.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(made[name], base[name]) for name in delta)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing", "ignore:fan_in_fan_out is set to")  # peft's
@pytest.mark.parametrize(
    "names", [["attn.c_proj", "score"], ["c_attn", "c_fc", "score"]], ids=["square", "wide"]
)
def test_conv1d_beside_a_linear_layer_lies_as_the_base_shows(names: list[str], tmp_path: Path) -> None:
    """PEFT writes the flag that its last module had; a square weight would be changed by the transpose."""
    peft: Any = pytest.importorskip("peft")
    import transformers

    model = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, num_labels=16)
    )
    base, where = model.state_dict(), tmp_path / "adapter"
    model.save_pretrained(tmp_path / "base")
    base = {name: tensor.clone() for name, tensor in base.items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, fan_in_fan_out=True))
    with torch.no_grad():
        for number, (name, p) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                p.copy_(normal(*p.shape, seed=number))
    adapted.save_pretrained(where)
    merged = adapted.merge_and_unload().state_dict()
    with pytest.raises(OptxError, match=r"factors of '.*\.c_\w+' beside 'score', and .* Pass base="):
        Delta.lora(where)
    made: Any = Delta.lora(where, base=base).apply(base)
    config = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base'}+{where}"}]}
    written = load_file(optx.merge_yaml(config, tmp_path / "out.safetensors"))
    for name, tensor in merged.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-5)
    turned = {name: t.t() if "c_" in name and t.dim() == 2 else t for name, t in base.items()}
    lying: Any = Delta.lora(where, base=turned).apply(turned)  # as layers of these names in other families
    for name, tensor in merged.items():
        own = tensor.t() if "c_" in name and tensor.dim() == 2 else tensor
        torch.testing.assert_close(lying[name], own, rtol=1e-5, atol=1e-5)
    del turned["transformer.h.0.mlp.c_fc.weight"], turned["transformer.h.0.attn.c_attn.weight"]
    del turned["transformer.h.0.mlp.c_proj.weight"]
    with pytest.raises(OptxError, match=r"no weight of base tells whether those are \(in, out\)"):
        Delta.lora(where, base=turned)


def test_a_part_taken_off_the_base_is_known_where_a_file_names_the_model(tmp_path: Path) -> None:
    """``model+adapter`` of a merge's file names the base that a PiSSA adapter needs."""
    peft: Any = pytest.importorskip("peft")
    model = Holder()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    options = {"r": 2, "target_modules": ["a"], "init_lora_weights": "pissa"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for number, (name, p) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                p.add_(normal(*p.shape, seed=number))
    adapted.save_pretrained(tmp_path / "adapter")
    want = adapted.merge_and_unload().a.weight
    text = f"{tmp_path / 'base.safetensors'}+{tmp_path / 'adapter'}"
    config = {"merge_method": "passthrough", "models": [{"model": text}]}
    made = load_file(optx.merge_yaml(config, tmp_path / "out.safetensors"))
    torch.testing.assert_close(made["a.weight"], want, rtol=1e-5, atol=1e-5)
    assert not torch.equal(made["a.weight"], base["a.weight"])


def test_factors_are_pruned_each_by_its_own_mask(tmp_path: Path) -> None:
    model = Holder()
    handle = optx.attach(model, optx.LoRA(rank=8), targets="a")
    with torch.no_grad():
        for number, p in enumerate(handle.parameters()):
            p.copy_(normal(*p.shape, seed=number))
    handle.save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved, delta = load_file(file), Delta.lora(tmp_path, "factors")
    assert delta.entries.keys() == saved.keys()
    product, total, many = Delta.lora(tmp_path)["a.weight"], torch.zeros(40, 50), 300
    scaling = 2.0  # alpha 16, rank 8
    for seed in range(many):
        pruned = dict(delta.dare(0.5, seed=seed).items())
        assert all(((t == 0) | (t == 2 * saved[n])).all() for n, t in pruned.items())
        a, b = (next(t for n, t in pruned.items() if f"lora_{side}" in n) for side in "AB")
        total += b @ a
    unbiased = total / many * scaling
    assert (unbiased - product).square().mean().sqrt() < 3 * product.square().mean().sqrt() / many**0.5
    save_file(pruned, file)
    fresh = Holder()
    optx.attach(fresh, tmp_path)
    torch.testing.assert_close(fresh(torch.eye(50)) - Holder()(torch.eye(50)), scaling * (b @ a).t())


def test_adapters_that_are_no_lora(tmp_path: Path) -> None:
    with pytest.raises(OptxError, match=r"target is 'both'; it must be 'product' or 'factors'"):
        Delta.lora(tmp_path, "both")  # type: ignore[arg-type]
    with pytest.raises(optx.FileError, match=r"no adapter_config.json that can be read"):
        Delta.lora(tmp_path)
    config = tmp_path / "adapter_config.json"
    for kind, dora in (("IA3", False), ("LORA", True)):
        config.write_text(json.dumps({"peft_type": kind, "use_dora": dora}))
        with pytest.raises(OptxError, match=f"of kind '{'DORA' if dora else 'IA3'}'; it must be LORA"):
            Delta.lora(tmp_path)
    config.write_text('{"peft_type": "LORA", "r": 2}')
    file = tmp_path / "adapter_model.safetensors"
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    for bad in ({"x.lora_A.weight": a}, {"x.lora_A.weight": a, "x.lora_B.weight": b, "head.weight": a + 1}):
        save_file(bad, file)
        with pytest.raises(OptxError, match=r"is no factor of a linear layer's LoRA. Merge"):
            Delta.lora(tmp_path)
    save_file({"fc.lora_A.weight": a, "fc.lora_B.weight": b}, file)
    with pytest.raises(
        optx.FileError, match=r"the key 'fc\.lora_[AB]\.weight'; keys must begin with 'base_model"
    ):
        Delta.lora(tmp_path)
    config.write_text('{"peft_type": "LORA", "r": 2, "target_parameters": ["experts.down_proj"]}')
    save_file(
        {
            f"base_model.model.experts.lora_{x}.weight": t
            for x, t in (("A", a.repeat(2, 1)), ("B", b.repeat(1, 2)))
        },
        file,
    )
    with pytest.raises(OptxError, match=r"target_parameters=\['experts.down_proj'\], .* a stack of experts"):
        Delta.lora(tmp_path)
