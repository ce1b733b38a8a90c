"""The cache of compiled kernels: damaged files, strangers' files and folders, and none at all."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import pytest
from cached import files

from optx._cache import NoCacheError, PrivateFolder, UnsafeCacheError, cache_root
from optx.kernels import generated, jit

pytestmark = pytest.mark.usefixtures("cache")
POSIX = os.name == "posix"
ROOT = POSIX and os.geteuid() == 0
STRANGER = 54321
posix = pytest.mark.skipif(not POSIX, reason="owners and modes are POSIX")
as_root = pytest.mark.skipif(not ROOT, reason="only root can give files away")
TEXT = """
from numba import types
from optx.kernels.jit import cfunc

@cfunc(types.int64(types.int64), cache=True)
def first(x):
    return x + {number}

@cfunc(types.int64(types.int64), cache=True)
def second(x):
    return x * {number}
"""


@pytest.fixture
def load() -> Iterator[Callable[[], tuple[int, int, int]]]:
    """As a new process would: 3 + 7 and 3 * 7 by a module's two functions, and how many were in the cache."""
    text = TEXT.format(number=7) + f"# {uuid.uuid4()}\n"
    loaded: list[ModuleType] = []

    def load() -> tuple[int, int, int]:
        if loaded:
            sys.modules.pop(loaded.pop().__name__, None)
        module = generated.load_module("test", text)
        loaded.append(module)
        call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
        first, second = module.first, module.second
        return call(first.address)(3), call(second.address)(3), first.cache_hits + second.cache_hits

    yield load
    for module in loaded:
        sys.modules.pop(module.__name__, None)


# ---- damaged files ------------------------------------------------------------------------------------


class Payload:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _folder(file: Path) -> None:
    file.unlink()
    (file / "more").mkdir(parents=True)


def _link(file: Path) -> None:
    aside = file.with_name("elsewhere")
    file.rename(aside)
    file.symlink_to(aside)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "one byte": lambda file: file.write_bytes(b"o"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "head only": lambda file: file.write_bytes(file.read_bytes()[: len(jit._MAGIC) + 32]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a bit": _flipped,
    "garbage": lambda file: file.write_bytes(os.urandom(5000)),
    "a pickle": lambda file: file.write_bytes(pickle.dumps({"version": numba.__version__})),
    "a pickle that runs": lambda file: file.write_bytes(pickle.dumps(Payload(file.with_name("ran")))),
    "a folder": _folder,
    "a link": _link,
    "a pipe": _pipe,
}


@posix
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(
    cache: Path, load: Callable[[], tuple[int, int, int]], damage: str
) -> None:
    assert load() == (10, 21, 0)
    first, second = files(cache)
    DAMAGES[damage](first)
    assert load() == (10, 21, 1)
    assert first.is_file()
    assert not first.is_symlink()
    assert load() == (10, 21, 2)
    assert not (cache / "kernels" / "ran").exists()
    assert {first, second} <= set(files(cache))


def test_exchanged_files_are_made_anew(cache: Path, load: Callable[[], tuple[int, int, int]]) -> None:
    load()
    first, second = files(cache)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert load() == (10, 21, 0)
    assert load() == (10, 21, 2)


def test_content_that_no_longer_loads_is_made_anew(
    cache: Path, load: Callable[[], tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and yet of no use: say, pickled among other modules."""
    with monkeypatch.context() as patch:
        patch.setattr(jit, "dumps", lambda _: pickle.dumps(("no", "code")))
        load()
    assert load() == (10, 21, 0)
    assert load() == (10, 21, 2)


def test_code_of_another_processor_or_other_settings_is_not_taken(
    load: Callable[[], tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    with monkeypatch.context() as patch:
        patch.setattr(numba.config, "CPU_NAME", "generic")
        assert load() == (10, 21, 0)
    with monkeypatch.context() as patch:
        patch.setattr(numba.config, "BOUNDSCHECK", 1)
        assert load() == (10, 21, 0)
    with monkeypatch.context() as patch:
        patch.setattr(numba, "__version__", "0.0")
        assert load() == (10, 21, 0)
    assert load() == (10, 21, 2)  # and each has a file of its own


def test_generated_text_is_never_read_from_a_file(
    cache: Path, load: Callable[[], tuple[int, int, int]], tmp_path: Path
) -> None:
    load()
    name = next(n for n in sys.modules if n.startswith("test_") and "first" in vars(sys.modules[n]))
    for folder in (cache, cache / "kernels", Path.cwd() if Path.cwd() == tmp_path else tmp_path):
        (folder / f"{name}.py").write_text("raise SystemExit('planted')")
    assert load() == (10, 21, 2)


# ---- folders ------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("umask", [0, 0o002, 0o077, 0o277])
def test_what_is_made_is_the_users_alone_whatever_the_umask(
    cache: Path, load: Callable[[], tuple[int, int, int]], umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTX_CACHE_DIR", str(cache / "deep" / "root"))
    before = os.umask(umask)
    try:
        load()
    finally:
        os.umask(before)
    made = [cache, *cache.rglob("*")]
    assert len(made) == 6
    modes = {stat.S_IMODE(path.stat().st_mode) for path in made if path.is_dir()}
    assert modes == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made if path.is_file()} == {0o600}


@posix
def test_a_folder_open_to_others_is_closed(cache: Path, load: Callable[[], tuple[int, int, int]]) -> None:
    (cache / "kernels").mkdir(parents=True)
    (cache / "kernels").chmod(0o777)
    cache.chmod(0o755)
    load()
    assert stat.S_IMODE((cache / "kernels").stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755  # a person's own folder keeps its mode
    (cache / "kernels").chmod(0o775)
    assert load() == (10, 21, 2)
    assert stat.S_IMODE((cache / "kernels").stat().st_mode) == 0o700


def plant(folder: Path, mark: Path) -> None:
    """Files as one who knows the format makes them: the right names and digests, and pickles that run."""
    for file in folder.iterdir():
        head, payload = file.read_bytes()[: len(jit._MAGIC)], pickle.dumps(Payload(mark))
        assert head == jit._MAGIC
        file.write_bytes(head + b"\0" * 32 + payload)


@pytest.fixture
def any_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests fit whatever there is, as they do for a forger: only ownership is left to tell."""
    monkeypatch.setattr(jit, "_head", lambda key, payload: jit._MAGIC + b"\0" * 32)


@as_root
def test_a_strangers_folder_is_not_used_and_said_once(
    cache: Path, load: Callable[[], tuple[int, int, int]], any_digest: None, recwarn: pytest.WarningsRecorder
) -> None:
    load()
    mark = cache / "ran"
    plant(cache / "kernels", mark)
    before = {file: file.read_bytes() for file in files(cache)}
    os.chown(cache / "kernels", STRANGER, -1)
    with pytest.warns(
        UserWarning, match=r"kernels belongs to user 54321, not to user 0.*OPTX_CACHE_DIR"
    ) as w:
        assert load() == (10, 21, 0)
    assert [Path(item.filename).name for item in w] == ["test_cache.py"]
    assert load() == (10, 21, 0)
    assert not mark.exists()
    assert {file: file.read_bytes() for file in files(cache)} == before
    assert not recwarn.list


@as_root
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_a_strangers_file_in_the_users_folder_is_not_run(
    cache: Path, load: Callable[[], tuple[int, int, int]], any_digest: None, how: str
) -> None:
    """Put there while the folder was open to others."""
    load()
    plant(cache / "kernels", cache / "ran")
    for file in files(cache):
        if how == "owner":
            os.chown(file, STRANGER, -1)
        else:
            file.chmod(0o666)
    assert load() == (10, 21, 0)
    assert not (cache / "ran").exists()
    assert all(f.stat().st_uid == 0 and stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files(cache))


@as_root
def test_a_folder_whose_mode_cannot_be_mended_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems without modes."""
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    with pytest.raises(UnsafeCacheError, match="can be written by others"):
        PrivateFolder(cache).check()


@posix
def test_links_are_followed_if_they_are_the_users(
    cache: Path, load: Callable[[], tuple[int, int, int]], tmp_path: Path
) -> None:
    (tmp_path / "scratch" / "kernels").mkdir(parents=True)
    cache.symlink_to(tmp_path / "scratch")
    assert load() == (10, 21, 0)
    assert len(files(tmp_path / "scratch")) == 2
    (tmp_path / "scratch" / "kernels").rename(tmp_path / "moved")
    (tmp_path / "scratch" / "kernels").symlink_to(tmp_path / "moved")
    assert load() == (10, 21, 2)
    if ROOT:
        os.chown(tmp_path / "scratch" / "kernels", STRANGER, -1, follow_symlinks=False)
        with pytest.warns(UserWarning, match="belongs to user 54321"):
            assert load() == (10, 21, 0)


def _file(path: Path) -> Path:
    path.touch()
    return path


@posix
@pytest.mark.parametrize("kind", ["file", "below a file", "cannot be made", "kernels is a file", "no home"])
def test_without_a_cache_kernels_are_compiled_all_the_same(
    load: Callable[[], tuple[int, int, int]], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = {
        "file": lambda: _file(tmp_path / "file"),
        "below a file": lambda: _file(tmp_path / "file") / "cache",
        "cannot be made": lambda: Path("/proc/optx"),
        "kernels is a file": lambda: _file(tmp_path / "kernels").parent,
        "no home": lambda: Path("~no.user.of.this.name/cache"),
    }
    monkeypatch.setenv("OPTX_CACHE_DIR", str(roots[kind]()))
    before = sorted(tmp_path.rglob("*"))
    assert load() == (10, 21, 0)
    assert load() == (10, 21, 0)
    assert sorted(tmp_path.rglob("*")) == before
    assert generated.cache_folder() is None


@posix
def test_a_full_disk_leaves_no_part_of_a_file(cache: Path, load: Callable[[], tuple[int, int, int]]) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert load() == (10, 21, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(cache) == []
    assert load() == (10, 21, 0)
    assert load() == (10, 21, 2)


# ---- which folder -------------------------------------------------------------------------------------


@posix
def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    if sys.platform == "darwin":
        pytest.skip("other folders")
    own = Path(pwd.getpwuid(os.getuid()).pw_dir)
    for variables, expected in [
        ({"OPTX_CACHE_DIR": "/a/b"}, Path("/a/b")),
        ({"OPTX_CACHE_DIR": "~/a", "HOME": "/h"}, Path("/h/a")),
        ({"OPTX_CACHE_DIR": "", "XDG_CACHE_HOME": "/x"}, Path("/x/optx")),
        ({"OPTX_CACHE_DIR": "", "XDG_CACHE_HOME": "~/x", "HOME": "/h"}, Path("/h/x/optx")),
        ({"OPTX_CACHE_DIR": "", "XDG_CACHE_HOME": "relative", "HOME": "/h"}, Path("/h/.cache/optx")),
        ({"OPTX_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": ""}, own / ".cache" / "optx"),
        ({"OPTX_CACHE_DIR": "~", "HOME": "relative"}, own),
    ]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert cache_root() == expected, variables


@posix
def test_a_relative_folder_is_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"cache-{uuid.uuid4()}"
    monkeypatch.setenv("OPTX_CACHE_DIR", name)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(NoCacheError, match="relative to a folder that is gone; give an absolute one"):
        cache_root()
    monkeypatch.chdir(tmp_path)
    assert cache_root() == tmp_path / name
    monkeypatch.chdir("/")
    assert cache_root() == tmp_path / name


def test_digests_cover_name_and_content() -> None:
    """So that no other file passes: not one of another key, nor one whose border to the key moved."""
    assert jit._head(b"a", b"bc") != jit._head(b"a", b"bd") != jit._head(b"ab", b"c")
    assert jit._head(b"a", b"b") == jit._MAGIC + hashlib.sha256(b"a\nb").digest()


def test_loading_costs_little(load: Callable[[], tuple[int, int, int]]) -> None:
    """Nothing of this runs at a step; at a load it is a few system calls."""
    load()
    times: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        generated._warn_of_unsafe_cache()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.01
