"""`optx.prune` on checkpoints: files, folders of shards, state dicts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import bert, gpt2, ids, llama
from family_models import BY_LABEL
from safetensors.torch import load_file, save_file
from torch import Tensor

import optx
from optx import FileError, Magnitude, Masks, OptxError, ShapeError
from optx.delta._safetensors_writer import Writer
from optx.pruning._folder import prune_folder


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layers(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "embed.weight": drawn(9, 8, seed=1, dtype=dtype),
        "layers.0.norm.weight": torch.ones(8, dtype=dtype),
        "layers.0.up.weight": drawn(16, 8, seed=2, dtype=dtype),
        "layers.1.down.weight": drawn(8, 16, seed=3, dtype=dtype),
        "layers.1.down.bias": torch.zeros(8, dtype=dtype),
        "lm_head.weight": drawn(9, 8, seed=4, dtype=dtype),
    }


CHOSEN = ["layers.0.up.weight", "layers.1.down.weight"]


def in_folder(model: Any, folder: Path, shards: str = "4KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "tokenizer.json").write_text("{}")
    return folder


METHODS = [Magnitude(0.3), Magnitude(pattern="2:4"), Magnitude(0.6, granularity="row")]

# ---- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_file_is_pruned_into_another(dtype: torch.dtype, method: Magnitude, tmp_path: Path) -> None:
    state, out = layers(dtype), tmp_path / "out.safetensors"
    save_file(state, tmp_path / "in.safetensors", metadata={"format": "pt"})
    masks = optx.prune(tmp_path / "in.safetensors", method, out=out)
    made = load_file(out)
    assert list(masks) == CHOSEN
    for name, tensor in state.items():
        assert made[name].dtype == dtype
        assert torch.equal(made[name], tensor * masks[name] if name in masks else tensor), name
        if name in masks:
            wide = tensor.to(torch.promote_types(dtype, torch.float32))
            assert torch.equal(masks[name], method.prune_matrix(wide)[0])
    assert Masks.of(out) == masks
    assert load_file(tmp_path / "in.safetensors").keys() == state.keys()


@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", [Magnitude(0.5), Magnitude(pattern="2:4")], ids=["half", "2:4"])
def test_a_folder_is_pruned_as_the_model_is(make: Any, method: Magnitude, tmp_path: Path) -> None:
    """Also GPT-2's, whose inputs run along the first dimension, which its files don't say."""
    source, out = in_folder(make().to(torch.bfloat16), tmp_path / "in"), tmp_path / "out"
    model = type(make()).from_pretrained(source, dtype=torch.bfloat16)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    masks = optx.prune(source, method, out=out)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in out.iterdir()) == sorted(before)
    again = type(model).from_pretrained(out, dtype=torch.bfloat16)
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (source, out)]
    assert maps[0] == maps[1]
    inside = r"(.*\.)?(layers?|h)\..*"
    assert optx.prune(model, method, targets=inside) == masks
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    masks.verify(again)
    assert torch.equal(model(ids()).logits, again(ids()).logits)
    if method.pattern:
        told = {row.pattern for row in masks.report().rows}
        assert told == {"2:4 by columns" if make is gpt2 else "2:4"}


def test_a_state_dict_in_place_or_into_a_file(tmp_path: Path) -> None:
    state = layers()
    old = {name: tensor.clone() for name, tensor in state.items()}
    masks = optx.prune(state, Magnitude(0.5), out=tmp_path / "out.safetensors")
    assert all(torch.equal(state[name], old[name]) for name in old)
    assert optx.prune(state, Magnitude(0.5)) == masks
    made = load_file(tmp_path / "out.safetensors")
    for name in old:
        assert torch.equal(state[name], old[name] * masks[name] if name in masks else old[name])
        assert torch.equal(state[name], made[name])


def test_targets_and_exclude(tmp_path: Path) -> None:
    assert list(optx.prune(layers(), Magnitude(), targets="embed|lm_head")) == [
        "embed.weight",
        "lm_head.weight",
    ]
    assert list(optx.prune(layers(), Magnitude(), exclude=["up"])) == CHOSEN[1:]
    assert list(optx.prune(layers(), Magnitude(), exclude=r".*\.up")) == CHOSEN[1:]
    assert list(optx.prune({"weight": drawn(4, 4)}, Magnitude(), targets="")) == ["weight"]


def test_tied_heads_and_tables_are_left_out() -> None:
    state = {**layers(), "layers.0.attn.relative_attention_bias.weight": drawn(4, 4)}
    state["lm_head.weight"] = state["embed.weight"]
    assert list(optx.prune(state, Magnitude())) == CHOSEN


def test_stacks_of_experts_are_left_by_one_who_knows() -> None:
    state = {**layers(), "layers.0.experts.up_proj": drawn(2, 4, 4), "layers.0.gate.weight": drawn(2, 8)}
    refused(state, r"'layers.0.experts.up_proj' .* a stack of experts in one tensor \(1 in all\)")
    assert list(optx.prune(state, Magnitude(), targets=r".*\.(up|down)")) == CHOSEN
    del state["layers.0.experts.up_proj"]
    assert list(optx.prune(state, Magnitude())) == CHOSEN


@pytest.mark.parametrize("label", ["GPT-Neo", "DeBERTa-v2", "T5", "Mamba", "ViT"])
def test_names_and_shapes_tell_what_modules_do(label: str) -> None:
    """Of all of the families, in one pass by hand; here of those that have something odd."""
    model = BY_LABEL[label].make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = Magnitude(0.4, granularity="row")
    assert optx.prune(state, method) == optx.prune(model, method)


# ---- which axis runs over inputs --------------------------------------------------------------------------


def conv1d(*shape: int) -> dict[str, Tensor]:
    return {"weight": drawn(*shape), "bias": torch.zeros(shape[1])}


def test_square_ones_are_as_others_of_their_name() -> None:
    """Of GPT-2's two c_proj one is square; its bias says nothing, the other's does."""
    parts = {
        "h.0.attn.c_proj": conv1d(8, 8),
        "h.0.mlp.c_proj": conv1d(16, 8),
        "h.0.q": {"weight": drawn(8, 8)},
    }
    state = {f"{path}.{name}": t for path, part in parts.items() for name, t in part.items()}
    state["h.1.up.weight"], state["h.1.up.bias"] = drawn(16, 8), torch.zeros(16)
    state["h.2.up.weight"], state["h.2.up.bias"] = drawn(16, 8), torch.zeros(16)
    told = {row.name: row.pattern for row in optx.prune(state, Magnitude(pattern="2:4")).report().rows}
    assert told == {
        "h.0.attn.c_proj.weight": "2:4 by columns",
        "h.0.mlp.c_proj.weight": "2:4 by columns",
        "h.0.q.weight": "2:4",
        "h.1.up.weight": "2:4",
        "h.2.up.weight": "2:4",
    }


# ---- what is refused, before anything is written ----------------------------------------------------------


def refused(target: Any, message: str, method: Magnitude | None = None, **options: Any) -> None:
    with pytest.raises(OptxError, match=message):
        optx.prune(target, method or Magnitude(), **options)


def test_what_is_refused(tmp_path: Path) -> None:
    save_file(layers(), tmp_path / "in.safetensors")
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    refused(source, "target is on the disk; give out=")
    refused(source, "doesn't divide", Magnitude(pattern="2:5"), out=out)
    refused(source, "no matrix that matches 'x'", targets="x", out=out)
    refused(source, "is not a regular expression", exclude="(", out=out)
    refused(source, "exclude='norm' leaves nothing out of", exclude="norm", out=out)
    refused(source, "exclude has 'upp'", exclude=["up", "upp"], out=out)
    refused(source, "is not a regular expression", targets="(", out=out)
    refused({"fc.weight": drawn(4, 4)}, r"no matrix in numbered blocks .*Near: 'fc'")
    refused(tmp_path / "x.bin", "is a pickle", out=out)
    refused(tmp_path / "none", "there is no file or folder", out=out)
    refused(source, "exists", out=source)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_numbers_that_can_not_be_ranked(odd: float, tmp_path: Path) -> None:
    state = layers()
    state[CHOSEN[1]][0, 0] = odd
    before = state[CHOSEN[0]].clone()
    refused(state, "'layers.1.down.weight' has inf or nan")
    assert torch.equal(state[CHOSEN[0]], before)
    refused(state, "'layers.1.down.weight' has inf or nan", out=tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_quantised_checkpoints_are_refused_by_name() -> None:
    codes = {"layers.2.up.weight": torch.zeros(4, 4, dtype=torch.int8), "layers.2.up.scale": torch.ones(4)}
    refused({**layers(), **codes}, r"'layers.2.up.weight' .* scaled 8-bit")
    refused({**layers(), "layers.2.qweight": torch.zeros(4, 4).int()}, "GPTQ's or AWQ's")
    refused({**layers(), "x": torch.eye(4).to(torch.float8_e4m3fn)}, "'x' .* float8")
    refused({**layers(), "layers.2.up.weight": torch.empty(4, 4, device="meta")}, "on the meta device")
    table = {**layers(), "layers.2.index.weight": torch.arange(16).view(4, 4)}
    refused(table, "'layers.2.index.weight' .* is torch.int64, codes or a table")
    assert set(optx.prune(table, Magnitude(), exclude="layers.2.index")) == set(CHOSEN)


def test_methods_that_need_inputs_need_a_model() -> None:
    class Needs(Magnitude):
        needs_inputs = True

    refused(layers(), "Needs needs the inputs of layers, which a checkpoint hasn't got", Needs())


# ---- killed, and called again -----------------------------------------------------------------------------


def stopping(after: int) -> Any:
    def progress(names: Iterable[str]) -> Iterator[str]:
        for i, name in enumerate(names):
            if i == after:
                raise KeyboardInterrupt
            yield name

    return progress


def test_killed_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "FLUSH", 1)  # each tensor is safe at once
    source, out = in_folder(llama(), tmp_path / "in"), tmp_path / "out"
    whole = optx.prune(source, Magnitude(0.5), out=tmp_path / "whole")
    options: dict[str, Any] = {"targets": None, "exclude": None}
    for after in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, Magnitude(0.5), out=out, progress=stopping(after), **options)
        assert not out.exists()
    assert len(list(tmp_path.iterdir())) > 2
    written: list[str] = []

    def noted(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            written.append(name)
            yield name

    assert prune_folder(source, Magnitude(0.5), out=out, progress=noted, **options) == whole
    assert 0 < len(written) < len(llama().state_dict()) - 1
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize("what", ["method", "targets", "source"])
def test_killed_another_call_takes_nothing_of_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "FLUSH", 1)
    source, out = in_folder(llama(), tmp_path / "in"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, Magnitude(), targets=None, exclude=None, out=out, progress=stopping(4))
    method = Magnitude(0.25) if what == "method" else Magnitude()
    targets = ".*(q|v)_proj" if what == "targets" else None
    if what == "source":
        other = llama()
        with torch.no_grad():
            for p in other.parameters():
                p.neg_().add_(0.01)
        shutil.rmtree(source)
        in_folder(other, source)
    fresh = optx.prune(source, method, targets=targets, out=tmp_path / "fresh")
    assert optx.prune(source, method, targets=targets, out=out) == fresh
    for path in (tmp_path / "fresh").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_forged_folders(tmp_path: Path) -> None:
    in_folder(llama(), tmp_path / "in")
    index = tmp_path / "in" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    for name in ("../x.safetensors", "none.safetensors", 3):
        index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], "a.weight": name}}))
        with pytest.raises(FileError):
            optx.prune(tmp_path / "in", Magnitude(), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(ShapeError):
        optx.prune(layers(), Magnitude(pattern="1:3"))
