"""How a checkpoint gets to the disk: past the page cache, by pieces made ahead, in memory used again."""

from __future__ import annotations

import errno
import random
import tempfile
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from optx import Delta, _buffers
from optx._safetensors import Entry
from optx.delta import _background_file, _safetensors_writer
from optx.delta._background_file import BackgroundFile
from optx.delta._safetensors_writer import Writer

F32, BF16 = torch.float32, torch.bfloat16


def state(seed: int) -> dict[str, Tensor]:
    layers = {f"layer.{i}.weight": normal(7, 40, seed=seed + i).to(BF16) for i in range(3)}
    return {**layers, "steps": torch.tensor([seed])}


@given(
    writes=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 30_000)), min_size=1, max_size=12),
    path=st.sampled_from(["direct", "usual", "refused"]),
)
@settings(max_examples=30)
def test_whatever_is_written_is_there(writes: list[tuple[int, int]], path: str) -> None:
    """At any place, in any order, over what is there: past the page cache, through it, and from one to the
    other when the file system has second thoughts."""

    class Refuses(FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

    wanted, generator = bytearray(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackgroundFile, "STAGE", 1 << 13)
        file = FileIO(Path(folder) / "x", "w")
        if path == "usual":
            patch.setattr(_background_file, "_direct", lambda _file: None)
        elif path == "refused":
            patch.setattr(_background_file, "_direct", lambda file: Refuses(file.name, "r+"))
        behind, safe = BackgroundFile(file), list[int]()
        for offset, count in writes:
            data = generator.randbytes(count)
            wanted.extend(bytes(max(0, offset + count - len(wanted))) if count else b"")
            wanted[offset : offset + count] = data
            behind.write(data, offset)
            behind.sync(lambda: safe.append(0))
        behind.wait()
        behind.close()
        assert (Path(folder) / "x").read_bytes() == wanted
        assert len(safe) == len(writes)


def test_the_disk_is_written_past_the_page_cache(tmp_path: Path) -> None:
    """Where it can be: this is what makes it fast."""
    behind = BackgroundFile(FileIO(tmp_path / "x", "w"))
    if (direct := behind._direct) is None:
        pytest.skip("the file system has no O_DIRECT")
    written: list[int] = []
    data = bytes(range(256)) * 40_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _background_file,
            "_put",
            lambda file, part, offset: written.append(part.nbytes * (file is direct)),
        )
        behind.write(data, 8)
        behind.wait()
    assert len(data) - 2 * 4096 <= sum(written) <= len(data)
    behind.close()


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    _buffers.release()
    one = _buffers.empty(_buffers.SIZE // 4, F32)
    place, view = one.data_ptr(), one[10:20]
    del one
    two = _buffers.empty(_buffers.SIZE // 4, F32)
    assert two.data_ptr() != place  # the view is alive
    view.fill_(1)
    two.fill_(2)
    assert view.tolist() == [1] * 10
    del view
    assert _buffers.empty(_buffers.SIZE // 4, F32).data_ptr() == place


def test_an_error_in_the_last_piece_is_not_lost(tmp_path: Path) -> None:
    def piece(begin: int, end: int) -> Tensor:
        if end == 10:
            raise ValueError("the last")
        return torch.zeros(end - begin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_safetensors_writer, "PIECE", 4)
        patch.setattr(Writer, "FLUSH", 1)
        writer = Writer(tmp_path / "x.safetensors", {"a": Entry((10,), F32)}, {}, "plan")
        writer.write_pieces("a", piece)
        with pytest.raises(ValueError, match="the last"):
            writer.finish()
        writer.close()
    again = Writer(tmp_path / "x.safetensors", {"a": Entry((10,), F32)}, {}, "plan")
    again.close()
    assert not again.written
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("size", [3, 64, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_and_threads_do_not_matter(
    size: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do empty tensors and those that are written whole, in between."""
    base = {**state(0), "none": torch.zeros(0, 4), "wide": normal(41, 3)}
    tuned = {**state(9), "none": torch.zeros(0, 4), "wide": normal(41, 3, seed=1)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    wanted = Delta.between(base, tuned).dare(0.5).apply(base)
    monkeypatch.setattr(_safetensors_writer, "PIECE", size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        delta = Delta.between(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors").dare(0.5)
        delta.apply(tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    finally:
        torch.set_num_threads(before)
    made = load_file(tmp_path / "out.safetensors")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())
