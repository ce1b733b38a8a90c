"""ComPEFT's files: every bit that is wrong is noticed, and what else is refused."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compeft_cases import V, compressed, random_state

import optx
from optx import ComPEFT, Compressed
from optx.delta import _compressed_file as compressed_file
from optx.delta import _golomb as golomb

# ---- files ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {**random_state(1, [(40, 9), (33,)]), "steps": torch.tensor([5, 6])}
    return optx.compress(state, ComPEFT(0.3)).save(tmp_path / "d.cpft")


def test_a_flipped_bit_is_refused(saved: Path) -> None:
    good = saved.read_bytes()
    names = set()
    for bit in [*range(24 * 8), *(8 * byte + byte % 8 for byte in range(24, len(good)))]:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(bad)
        with pytest.raises(optx.FileError, match=r"d\.cpft") as caught:
            Compressed.load(saved)
        names |= {
            name for name in ("'t0'", "'t1'", "'steps'", "header", "first bytes") if name in str(caught.value)
        }
    assert len(names) == 5


def test_every_cut_and_anything_added_is_refused(saved: Path) -> None:
    good = saved.read_bytes()
    for length in range(len(good)):
        saved.write_bytes(good[:length])
        with pytest.raises(optx.FileError, match=r"d\.cpft"):
            Compressed.load(saved)
    saved.write_bytes(good + b"x")
    with pytest.raises(optx.FileError, match=f"has {len(good) + 1} bytes; it should have {len(good)}"):
        Compressed.load(saved)
    saved.write_bytes(good)
    assert Compressed.load(saved).nonzeros == int(0.3 * 393)


def test_the_header_can_be_read_by_others(saved: Path) -> None:
    raw = saved.read_bytes()
    length = int.from_bytes(raw[12:16], "little")
    header = json.loads(zlib.decompress(raw[24 : 24 + length]))
    blob = Compressed.load(saved)
    assert raw[:8] == b"optx-cpf"
    assert header["scale"] == blob.scale == float(np.float32(header["alpha"] * header["sigma"]))
    assert [row[:3] for row in header["tensors"]] == [
        ["t0", "F32", [40, 9]],
        ["t1", "F32", [33]],
        ["steps", "I64", [2]],
    ]


def test_the_first_version_is_read(saved: Path) -> None:
    """It had gap codes alone, as every block has at this density."""
    raw = bytearray(saved.read_bytes())
    length = int.from_bytes(raw[12:16], "little")
    assert raw[8] == 2
    raw[8] = 1
    raw[16:24] = compressed_file._digest(1, bytes(raw[24 : 24 + length]))
    new = Compressed.load(saved).masks
    saved.write_bytes(raw)
    assert all(torch.equal(mask, new[name]) for name, mask in Compressed.load(saved).masks.items())


def test_another_version_is_named(saved: Path) -> None:
    raw = bytearray(saved.read_bytes())
    length = int.from_bytes(raw[12:16], "little")
    raw[8] = 9
    raw[16:24] = compressed_file._digest(9, bytes(raw[24 : 24 + length]))
    saved.write_bytes(raw)
    with pytest.raises(optx.FileError, match="has version 9 of the format; this optx reads 1 to 2"):
        Compressed.load(saved)


def test_saving_leaves_a_whole_file_or_none(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = Compressed.load(saved)
    with pytest.raises(optx.OptxError, match="exists already"):
        blob.save(saved)
    with pytest.raises(optx.FileError, match="could not be read"):
        Compressed.load(saved.with_name("none.cpft"))

    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(golomb, "encode", full)
    with pytest.raises(optx.FileError, match=r"new\.cpft' could not be written: No space left on device"):
        blob.save(saved.with_name("new.cpft"))
    assert [p.name for p in saved.parent.iterdir()] == ["d.cpft"]


# ---- options, errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density is 0.0; it must be above 0"),
        ({"density": 20}, "density is 20; it must be between 0.0 and 1.0"),
        ({"density": math.nan}, "density is nan"),
        ({"alpha": -1.0}, "alpha is -1.0; it must be at least 0.0"),
        ({"alpha": math.inf}, "alpha is inf; it must be finite"),
        ({"compat": "paper "}, "compat is 'paper '; it must be 'paper' or 'repo'"),
    ],
)
def test_options_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        ComPEFT(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 69_999])
def test_numbers_that_are_not_finite(value: float, at: int) -> None:
    v = torch.randn(70_000)
    v[at] = value
    with pytest.raises(optx.OptxError, match="'w' has a change that is not finite"):
        optx.compress({"a": torch.ones(3), "w": v})


def test_other_errors() -> None:
    with pytest.raises(optx.OptxError, match="there are 1 floating numbers; sigma needs at least 2"):
        optx.compress({"w": torch.ones(1), "n": torch.ones(5, dtype=torch.int64)})
    with pytest.raises(optx.OptxError, match="compat='repo' keeps one number more"):
        compressed(V, density=1, compat="repo")
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(optx.OptxError, match="alpha is"):
            compressed(V).scaled(alpha)
