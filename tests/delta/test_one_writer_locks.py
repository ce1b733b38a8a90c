"""The lock beside an output: what is not ours, what ends in the midst of taking it, and whose it is."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optx import FileError, OptxError
from optx.delta import _claim
from optx.delta._claim import claimed

LOCK = Path(".out.lock")
OURS = _claim._MARK + f"{os.getpid()} on {_claim.socket.gethostname()}\n".encode()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("precious")
    Path("empty").touch()


FOREIGN: dict[str, Callable[[], Any]] = {
    "a file": lambda: LOCK.write_text("precious"),
    "a link": lambda: os.symlink("mine", LOCK),
    "a link to an empty file": lambda: os.symlink("empty", LOCK),
    "another name of a file": lambda: os.link("mine", LOCK),
    "another name of an empty file": lambda: os.link("empty", LOCK),
    "a pipe": lambda: os.mkfifo(LOCK),
    "a folder": lambda: LOCK.mkdir(),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_lock_that_is_not_ours_stays(what: str) -> None:
    FOREIGN[what]()
    before, open_files = LOCK.lstat(), len(os.listdir("/dev/fd"))
    with (
        pytest.raises(FileError, match=r"is a file that optx did not make. Move it away"),
        claimed(Path("out")),
    ):
        pass
    assert os.path.samestat(before, LOCK.lstat())
    assert len(os.listdir("/dev/fd")) == open_files
    assert (Path("mine").read_text(), Path("empty").read_text()) == ("precious", "")


def test_one_output_by_two_names() -> None:
    Path("folder").mkdir()
    with claimed(Path("out")), claimed(Path("folder/../out")):
        assert LOCK.read_bytes() == OURS
    assert not LOCK.exists()


def test_what_a_killed_one_has_left_is_written_anew() -> None:
    LOCK.write_bytes(_claim._MARK + b"1234567890 on a.host.of.a.very.long.name" + b"e" * 60 + b"\n")
    with claimed(Path("out")):
        assert LOCK.read_bytes() == OURS


@pytest.mark.parametrize("then", ["gone", "another's"])
def test_the_lock_goes_away_before_it_is_held(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder unlinks it between the opening and the locking; and somebody may have made the next."""
    LOCK.touch()
    flock, calls = fcntl.flock, list[int]()

    def late(*args: Any) -> None:
        if not calls:
            LOCK.unlink()
            if then != "gone":
                Path("next").touch()
                Path("next").rename(LOCK)
        calls.append(1)
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(Path("out")):
        assert LOCK.read_bytes() == OURS
    assert len(calls) == 2


def test_the_lock_goes_away_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, calls = os.open, list[int]()

    def late(path: Any, flags: int, *rest: Any) -> int:
        calls.append(flags)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, "exists")
        return opened(path, flags, *rest)

    monkeypatch.setattr(_claim.os, "open", late)
    with claimed(Path("out")):
        assert LOCK.read_bytes() == OURS
    assert len(calls) == 3


@pytest.mark.parametrize("alive", [True, False])
def test_another_users_process_is_alive(alive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no locks; and a number that no process can have is nobody's."""

    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    def kill(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "another user's")

    monkeypatch.setattr(fcntl, "flock", refuses)
    pid = os.getppid() if alive else 10**30
    LOCK.write_bytes(_claim._MARK + f"{pid} on {_claim.socket.gethostname()}\n".encode())
    if not alive:
        with claimed(Path("out")):
            assert LOCK.read_bytes() == OURS
        return
    monkeypatch.setattr(_claim.os, "kill", kill)
    with pytest.raises(OptxError, match=rf"another process \({pid}\)"), claimed(Path("out")):
        pass


def test_a_place_where_no_lock_can_be_made() -> None:
    with pytest.raises(FileError, match=r"^'mine/out' can't be written"), claimed(Path("mine/out")):
        pass
