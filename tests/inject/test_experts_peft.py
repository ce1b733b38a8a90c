"""LoRA on experts beside PEFT's ``target_parameters``: files both ways, outputs, gradients, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import (
    assert_close,
    assert_refused,
    by_peft,
    config_in,
    edit_config,
    ids,
    in_peft,
    llama,
    outputs,
    peft_talk,
    rewrite,
    shake,
    tensors_in,
)
from expert_models import BOTH, FAMILIES, ONE_PARAMETER, moe

import optx

pytestmark = ONE_PARAMETER

# What PEFT is asked for: parameters, modules, and other options.
CONFIGS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "gate and up": {"target_parameters": ["experts.gate_up_proj"], "use_rslora": True},
    "down": {"target_parameters": ["mlp.experts.down_proj"], "lora_alpha": 5},
    "with attention": {"target_parameters": BOTH, "target_modules": ["q_proj", "v_proj"]},
    "other ranks": {
        "target_parameters": BOTH,
        "rank_pattern": {"gate_up_proj": 2},
        "alpha_pattern": {r"layers\.0.*experts\.down_proj": 5},
    },
    "a rank above the matrix's": {"target_parameters": ["experts.down_proj"], "r": 20},
    "the router": {"target_parameters": ["gate.weight", "experts.down_proj"], "target_modules": ["k_proj"]},
}


def config(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False, **options}
    )


def gradients(adapted: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in adapted.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("case", CONFIGS)
def test_files_both_ways(case: str, family: str, tmp_path: Path) -> None:
    theirs = by_peft(moe(family), config(**CONFIGS[case]), tmp_path / "theirs")
    wanted = outputs(theirs)
    model = moe(family)
    assert not torch.allclose(outputs(model), wanted, atol=1e-3)
    handle = optx.attach(model, tmp_path / "theirs")
    assert_close(outputs(model), wanted, 1e-6)
    handle.save(tmp_path / "ours")
    assert_close(outputs(in_peft(moe(family), tmp_path / "ours")), wanted, 1e-6)
    assert tensors_in(tmp_path / "ours").keys() == tensors_in(tmp_path / "theirs").keys()
    again = moe(family)
    optx.attach(again, tmp_path / "ours")
    assert torch.equal(outputs(again), outputs(model))
    other = moe(family)
    rewrite(tmp_path / "ours", tensors_in(tmp_path / "ours"))
    optx.attach(other, tmp_path / "ours")
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("Mixtral", "Qwen3Moe")])
def test_other_families(family: str, tmp_path: Path) -> None:
    handle = optx.attach(model := moe(family), optx.LoRA(rank=2), targets=[*BOTH, "o_proj"])
    shake(handle.parameters(), by=0.3)
    handle.save(tmp_path)
    assert_close(outputs(in_peft(moe(family), tmp_path)), outputs(model), 1e-6)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_training_is_pefts(implementation: str, tmp_path: Path) -> None:
    """From the same start, with the same batch: losses of ten steps."""
    import peft

    handle = optx.attach(model := moe("Qwen3Moe", implementation), optx.LoRA(rank=2), targets=BOTH)
    shake(handle.parameters(), by=0.3)
    handle.save(tmp_path)
    with peft_talk():
        other = peft.PeftModel.from_pretrained(
            moe("Qwen3Moe", implementation), tmp_path, is_trainable=True
        ).eval()
    losses = []
    trained = [p for p in other.parameters() if p.requires_grad]
    for one, parameters in ((model, handle.parameters()), (other, trained)):
        opt, own = torch.optim.SGD(parameters, lr=3.0), []
        for _ in range(10):
            loss = one(ids(), labels=ids()).loss
            loss.backward()
            own.append(loss.detach())
            opt.step()
            opt.zero_grad()
        losses.append(torch.stack(own))
    assert losses[0][-1] < losses[0][0] - 0.02
    assert_close(*losses, 1e-5)


def test_gradients_are_pefts(tmp_path: Path) -> None:
    theirs = by_peft(moe(), config(**CONFIGS["with attention"]), tmp_path)
    handle = optx.attach(model := moe(), tmp_path)
    for one in (theirs, model):
        one(ids()).logits.square().sum().backward()
    wanted = gradients(theirs)
    checked = 0
    for one in handle.served:
        suffixes = one.part.suffixes()
        for name, p in one.part.named_parameters():
            torch.testing.assert_close(p.grad, wanted[f"{one.path}.{suffixes[name]}"], rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked == 16


def test_what_is_written(tmp_path: Path) -> None:
    handle = optx.attach(moe(num_hidden_layers=1), optx.LoRA(rank=2, alpha=4), targets=[*BOTH, "q_proj"])
    handle.save(tmp_path)
    experts = "model.layers.0.mlp.experts"
    assert config_in(tmp_path)["target_parameters"] == [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    assert config_in(tmp_path)["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    found = {key: tuple(t.shape) for key, t in tensors_in(tmp_path).items() if "experts" in key}
    assert found == {
        f"base_model.model.{experts}.base_layer.lora_A.weight": (8, 16),
        f"base_model.model.{experts}.base_layer.lora_B.weight": (48, 8),
        f"base_model.model.{experts}.lora_A.weight": (8, 24),
        f"base_model.model.{experts}.lora_B.weight": (16, 8),
    }


def test_a_handle_loads_what_it_saved(tmp_path: Path) -> None:
    handle = optx.attach(model := moe(), optx.LoRA(rank=2), targets=BOTH)
    shake(handle.parameters(), by=0.3)
    wanted = outputs(model)
    handle.save(tmp_path)
    shake(handle.parameters(), by=0.3, seed=8)
    handle.load(tmp_path)
    assert torch.equal(outputs(model), wanted)
    narrower = optx.attach(moe(), optx.LoRA(rank=2), targets=["experts.down_proj"])
    with pytest.raises(optx.FileError, match="has no place in this model"):
        narrower.load(tmp_path)


def test_in_optx_own_format_where_peft_would_do_something_else(tmp_path: Path) -> None:
    """A single expert whose matrix is (in, out): PEFT adds an update of (out, in) to it."""
    one_expert = {"num_local_experts": 1, "num_experts_per_tok": 1}
    handle = optx.attach(model := moe("GptOss", **one_expert), optx.LoRA(rank=2), targets=BOTH)
    shake(handle.parameters(), by=0.3)
    with pytest.warns(UserWarning, match="does not serve a single transposed expert"):
        handle.save(tmp_path)
    optx.attach(other := moe("GptOss", **one_expert), tmp_path)
    assert torch.equal(outputs(other), outputs(model))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    by_peft(moe(), config(target_parameters=BOTH), tmp_path)
    tensors = tensors_in(tmp_path)
    experts = "base_model.model.model.layers.1.mlp.experts"
    extra = {f"{experts}.base_layer.base_layer.lora_A.weight": torch.zeros(12, 16)}

    def without(start: str) -> dict[str, torch.Tensor]:
        return {key: t for key, t in tensors.items() if not key.startswith(f"{experts}.{start}")}

    assert_refused(tmp_path, r"no parameter 'experts\.down_proj'", llama())
    assert_refused(tmp_path, r"has shape \(12, 16\), the model needs \(6, 16\)", moe(num_local_experts=2))
    rewrite(tmp_path, without("base_layer"))
    assert_refused(tmp_path, r"no tensors at '.*1\.mlp\.experts\.base_layer', where .*gate_up_proj'", moe())
    rewrite(tmp_path, without("lora_B"))
    assert_refused(tmp_path, r"1\.mlp\.experts\.lora_B\.weight' is missing", moe())
    rewrite(tmp_path, {**tensors, **extra})
    assert_refused(tmp_path, r"base_layer\.base_layer", moe())
    rewrite(tmp_path, tensors)
    edit_config(tmp_path, target_parameters=["experts.down_proj"])
    assert_refused(tmp_path, r"experts\.base_layer", moe())
    edit_config(tmp_path, target_parameters={"experts.down_proj": 1})
    assert_refused(tmp_path, "must be a list of names", moe())
    edit_config(tmp_path, target_parameters=[*BOTH, "q_proj.weight"])
    assert_refused(tmp_path, "target_parameters=.*weight of a Linear", moe())


def test_a_file_of_transformers_4(tmp_path: Path) -> None:
    """Each expert was a module there."""
    by_peft(moe(), config(target_modules=["q_proj"]), tmp_path)
    old = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    more = {f"{old}.lora_A.weight": torch.zeros(3, 16), f"{old}.lora_B.weight": torch.zeros(24, 3)}
    rewrite(tmp_path, {**tensors_in(tmp_path), **more})
    edit_config(tmp_path, target_modules=["q_proj", "w1"])
    assert_refused(tmp_path, "trained with transformers 4, where each expert was a module", moe())


def as_before(folder: Path, version: str | None, **sizes: Any) -> tuple[Any, torch.Tensor]:
    """A file as PEFT wrote it before 0.19.1, with a bare model and the logits that it gave there."""
    by_peft(moe(**sizes), config(target_parameters=BOTH), folder)
    model, tensors, weights = moe(**sizes), {}, {}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for name, place in (("gate_up_proj", "base_layer."), ("down_proj", "")):
            W = model.get_parameter(f"{experts}.{name}").detach()
            A, B = 0.3 * torch.randn(12, W.shape[1]), 0.3 * torch.randn(W.shape[2], 12)
            tensors[f"base_model.model.{experts}.{place}lora_A.weight"] = A
            tensors[f"base_model.model.{experts}.{place}lora_B.weight"] = B
            delta = torch.einsum("ore,eri->eio", B.view(-1, 3, 4), A.view(4, 3, -1))
            weights[f"{experts}.{name}"] = W + 2 * delta
    rewrite(folder, tensors)
    edit_config(folder, peft_version=version)
    return model, torch.func.functional_call(model, weights, (ids(),)).logits.detach()


@pytest.mark.parametrize(
    ("version", "width"), [("0.18.1", 24), ("0.18.1", 8), ("0.17.0", 16), (None, 24), ("0.20.0", 24)]
)
def test_files_of_older_versions_of_peft(version: str | None, width: int, tmp_path: Path) -> None:
    """Their A has the rows' size and their B the columns'; of width 8 or 16, one of both is square."""
    model, wanted = as_before(tmp_path, version, intermediate_size=width)
    optx.attach(model, tmp_path)
    assert_close(outputs(model), wanted, 1e-5)


@pytest.mark.parametrize("version", [None, "0.19.0"])
def test_square_matrices_of_a_version_that_is_not_known(version: str | None, tmp_path: Path) -> None:
    model, _ = as_before(tmp_path, version, intermediate_size=8)
    assert_refused(
        tmp_path, rf"gate_up_proj', whose matrices are square, and peft_version={version!r}", model
    )


def test_square_matrices_both_ways(tmp_path: Path) -> None:
    theirs = by_peft(moe(intermediate_size=16), config(target_parameters=BOTH), tmp_path / "theirs")
    handle = optx.attach(model := moe(intermediate_size=16), tmp_path / "theirs")
    assert_close(outputs(model), outputs(theirs), 1e-6)
    handle.save(tmp_path / "ours")
    rewrite(tmp_path / "ours", tensors_in(tmp_path / "ours"))
    optx.attach(again := moe(intermediate_size=16), tmp_path / "ours")
    assert torch.equal(outputs(again), outputs(model))
