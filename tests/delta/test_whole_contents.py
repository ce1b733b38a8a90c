"""A base is known by every number of it, and a resumed computation by all that it reads."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import optx
from optx import Delta, OptxError
from optx.delta import _mixed_sum, _safetensors_writer

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float8_e5m2,
    torch.int8,
    torch.bool,
    torch.complex64,
]


def far(seed: int, at: int = 700, by: float = 1.0) -> dict[str, Tensor]:
    """A base of which a late number can be another."""
    state = {f"w{i}": normal(1000, seed=seed + i) for i in range(3)}
    state["w1"][at] += by
    return state


def tuned() -> dict[str, Tensor]:
    return {f"w{i}": normal(1000, seed=50 + i) for i in range(3)}


# ---- the hash --------------------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(0, 500), max_size=6),
    dtype=st.sampled_from(DTYPES),
    place=st.integers(0, 499),
    begin=st.integers(0, 2**40),
)
@settings(max_examples=40)
def test_any_pieces_have_one_sum_and_any_other_number_another(
    cuts: list[int], dtype: torch.dtype, place: int, begin: int
) -> None:
    flat = torch.randint(0, 255, (500 * dtype.itemsize,), dtype=torch.uint8)
    flat = (flat % 2).bool() if dtype == torch.bool else flat.view(dtype)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    places = sorted({0, *cuts, len(flat)})
    pieces = [(a, flat[a:b]) for a, b in pairwise(places)]
    whole = _mixed_sum.mixed_sum(flat, begin)
    assert sum(_mixed_sum.mixed_sum(piece, begin + a) for a, piece in pieces) & _mixed_sum.MASK == whole
    other = flat.clone()
    raw = other.view(torch.uint8)
    raw[place * dtype.itemsize] ^= 1
    assert _mixed_sum.mixed_sum(other, begin) != whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_gives_what_numba_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.arange(200_000).to(dtype)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    known = _mixed_sum.mixed_sum(flat, 12345)
    monkeypatch.setattr(_mixed_sum, "why_unavailable", lambda _what: "not here")
    assert _mixed_sum.mixed_sum(flat, 12345) == known


# ---- the base --------------------------------------------------------------------------------------------


def save(folder: Path, **models: dict[str, Tensor]) -> None:
    for name, tensors in models.items():
        save_file(tensors, folder / f"{name}.safetensors")


WAYS = [
    "in memory",
    "files",
    "one pass",
    "saved",
    "saved, sparse",
    "compressed",
    "compressed file",
    "merge",
    "add_to",
]


@pytest.mark.parametrize("way", WAYS)
def test_another_base_is_refused_by_its_last_numbers(way: str, tmp_path: Path) -> None:
    """The first 256 numbers are the same; the very base, a copy and one of another width pass."""
    right, wrong = far(0), far(0, by=1.5)
    save(tmp_path, right=right, wrong=wrong, copy=right)
    delta = Delta.between(right, tuned())
    if way in ("files", "one pass"):
        delta = Delta.between(tmp_path / "right.safetensors", tuned())
    if way in ("files", "saved, sparse"):
        delta = delta.dare(0.9) * 1.0
    if way.startswith("saved"):
        delta = Delta.load(delta.save(tmp_path / "d.safetensors"))
    small = optx.compress(delta)
    if way == "compressed file":
        small = optx.Compressed.load(small.save(tmp_path / "d.compeft"))
    if way.startswith("compressed"):
        delta = small.delta()

    def go(name: str, base: Any, out: str) -> None:
        if way == "add_to":
            small.add_to({n: t.clone() for n, t in base.items()})
        elif way == "merge":
            optx.merge(tmp_path / f"{name}.safetensors", [delta], optx.TaskArithmetic(), tmp_path / out)
        else:
            delta.apply(tmp_path / f"{name}.safetensors", tmp_path / out)

    before = set(tmp_path.iterdir())
    with pytest.raises(OptxError, match=r"(is not the base that|was taken from another base).*'w1' differs"):
        go("wrong", wrong, "out.safetensors")
    assert set(tmp_path.iterdir()) == before
    for name in ("right", "copy"):
        go(name, right, f"{name}-out.safetensors")
    if way not in ("add_to", "merge"):
        with pytest.raises(OptxError, match="'w1' differs"):
            delta.apply(wrong)
        delta.apply(right)
        delta.apply({n: t.double() for n, t in right.items()})
        delta.unbound().apply(wrong)


def test_a_base_in_another_width_is_the_same_base(tmp_path: Path) -> None:
    """Loaded as float32, a bfloat16 checkpoint has the same numbers."""
    base = {n: t.bfloat16() for n, t in far(0).items()}
    path = Delta.between(base, {n: t.bfloat16() for n, t in tuned().items()}).save(tmp_path / "d.safetensors")
    loaded = Delta.load(path)
    loaded.apply({n: t.float() for n, t in base.items()})
    with pytest.raises(OptxError, match="'w1' differs"):
        loaded.apply({n: t.float() + (0.001 * (n == "w1")) for n, t in base.items()})


def test_sums_and_averages_of_other_bases_are_refused(tmp_path: Path) -> None:
    one, two = (Delta.between(base, tuned()) for base in (far(0), far(0, by=1.5)))
    files = [Delta.load(d.save(tmp_path / f"{i}.safetensors")) for i, d in enumerate((one, two))]
    with pytest.raises(OptxError, match="the two are of different bases; they differ at 'w1'"):
        files[0] + files[1]
    with pytest.raises(OptxError, match="different bases; they differ at 'w1'"):
        optx.Compressed.average([optx.compress(one), optx.compress(two)])


def test_files_of_before_are_still_checked_as_before(tmp_path: Path) -> None:
    """Without hashes of whole tensors, by the first numbers."""
    delta = Delta.between(far(0), tuned())
    delta.contents, delta.bases = {}, ()
    delta.apply(far(0, by=2.0))
    with pytest.raises(OptxError, match="'w1' differs"):
        delta.apply(far(0, at=3, by=2.0))


# ---- resuming --------------------------------------------------------------------------------------------


def stopping(names: Any) -> Any:
    for number, name in enumerate(names):
        if number == 15:
            raise KeyboardInterrupt
        yield name


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_safetensors_writer.Writer, "FLUSH", 1)


def models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base = {f"w{i:02}": torch.zeros(1000) for i in range(20)}
    return base, {name: tensor + 1 for name, tensor in base.items()}


@pytest.mark.parametrize("what", ["model", "base", "delta", "apply", "compressed"])
def test_other_numbers_in_memory_begin_anew(what: str, often: None, tmp_path: Path) -> None:
    """resumed_with_other_input.py"""
    base, one = models()
    out = tmp_path / "m.safetensors"

    def go(**options: Any) -> Any:
        if what == "apply":
            return Delta.between(base, one).apply(base, out, **options)
        if what == "compressed":
            state = optx.compress(Delta.between(base, one)).state_dict()
            return optx.Compressed.from_state_dict(state).delta().apply(base, out, **options)
        if what == "delta":
            return optx.merge(
                base, [Delta.between(base, one).magnitude(0.0)], optx.TaskArithmetic(), out, **options
            )
        return optx.merge(base, [one], optx.TaskArithmetic(), out, **options)

    with pytest.raises(KeyboardInterrupt):
        go(progress=stopping)
    assert (tmp_path / ".m.safetensors.part").exists()
    for tensor in (base if what == "base" else one).values():
        tensor[500:] = 9.0 if what != "compressed" else 0.0
    made = load_file(go())
    if what == "compressed":
        assert all(not bool(t[999]) for t in made.values())
    else:
        assert {float(t[999]) for t in made.values()} == {9.0 if what != "base" else 1.0}


def test_the_same_numbers_go_on(often: None, tmp_path: Path) -> None:
    base, one = models()
    out, seen = tmp_path / "m.safetensors", list[str]()

    def counting(names: Any) -> Any:
        for name in names:
            seen.append(name)
            yield name

    with pytest.raises(KeyboardInterrupt):
        optx.merge(base, [one], optx.TaskArithmetic(), out, progress=stopping)
    copies = [{n: t.clone() for n, t in state.items()} for state in (base, one)]
    optx.merge(copies[0], [copies[1]], optx.TaskArithmetic(), out, progress=counting)
    assert 0 < len(seen) <= 8


@pytest.mark.parametrize("keep_times", [True, False])
def test_other_files_under_the_same_names_begin_anew(keep_times: bool, often: None, tmp_path: Path) -> None:
    """Of the same size, and with the old one's times."""
    base, one = models()
    save(tmp_path, base=base, one=one)
    paths, out = [tmp_path / "base.safetensors", tmp_path / "one.safetensors"], tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        optx.merge(paths[0], [paths[1]], optx.TaskArithmetic(), out, progress=stopping)
    times = paths[1].stat()
    save(tmp_path, one={n: torch.cat([t[:500], t[500:] + 8]) for n, t in one.items()})
    if keep_times:
        os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    made = load_file(optx.merge(paths[0], [paths[1]], optx.TaskArithmetic(), out))
    assert {float(t[999]) for t in made.values()} == {9.0}


def test_a_part_that_was_cut_begins_anew(often: None, tmp_path: Path) -> None:
    base, one = models()
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        optx.merge(base, [one], optx.TaskArithmetic(), out, progress=stopping)
    os.truncate(tmp_path / ".m.safetensors.part", 3000)
    made = load_file(optx.merge(base, [one], optx.TaskArithmetic(), out))
    assert all(bool((t == 1).all()) for t in made.values())
