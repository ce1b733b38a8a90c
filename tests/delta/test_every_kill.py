"""kill -9 and a full disk during every operation that writes: nothing half-written under a final name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import normal
from safetensors.torch import save_file

import optx

OPERATIONS: dict[str, str] = {
    "apply": "Delta.between('base', 'tuned').apply('base', out)",
    "apply to a file": "Delta.between('base', 'tuned').apply('base', out + '.safetensors')",
    "dare": "Delta.between('base', 'tuned').dare(0.5).apply('base', out)",
    "whole tensors": "Delta.between('base', 'tuned').magnitude(0.5).apply('base', out)",
    "new heads": "Delta.between('base', 'grown', whole='embed.*').apply('base', out)",
    "save": "Delta.between('base', 'tuned').dare(0.9).save(out + '.safetensors')",
    "load and apply": "Delta.load('delta.safetensors').apply('base', out)",
    "compress": "optx.compress(Delta.between('base', 'tuned')).save(out + '.compeft')",
    "decode": "optx.Compressed.load('x.compeft').delta().apply('base', out)",
    "merge": "optx.merge('base', ['tuned', 'tuned'], optx.TaskArithmetic(), out)",
    "merge in passes": "optx.merge('base', ['tuned'], optx.TIES(), out, dtype=torch.bfloat16)",
    "merge a delta": "optx.merge('base', [Delta.load('delta.safetensors')], optx.TaskArithmetic(), out)",
    "a searched merge": "searched(out)",
    "a patch": "patched(out)",
    "a pruning": "optx.prune('base', optx.Magnitude(0.5), targets='.*', out=out)",
    "command": "typed(['delta', 'dare', 'base', 'tuned', out])",
    "command, overwriting": "typed(['delta', 'dare', 'base', 'tuned', out, '--overwrite'])",
}

PROGRAM = """
import builtins, io, json, os, resource, shutil, signal, sys
from pathlib import Path
import torch, optx
from optx import Delta
from optx.delta import _safetensors_writer
torch.set_num_threads(1)
_safetensors_writer.Writer.FLUSH = 1
os.chdir(sys.argv[1])
def searched(out):
    best = optx.search(lambda lam: -abs(lam - 0.3), {"lam": (0.0, 1.0)}, 5).best
    optx.merge('base', ['tuned'], optx.TaskArithmetic(**best), out)
def patched(out):
    from safetensors.torch import load_file
    signature = optx.Signature({n: t - 1 for n, t in load_file('base/one.safetensors').items()})
    signature.save(out + '.safetensors')
def typed(words):
    from optx.cli import app
    from typer.testing import CliRunner
    done = CliRunner().invoke(app, words)
    if done.exit_code:
        raise optx.OptxError(done.output)
now = ['']
def work(out):
    exec(now[0])
operations = json.loads(sys.argv[2])
for name, now[0] in operations.items():
    work('warm-' + name.replace(' ', '-'))  # imports and compiles
calls, stop = [0], [-1]
def counted(function):
    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] == stop[0]:
            os.kill(os.getpid(), 9)
        return function(*arguments, **options)
    return call
# Every call by which a file comes to be, grows, is made safe, gets its name or goes.
for name in 'open replace rename unlink remove mkdir rmdir fsync ftruncate pwrite'.split():
    setattr(os, name, counted(getattr(os, name)))
_safetensors_writer.BackgroundFile.write = counted(_safetensors_writer.BackgroundFile.write)
io.open = builtins.open = counted(io.open)
def fork(prepare):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            prepare()
            work('out')
            status = 0
        except (optx.OptxError, OSError) as error:
            status = 3
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]
def clean():
    for path in Path().glob('*out*'):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in Path().glob('.*out*'):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
def start():
    if 'overwrite' in now[0]:
        shutil.copytree('old', 'out')
"""

TREE = """
def tree():
    found = sorted(Path().glob('out*')) + sorted(Path().glob('out*/**/*'))
    return {str(p): p.read_bytes() for p in found if p.is_file()}
points = int(sys.argv[3])
"""

KILLS = """
def killed(name, wanted, before, total):
    kills = 0
    for at in sorted({1 + total * k // points for k in range(points)} | {total - 1, total}):
        start()
        def prepare(at=at):
            calls[0], stop[0] = 0, at
        kills += fork(prepare) == 9
        there = tree()
        # whole, as it was, or (between the two renames of --overwrite) away for the moment
        if there not in (wanted, before, {}):
            print(name, 'HALF at', at, 'of', total, sorted(there))
        if there != wanted:
            if fork(lambda: None):
                print(name, 'NOT RESUMED at', at)
            if tree() != wanted:
                print(name, 'OTHER BYTES at', at)
        else:
            fork(lambda: None)  # is refused, as the output is there, and tidies up
        clean()
    print(name, 'kills', kills)
"""

FULL = """
def refused(name, wanted, before):
    full, largest = 0, max(len(data) for data in wanted.values())
    for limit in (200, largest // 2):
        start()
        status = fork(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        if tree() not in (wanted, before):
            print(name, 'HALF with', limit)
        if os.WEXITSTATUS(status) not in (0, 3):
            print(name, 'NOT REFUSED with', limit, status)
        full += os.WEXITSTATUS(status) == 3
        if tree() != wanted and fork(lambda: None):
            print(name, 'NOT RESUMED with', limit)
        if tree() != wanted:
            print(name, 'OTHER BYTES with', limit)
        clean()
    print(name, 'full', full)
"""

EACH = """
for name, now[0] in operations.items():
    clean(); start(); before = tree(); calls[0], stop[0] = 0, -1
    work('out'); total, wanted = calls[0], tree(); clean()
    killed(name, wanted, before, total)
    refused(name, wanted, before)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base = {
        "embed.weight": normal(6, 50),
        "a.weight": normal(40, 50),
        "b.weight": normal(30, 50),
        "n": torch.tensor(3),
    }
    models: dict[str, dict[str, Any]] = {
        "base": base,
        "tuned": {n: t + 1 for n, t in base.items()},
        "old": base,
        "grown": {**base, "embed.weight": normal(8, 50), "a.weight": base["a.weight"] + 1},
    }
    for name, state in models.items():
        (tmp_path / name).mkdir()
        save_file({n: state[n] for n in ("embed.weight", "a.weight")}, tmp_path / name / "one.safetensors")
        save_file({n: state[n] for n in ("b.weight", "n")}, tmp_path / name / "two.safetensors")
        (tmp_path / name / "config.json").write_text('{"dtype": "float32"}')
        (tmp_path / name / "tokenizer.json").write_text("x" * 3000)
    delta = optx.Delta.between(tmp_path / "base", tmp_path / "tuned")
    delta.dare(0.9).save(tmp_path / "delta.safetensors")
    optx.compress(delta).save(tmp_path / "x.compeft")
    return tmp_path


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def test_killed_and_out_of_space_in_every_operation(place: Path) -> None:
    """By SIGKILL, and by the system's own limit of a file's size, which a write meets as it does a full disk.

    Both in one process: it is its imports and what it compiles that take long.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(optx.__file__).parent.parent)}
    points = os.environ.get("OPTX_KILLS", "2")  # 14 of them take four minutes
    program = PROGRAM + TREE + KILLS + FULL + EACH
    command = [sys.executable, "-W", "ignore", "-c", program, str(place), json.dumps(OPERATIONS), points]
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert told.returncode == 0, told.stdout + told.stderr
    for word in ("HALF", "NOT REFUSED", "NOT RESUMED", "OTHER BYTES"):
        assert word not in told.stdout, told.stdout
    lines = told.stdout.splitlines()
    wanted = [f"{name} {word}" for name in OPERATIONS for word in ("kills", "full")]
    assert [line.rpartition(" ")[0] for line in lines] == wanted
    assert all(int(line.rpartition(" ")[2]) >= 2 for line in lines), told.stdout
