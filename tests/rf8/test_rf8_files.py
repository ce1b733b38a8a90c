"""Files of packed weights: from and into whatever holds tensors, in little memory, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import optx
from optx import FileError, OptxError, ShapeError, rf8
from optx._buffers import PIECE


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(30, 8), nn.Linear(8, 30), nn.BatchNorm1d(4), nn.Linear(30, 8).bfloat16()
    )


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def numbers(one: Any) -> tuple[Any, ...]:
        return (one.e_max, one.dtype, one.codes.tolist()) if isinstance(one, rf8.Packed) else (one.tolist(),)

    return sorted(a) == sorted(b) and all(numbers(a[n]) == numbers(b[n]) for n in a)


def test_every_source_gives_one_file(tmp_path: Path) -> None:
    model = net()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    packed = rf8.pack(state)
    save_file(state, tmp_path / "one.safetensors")
    (tmp_path / "many").mkdir()
    names = sorted(state)
    for i, some in enumerate((names[:4], names[4:]), 1):
        save_file({n: state[n] for n in some}, tmp_path / "many" / f"model-0000{i}-of-00002.safetensors")
    sources: list[Any] = [model, state, packed, tmp_path / "one.safetensors", tmp_path / "many"]
    files = [rf8.save(source, tmp_path / f"{i}.safetensors") for i, source in enumerate(sources)]
    assert all(same(rf8.load(file), packed) for file in files)
    assert len({file.read_bytes() for file in files[:3]}) == 1
    with safe_open(files[0], "pt") as file:  # type: ignore[no-untyped-call]
        assert file.get_tensor("1.weight").dtype == torch.uint8
        assert json.loads(file.metadata()["optx"])["tensors"]["3.weight"]["dtype"] == "BF16"
    other = net(1)
    rf8.load_into(other, files[0])
    wanted = rf8.quantise(state)
    assert all(torch.equal(t, wanted[name]) for name, t in other.state_dict().items())
    with pytest.raises(OptxError, match="exists already"):
        rf8.save(model, files[0])


def test_tied_names_and_folders(tmp_path: Path) -> None:
    model = net()
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    model[1].weight = model[0].weight
    file = rf8.save(model, tmp_path / "all" / "a.safetensors")
    assert file.stat().st_size < 240 + 240 * 2 + 1200
    found = rf8.load(file)
    assert found["1.weight"] is found["0.weight"]
    again = rf8.save(found, tmp_path / "b.safetensors")
    assert same(rf8.load(again), found)
    rf8.save({"x": torch.ones(2, 2)}, tmp_path / "all" / "x.safetensors")
    assert set(rf8.load(tmp_path / "all")) == {*model.state_dict(), "x"}
    half = net(2).half()
    half[1].weight = half[0].weight
    rf8.load_into(half, file)
    assert torch.equal(half[0].weight, found["0.weight"].unpack(torch.float16))  # type: ignore[union-attr]
    double = net(2).double()
    rf8.load_into(double, again)
    assert torch.equal(double[0].weight, found["0.weight"].unpack().double())  # type: ignore[union-attr]


def test_a_plain_load_fails_aloud(tmp_path: Path) -> None:
    """Codes are bytes: copied into floats they were weights of up to 255, and nothing said so."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1, bias=False), nn.Linear(1, 1), nn.PReLU())
    model[3].weight = nn.Parameter(torch.tensor(0.25))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    file = rf8.save(model, tmp_path / "a.safetensors", include=".*")
    with pytest.raises(RuntimeError, match="size mismatch") as raised:
        model.load_state_dict(load_file(file), strict=False)
    assert str(raised.value).count("size mismatch") == len(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    rf8.load_into(model, file)
    wanted = rf8.quantise(before, include=".*")
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())


def test_files_of_the_first_layout_still_load(tmp_path: Path) -> None:
    packed = rf8.pack(torch.tensor([[1.0, -0.3]]))
    save_file({"w": packed.codes}, tmp_path / "a.safetensors", _about(version=1))
    found = rf8.load(tmp_path / "a.safetensors")["w"]
    assert isinstance(found, rf8.Packed)
    assert torch.equal(found.unpack(), packed.unpack())


def test_a_tied_model_does_not_take_the_last_of_two(tmp_path: Path) -> None:
    apart, tied = net(), net(1)
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    with pytest.raises(FileError, match=r"'0.weight' and '1.weight' are one tensor .* Untie them"):
        rf8.load_into(tied, rf8.save(apart, tmp_path / "apart.safetensors"))
    assert torch.equal(tied[0].weight, before)
    apart[1].weight = nn.Parameter(apart[0].weight.detach().clone())
    rf8.load_into(tied, rf8.save(apart, tmp_path / "equal.safetensors"))
    assert torch.equal(tied[1].weight, rf8.quantise(apart[0].weight))


def test_pieces_are_packed_by_the_whole_tensors_exponent(tmp_path: Path) -> None:
    w = torch.full((2, PIECE), 0.3)
    w[1, -1] = 40.0
    found = rf8.load(rf8.save({"w": w}, tmp_path / "a.safetensors"))["w"]
    assert isinstance(found, rf8.Packed)
    assert found.e_max == rf8.pack(w).e_max == 5
    assert torch.equal(found.unpack(), rf8.pack(w).unpack())


def test_a_killed_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.delta._safetensors_writer import Writer

    monkeypatch.setattr(Writer, "FLUSH", 1)
    state = {f"w{i}": torch.randn(40, 30) for i in range(9)}
    save_file(state, tmp_path / "one.safetensors")

    def stops(names: Any) -> Any:
        for i, name in enumerate(names):
            if i == 7:
                raise KeyboardInterrupt
            yield name

    out, left = tmp_path / "a.safetensors", list[str]()
    with pytest.raises(KeyboardInterrupt):
        rf8.save(tmp_path / "one.safetensors", out, progress=stops)
    assert not out.exists()
    rf8.save(tmp_path / "one.safetensors", out, progress=lambda names: left.extend(names) or list(left))  # type: ignore[func-returns-value]
    assert 0 < len(left) < 9
    assert same(rf8.load(out), rf8.pack(state))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: rf8.save({"w": torch.ones(2, 2)}, p / "a.bin"), "a.bin' must end in .safetensors"),
        (lambda p: rf8.save({"w": torch.full((2, 2), torch.inf)}, p / "a.safetensors"), "'w' has inf among"),
        (
            lambda p: rf8.save({"w": torch.ones(2, 2).double()}, p / "a.safetensors"),
            "'w' is torch.float64; RF8",
        ),
        (lambda p: rf8.save(rf8.pack({"w": torch.ones(2, 2)}), p / "a.safetensors", include="w"), "already"),
        (lambda p: rf8.load(p / "none.safetensors"), "There is no file"),
        (lambda p: rf8.load(5), "rf8.load: path is 5; it must be a path"),  # type: ignore[arg-type]
        (lambda p: rf8.load_into(nn.PReLU(), [p]), r"rf8.load_into: path is \[.*it must be a path"),  # type: ignore[arg-type]
        (lambda p: rf8.save(nn.PReLU(), None), "rf8.save: path is None; it must be a path"),  # type: ignore[arg-type]
        (
            lambda p: rf8.load_into(nn.Linear(2, 2), p / "good.safetensors"),
            "the file has no 'bias'. Near: 'weight'",
        ),
        (
            lambda p: rf8.load_into(nn.Embedding(2, 3), p / "good.safetensors"),
            r"has shape \(2, 3\) in the model",
        ),
        (lambda p: rf8.load_into(nn.PReLU(), p / "two.safetensors"), "the model has no 'other', which is in"),
    ],
)
def test_mistakes(call: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    rf8.save({"weight": torch.ones(2, 2)}, tmp_path / "good.safetensors")
    rf8.save({"weight": torch.ones(1, 1), "other": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises((OptxError, ShapeError), match=said):
        call(tmp_path)
    assert not (tmp_path / "a.safetensors").exists()


def test_weights_that_were_replaced_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with optx.attach(model, optx.RF8Linear(), "0|1"):
        rf8.pack(model)  # no warning: what rests is what computes
    handle = optx.attach(model, optx.StableRPS(compression=0.25), "0|1")
    said = r"2 of the weights \('0.weight' is the first\) take no part.*'stable_rps'.*merge_and_unload"
    with pytest.warns(UserWarning, match=f"^pack: {said}"):
        packed = rf8.pack(model)
    with pytest.warns(UserWarning, match=f"^rf8.save: {said}"):
        file = rf8.save(model, tmp_path / "a.safetensors")
    assert same(rf8.load(file), packed)
    rf8.pack(handle.state_dict(), include=".*psi")
    handle.merge()
    rf8.pack(model)


def _about(**change: Any) -> dict[str, str]:
    about = {
        "kind": "rf8",
        "version": 2,
        "tensors": {"w": {"e_max": 0, "dtype": "F32", "shape": [3]}},
        "tied": {},
        **change,
    }
    return {"optx": json.dumps(about)}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "is no RF8 file, but plain weights; optx.rf8.save packs them"),
        (_about(kind="delta"), "is no RF8 file, but optx's file of kind 'delta'"),
        (_about(version=3), "is an RF8 file of version 3; this version of optx reads 1 to 2"),
        (_about(version="1"), "is an RF8 file of version '1'; this version of optx reads 1 to 2"),
        (_about(), r"'w' has codes of shape \(3,\), and a weight of \[3\]"),
        (_about(tensors={"w": {"e_max": 0, "dtype": "F32"}}), "its header says what can't be .'shape'"),
        (_about(tensors={"v": {"e_max": 0, "dtype": "F32"}}), "is damaged: its header says what can't be"),
        (_about(tensors={"w": {"e_max": 300, "dtype": "F32"}}), "e_max is 300"),
        (_about(tensors={"w": {"e_max": 0, "dtype": "I8"}}), "dtype is torch.int8"),
        (_about(tensors={"w": {"e_max": 0}}), "is damaged: its header says what can't be .'dtype'"),
        (_about(tensors={"x": {"e_max": 0, "dtype": "F32"}}), "'x' is torch.float32, and codes are bytes"),
        (_about(tensors=[1]), "is damaged: its header says what can't be"),
        (_about(tensors={}, tied={"w": "x"}), "'w' is tied to 'x'"),
        (_about(tied=3), "is damaged: its header says what can't be"),
        ({"optx": "{"}, "is damaged: its header says what can't be"),
        ({"optx": "[1]"}, "is damaged: its header says what can't be"),
    ],
)
def test_foreign_and_broken_files(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(3, dtype=torch.uint8), "x": torch.zeros(2)}, file, metadata)
    with pytest.raises(FileError, match=said):
        rf8.load(file)


def test_a_file_cut_short(tmp_path: Path) -> None:
    file = rf8.save({"w": torch.ones(20, 20)}, tmp_path / "a.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FileError, match="is cut short or damaged"):
        rf8.load(file)


def test_others_do_not_take_it_for_weights(tmp_path: Path) -> None:
    file = rf8.save({"w": torch.ones(20, 20)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=re.escape("weights in RF8: optx.rf8.load")):
        optx.deepshape(file, out=tmp_path / "b.safetensors")
