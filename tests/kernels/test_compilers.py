"""Compilers that are absent, broken or switched off: the same numbers, or a sentence that says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from cached import files
from torch import nn

import optx
from optx.delta import _order_statistics, _random_mask
from optx.kernels import available
from optx.signal import stablemax

pytestmark = pytest.mark.usefixtures("cache")

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


@pytest.mark.long
def test_processes_without_a_home_or_a_whole_numba_or_at_once(tmp_path: Path, cache: Path) -> None:
    """Five processes, at most two at a time: each costs seconds, and says all that it can."""
    empty = tmp_path / "empty"
    empty.mkdir()
    fused = STEP.replace("FUSED", "True")
    counted = COUNT + fused + "\nshown['compiles'] = len(compiles)"
    # Both find nothing: one compiles, and the other waits for what it keeps.
    twins = [start(counted, OPTX_CACHE_DIR=cache, NUMBA_DISABLE_JIT="0") for _ in range(2)]
    one, two = map(result, twins)
    few, many = sorted((one.pop("compiles"), two.pop("compiles")))
    assert few == 0 < many
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


@pytest.mark.long
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
