"""Masks by themselves: bits, files, what they say, and how two meet."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from optx import FileError, Masks, OptxError, ShapeError
from optx._mask_bits import keep_, layout, ones, pack, packed_shape, unpack

SHAPES = st.lists(st.integers(0, 19), min_size=0, max_size=4).map(tuple)


def drawn(shape: tuple[int, ...], seed: int = 0, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


def some(seed: int = 0) -> Masks:
    shapes = {"a.weight": (6, 20), "b.weight": (5, 3, 3, 3), "c.bias": (11,)}
    return Masks.from_bool({name: drawn(shape, seed + i) for i, (name, shape) in enumerate(shapes.items())})


# ---- bits -------------------------------------------------------------------------------------------------


@given(SHAPES, st.integers(0, 1000))
def test_bits_are_numpys(shape: tuple[int, ...], seed: int) -> None:
    mask = drawn(shape, seed)
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert tuple(bits.shape) == packed_shape(shape)
    rows = mask.reshape(layout(shape)).numpy()
    assert np.array_equal(bits.numpy(), np.packbits(rows, axis=1, bitorder="little"))
    assert torch.equal(unpack(bits, shape), mask)
    assert ones(bits) == int(mask.sum())


@given(
    SHAPES,
    st.integers(0, 1000),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_numbers_that_a_mask_leaves_out_are_0(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    mask = drawn(shape, seed)
    odd = torch.tensor([1.5, -2.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    numbers = odd[torch.randint(7, shape, generator=torch.Generator().manual_seed(seed))]
    wanted = numbers.masked_fill(~mask, 0)
    assert keep_(numbers, pack(mask)) is numbers
    assert torch.equal(numbers.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("offset", range(9))
def test_views_and_transposes_are_packed_as_what_they_show(offset: int) -> None:
    mask = drawn((9, 40))[:, offset : offset + 24]
    assert torch.equal(unpack(pack(mask), (9, 24)), mask)
    flat = drawn((9 * 24 + 8,))[offset : offset + 9 * 24].view(9, 24)
    assert torch.equal(unpack(pack(flat), (9, 24)), flat)
    assert torch.equal(unpack(pack(flat.t()), (24, 9)), flat.t())


def test_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    mask = unpack(every, (256, 8))
    assert torch.equal(pack(mask), every)
    assert [ones(byte) for byte in every] == [bin(byte).count("1") for byte in range(256)]


def test_shards_of_bits_are_bits_of_shards() -> None:
    mask = drawn((7, 13))
    assert torch.equal(pack(mask)[2:5], pack(mask[2:5]))


# ---- a mapping --------------------------------------------------------------------------------------------


def test_a_mapping_of_bools() -> None:
    masks = some()
    assert list(masks) == ["a.weight", "b.weight", "c.bias"]
    assert len(masks) == 3
    assert "a.weight" in masks
    assert "d" not in masks
    assert torch.equal(masks["b.weight"], drawn((5, 3, 3, 3), 1))
    assert masks.shape("b.weight") == (5, 3, 3, 3)
    with pytest.raises(KeyError):
        masks["d"]
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert masks.sparsity == 1 - kept / (120 + 135 + 11)


def test_they_can_not_be_changed_through_what_they_gave_or_got() -> None:
    bits = pack(drawn((6, 20)))
    masks = Masks({"a": bits}, {"a": (6, 20)})
    before = masks.digest()
    bits.zero_()
    masks.packed("a").zero_()
    masks["a"].zero_()
    assert Masks({"a": masks.packed("a")}, {"a": (6, 20)}).digest() == before
    assert torch.equal(masks["a"], drawn((6, 20)))


def test_equal_ones() -> None:
    masks = some()
    turned = Masks.from_bool({name: masks[name] for name in reversed(list(masks))})
    assert masks == turned
    assert hash(masks) == hash(turned)
    assert masks.digest() == turned.digest()
    assert masks != some(1)
    assert masks != 3
    renamed = Masks.from_bool({f"{name}s": mask for name, mask in masks.items()})
    flat = Masks.from_bool({name: mask.flatten() for name, mask in masks.items()})
    assert len({one.digest() for one in (masks, some(1), renamed, flat)}) == 4
    assert masks != flat


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(again: Any) -> None:
    masks = some()
    assert again(masks) == masks


def test_what_is_no_mask() -> None:
    with pytest.raises(OptxError, match=r"Masks.from_bool: 'a' is torch.float32; it must be a bool tensor"):
        Masks.from_bool({"a": torch.ones(3)})
    with pytest.raises(OptxError, match="there is no tensor"):
        Masks.from_bool({})
    with pytest.raises(OptxError, match="names in bits that are not those in shapes"):
        Masks({"a": torch.zeros(1, 1, dtype=torch.uint8)}, {"b": (1,)})
    with pytest.raises(OptxError, match=r"the bits of 'a' are torch.uint8 of shape \(1, 1\); .* \(2, 1\)"):
        Masks({"a": torch.zeros(1, 1, dtype=torch.uint8)}, {"a": (2, 7)})
    with pytest.raises(OptxError, match="the bits of 'a' have some past the end of a row"):
        Masks({"a": torch.full((2, 1), 255, dtype=torch.uint8)}, {"a": (2, 7)})


# ---- two of them ------------------------------------------------------------------------------------------


def test_union_and_intersection_of_what_is_kept() -> None:
    a, b = some(0), some(7)
    for name in a:
        assert torch.equal((a | b)[name], a[name] | b[name])
        assert torch.equal((a & b)[name], a[name] & b[name])


def test_a_weight_that_one_lacks_is_kept_there() -> None:
    every = some()
    one = Masks.from_bool({"a.weight": drawn((6, 20), 3)})
    other = Masks.from_bool({"z": drawn((2, 2))})
    assert list(every | one) == ["a.weight"]
    assert list(one & other) == ["a.weight", "z"]
    assert torch.equal((every & one)["b.weight"], every["b.weight"])
    with pytest.raises(OptxError, match="share no weight, so that their union keeps all"):
        one | other
    with pytest.raises(ShapeError, match=r"'a.weight' has shape \(6, 20\) in one and \(20, 6\) in the other"):
        every & Masks.from_bool({"a.weight": drawn((20, 6))})
    with pytest.raises(ShapeError):
        every | Masks.from_bool({"a.weight": drawn((20, 6))})


# ---- the report -------------------------------------------------------------------------------------------


def in_groups(n: int, m: int, rows: int = 6, length: int = 64) -> Tensor:
    """n of every m are False, drawn."""
    order = torch.rand(rows, length // m, m, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return (order >= n).reshape(rows, length)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8), (3, 16), (9, 32)])
def test_the_report_knows_patterns(n: int, m: int) -> None:
    kept = in_groups(n, m)
    told = Masks.from_bool({"a": kept, "b": kept.t().clone(), "c": kept.view(6, 4, 4, 4)}).report()
    assert [row.pattern for row in told.rows] == [f"{n}:{m}", f"{n}:{m} by columns", f"{n}:{m}"]
    broken = kept.clone()
    broken[-1, -m:] = True
    assert Masks.from_bool({"a": broken}).report().rows[0].pattern == "free"


def test_the_report_in_words() -> None:
    rows = torch.ones(4, 9, dtype=torch.bool)
    for i in range(4):
        rows[i, torch.arange(i, 3 + i)] = False
    masks = Masks.from_bool({"rows": rows, "free": drawn((5, 9)), "all": torch.ones(3, 4).bool()})
    report = masks.report()
    assert [row.pattern for row in report.rows] == ["rows", "free", "none"]
    assert report.total.zeros == sum(int((~mask).sum()) for mask in masks.values())
    assert report.total.sparsity == pytest.approx(masks.sparsity)
    lines = str(report).splitlines()
    assert lines[0].split() == ["name", "shape", "zeros", "sparsity", "pattern"]
    assert lines[2].split() == ["rows", "4", "x", "9", "12", "33.33%", "rows"]
    assert lines[-1].split()[:2] == ["in", "all"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    assert "33.33%" in console.export_text()


# ---- files ------------------------------------------------------------------------------------------------


def test_a_file_is_read_back_by_us_and_by_others(tmp_path: Path) -> None:
    masks = some()
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.load(tmp_path / "masks.safetensors")
    assert again == masks
    assert list(again) == list(masks)
    theirs = load_file(tmp_path / "masks.safetensors")
    assert all(torch.equal(theirs[name], masks.packed(name)) for name in masks)
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]


def test_names_of_any_kind(tmp_path: Path) -> None:
    masks = Masks.from_bool({"": drawn((2, 2)), "ä.[b]{c}": drawn((0, 4)), "s": drawn(())})
    masks.save(tmp_path / "masks.safetensors")
    assert Masks.load(tmp_path / "masks.safetensors") == masks
    assert "ä.[b]{c}" in str(masks.report())


def about(**changes: Any) -> str:
    table = {"kind": "masks", "version": 1, "shapes": {"a": [3, 9]}}
    return json.dumps({**table, **changes})


BITS = pack(drawn((3, 9)))
FORGED: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "no masks": ({"a": BITS}, {}, "a safetensors file without masks"),
    "no json": ({"a": BITS}, {"optx": "{"}, "holds no masks"),
    "no table": ({"a": BITS}, {"optx": "[]"}, "its kind is None"),
    "a delta": ({"a": BITS}, {"optx": about(kind="delta")}, "its kind is 'delta'"),
    "another version": ({"a": BITS}, {"optx": about(version=2)}, "its version is 2"),
    "no shapes": ({"a": BITS}, {"optx": about(shapes=None)}, "no table of shapes"),
    "a shape": ({"a": BITS}, {"optx": about(shapes={"a": 27})}, "the shape of 'a' is 27"),
    "a size": ({"a": BITS}, {"optx": about(shapes={"a": [3, -9]})}, "the shape of 'a'"),
    "a truth": ({"a": BITS}, {"optx": about(shapes={"a": [3, True]})}, "the shape of 'a'"),
    "a large size": ({"a": BITS}, {"optx": about(shapes={"a": [3, 2**60]})}, "the shape of 'a'"),
    "many sizes": ({"a": BITS}, {"optx": about(shapes={"a": [1] * 65})}, "the shape of 'a'"),
    "deep": ({"a": BITS}, {"optx": "[" * 2000 + "]" * 2000}, "nested too deep"),
    "another shape": ({"a": BITS}, {"optx": about(shapes={"a": [3, 17]})}, r"have shape \(3, 2\); of a"),
    "huge": ({"a": BITS}, {"optx": about(shapes={"a": [2**39, 2**39]})}, "have shape"),
    "one more": ({"a": BITS, "b": BITS.clone()}, {"optx": about()}, "'b' has bits or a shape, but not both"),
    "one less": ({"a": BITS}, {"optx": about(shapes={"a": [3, 9], "b": [3, 9]})}, "'b' has bits or a shape"),
    "none": ({}, {"optx": about(shapes={})}, "there is no tensor"),
    "floats": ({"a": torch.zeros(3, 2)}, {"optx": about()}, "are torch.float32 of shape"),
    "bits past the end": ({"a": BITS | 2**7}, {"optx": about()}, "past the end of a row"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files(case: str, tmp_path: Path) -> None:
    tensors, metadata, message = FORGED[case]
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or None)
    with pytest.raises(FileError, match=message):
        Masks.load(tmp_path / "x.safetensors")


def test_files_that_are_missing_or_cut(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="There is no file"):
        Masks.load(tmp_path / "x.safetensors")
    some().save(tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for end in (0, 7, 40, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:end])
        with pytest.raises(FileError):
            Masks.load(tmp_path / "x.safetensors")


def test_what_was_there_stays_if_it_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Give the name of a file"):
        some().save(tmp_path / "folder")
    with pytest.raises(OSError, match="No such file"):
        some().save(tmp_path / "none" / "x.safetensors")


def test_a_file_of_masks_is_no_pruned_model(tmp_path: Path) -> None:
    some().save(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"If it holds masks: optx.Masks.load"):
        Masks.of(tmp_path / "x.safetensors")
