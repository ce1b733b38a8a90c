"""Which files of a folder are its model: transformers' order, folders below, and what leads out of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import llama
from delta_cases import content, equal
from safetensors.torch import load_file, save_file

from optx import Delta, FileError
from optx._safetensors import Reader, shards
from optx.delta._checkpoint_source import Files

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


def w(folder: Path, file: str, value: float) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((2,), value)}, folder / file)


def index(folder: Path, where: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def read(folder: Path) -> float:
    return float(Files(folder).read("w")[0])


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """stale_index.py"""
    w(tmp_path, SHARD, 0.0)
    index(tmp_path, {"w": SHARD})
    assert read(tmp_path) == 0.0
    w(tmp_path, "model.safetensors", 1.0)
    assert read(tmp_path) == 1.0
    (tmp_path / SHARD).unlink()
    made = Delta.between(tmp_path, {"w": torch.zeros(2)}).apply(tmp_path, tmp_path / "out")
    assert sorted(p.name for p in Path(str(made)).iterdir()) == ["model.safetensors"]


def test_the_order_is_that_of_transformers(tmp_path: Path) -> None:
    """A small Llama in every place at once: as many are taken away as are found."""
    from transformers import LlamaForCausalLM

    models = {"named.safetensors": 3.0, "model.safetensors": 2.0, INDEX: 1.0}
    for number in models.values():
        model = llama()
        torch.nn.init.constant_(model.model.norm.weight, number)
        model.save_pretrained(tmp_path / f"{number}", max_shard_size="20KB" if number == 1 else "1GB")
    place = Path(shutil.copytree(tmp_path / "1.0", tmp_path / "all"))
    for name, number in list(models.items())[:2]:
        shutil.copyfile(tmp_path / f"{number}" / "model.safetensors", place / name)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "transformers_weights": "named.safetensors"}))
    for name, number in models.items():
        theirs = LlamaForCausalLM.from_pretrained(place)
        assert float(theirs.model.norm.weight.detach()[0]) == number
        assert float(Files(place).read("model.norm.weight")[0]) == number
        (place / name).unlink()
        (place / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["model.fp16", "diffusion_pytorch_model", "adapter_model"])
def test_other_names_follow_the_same_rule(name: str, tmp_path: Path) -> None:
    w(tmp_path, "a-1.safetensors", 0.0)
    index(tmp_path, {"w": "a-1.safetensors"}, f"{name}.safetensors.index.json")
    assert read(tmp_path) == 0.0
    w(tmp_path, f"{name}.safetensors", 1.0)
    assert read(tmp_path) == 1.0


def test_consolidated_weights_beside_an_index_are_not_read_twice(tmp_path: Path) -> None:
    w(tmp_path, SHARD, 0.0)
    w(tmp_path, "consolidated.safetensors", 5.0)
    index(tmp_path, {"w": SHARD})
    assert read(tmp_path) == 0.0


def test_without_an_index_all_files_are_read_but_no_hidden_one(tmp_path: Path) -> None:
    w(tmp_path, "a.safetensors", 1.0)
    save_file({"v": torch.zeros(1)}, tmp_path / "b.safetensors")
    w(tmp_path, ".a.safetensors", 3.0)
    assert set(Files(tmp_path).entries) == {"v", "w"}


def test_shards_in_folders_below(tmp_path: Path) -> None:
    """They are read, and written so."""
    base = tmp_path / "base"
    w(base, "shards/part/one.safetensors", 1.0)
    save_file({"v": torch.ones(3)}, base / "two.safetensors")
    index(base, {"w": "shards/part/one.safetensors", "v": "./two.safetensors"})
    tuned = {"w": torch.full((2,), 7.0), "v": torch.zeros(3)}
    out = Path(str(Delta.between(base, tuned).apply(base, tmp_path / "out")))
    assert set(content(out)) == {"shards/part/one.safetensors", "two.safetensors", INDEX}
    assert equal(dict(load_file(out / "shards/part/one.safetensors")), {"w": tuned["w"]})
    assert json.loads((out / INDEX).read_text())["weight_map"] == {
        "w": "shards/part/one.safetensors",
        "v": "two.safetensors",
    }
    again = Files(out)
    assert torch.equal(again.read("v"), tuned["v"])


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x", "a/../../x", "..", "a/b/../../../x.safetensors"]
)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    w(tmp_path, "x.safetensors", 1.0)
    w(folder, "y.safetensors", 1.0)
    index(folder, {"w": name})
    with pytest.raises(FileError, match="which is outside its folder"):
        Files(folder)
    (folder / INDEX).unlink()
    (folder / "config.json").write_text(json.dumps({"transformers_weights": f"{name}/m.safetensors"}))
    with pytest.raises(FileError, match="which is outside its folder"):
        Files(folder)


def test_links_are_followed_as_the_cache_of_the_hub_is_made_of_them(tmp_path: Path) -> None:
    w(tmp_path, "blobs/123", 4.0)
    (tmp_path / "snapshot").mkdir()
    os.symlink("../blobs/123", tmp_path / "snapshot" / SHARD)
    index(tmp_path / "snapshot", {"w": SHARD})
    os.symlink("snapshot", tmp_path / "main")
    assert read(tmp_path / "main") == 4.0


ODD: dict[str, tuple[Any, str]] = {
    "a list": ([], "has no table 'weight_map'"),
    "a number for a file": ({"w": 3}, "names 3 for a file"),
    "an empty name": ({"w": ""}, "names '', which is no file's name"),
    "a zero byte": ({"w": "a\0b"}, "which is no file's name"),
    "a long name": ({"w": "x" * 300}, "is not in the folder"),
    "a very long name": ({"w": "x" * 9000}, "which is no file's name"),
    "a missing file": ({"w": "x"}, "names 'x', which is not in the folder"),
}


@pytest.mark.parametrize("case", ODD)
def test_damaged_indexes(case: str, tmp_path: Path) -> None:
    where, message = ODD[case]
    index(tmp_path, where)
    with pytest.raises(FileError, match=message):
        list(shards(tmp_path))
    for text in ("[" * 100_000, "\xff", "{", "3", '{"weight_map": {"a": "b", }}'):
        (tmp_path / INDEX).write_text(text, encoding="latin-1")
        with pytest.raises(FileError, match="is damaged"):
            list(shards(tmp_path))


# ---- headers ---------------------------------------------------------------------------------------------

F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS: dict[str, tuple[Any, str]] = {
    "no table": ([], "its header is no table"),
    "a hole": ({"a": F32_4, "b": {**F32_4, "data_offsets": [20, 36]}}, "begins at byte 20 of the tensors"),
    "two in one place": ({"a": F32_4, "b": F32_4}, "begins at byte 0 of the tensors, and what is before"),
    "bytes after": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "its tensors end at"),
    "a size that is none": ({"a": {**F32_4, "shape": [-4]}}, "a number that is none of its kind"),
    "true for a size": ({"a": {**F32_4, "shape": [4, True]}}, "a number that is none of its kind"),
    "a fraction": ({"a": {**F32_4, "shape": [4.0]}}, "a number that is none of its kind"),
    "a product too large": ({"a": {**F32_4, "shape": [2**40, 2**40]}}, "is cut short or damaged"),
    "many dimensions": ({"a": {**F32_4, "shape": [1] * 70}}, "no list of numbers"),
    "an unknown dtype": ({"a": {**F32_4, "dtype": "F31"}}, "of a dtype 'F31', which this version"),
    "four bits": (
        {"a": {**F32_4, "dtype": "F4", "shape": [32]}},
        "F4, several numbers in a byte.*dequantise",
    ),
    "strings that are none": ({"__metadata__": {"a": 1}, "a": F32_4}, "no table of strings"),
    "half a letter": ({"\ud800": F32_4}, "surrogates not allowed"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_checked_before_memory_is_asked_for(case: str, tmp_path: Path) -> None:
    header, message = HEADERS[case]
    text = json.dumps(header).encode()
    extra = 20 if case == "a hole" else 0
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 + extra))
    with pytest.raises(FileError, match=message):
        Reader(tmp_path / "x.safetensors")


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    one = json.dumps(F32_4)
    text = f'{{"a": {one}, "a": {one}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(FileError, match="it has 'a' twice"):
        Reader(tmp_path / "x.safetensors")


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    """A reader beside a writer: one model or the other, never some of both."""
    w(tmp_path, "a.safetensors", 1.0)
    source = Files(tmp_path / "a.safetensors")
    w(tmp_path, "b.safetensors", 2.0)
    os.replace(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="was changed or replaced while it was read"):
        source.read("w")


def test_an_index_of_another_model(tmp_path: Path) -> None:
    """What it names and no shard has would be left out of the difference, and of the result."""
    w(tmp_path, SHARD, 1.0)
    index(tmp_path, {"w": SHARD, "v": SHARD})
    with pytest.raises(FileError, match=rf"{INDEX}' says that 'v' is in '{SHARD}', which has it not"):
        Files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json"])
def test_pipes_are_not_waited_for(name: str, tmp_path: Path) -> None:
    w(tmp_path, SHARD, 1.0)
    os.mkfifo(tmp_path / name)
    if name == "config.json":  # it is not needed
        assert read(tmp_path) == 1.0
        return
    with pytest.raises(FileError, match=rf"{name}' is damaged.*it is a pipe or a device"):
        Files(tmp_path)
