"""Masks on models and checkpoints: found, set and looked at."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import gpt2, ids, llama, peft_talk
from safetensors.torch import save_file
from torch import Tensor, nn

import optx
from optx import FileError, Masks, OptxError, ShapeError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def pruned(model: nn.Module | None = None) -> tuple[Any, Masks]:
    model = net() if model is None else model
    return model, optx.prune(model, optx.Magnitude(0.5))


def copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- where weights are 0 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_of_is_what_was_pruned(dtype: torch.dtype, tmp_path: Path) -> None:
    model, masks = pruned(net().to(dtype))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for source in (model, model.state_dict(), tmp_path / "model.safetensors", str(tmp_path)):
        assert Masks.of(source) == masks
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]


def test_zeros_that_were_not_pruned_are_no_mask() -> None:
    """Biases and norms may start at 0, adapters too; a row of padding and a few zeros are in dense models."""
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(200, 8, padding_idx=0),
            "proj": nn.Linear(8, 8),
            "zero": nn.Linear(8, 8),
            "conv": nn.Conv2d(2, 4, 3),
        }
    )
    nn.init.zeros_(model["zero"].weight)
    nn.init.zeros_(model["proj"].bias)
    with pytest.raises(OptxError, match=r"not pruned: of 4 .* at least 0.01 \(but for 1 .*'zero.weight'\)"):
        Masks.of(model)
    masks = optx.prune(model, optx.Magnitude(0.25), targets="proj|conv")
    with pytest.warns(UserWarning, match="1 weights have nothing but zeros, .*: 'zero.weight'"):
        assert Masks.of(model) == masks
    assert list(Masks.of(model, min_sparsity=0.3, names=".*weight")) == [*model_weights(model)]
    with pytest.warns(UserWarning, match="nothing but zeros"):
        assert "words.weight" in Masks.of(model, min_sparsity=0.001)


def model_weights(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("weight")]


def test_weights_that_are_named() -> None:
    model, _ = pruned()
    nn.init.zeros_(model[4].bias)
    assert list(Masks.of(model, ["4.bias", "0.weight"])) == ["4.bias", "0.weight"]
    assert list(Masks.of(model, r"[04]\.(weight|bias)")) == ["0.weight", "4.weight", "4.bias"]
    with pytest.raises(OptxError, match=r"'0.bias' in the Sequential has no weight that is 0"):
        Masks.of(model, ["0.weight", "0.bias"])
    with pytest.raises(OptxError, match=r"the Sequential has no weight '0.wight'. Near: '0.weight'"):
        Masks.of(model, ["0.wight"])
    with pytest.raises(OptxError, match=r"names='9' matches no weight"):
        Masks.of(model, "9")
    with pytest.raises(OptxError, match=r"names='\(' is not a regular expression"):
        Masks.of(model, "(")
    with pytest.raises(OptxError, match=r"is not pruned: of 1 weights none"):
        Masks.of(model, r"0\.bias")
    with pytest.raises(OptxError, match="min_sparsity is 2"):
        Masks.of(model, min_sparsity=2)


def test_buffers_of_checkpoints_are_no_weights() -> None:
    """GPT-2's first checkpoints have the triangle of attention in float32."""
    model, masks = pruned()
    state = {
        **model.state_dict(),
        "h.0.attn.bias": torch.ones(1, 1, 9, 9).tril(),
        "ids": torch.zeros(1, 9).long(),
    }
    assert Masks.of(state) == masks


def test_minus_zero_is_zero() -> None:
    masks = Masks.of({"weight": torch.tensor([[-0.0, 1.0], [0.0, -1.0]])})
    assert masks["weight"].tolist() == [[False, True], [False, True]]


# ---- on a model -------------------------------------------------------------------------------------------


def test_apply_sets_what_is_masked_and_nothing_else() -> None:
    _, masks = pruned()
    model = net()
    before, places = copies(model), [(id(p), p.data_ptr()) for p in model.parameters()]
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = torch.nan  # and not nan times 0
    version = model[0].weight._version
    masks.apply_(model)
    assert model[0].weight._version > version
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, old * masks[name] if name in masks else old)
        assert p.requires_grad
        assert p.is_leaf
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == places  # an optimizer's are these
    masks.verify(model)


def test_verify_names_what_grew() -> None:
    model, masks = pruned()
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = 1e-30
        model[4].weight[~masks["4.weight"]] = torch.nan
    with pytest.raises(OptxError) as told:
        masks.verify(model)
    grown = "88 masked weights are not 0, in 2 of 3: '0.weight' (64 of 64), '4.weight' (24 of 24)."
    assert grown in str(told.value)
    assert "masks.apply_(model)" in str(told.value)
    masks.apply_(model)
    masks.verify(model)


@pytest.mark.parametrize("what", ["apply_", "verify", "parameters_of"])
def test_masks_of_another_model_change_nothing(what: str) -> None:
    model, before = net(), copies(net())
    good = pruned()[1]
    more = Masks.from_bool({**good, "5.weight": torch.zeros(3, 3).bool()})
    with pytest.raises(
        OptxError, match=rf"Masks.{what}: .* a Sequential, has no parameter '5.weight'. Near:"
    ):
        getattr(more, what)(model)
    turned = Masks.from_bool({**good, "0.weight": good["0.weight"].t()})
    with pytest.raises(ShapeError, match=r"'0.weight' has shape \(16, 8\), and its mask is of \(8, 16\)"):
        getattr(turned, what)(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_they_remember_the_model_but_do_not_hold_it() -> None:
    model, masks = pruned()
    assert masks.model is model
    again = Masks.from_bool(masks)
    assert again.model is None
    again.apply_(model)
    assert again.model is model
    assert Masks.of(model).model is model
    del model
    gc.collect()
    assert masks.model is None


def test_tied_weights_are_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    masks = Masks.from_bool({"a.weight": torch.randn(8, 8) > 0})
    masks.apply_(model)
    assert list(Masks.of(model)) == ["a.weight"]
    other = Masks.from_bool({"b.weight": masks["a.weight"]})
    other.verify(model)
    assert other.parameters_of(model)["b.weight"] is model["a"].weight
    both = Masks.from_bool({"a.weight": masks["a.weight"], "b.weight": ~masks["a.weight"]})
    before = model["a"].weight.clone()
    with pytest.raises(
        OptxError, match=r"'a.weight' and 'b.weight' are one weight here, and their masks are two"
    ):
        both.apply_(model)
    assert torch.equal(model["a"].weight, before)
    Masks.from_bool({"a.weight": masks["a.weight"], "b.weight": masks["a.weight"]}).apply_(model)


def test_a_compiled_model_has_the_same_names() -> None:
    model, masks = pruned()
    compiled = torch.compile(model)
    masks.verify(compiled)
    assert Masks.of(compiled) == masks
    parallel = nn.DataParallel(net())
    masks.apply_(parallel)
    for wrapped in (compiled, parallel, torch.compile(parallel)):
        there = Masks.of(wrapped.state_dict())  # their names have what wraps the model
        assert list(there) != list(masks)
        for one in (wrapped, model):
            there.verify(one)


# ---- what has no numbers ----------------------------------------------------------------------------------


def test_weights_without_numbers_are_refused_by_name() -> None:
    model, masks = pruned()
    with pytest.raises(OptxError, match=r"Masks.of: '0.weight' is on the meta device"):
        Masks.of(model.to("meta"))
    with pytest.raises(OptxError, match=r"Masks.apply_: '0.weight' is on the meta device"):
        masks.apply_(model)
    partitioned = nn.Linear(4, 4, bias=False)
    partitioned.weight.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]  # as ZeRO-3 marks its parameters
    with pytest.raises(OptxError, match=r"Masks.of: 'weight' is partitioned by DeepSpeed"):
        Masks.of(partitioned)
    with pytest.raises(OptxError, match=r"Masks.of: 'a' is sparse_coo"):
        Masks.of({"a": torch.eye(3).to_sparse()}, "a")
    for kind in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(OptxError, match=r"Masks.of: 'a.weight' is torch.\w+, codes"):
            Masks.of({"a.weight": torch.eye(3).to(kind)})
    with pytest.raises(OptxError, match=r"Masks.of: 'a' is torch.float8_e4m3fn, codes"):
        Masks.of({"a": torch.eye(3).to(torch.float8_e4m3fn)}, "a")
    codes = {"x.weight": torch.zeros(4, 4, dtype=torch.int8), "x.scale": torch.ones(4)}
    with pytest.raises(OptxError, match=r"'x.weight' in the state dict belongs to scaled 8-bit"):
        Masks.of(codes)


def test_quantised_modules_are_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, masks = pruned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for call in (masks.apply_, masks.verify, Masks.of):
        with pytest.raises(OptxError, match=r"'0.weight' is a \w+, quantised or wrapped"):
            call(model)


def test_torchs_own_pruning_is_told_what_to_do() -> None:
    from torch.nn.utils import prune

    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    mask = model[0].weight_mask.bool()
    with pytest.raises(OptxError, match=r"Masks.of: '0.weight' is pruned by torch.nn.utils.prune"):
        Masks.of(model)
    with pytest.raises(OptxError, match=r"Masks.verify: '0.weight' is pruned by torch.nn.utils.prune"):
        Masks.from_bool({"0.weight": mask}).verify(model)
    prune.remove(model[0], "weight")
    assert torch.equal(Masks.of(model)["0.weight"], mask)


@pytest.mark.parametrize("odd", [3, None, [torch.ones(3)]])
def test_what_is_no_model(odd: Any) -> None:
    with pytest.raises(OptxError, match=r"Masks.of: pruned is a"):
        Masks.of(odd)
    with pytest.raises(OptxError, match=r"Masks.of: 'a' is a "):
        Masks.of({"a": odd})


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no file or folder"):
        Masks.of(tmp_path / "none")
    with pytest.raises(FileError, match=r"has no \*.safetensors file"):
        Masks.of(tmp_path)
    with pytest.raises(FileError, match="is a pickle"):
        Masks.of(tmp_path / "x.bin")
    for name in ("a", "b"):
        save_file({"w.weight": torch.eye(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileError, match=r"'w.weight' is in two files"):
        Masks.of(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    index = {"weight_map": {"w.weight": "a.safetensors", "v.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match=r"lacks|v\.weight|b\.safetensors"):  # its zeros would not be seen
        Masks.of(tmp_path, ".*")


# ---- with adapters, and with heads ------------------------------------------------------------------------


def test_an_adapter_is_looked_at_once_it_is_merged() -> None:
    model, masks = pruned(llama())
    handle = optx.attach(model, optx.LoRA(rank=2), targets=r".*q_proj")
    with torch.no_grad():
        for p in handle.parameters():
            p.fill_(0.1)
    masks.verify(model)
    assert Masks.of(model) == masks
    assert len(masks.parameters_of(model)) == len(masks)
    handle.merge()
    with pytest.raises(OptxError, match=r"not 0, in 2 of 14: 'model.layers.0.self_attn.q_proj.weight'"):
        masks.verify(model)
    handle.remove()
    masks.verify(model)


def test_names_are_the_same_in_peft() -> None:
    peft = pytest.importorskip("peft")
    model, masks = pruned(llama())
    with peft_talk():
        inside = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"], r=2)
        )
    for one in (inside, model):
        masks.verify(one)
        assert Masks.of(one) == masks
    with torch.no_grad():
        inside.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.fill_(1)
    with pytest.raises(OptxError, match=r"not 0, in 1 of 14: 'model.layers.0.self_attn.q_proj.weight'"):
        masks.verify(inside)


def test_a_models_own_prefix_may_lack() -> None:
    """A checkpoint of GPT2Model has h.0...; with a head they are transformer.h.0...."""
    model = gpt2()
    masks = optx.prune(model, optx.Magnitude(0.5))
    bare = Masks.from_bool({name.removeprefix("transformer."): mask for name, mask in masks.items()})
    assert list(bare) != list(masks)
    bare.verify(model)
    masks.verify(model.transformer)
    bare.apply_(gpt2())
    with pytest.raises(OptxError, match="masks of another model"):
        Masks.from_bool({f"x.{name}": mask for name, mask in masks.items()}).verify(model)
    model(ids())
