"""One writer to an output, and hidden files that are known for optx's own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import content
from safetensors.torch import load_file, save_file

import optx
from optx import Delta, FileError, OptxError
from optx.delta import _claim
from optx.delta._claim import claimed

BASE = {f"t{i}": torch.zeros(30, 50) for i in range(8)}
ONE = {n: t + 1 for n, t in BASE.items()}
TWO = {n: t + 2 for n, t in BASE.items()}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, state in (("base", BASE), ("one", ONE), ("two", TWO)):
        Path(name).mkdir()
        save_file(state, f"{name}/model.safetensors")
        save_file(state, f"{name}.safetensors")


def operations(folder: bool) -> dict[str, Any]:
    """What writes: each takes a model, the output, and what wraps the names."""
    end = "" if folder else ".safetensors"

    def small(which: str) -> optx.Compressed:
        return optx.compress(Delta.between("base.safetensors", f"{which}.safetensors"))

    made: dict[str, Any] = {
        "apply": lambda m, out, p: Delta.between(f"base{end}", f"{m}{end}").apply(
            f"base{end}", out, progress=p
        ),
        "dare": lambda m, out, p: (
            Delta.between(f"base{end}", f"{m}{end}").dare(0.5).apply(f"base{end}", out, progress=p)
        ),
        "merge": lambda m, out, p: optx.merge(
            f"base{end}", [f"{m}{end}"], optx.TaskArithmetic(), out, progress=p
        ),
        "merge in passes": lambda m, out, p: optx.merge(
            f"base{end}", [f"{m}{end}"], optx.TIES(), out, progress=p
        ),
        "decoded": lambda m, out, p: small(m).delta().apply(f"base{end}", out, progress=p),
    }
    return made


CASES = [(name, folder) for folder in (True, False) for name in operations(folder)]


@pytest.mark.parametrize(("name", "folder"), CASES)
def test_a_second_writer_is_refused_at_once(name: str, folder: bool, tmp_path: Path) -> None:
    """two_writers.py: in the midst of the first's work; the result is wholly the first's."""
    work, out = operations(folder)[name], f"out{'' if folder else '.safetensors'}"
    errors = list[BaseException]()

    def second() -> None:
        for other in operations(folder).values():
            try:
                other("two", out, list)
            except OptxError as error:
                errors.append(error)

    def progress(names: Any) -> Any:
        for number, each in enumerate(names):
            if number == 3 and not errors:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            yield each

    work("one", out, progress)
    assert len(errors) == len(operations(folder))
    assert {str(error) for error in errors} == {
        f"out: {out!r} is being written by another thread. Wait for it, or give another name."
    }
    made = load_file(f"{out}/model.safetensors" if folder else out)
    assert all(float(t.max()) < 2.5 or name in ("dare", "decoded") for t in made.values())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["Delta.save", "Compressed.save", "Signature.save"])
def test_saving_claims_its_file(kind: str) -> None:
    delta = Delta.between(BASE, ONE)
    saves: dict[str, Any] = {
        "Delta.save": delta.save,
        "Compressed.save": optx.compress(delta).save,
        "Signature.save": optx.Signature(ONE).save,
    }
    errors = list[BaseException]()

    def other() -> None:
        with pytest.raises(OptxError, match="is being written by another thread") as error:
            saves[kind]("out.safetensors")
        errors.append(error.value)

    with claimed(Path("out.safetensors")):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert errors
        saves[kind]("out.safetensors")  # the thread that holds it may
    assert not list(Path().glob(".*"))


WRITER = """
import sys, time, optx
def slow(names):
    for name in names:
        print("writing", flush=True)
        time.sleep(30)
        yield name
optx.merge("base", ["one"], optx.TaskArithmetic(), sys.argv[1], progress=slow)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills")
def test_another_process_and_its_death(tmp_path: Path) -> None:
    """It is named; once it was killed, the same call goes on, and nothing of the lock is left."""
    environment = {**os.environ, "PYTHONPATH": str(Path(optx.__file__).parent.parent)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, "out"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    with pytest.raises(OptxError, match=rf"'out' is being written by another process \({writer.pid}\)"):
        optx.merge("base", ["two"], optx.TaskArithmetic(), "out")
    with pytest.raises(OptxError, match="is being written"):
        optx.merge("base", ["two"], optx.TaskArithmetic(), tmp_path / "one" / ".." / "out")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert Path(".out.lock").exists()
    optx.merge("base", ["one"], optx.TaskArithmetic(), "out")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, "no module"])
def test_file_systems_without_locks(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's name is the lock then, and the process that it names tells whether it is stale."""
    if code == "no module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        import fcntl

        def refuses(*_: Any) -> None:
            raise OSError(code, "no locks here")

        monkeypatch.setattr(fcntl, "flock", refuses)
    lock, host = Path(".out.lock"), _claim.socket.gethostname()
    with claimed(Path("out")):
        assert lock.exists()
        told = list[str]()

        def other() -> None:
            with pytest.raises(OptxError) as error, claimed(Path("out")):
                pass
            told.append(str(error.value))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "is being written by another thread" in told[0]
    assert not lock.exists()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    lock.write_bytes(_claim._MARK + f"{child.pid} on {host}\n".encode())  # of a process that is dead
    with claimed(Path("out")):
        pass
    lock.write_bytes(_claim._MARK + f"{os.getppid()} on {host}\n".encode())
    with pytest.raises(OptxError, match=rf"another process \({os.getppid()}\)"), claimed(Path("out")):
        pass
    lock.write_bytes(_claim._MARK + f"{child.pid} on elsewhere\n".encode())  # where it may be alive
    with (
        pytest.raises(OptxError, match=rf"by process {child.pid} on 'elsewhere'. If that has ended"),
        claimed(Path("out")),
    ):
        pass


# ---- work files ------------------------------------------------------------------------------------------


def test_what_has_a_hidden_name_stays(tmp_path: Path) -> None:
    """work_names.py: links are not followed, what is of others stays, and the work is done elsewhere."""
    Path("mine.txt").write_text("precious")
    foreign: dict[str, Any] = {
        "a link": lambda path: os.symlink(Path("mine.txt").absolute(), path),
        "a link to nowhere": lambda path: os.symlink(tmp_path / "nowhere", path),
        "a file": lambda path: path.write_text("precious"),
        "an empty file": lambda path: path.touch(),
        "a hard link": lambda path: os.link("mine.txt", path),
        "a folder": lambda path: (path.mkdir(), (path / "thesis.txt").write_text("x")),
        "a folder of its own": lambda path: path.mkdir(),
    }
    delta = Delta.between("base", "one")
    for number, (kind, make) in enumerate(foreign.items()):
        for ending in ("part", "journal"):
            for out in (f"{number}{ending}", f"{number}{ending}.safetensors"):
                if kind == "an empty file" and ending == "journal":
                    continue  # optx's own, of a call that was killed before it wrote a word
                hidden = Path(f".{out}.{ending}")
                make(hidden)
                before = (hidden.lstat().st_ino, hidden.is_symlink(), list(hidden.parent.glob(f"{hidden}/*")))
                delta.apply("base", out)
                after = (hidden.lstat().st_ino, hidden.is_symlink(), list(hidden.parent.glob(f"{hidden}/*")))
                assert before == after, (kind, out)
                assert Path("mine.txt").read_text() == "precious"
                assert [p.name for p in tmp_path.glob(f".{out}.*")] == [hidden.name]
    assert not (tmp_path / "nowhere").exists()
    assert not Path("mine.txt").is_symlink()


def test_a_part_is_gone_on_with_by_its_journal_only(tmp_path: Path) -> None:
    """Without the journal, or beside another's, it is not optx's; a link in its place is not followed."""

    def stop(names: Any) -> Any:
        for number, name in enumerate(names):
            if number == 5:
                raise KeyboardInterrupt
            yield name

    def begin() -> None:
        with pytest.raises(KeyboardInterrupt):
            optx.merge("base", ["one"], optx.TaskArithmetic(), "out.safetensors", progress=stop)

    part, journal = Path(".out.safetensors.part"), Path(".out.safetensors.journal")
    begin()
    Path("mine.txt").write_text("precious")
    part.unlink()
    os.symlink(Path("mine.txt").absolute(), part)
    optx.merge("base", ["one"], optx.TaskArithmetic(), "out.safetensors")
    assert Path("mine.txt").read_text() == "precious"
    assert part.is_symlink()
    part.unlink()
    Path("out.safetensors").unlink()
    journal.unlink()
    begin()
    journal.write_text("my diary\n")
    optx.merge("base", ["one"], optx.TaskArithmetic(), "out.safetensors")
    assert journal.read_text() == "my diary\n"
    assert part.exists()
    assert float(load_file("out.safetensors")["t0"][0, 0]) == 1


def test_when_all_names_are_taken() -> None:
    for number in range(20):
        Path(f".out{f'.{number}' if number else ''}.part").write_text("x")
    before = content(Path())
    with pytest.raises(FileError, match="19 more hidden names are taken by files that optx did not make"):
        Delta.between("base", "one").apply("base", "out")
    assert content(Path()) == before


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_an_output_that_somebody_makes_meanwhile_stays(out: str) -> None:
    def progress(names: Any) -> Any:
        for number, name in enumerate(names):
            if number == 2:
                Path(out).write_text("somebody's")
            yield name

    with pytest.raises(FileError, match="somebody else has made it meanwhile"):
        Delta.between("base", "one").apply("base", out, progress=progress)
    assert Path(out).read_text() == "somebody's"


def test_overwriting_is_for_one_at_a_time() -> None:
    """The command line: a second --overwrite finds the new one being written."""
    from optx.delta._overwrite import output

    Path("out").mkdir()
    save_file(BASE, "out/model.safetensors")
    with claimed(Path(".new.out")):
        found = list[str]()

        def other() -> None:
            with (
                pytest.raises(OptxError) as error,
                output(Path("out"), True, [Path("base"), Path("one")]) as path,
            ):
                Delta.between("base", "one").apply("base", path)
            found.append(str(error.value))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "is being written by another thread" in found[0]
    assert float(load_file("out/model.safetensors")["t0"][0, 0]) == 0
