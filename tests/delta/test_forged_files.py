"""Deltas of strangers: sizes and places are checked before memory is asked for."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import normal
from safetensors.torch import load_file, save_file
from torch import Tensor

import optx
from optx import Compressed, Delta, FileError
from optx._safetensors import Reader
from optx.delta import _compressed_file


def small(numel: int = 1000) -> Compressed:
    return optx.compress(Delta.between({"w": torch.zeros(numel)}, {"w": normal(numel)}))


# ---- state dicts -----------------------------------------------------------------------------------------


def header_of(state: dict[str, Any], **changes: Any) -> str:
    table = json.loads(state["compeft"])
    table["tensors"][0][2] = changes.get("shape", table["tensors"][0][2])
    return json.dumps({**table, **{k: v for k, v in changes.items() if k != "shape"}})


def test_other_strides_are_the_same_masks() -> None:
    """forged_masks.py"""
    blob = small()
    state = blob.state_dict()
    for mask in (
        state["masks"]["w"].t().contiguous().t(),
        torch.cat([state["masks"]["w"]] * 2, 1)[:, : state["masks"]["w"].shape[1]],
        torch.stack([state["masks"]["w"]] * 2, 2)[:, :, 1],
    ):
        again = Compressed.from_state_dict({**state, "masks": {"w": mask}})
        assert again.nonzeros == blob.nonzeros == 200
        assert torch.equal(again.delta()["w"], blob.delta()["w"])


@pytest.mark.parametrize("numel", [100_000, 10**11])
def test_expanded_masks_are_refused(numel: int) -> None:
    """forged_masks.py: a few bytes that say they are gigabytes."""
    state = small().state_dict()
    mask = torch.zeros(2, 1, dtype=torch.int64).expand(2, -(-numel // 64))
    forged = {**state, "compeft": header_of(state, shape=[numel]), "masks": {"w": mask}}
    with pytest.raises(FileError, match=r"the masks of 'w' must be int64"):
        Compressed.from_state_dict(forged)


def both(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[0] |= mask[1]
    return mask


def beyond(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[0, -1] |= 1 << 50  # of 1000 numbers the last word has 40
    return mask


MASKS: dict[str, tuple[Any, str]] = {
    "none": (lambda mask: None, "must be int64"),
    "floats": (lambda mask: mask.double(), "must be int64"),
    "flat": (lambda mask: mask.flatten(), "must be int64"),
    "short": (lambda mask: mask[:, :-1], "must be int64"),
    "sparse": (lambda mask: mask.to_sparse(), "must be int64"),
    "both signs": (both, "have bits that mean nothing"),
    "bits past the last": (beyond, "have bits that mean nothing"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_are_none(case: str) -> None:
    change, message = MASKS[case]
    state = small().state_dict()
    with pytest.raises(FileError, match=message):
        Compressed.from_state_dict({**state, "masks": {"w": change(state["masks"]["w"])}})


ODD: list[Any] = [None, 3, "x", [], {}, {"w": 3}]


@pytest.mark.parametrize("part", ["compeft", "masks"])
@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_states_that_are_none(part: str, odd: Any) -> None:
    with pytest.raises(FileError, match=r"Compressed.from_state_dict: "):
        Compressed.from_state_dict({**small().state_dict(), part: odd})
    with pytest.raises(FileError, match=r"Compressed.from_state_dict: "):
        Compressed.from_state_dict({k: v for k, v in small().state_dict().items() if k != part})


HEADERS: dict[str, dict[str, Any]] = {
    "sigma": {"sigma": float("nan")},
    "alpha": {"alpha": -1.0},
    "scale": {"sigma": "x"},
    "tied": {"tied": {"a": 3}},
    "a size": {"shape": [-1000]},
    "a shape": {"shape": 1000},
    "large": {"shape": [2**70]},
    "compat": {"compat": 3},
    "rows": {"tensors": [[]]},
    "no rows": {"tensors": None},
    "start": {"start": []},
    "name": {"tensors": [[3, "F32", [1], 0]]},
    "twice": {"tensors": [["w", "F32", [1000], 0]] * 2},
    "dtype": {"tensors": [["w", "F33", [1000], 0]]},
    "half a letter": {"tensors": [["\ud800", "F32", [1000], 0]]},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_make_no_sense(case: str, tmp_path: Path) -> None:
    """In a state dict and, with a sum that is right, in a file."""
    blob = small()
    text = header_of(blob.state_dict(), **HEADERS[case])
    with pytest.raises(FileError):
        Compressed.from_state_dict({**blob.state_dict(), "compeft": text})
    rest = blob.save(tmp_path / "a").read_bytes()[-100:]
    (tmp_path / "b").write_bytes(file_of(text, rest))
    with pytest.raises(FileError, match=r"header makes no sense|is cut short|it should have|is damaged"):
        Compressed.load(tmp_path / "b")


def file_of(text: str, payloads: bytes = b"") -> bytes:
    header = zlib.compress(text.encode("utf-8", "surrogatepass"))
    digest = _compressed_file._digest(2, header)
    return _compressed_file._HEAD.pack(b"optx-cpf", 2, len(header), digest) + header + payloads


def test_a_header_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    packer = zlib.compressobj(1)
    header = b"".join(packer.compress(b" " * 10_000_000) for _ in range(11)) + packer.flush()
    digest = _compressed_file._digest(2, header)
    path = tmp_path / "bomb"
    path.write_bytes(_compressed_file._HEAD.pack(b"optx-cpf", 2, len(header), digest) + header)
    with pytest.raises(FileError, match=r"its header makes no sense .it is too large or cut short"):
        Compressed.load(path)


@pytest.mark.parametrize("size", [-1, 2**40, 10**30, 0.5, True, "x"])
def test_payloads_have_the_size_that_the_file_has(size: Any, tmp_path: Path) -> None:
    table = json.loads(small().state_dict()["compeft"])
    table["tensors"][0][3] = size
    path = tmp_path / "x"
    path.write_bytes(file_of(json.dumps(table), b"abcd1234"))
    with pytest.raises(FileError, match=r"header makes no sense|is cut short in 'w'|it should have"):
        Compressed.load(path)


@pytest.mark.parametrize("shape", [[10**11], [2**20, 2**20], [10**6]])
def test_shapes_need_their_blocks(shape: list[int], tmp_path: Path) -> None:
    """Every 131,072 numbers have six bytes of the payload, at least."""
    payload = bytes(6)
    table = json.loads(small().state_dict()["compeft"])
    table["tensors"][0][2:4] = [shape, len(payload)]
    path = tmp_path / "x"
    path.write_bytes(file_of(json.dumps(table), payload + struct.pack("<I", zlib.crc32(payload))))
    with pytest.raises(FileError, match="is damaged in 'w': it is too short"):
        Compressed.load(path)


# ---- sparse deltas ---------------------------------------------------------------------------------------


def forged(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
    base = {"kind": "delta", "version": 1, "plan": "x", "fingerprints": {}}
    path = folder / "d.safetensors"
    save_file(tensors, path, {"optx": json.dumps({**base, **about})})
    return path


def entry(form: str, *shape: int) -> dict[str, Any]:
    return {"w": {"form": form, "shape": list(shape), "dtype": "F32"}}


BYTE, COLUMN = torch.uint8, torch.int32
PARTS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "a dense one of another shape": ({"w": torch.zeros(3)}, entry("dense", 4), "does not make that tensor"),
    "of another dtype": ({"w": torch.zeros(4).half()}, entry("dense", 4), "does not make that tensor"),
    "gaps beyond the end": (
        {"w::values": torch.ones(2), "w::gaps": torch.tensor([3, 3], dtype=BYTE)},
        entry("sparse", 5),
        "don't fit its shape",
    ),
    "one value for many places": (
        {"w::values": torch.ones(1), "w::gaps": torch.tensor([0, 0, 0], dtype=BYTE)},
        entry("sparse", 9),
        "don't fit its shape",
    ),
    "more values than codes": (
        {"w::values": torch.ones(3), "w::gaps": torch.tensor([0], dtype=BYTE)},
        entry("sparse", 9),
        "does not make that tensor",
    ),
    "signed gaps": (
        {"w::values": torch.ones(1), "w::gaps": torch.tensor([-1], dtype=torch.int8)},
        entry("sparse", 9),
        "does not make that tensor",
    ),
    "a shape beyond all memory": (
        {"w::values": torch.ones(1), "w::gaps": torch.tensor([0], dtype=BYTE)},
        entry("sparse", 2**30, 2**30),
        "does not make that tensor",
    ),
    "terabytes": (
        {"w::values": torch.ones(1), "w::gaps": torch.tensor([0], dtype=BYTE)},
        entry("sparse", 2**39),
        "for which there is no memory|w",
    ),
    "a column before the first": (
        {"w::values": torch.ones(2, 1), "w::columns": torch.tensor([-1], dtype=COLUMN)},
        entry("columns", 2, 5),
        "don't fit its shape",
    ),
    "a column past the last": (
        {"w::values": torch.ones(2, 1), "w::columns": torch.tensor([5], dtype=COLUMN)},
        entry("columns", 2, 5),
        "don't fit its shape",
    ),
    "a column twice": (
        {"w::values": torch.ones(2, 2), "w::columns": torch.tensor([1, 1], dtype=COLUMN)},
        entry("columns", 2, 5),
        "don't fit its shape",
    ),
    "one row for all": (
        {"w::values": torch.ones(1, 1), "w::columns": torch.tensor([1], dtype=COLUMN)},
        entry("columns", 2, 5),
        "does not make that tensor",
    ),
    "columns of a vector": (
        {"w::values": torch.ones(1), "w::columns": torch.tensor([1], dtype=COLUMN)},
        entry("columns", 5),
        "does not make that tensor",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_sparse_parts_make_their_tensor(case: str, tmp_path: Path) -> None:
    if case == "terabytes":
        pytest.importorskip("resource")
    tensors, table, message = PARTS[case]
    path = forged(tmp_path, tensors, {"tensors": table})
    if case == "terabytes":  # that much may well be promised by the system: then it is zeros, never touched
        assert Delta.load(path).entries["w"].shape == (2**39,)
        return
    with pytest.raises(FileError, match=message):
        dict(Delta.load(path).items())


def test_good_parts_are_read(tmp_path: Path) -> None:
    path = forged(
        tmp_path,
        {
            "w::values": torch.tensor([[1.0, 2.0]]).t().contiguous(),
            "w::columns": torch.tensor([3], dtype=COLUMN),
        },
        {"tensors": entry("columns", 2, 5)},
    )
    assert Delta.load(path)["w"].tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0]]


ABOUT: dict[str, dict[str, Any]] = {
    "a list": {"tensors": []},
    "a number": {"tensors": {"w": 3}},
    "prints": {"fingerprints": {"w": 3}},
    "contents": {"contents": [1]},
    "no form": {"tensors": {"w": {"form": "x", "shape": [1], "dtype": "F32"}}},
    "a size": {"tensors": {"w": {"form": "dense", "shape": [-1], "dtype": "F32"}}},
    "whole": {"whole": 3},
}


@pytest.mark.parametrize("case", ABOUT)
def test_descriptions_that_make_no_sense(case: str, tmp_path: Path) -> None:
    about = {"tensors": entry("dense", 4), **ABOUT[case]}
    with pytest.raises(FileError, match="is damaged"):
        Delta.load(forged(tmp_path, {"w": torch.zeros(4)}, about))


# ---- signatures ------------------------------------------------------------------------------------------

SIGNED: dict[str, dict[str, Any]] = {
    "levels": {"levels": 10**9},
    "a word": {"levels": "x"},
    "form": {"form": "x"},
    "low": {"low": []},
    "nan": {"high": float("nan")},
    "a shape": {"shape": [10**9, 10**9]},
    "another shape": {"shape": [9, 9]},
    "a size": {"shape": [-9]},
}


@pytest.mark.parametrize("case", SIGNED)
def test_signatures(case: str, tmp_path: Path) -> None:
    path = optx.Signature({"a": normal(9, 7)}).quantize(16).save(tmp_path / "s.safetensors")
    about = json.loads(Reader(path).metadata["optx.signature"])
    about["a"] |= SIGNED[case]
    save_file(load_file(path), path, {"optx.signature": json.dumps(about)})
    with pytest.raises(FileError, match=r"is no signature's file, or is damaged"):
        optx.Signature.load(path)
