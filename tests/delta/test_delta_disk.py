"""`optx.Delta` and the disk: too small, full, killed at any moment, and the memory that it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import content, equal, normal, state
from safetensors.torch import load_file, save_file

import optx
from optx import Delta, FileError, OptxError
from optx._safetensors import Entry
from optx.delta import _background_file, _checkpoint_output, _delta_file, _safetensors_writer
from optx.delta._background_file import BackgroundFile
from optx.delta._safetensors_writer import Writer

F32 = torch.float32
Usage = namedtuple("Usage", "total used free")


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


@pytest.mark.long(keep=2)
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
    # Of a kill just after the renaming a lock or a journal may be left, until the next call says it is there.
    delta = Delta.between(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(OptxError, match="exists already"):
        delta.apply(tmp_path / "base", out) if kind == "apply" else delta.save(out)
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


@pytest.mark.long
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


@pytest.mark.parametrize("name", ["", ".", "a\0b.safetensors"])
def test_names_that_no_output_can_have(name: str, tmp_path: Path) -> None:
    """They are refused, and not by pathlib."""
    base = {"w": torch.zeros(3)}
    delta = Delta.between(base, {"w": torch.ones(3)})
    for call in (
        lambda: delta.apply(base, name),
        lambda: optx.merge(base, [base], optx.TaskArithmetic(), name),
        lambda: optx.compress(delta).save(name),
    ):
        with pytest.raises(OptxError, match="is no name of a new file or folder"):
            call()


@pytest.mark.parametrize("scale", ["2", None, float("nan"), float("inf"), torch.ones(2)])
def test_a_scale_is_a_finite_number(scale: Any, tmp_path: Path) -> None:
    """Said before a file is begun."""
    base = {"w": torch.zeros(3)}
    delta = Delta.between(base, {"w": torch.ones(3)})
    with pytest.raises(OptxError, match=r"scale is .*; it must be a finite number"):
        delta.apply(base, tmp_path / "out.safetensors", scale=scale)
    with pytest.raises(OptxError, match=r"the factor is .*; it must be a finite number"):
        delta * scale
    assert not list(tmp_path.iterdir())
