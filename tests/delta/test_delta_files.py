"""`optx.Delta` over files: sharded folders, memory, kills, full disks, and a delta's own file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import optx
from optx import Delta, FileError, OptxError
from optx._safetensors import Entry
from optx.delta import _background_file, _checkpoint_output, _delta_file, _safetensors_writer
from optx.delta._background_file import BackgroundFile
from optx.delta._safetensors_writer import Writer

Usage = namedtuple("Usage", "total used free")
F32, BF16 = torch.float32, torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int, count: int = 4, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    tensors = {f"layer.{i}.weight": normal(50, 40, seed=seed + i).to(dtype) for i in range(count)}
    return {**tensors, "steps": torch.tensor([seed])}


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded Llama and what it became."""
    place = tmp_path_factory.mktemp("models")
    model = llama()
    model.save_pretrained(place / "base", max_shard_size="10KB")
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=number))
    model.save_pretrained(place / "tuned", max_shard_size="10KB")
    assert len(list((place / "base").glob("*.safetensors"))) > 2
    return place / "base", place / "tuned"


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


# ---- the disk --------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused_first(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_checkpoint_output, _delta_file):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: Usage(1000, 900, 100))
    delta = Delta.between(*folders)
    with pytest.raises(OptxError, match=r"GB are needed in .* and 0.00 GB are free"):
        delta.apply(folders[0], tmp_path / "out")
    with pytest.raises(OptxError, match=r"Delta.save: .* are needed"):
        delta.save(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [False, True])
def test_a_disk_that_fills_up(save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails in the middle; with room again, the same call ends in the same bytes."""
    base, tuned = state(0, 12), state(50, 12)
    save_file(base, tmp_path / "base.safetensors")
    delta = Delta.between(tmp_path / "base.safetensors", tuned).dare(0.5)

    def go(name: str) -> Path:
        out = tmp_path / name
        return delta.save(out) if save else delta.apply(tmp_path / "base.safetensors", out)  # type: ignore[return-value]

    wanted = go("wanted.safetensors").read_bytes()
    write, left = _safetensors_writer.FileIO.write, [30_000]

    class Full(_safetensors_writer.FileIO):
        def write(self, data: Any) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return write(self, data)

    with monkeypatch.context() as patch:
        for module in (_safetensors_writer, _background_file):
            patch.setattr(module, "FileIO", Full)
        with pytest.raises(FileError, match="could not be written: No space left on device"):
            go("out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert go("out.safetensors").read_bytes() == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base.safetensors",
        "out.safetensors",
        "wanted.safetensors",
    ]


def test_another_plan_begins_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """What is left of one computation is never mixed with another's."""
    delta = Delta.between(*folders)

    def stop_after(count: int) -> Any:
        def progress(names: Any) -> Any:
            for name in names:
                progress.left -= 1  # type: ignore[attr-defined]
                if progress.left < 0:  # type: ignore[attr-defined]
                    raise KeyboardInterrupt
                yield name

        progress.left = count  # type: ignore[attr-defined]
        return progress

    wanted = content(delta.dare(0.5).apply(folders[0], tmp_path / "wanted"))  # type: ignore[arg-type]
    for other in (delta, delta.dare(0.6), delta.dare(0.5, seed=1), delta * 2.0, delta.dare(0.5)):
        with pytest.raises(KeyboardInterrupt):
            other.apply(folders[0], tmp_path / "out", progress=stop_after(15))
        assert list(tmp_path.joinpath(".out.part").glob("*.safetensors"))  # a whole shard is there
    again: list[str] = []

    def progress(names: Any) -> Any:
        again.extend(names)
        return names

    delta.dare(0.5).apply(folders[0], tmp_path / "out", progress=progress)
    assert 0 < len(again) < len(delta)
    assert content(tmp_path / "out") == wanted


@pytest.mark.parametrize("culprit", ["write", "fsync"])
def test_after_an_error_nothing_is_called_safe(
    culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(FileIO):
        def write(self, data: Any) -> int:
            if culprit == "write":
                raise OSError(28, "No space left on device")
            return super().write(data)

    calls: list[int] = []

    def fsync(file: int) -> None:
        calls.append(file)
        if culprit == "fsync" and len(calls) == 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    file, safe = BackgroundFile(Broken(tmp_path / "x", "w")), list[int]()

    def write() -> None:
        file.write(b"some", 0)
        file.wait()
        file.sync(lambda: safe.append(0))
        file.wait()

    with pytest.raises(OSError, match=r"No space|Input/output"):
        write()
    file.sync(lambda: safe.append(1))
    file.close()
    assert not safe


def test_what_is_safe_is_not_done_again(tmp_path: Path) -> None:
    entries = {name: Entry((100,), F32) for name in "abc"}
    tensors = {name: normal(100, seed=ord(name)) for name in "abc"}
    path = tmp_path / "x.safetensors"
    writer = Writer(path, entries, {}, "plan")
    writer.write("a", tensors["a"])
    writer.flush()
    writer.write("b", tensors["b"])
    writer.close()
    again = Writer(path, entries, {}, "plan")
    assert again.written == {"a"}
    for name in "bc":
        again.write(name, tensors[name])
    again.finish()
    assert equal(load_file(path), tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


KILLED = """
import os, random, signal, sys, time, torch
from pathlib import Path
from optx import Delta
from optx.delta import _safetensors_writer
torch.set_num_threads(1)
_safetensors_writer.Writer.FLUSH = 20_000
folder, kind = Path(sys.argv[1]), sys.argv[2]
plain = _safetensors_writer.Writer._note
def slow(self, name):
    plain(self, name)
    time.sleep(0.004)
_safetensors_writer.Writer._note = slow
def work(name):
    delta = Delta.between(folder / "base", folder / "tuned").dare(0.5)
    delta.apply(folder / "base", folder / name) if kind == "apply" else delta.save(folder / name)
end = "" if kind == "apply" else ".safetensors"
work("warm" + end)  # imports and compiles
start = time.perf_counter()
work("timed" + end)
takes, generator = time.perf_counter() - start, random.Random(0)
for number in range(8):
    child = os.fork()
    if not child:
        work("out" + end)
        os._exit(0)
    time.sleep(takes * generator.uniform(0.1, 0.6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(int((folder / ("out" + end)).exists()), len(list(folder.glob(".out*"))), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["apply", "save"])
def test_kill_at_any_moment(kind: str, tmp_path: Path) -> None:
    """Nothing stands under the final name before it is whole, and the same call ends in the same bytes."""
    for name, seed in (("base", 0), ("tuned", 500)):
        (tmp_path / name).mkdir()
        tensors, index = state(seed, 40), dict[str, str]()
        for number in range(4):
            part = dict(list(tensors.items())[number::4])
            save_file(part, tmp_path / name / f"model-{number}.safetensors")
            index |= dict.fromkeys(part, f"model-{number}.safetensors")
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(optx.__file__).parent.parent)}
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path), kind]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    states = [tuple(map(int, line.split())) for line in told.splitlines()]
    assert any(not there and aside for there, aside in states)  # kills in the middle
    end = "" if kind == "apply" else ".safetensors"
    out, wanted = tmp_path / f"out{end}", tmp_path / f"timed{end}"
    if not out.exists():
        delta = Delta.between(tmp_path / "base", tmp_path / "tuned").dare(0.5)
        delta.apply(tmp_path / "base", out) if kind == "apply" else delta.save(out)
    assert (content(out) == content(wanted)) if out.is_dir() else (out.read_bytes() == wanted.read_bytes())
    assert not list(tmp_path.glob(".out*"))


MEASURED = """
import sys, resource, torch
from pathlib import Path
from optx import Delta
from optx.delta import _safetensors_writer
from optx.delta._background_file import BackgroundFile
folder = Path(sys.argv[1])
def kilobytes(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0])
small = {"w": torch.zeros(8)}
Delta.between(small, small).dare(0.9).apply(small)
_safetensors_writer.PIECE, BackgroundFile.STAGE = 1 << 16, 1 << 18
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
delta = Delta.between(folder / "base.safetensors", folder / "tuned.safetensors").dare(0.9)
delta.apply(folder / "base.safetensors", folder / "out.safetensors")
print(1024 * (kilobytes("VmHWM:") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_pieces(tmp_path: Path) -> None:
    """A tensor of 80 MB is pruned in the memory of some pieces."""
    base = {"w": normal(800, 25_000), "v": torch.ones(5)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"w": base["w"] + 1, "v": base["v"]}, tmp_path / "tuned.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(Path(optx.__file__).parent.parent)}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert 1e5 < int(told) < 30e6
    assert equal(
        load_file(tmp_path / "out.safetensors"),
        Delta.between(base, {"w": base["w"] + 1, "v": base["v"]}).dare(0.9).apply(base),
    )


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
