"""Merges into folders that are interrupted, killed, or fail: whole, gone on with, or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_cases import METHODS, folder, model, tuned

import optx


@pytest.mark.parametrize(
    "method", [*METHODS[1:], optx.DARELinear(0.5, seed=-1, convention="mergekit")], ids=repr
)
@pytest.mark.parametrize("sharded", [False, True])
def test_interrupted_merges_go_on(method: optx.MergeMethod, sharded: bool, tmp_path: Path) -> None:
    base = model(0)
    inputs = [base, tuned(base, 1), tuned(base, 2)]
    paths = [folder(tmp_path / f"{i}", sd) for i, sd in enumerate(inputs)]
    out, suffix = tmp_path / "out", "" if sharded else ".safetensors"
    torch.manual_seed(7)
    whole = optx.merge(paths[0], paths[1:], method, out.with_name(f"whole{suffix}"))

    class Stop(Exception):
        pass

    def stopping(names: Any) -> Any:
        todo = list(names)
        for i, name in enumerate(todo):
            if i == 2 and "steps" in todo:  # no pass over the changes has integers: it is being written
                raise Stop
            yield name

    target = out.with_name(f"out{suffix}")
    torch.manual_seed(7)
    with pytest.raises(Stop):
        optx.merge(paths[0], paths[1:], method, target, progress=stopping)
    assert not target.exists()
    torch.manual_seed(7)
    optx.merge(paths[0], paths[1:], method, target)
    for file in sorted(Path(whole).glob("*.safetensors")) if sharded else [Path(whole)]:
        assert file.read_bytes() == (target / file.name if sharded else target).read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


KILLED = """
import os, sys, torch, optx
torch.set_num_threads(1)
count = 0
def progress(names):
    global count
    for name in names:
        count += 1
        if count == int(sys.argv[4]):
            os.kill(os.getpid(), 9)
        yield name
optx.merge(sys.argv[1], [sys.argv[2]], optx.TIES(density=0.5), sys.argv[3], progress=progress)
"""


def test_numbers_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    """The same call could never be gone on with; what a full disk stopped can (test_delta_files)."""
    base = model(0)
    bad = {**tuned(base, 1), "layer.weight": torch.full((6, 6), torch.inf)}
    paths = [folder(tmp_path / n, sd) for n, sd in (("base", base), ("bad", bad))]
    before = set(tmp_path.iterdir())
    for target in ("out", "out.safetensors"):
        with pytest.raises(optx.OptxError, match=r"change of 'layer.weight' in models\[0\] is not finite"):
            optx.merge(paths[0], paths[1:], optx.TaskArithmetic(), tmp_path / target)
        assert set(tmp_path.iterdir()) == before


def test_a_folder_says_its_new_dtype(tmp_path: Path) -> None:
    """transformers loads it in that dtype; dtypes inside a configuration change too."""
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    for name, seed in (("base", 0), ("a", 1)):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).float().save_pretrained(tmp_path / name)
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    assert told["dtype"] == "float32"
    told["inner"] = {"torch_dtype": "float32", "list": [{"dtype": "x"}]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(told))
    for dtype in (torch.bfloat16, torch.float16, None):
        out = optx.merge(
            tmp_path / "base", [tmp_path / "a"], optx.TaskArithmetic(0.5), tmp_path / f"{dtype}", dtype=dtype
        )
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert loaded.dtype == loaded.config.dtype == (dtype or torch.float32)
        name = str(dtype or torch.float32).removeprefix("torch.")
        said = json.loads((Path(out) / "config.json").read_text())
        inner = {"torch_dtype": name, "list": [{"dtype": "x"}]}
        assert said == {**told, "dtype": name, "inner": inner}
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')  # one that says nothing
    out = optx.merge(
        tmp_path / "base", [tmp_path / "a"], optx.TIES(), tmp_path / "silent", dtype=torch.bfloat16
    )
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16


def test_kill_9_leaves_no_half_file(tmp_path: Path) -> None:
    base = model(0)
    a, b = folder(tmp_path / "a", base), folder(tmp_path / "b", tuned(base, 1))
    whole = optx.merge(a, [b], optx.TIES(density=0.5), tmp_path / "whole")
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, a, b, out, "12"], env={**os.environ})
    assert killed.returncode == -9
    assert not out.exists()
    optx.merge(a, [b], optx.TIES(density=0.5), out)
    for file in Path(whole).iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()
