"""`optx.Delta` over sharded folders and files, and a delta's own file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import content, equal, normal, state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import optx
from optx import Delta, FileError, OptxError
from optx._safetensors import Entry
from optx.delta import _delta_file, _safetensors_writer

BF16, F32 = torch.bfloat16, torch.float32


# ---- folders and files -----------------------------------------------------------------------------------


def test_folders_give_tuned_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base, tuned = folders
    before = content(base)
    delta = Delta.between(base, tuned)
    out = delta.apply(base, tmp_path / "out")
    assert content(base) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in tmp_path.joinpath("out").iterdir()) == sorted(
        p.name for p in base.iterdir()
    )
    made, wanted = (LlamaForCausalLM.from_pretrained(folder) for folder in (out, tuned))
    assert equal(made.state_dict(), wanted.state_dict())
    tokens = torch.arange(12)[None]
    assert torch.equal(made(tokens).logits, wanted(tokens).logits)


def test_files_folders_dicts_and_modules_are_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base, tuned = folders
    models = [LlamaForCausalLM.from_pretrained(folder) for folder in folders]
    save_file({name: t.clone() for name, t in models[1].state_dict().items()}, tmp_path / "one.safetensors")
    pruned = Delta.between(base, tuned).dare(0.7)
    wanted = pruned.apply(models[0])
    for delta in (
        Delta.between(models[0], models[1]),
        Delta.between(base, tmp_path / "one.safetensors"),
        Delta.between(models[0].state_dict(), str(tuned)),
    ):
        assert equal(dict(delta.dare(0.7).items()), dict(pruned.items()))
        assert equal(delta.dare(0.7).apply(models[0]), wanted)
    file = pruned.apply(base, tmp_path / "out.safetensors")
    assert equal(load_file(file), wanted)
    single = pruned.apply(models[0], tmp_path / "folder")
    assert equal(load_file(single / "model.safetensors"), wanted)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("what", ["plain", "dare", "times", "magnitude", "sum", "scaled"])
def test_pieces_are_the_whole(what: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any) -> None:
    """Files are worked on by pieces, dicts whole; the pieces here are small and odd."""
    monkeypatch.setattr(_safetensors_writer, "PIECE", 77)
    base, tuned = state(0, dtype=dtype), state(9, dtype=dtype)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    scale = 0.3 if what == "scaled" else 1.0

    def change(old: Any, new: Any) -> Delta:
        delta = Delta.between(old, new)
        return {
            "dare": lambda: delta.dare(0.6),
            "times": lambda: 0.7 * delta.dare(0.6),
            "magnitude": lambda: delta.magnitude(0.5),
            "sum": lambda: delta + delta.dare(0.5),
        }.get(what, lambda: delta)()

    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    out = change(*paths).apply(paths[0], tmp_path / "out.safetensors", scale=scale)
    assert equal(load_file(out), change(base, tuned).apply(base, scale=scale))


def test_out_is_needed_and_must_be_new(folders: tuple[Path, Path], tmp_path: Path) -> None:
    delta = Delta.between(*folders)
    with pytest.raises(OptxError, match="base is on the disk; give out="):
        delta.apply(folders[0])
    (tmp_path / "there").mkdir()
    with pytest.raises(OptxError, match="exists already"):
        delta.apply(folders[0], tmp_path / "there")


def test_damaged_checkpoints_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[1], tmp_path / "copy"))
    shard = sorted(copy.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for data, message in (
        (whole[:-5], "is cut short or damaged"),
        (b"\x00" * 20, "is damaged"),
        (b"", "is damaged"),
    ):
        shard.write_bytes(data)
        with pytest.raises(FileError, match=message):
            Delta.between(folders[0], copy)
    shard.unlink()
    with pytest.raises(FileError, match="which is not in the folder"):
        Delta.between(folders[0], copy)


def test_a_folder_of_the_wrong_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptxError, match="not the base that the delta was taken from"):
        Delta.between(*folders).apply(folders[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_progress_sees_every_tensor(folders: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(names: Any) -> Any:
        for name in names:
            seen.append(name)
            yield name

    delta = Delta.between(*folders)
    delta.apply(folders[0], tmp_path / "out", progress=progress)
    assert sorted(seen) == sorted(delta)


# ---- a delta's own file ----------------------------------------------------------------------------------


METHODS: dict[str, Any] = {
    "whole": lambda d: d,
    "half": lambda d: d.dare(0.5),
    "dare": lambda d: d.dare(0.9),
    "extreme": lambda d: d.dare(0.999),
    "magnitude": lambda d: d.magnitude(0.97),
    "columns": lambda d: d.structural(0.9),
    "nothing": lambda d: d * 0.0,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64])
def test_saved_and_loaded(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = state(0, 3, dtype), {**state(9, 3, dtype)}
    base["scalar"], tuned["scalar"] = torch.tensor(1.0).to(dtype), torch.tensor(2.0).to(dtype)
    base["empty"] = tuned["empty"] = torch.zeros(2, 0, dtype=dtype)
    delta = METHODS[method](Delta.between(base, tuned))
    path = delta.save(tmp_path / "sub" / "d.safetensors")
    loaded = Delta.load(path)
    assert list(loaded) == list(delta)
    assert loaded.entries == delta.entries
    for name, tensor in delta.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    assert equal(loaded.apply(base), (delta * 1.0).apply(base))
    with pytest.raises(OptxError, match="not the base"):
        loaded.apply(tuned)
    assert len(load_file(path)) >= len(base)  # other programs can read it


@given(
    places=st.sets(st.integers(0, 299_999), max_size=12),
    p=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999]),
    size=st.sampled_from([1, 255, 256, 257, 70_000, 300_000]),
)
@settings(max_examples=25)
def test_gaps_of_every_size(places: set[int], p: float, size: int) -> None:
    """Codes that end a run exactly, run over their width, or never end."""
    tensor = torch.zeros(size)
    if p:
        tensor = normal(size) * (torch.rand(size, generator=torch.Generator().manual_seed(1)) >= p)
    tensor[[place for place in places if place < size]] = 7.0
    for width in (torch.uint8, torch.uint16, torch.uint32):
        form = _delta_file._Form("sparse", {})
        gaps = _delta_file._gaps(tensor)
        codes = len(gaps) + int((gaps // torch.iinfo(width).max).sum())
        form = _delta_file._Form(
            "sparse", {"w::values": Entry((len(gaps),), F32), "w::gaps": Entry((codes,), width)}
        )
        parts = _delta_file._encode("w", tensor, form)

        class Parts:
            path = Path("x")

            @staticmethod
            def read(name: str, parts: dict[str, Tensor] = parts) -> Tensor:
                return parts[name]

        back = _delta_file._decode(Parts, "w", Entry((size,), F32), "sparse")  # type: ignore[arg-type]
        assert torch.equal(back, tensor)


@pytest.mark.parametrize(("p", "bytes_each"), [(0.9, 5.01), (0.99, 5.2), (0.999, 6.1)])
def test_sparse_files_are_small(p: float, bytes_each: float, tmp_path: Path) -> None:
    delta = Delta.between({"w": torch.zeros(1000, 1000)}, {"w": normal(1000, 1000)}).dare(p)
    kept = int(delta["w"].count_nonzero())
    assert delta.save(tmp_path / "d.safetensors").stat().st_size < bytes_each * kept + 500


def test_columns_are_stored_as_a_block(tmp_path: Path) -> None:
    delta = Delta.between({"w": torch.zeros(500, 400)}, {"w": normal(500, 400)}).structural(0.95)
    parts = load_file(delta.save(tmp_path / "d.safetensors"))
    assert {name: tuple(t.shape) for name, t in parts.items()} == {
        "w::values": (500, 20),
        "w::columns": (20,),
    }


def test_save_refuses(tmp_path: Path) -> None:
    delta = Delta.between(state(0), state(1))
    delta.save(tmp_path / "d.safetensors")
    with pytest.raises(OptxError, match="exists already"):
        delta.save(tmp_path / "d.safetensors")
    with pytest.raises(OptxError, match="must end in"):
        delta.save(tmp_path / "d.pt")
    odd = {"a::gaps": torch.zeros(3)}
    with pytest.raises(OptxError, match="'a::gaps' has '::' in its name"):
        Delta.between(odd, odd).save(tmp_path / "e.safetensors")


def test_load_refuses(tmp_path: Path) -> None:
    save_file(state(0), tmp_path / "weights.safetensors")
    with pytest.raises(FileError, match="is no delta that optx saved"):
        Delta.load(tmp_path / "weights.safetensors")
    with pytest.raises(FileError, match="There is no file"):
        Delta.load(tmp_path / "nothing.safetensors")
    path = Delta.between(state(0), state(1)).dare(0.9).save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    for data, message in (
        (whole[:-1], "cut short"),
        (whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'), "has version 9; this reads 1"),
        (
            whole.replace(b'\\"form\\": \\"sparse\\"', b'\\"form\\": \\"spores\\"'),
            "is damaged: its header lacks",
        ),
    ):
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(FileError, match=message):
            Delta.load(path)
    path.write_bytes(whole[:-2000] + b"\xfe" * 2000)  # gaps that lead beyond the tensor
    with pytest.raises(FileError, match=r"the places of 'layer.\d.weight' don't fit its shape"):
        dict(Delta.load(path).items())


def test_a_delta_is_no_model(tmp_path: Path) -> None:
    """Its file has the model's own names and shapes, and would be merged or subtracted as weights."""
    base, tuned = {"w": torch.ones(9)}, {"w": torch.full((9,), 3.0)}
    save_file(base, tmp_path / "base.safetensors")
    delta = Delta.between(base, tuned)
    dense, small = delta.save(tmp_path / "dense.safetensors"), tmp_path / "small.cpf"
    optx.compress(delta).save(small)
    (tmp_path / "folder").mkdir()
    delta.save(tmp_path / "folder" / "model.safetensors")
    file = tmp_path / "base.safetensors"
    for wrong in (dense, small, tmp_path / "folder"):
        yaml = {"merge_method": "linear", "models": [{"model": str(wrong)}], "parameters": {"weight": 1}}
        for call in (
            lambda wrong=wrong: Delta.between(file, wrong),
            lambda wrong=wrong: Delta.between(wrong, file),
            lambda wrong=wrong: optx.merge(file, [wrong], optx.TaskArithmetic(), tmp_path / "out"),
            lambda wrong=wrong: optx.merge(wrong, [file], optx.TaskArithmetic(), tmp_path / "out"),
            lambda wrong=wrong: delta.unbound().apply(wrong, tmp_path / "out"),
            lambda yaml=yaml: optx.merge_yaml(yaml, tmp_path / "out"),
        ):
            with pytest.raises(optx.FileError, match=r"delta.*pen it with optx.Delta.load"):
                call()
    assert not (tmp_path / "out").exists()
    assert torch.equal(optx.merge(base, [Delta.load(dense)], optx.TaskArithmetic(lam=1.0))["w"], tuned["w"])
