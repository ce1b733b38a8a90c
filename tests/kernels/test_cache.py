"""The machine: damaged, foreign and absent caches; compilers that are absent, broken or switched off."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import pytest
import torch
from torch import nn

import optx
from optx._cache import NoCacheError, PrivateFolder, UnsafeCacheError, cache_root
from optx.delta import _order_statistics, _random_mask
from optx.kernels import available, generated, jit
from optx.signal import stablemax

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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def files(cache: Path) -> list[Path]:
    return sorted((cache / "kernels").iterdir())


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


# ---- compilers ----------------------------------------------------------------------------------------

STEP = """
import torch, optx
torch.set_num_threads(1)
w = torch.nn.Parameter(torch.arange(9.0))
o = optx.wrap(torch.optim.SGD([w], lr=0.5), fused=FUSED)
w.grad = torch.linspace(1, -2, 9)
o.step()
[plan] = o.plan()
shown = {"w": w.tolist(), "path": plan.path, "reason": plan.reason}
"""


def start(program: str, **environment: str | Path | None) -> subprocess.Popen[str]:
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    for name in ("HOME", "XDG_CACHE_HOME") if environment.get("HOME", "") is None else ():
        variables.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", program + "\nimport json; print(json.dumps(shown))"],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


COUNT = """
from numba.core import event
compiles = []
class Count(event.Listener):
    def on_start(self, e): compiles.append(e)
    def on_end(self, e): pass
event.register("numba:compile", Count())
"""

# A cache folder that cannot be written: its place is taken by a file.
TAKEN = """
import os
os.environ["OPTX_CACHE_DIR"] = TAKEN
v = torch.nn.Parameter(torch.arange(5.0))
o = optx.wrap(torch.optim.SGD([v], lr=0.5, momentum=0.9), fused=True)  # another kernel
v.grad = torch.ones(5)
o.step()
from optx.kernels.generated import cache_folder
shown["v"], shown["folder"] = v.tolist(), str(cache_folder())
"""

BROKEN = """
import importlib, sys
from pathlib import Path
folder = Path(FAKE)
folder.mkdir()
sys.dont_write_bytecode = True
sys.path.insert(0, str(folder))
from optx.kernels import available
reasons = []
def broken(package, text):
    (folder / package).mkdir(parents=True, exist_ok=True)
    (folder / package / "__init__.py").write_text(text)
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        del sys.modules[name]
    importlib.invalidate_caches()
    available._why_not_imported.cache_clear()
    reasons.append(available.why_unavailable(package))
for package in ("triton", "numba"):
    broken(package, "import " + package + "_lite_that_is_not_there")
    broken(package, "raise OSError('libllvm.so: cannot open shared object file')")
    broken(package, "raise SystemError('initialization failed')")
    broken(package, "raise ImportError('it needs NumPy 2.4 or less.\\\\nGot NumPy 9.')")
"""


def test_processes_without_a_home_or_a_whole_numba_or_at_once(tmp_path: Path, cache: Path) -> None:
    """Five processes, at most two at a time: each costs seconds, and says all that it can."""
    empty = tmp_path / "empty"
    empty.mkdir()
    fused = STEP.replace("FUSED", "True")
    counted = COUNT + fused + "\nshown['compiles'] = len(compiles)"
    # Both find nothing and write the same.
    twins = [start(counted, OPTX_CACHE_DIR=cache, NUMBA_DISABLE_JIT="0") for _ in range(2)]
    one, two = map(result, twins)
    assert one.pop("compiles") + two.pop("compiles") > 0
    assert one == two
    assert one["path"] == "fused cpu"
    made = files(cache)
    assert {path.suffix for path in made} == {".nbc"}  # and no part of one

    homeless = "import pwd\ndef none(u): raise KeyError(u)\npwd.getpwuid = none\n" + fused
    taken = tmp_path / "taken"
    taken.touch()
    homeless += TAKEN.replace("= TAKEN", f"= {str(taken)!r}")
    nowhere = start(homeless, OPTX_CACHE_DIR="", HOME=None, TMPDIR=empty)
    warm = result(start(counted, OPTX_CACHE_DIR=cache))
    assert warm.pop("compiles") == 0
    assert warm == one
    assert files(cache) == made
    broken = start(
        BROKEN.replace("FAKE", repr(str(tmp_path / "fake")))
        + STEP.replace("FUSED", "'auto'")
        # The same again through the other callers;
        + "\nshown['reasons'] = reasons"
        + "\nshown['loss'] = float(optx.stablemax_cross_entropy(torch.eye(3), torch.arange(3)))"
        + "\nfrom optx.delta._random_mask import Dropout"
        + "\nshown['kept'] = Dropout(5, 0.5, 1.0).keep(0, 99).tolist()"
        + "\ntry: import optx.kernels.ternary.cpu"
        + "\nexcept optx.OptxError as error: shown['ternary'] = str(error)",
        OPTX_CACHE_DIR=cache,
    )
    without = result(nowhere)
    assert without.pop("v") == [x - 0.5 for x in range(5)]
    assert not without.pop("folder").startswith(str(taken))
    assert without == one
    left = [path.name for path in empty.iterdir() if not path.name.startswith("torchinductor")]  # torch's own
    assert left == []  # no temporary folder stays
    got = result(broken)
    said = "{0} can't be imported (ImportError: it needs NumPy 2.4 or less.)"
    assert (got["path"], got["reason"]) == ("foreach", said.format("numba"))
    assert torch.tensor(got["w"]).allclose(torch.tensor(one["w"]), atol=1e-6)
    missing = "{0} can't be imported (ModuleNotFoundError: No module named '{0}_lite_that_is_not_there')"
    assert got["reasons"] == [
        text.format(package)
        for package in ("triton", "numba")
        for text in (
            missing,
            "{0} can't be imported (OSError: libllvm.so: cannot open shared object file)",
            "{0} can't be imported (SystemError: initialization failed)",
            said,
        )
    ]
    loss = stablemax.stablemax_cross_entropy(torch.eye(3), torch.arange(3))
    assert got["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert got["kept"] == _random_mask.Dropout(5, 0.5, 1.0).keep(0, 99).tolist()
    assert got["ternary"].startswith("Compressed deltas need compiled kernels, and numba can't be imported")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    available._why_not_imported.cache_clear()
    try:
        assert available.why_unavailable("triton") == "triton is not installed"
    finally:
        available._why_not_imported.cache_clear()


@pytest.fixture
def no_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``NUMBA_DISABLE_JIT=1`` sets; the variable itself is in the next test."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)


def test_the_variable_that_switches_numba_off(cache: Path) -> None:
    off = start(STEP.replace("FUSED", "'auto'"), NUMBA_DISABLE_JIT="1")
    got = result(off)
    assert (got["path"], got["reason"]) == (
        "foreach",
        "Numba's compiler is switched off (NUMBA_DISABLE_JIT)",
    )


def wrapped(fused: Any) -> tuple[nn.Parameter, optx.Wrapped]:
    p = nn.Parameter(torch.arange(5.0))
    opt = optx.wrap(torch.optim.SGD([p], lr=0.5), optx.PerpGrad(), fused=fused)
    p.grad = torch.ones(5)
    return p, opt


def test_fused_that_cannot_be_honoured_says_so(no_jit: None) -> None:
    with pytest.raises(optx.FusedError, match="NUMBA_DISABLE_JIT"):
        wrapped(True)[1].step()


def test_switching_numba_off_midway_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is chosen with the compiler on; the kernel is compiled at the first step."""
    p, opt = wrapped(True)
    opt.plan()
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    opt.step()
    q, reference = wrapped(False)
    reference.step()
    torch.testing.assert_close(p, q)


MASKS = [(p, q) for p in (0.0, 0.5, 0.9) for q in (1.0, 0.1, 0.7)]


def test_masks_are_the_same_bits_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    base, old, new = (torch.randn(1001, generator=g) for _ in range(3))
    base[::3] = old[::3]
    base[5], new[7] = float("inf"), float("nan")

    def everything() -> list[bytes]:
        made: list[torch.Tensor] = []
        for p, q in MASKS:
            drop = _random_mask.Dropout(_random_mask.key_of(3, "x"), p, q)
            made += [drop.keep(11, 999).view(torch.uint8), drop.scale(new, 4).view(torch.int32)]
            made += [drop.scale(new.double()).view(torch.int64)]
            made += [drop.onto(base, old, new, 17).view(torch.int32)]
            low = drop.onto(base.bfloat16(), old.bfloat16(), new.bfloat16(), 17)
            made += [low.nan_to_num(nan=123.0).view(torch.int16)]  # a nan's payload is no number
        return [t.numpy().tobytes() for t in made]

    compiled = everything()
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.setattr(_random_mask, "_compiled", None)  # not to be called
    assert everything() == compiled


def test_order_statistics_are_the_same_without_numba(no_jit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_order_statistics, "_FEW", 10)
    monkeypatch.setattr(_order_statistics, "_compiled", None)
    numbers = torch.cat([torch.randn(5000), torch.zeros(9), -torch.zeros(9), torch.tensor([float("inf")])])
    ranks = [0, 1, 2500, 2501, 5015, 5018]
    got = _order_statistics.order_statistics(
        lambda: [[part] for part in numbers.split(999)], [ranks], len(numbers)
    )
    assert got == [numbers.sort().values[ranks].tolist()]


def test_stablemax_is_the_same_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 11, requires_grad=True)
    target = torch.arange(7)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        loss = stablemax.stablemax_cross_entropy(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    compiled = both()
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert stablemax._path(logits) is stablemax._TORCH
    torch.testing.assert_close(both(), compiled)


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
