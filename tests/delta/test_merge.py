"""optx.merge itself: forms of checkpoints, thresholds over whole models, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import METHODS, folder, model, tuned
from safetensors.torch import load_file, save_file
from torch import nn

import optx
from optx.delta import _merge_method, _safetensors_writer
from optx.delta._order_statistics import order_statistics

# ---- exact order statistics ----------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), min_size=1, max_size=3
    ),
    data=st.data(),
)
def test_order_statistics_are_those_of_sorting(rows: list[list[float]], data: st.DataObject) -> None:
    many = 1 << 21  # more than are sorted in memory
    ranks = [
        data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=4), label="ranks")
        for row in rows
    ]
    cut = data.draw(st.integers(0, 60), label="cut")
    tensors = [torch.tensor(row) for row in rows]
    found = order_statistics(lambda: [[t[:cut] for t in tensors], [t[cut:] for t in tensors]], ranks, many)
    for row, ks, values in zip(rows, ranks, found, strict=True):
        assert values == [sorted(row)[k] for k in ks]


def test_order_statistics_of_many_numbers() -> None:
    x = torch.randn(2_500_000, generator=torch.Generator().manual_seed(0))
    ranks = [0, 1, 123_456, 1_250_000, 2_499_999]
    expected = x.sort().values[ranks].tolist()
    assert order_statistics(lambda: [[x]], [ranks], len(x)) == [expected]
    assert order_statistics(lambda: ([piece] for piece in x.split(999_983)), [ranks], len(x)) == [expected]


# ---- the forms of a checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_give_what_dicts_give(method: optx.MergeMethod, dtype: torch.dtype, tmp_path: Path) -> None:
    base = model(0, dtype)
    models = [tuned(base, 1), tuned(base, 2)]
    before = [{n: t.clone() for n, t in sd.items()} for sd in (base, *models)]
    expected: Any = optx.merge(base, models, method)
    assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {
        n: (t.shape, t.dtype) for n, t in base.items()
    }
    assert equal({n: expected[n] for n in ("steps", "mask")}, {n: base[n] for n in ("steps", "mask")})
    assert not any(expected[n].data_ptr() == base[n].data_ptr() for n in base)
    assert all(equal(a, b) for a, b in zip(before, (base, *models), strict=True))
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, sd in zip(files, (base, *models), strict=True):
        save_file(sd, file)
    out = optx.merge(files[0], [files[1], models[1]], method, tmp_path / "out.safetensors")
    assert equal(load_file(out), expected)
    sharded = optx.merge(
        folder(tmp_path / "base", base),
        [folder(tmp_path / "a", models[0]), files[2]],
        method,
        tmp_path / "merged",
    )
    assert equal(
        {n: t for f in Path(sharded).glob("*.safetensors") for n, t in load_file(f).items()}, expected
    )
    assert (Path(sharded) / "config.json").exists()
    backwards = {n: base[n] for n in reversed(base)}
    assert all(
        torch.allclose(expected[n].double(), t.double(), rtol=1e-2 if dtype != torch.float32 else 1e-5)
        for n, t in optx.merge(backwards, models, method).items()  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_threads_do_not_matter(method: optx.MergeMethod) -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 200, generator=g)}
    models = [tuned(base, seed) for seed in (1, 2, 3)]
    results: list[Any] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(optx.merge(base, models, method))
    assert torch.equal(results[0]["w"], results[1]["w"])


@dataclass(frozen=True)
class Whole(optx.MergeMethod):
    """A person's own method, which needs whole tensors."""

    def prepare(self, changes: _merge_method.Changes) -> _merge_method.Combine:
        norms = {name: [float(t.norm()) for t in tensors] for name, tensors in changes}
        return lambda name, tensors: tensors[norms[name].index(max(norms[name]))]


LARGE = [
    *METHODS,
    optx.TIES(density=(0.0, 1.0, 0.6), convention="mergekit"),
    optx.DARETIES(p=(0.5, 0.0, 0.9), seed=-1, convention="mergekit"),
    optx.PCB(ratio=0.3, scope="tensor", inter="pairwise"),
    optx.PCB(ratio=0.3, scope="tensor", score="paper"),
    Whole(),
]


@pytest.mark.parametrize("method", LARGE, ids=repr)
def test_pieces_do_not_show(method: optx.MergeMethod, tmp_path: Path, monkeypatch: Any) -> None:
    """Neither their size nor, in a tensor with many equal changes, where one ends; nor strides."""
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 200, generator=g), "t": torch.randn(130, 140, generator=g).t()}
    base |= {"e": torch.zeros(0, 3), "s": torch.randn((), generator=g)}
    models = [tuned(base, seed) for seed in (1, 2)]
    models.append({n: t + 0.1 * torch.randint(-1, 2, t.shape, generator=g) for n, t in base.items()})
    made: list[Any] = []
    for piece in (1 << 14, 1 << 20):
        for module in (_merge_method, _safetensors_writer, optx.delta.merge):
            monkeypatch.setattr(module, "PIECE", piece)
        torch.manual_seed(0)
        made.append(optx.merge(base, models, method))
        torch.manual_seed(0)
        made.append(load_file(optx.merge(base, models, method, tmp_path / f"{piece}.safetensors")))
    assert all(equal(made[0], other) for other in made[1:])
    assert all(made[0][n].shape == t.shape for n, t in base.items())


MEASURED = """
import ctypes, sys, torch, optx
from pathlib import Path
from optx.delta import _merge_method, _safetensors_writer, compeft
from optx.delta._background_file import BackgroundFile
folder = Path(sys.argv[1])
base, models = folder / "base.safetensors", [folder / f"{i}.safetensors" for i in range(3)]
def kilobytes(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0])
small = {"w": torch.randn(1 << 21)}
tuned = {"w": small["w"] + 0.01 * torch.randn(1 << 21)}
methods = optx.TIES(convention="mergekit"), optx.DARETIES(rescale="l1"), optx.PCB()
for method in methods:
    optx.merge(small, [tuned], method)
optx.compress(optx.Delta.between(small, tuned))
for module in (_merge_method, _safetensors_writer, compeft):
    module.PIECE = 1 << 16
BackgroundFile.STAGE = 1 << 18
ctypes.CDLL(None).malloc_trim(0)  # what the first time left free would hide what the second takes
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
for method in methods:
    optx.merge(base, models, method, folder / f"{method.__class__.__name__}.safetensors")
optx.compress(optx.Delta.between(base, models[0]))
print(1024 * (kilobytes("VmHWM:") - before))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_pieces(tmp_path: Path) -> None:
    """Four tensors of 16 MB in float32 are merged in less than one would take."""
    base = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": base}, tmp_path / "base.safetensors")
    for i in range(3):
        save_file({"w": base + (i + 1) * 0.01}, tmp_path / f"{i}.safetensors")
    # glibc gives what is freed back at once: what is measured is what is held, not what it keeps in store.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **at_once, "PYTHONPATH": str(Path(optx.__file__).parent.parent)}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert 1e6 < int(told) < 16e6, f"{int(told) / 1e6:.0f} MB"


def test_deltas_and_modules_are_models_too() -> None:
    base, other = nn.Linear(4, 3), nn.Linear(4, 3)
    delta = optx.Delta.between(base, other)
    ways: list[Any] = [
        optx.merge(base, [model], optx.TaskArithmetic(lam=0.5))
        for model in (other, other.state_dict(), delta)
    ]
    assert equal(ways[0], ways[1])
    assert equal(ways[0], ways[2])
    part: Any = optx.merge(base, [delta.subset("bias")], optx.TaskArithmetic())
    assert torch.equal(part["weight"], base.weight)
    torch.testing.assert_close(part["bias"], other.bias.detach())


def test_dare_has_the_masks_of_delta_dare() -> None:
    base = {"w": torch.zeros(1000)}
    models = [{"w": torch.ones(1000)}, {"w": 2 * torch.ones(1000)}]
    made: Any = optx.merge(base, models, optx.DARELinear(p=0.8, seed=5))
    deltas = [optx.Delta.between(base, m).dare(0.8, seed=5 + i) for i, m in enumerate(models)]
    summed: Any = optx.merge(base, deltas, optx.TaskArithmetic())
    torch.testing.assert_close(made["w"], summed["w"])
    assert 200 < int((made["w"] != 0).sum()) < 500
    again: Any = optx.merge({"x": torch.zeros(1000)}, [{"x": m["w"]} for m in models], optx.DARELinear(p=0.8))
    assert not torch.equal(again["x"], made["w"])


def test_ties_over_the_whole_model_is_that_of_one_long_tensor() -> None:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(1000, generator=g) for _ in range(3)]
    sizes, names = [100, 1, 399, 500], ["b", "a", "d", "c"]
    for options in ({}, {"weights": [1.0, 0.5, 2.0]}, {"normalize": False}):
        base = dict(zip(names, torch.zeros(1000).split(sizes), strict=True))
        models = [dict(zip(names, row.split(sizes), strict=True)) for row in rows]
        made: Any = optx.merge(base, models, optx.TIES(density=0.2, **options))
        long: Any = optx.merge(
            {"w": torch.zeros(1000)}, [{"w": row} for row in rows], optx.TIES(density=0.2, **options)
        )
        assert torch.equal(torch.cat([made[n] for n in names]), long["w"])
    kept = sum(int((t != 0).sum()) for t in optx.merge(base, models[:1], optx.TIES(density=0.2)).values())  # type: ignore[union-attr]
    assert kept == 201


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_tensors_are_merged_once(tmp_path: Path) -> None:
    base, other = Tied(), Tied()
    made: Any = optx.merge(base, [other], optx.DARELinear(p=0.5))
    assert made["head.weight"] is made["embed.weight"]
    save_file({"embed.weight": other.embed.weight.detach()}, tmp_path / "m.safetensors")
    assert equal(optx.merge(base, [tmp_path / "m.safetensors"], optx.DARELinear(p=0.5)), made)
    untied = {name: t.clone() for name, t in other.state_dict().items()}
    assert equal(optx.merge(base, [untied], optx.DARELinear(p=0.5)), made)
    untied["head.weight"] += 1
    with pytest.raises(optx.OptxError, match=r"'head.weight' is tied to 'embed.weight' in base"):
        optx.merge(base, [untied], optx.DARELinear(p=0.5))


def test_include_exclude_and_dtype() -> None:
    base = model(0)
    models = [tuned(base, 1)]
    made: Any = optx.merge(base, models, optx.TaskArithmetic(), exclude="layer.*", dtype=torch.bfloat16)
    assert torch.equal(made["layer.weight"], base["layer.weight"].bfloat16())
    assert torch.equal(made["embed.weight"], models[0]["embed.weight"].bfloat16())
    assert made["steps"].dtype == torch.int64
    wide: Any = optx.merge(model(0, torch.bfloat16), models, optx.TaskArithmetic(), dtype=torch.float32)
    torch.testing.assert_close(wide["scale"], models[0]["scale"], rtol=1e-6, atol=1e-6)


# ---- errors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    base: Any
    models: Any
    message: str
    method: Any = optx.TaskArithmetic()  # noqa: RUF009
    options: Any = None


W = {"w": torch.zeros(2, 3), "v": torch.zeros(4)}
BAD = {
    "lacks": Bad(W, [W, {"w": W["w"]}], "models[1] lacks 'v', which base has. Near: 'w'"),
    "more": Bad(W, [{**W, "u": torch.zeros(1)}], "models[0] has 'u', which base lacks."),
    "shape": Bad(W, [{**W, "w": torch.zeros(3, 2)}], "'w' has shape (3, 2) in models[0] and (2, 3) in base"),
    "kind": Bad(W, [{**W, "v": torch.zeros(4).int()}], "'v' is torch.int32 in models[0] and torch.float32"),
    "none": Bad(W, [], "models must be a list of at least one model"),
    "no list": Bad(W, W, "models must be a list of at least one model"),
    "method": Bad(W, [W], "method is a str; it must be one such as optx.TIES()", "ties"),
    "weights": Bad(W, [W], "weights has 2 numbers, and there are 1 models", optx.TaskArithmetic(1.0, (1, 2))),
    "nan": Bad(W, [{**W, "v": torch.full((4,), torch.nan)}], "the change of 'v' in models[0] is not finite"),
    "nothing": Bad(W, [W], "leave no floating tensor", options={"include": "x"}),
    "regex": Bad(W, [W], "include='(' is not a regular expression", options={"include": "("}),
    "dtype": Bad(W, [W], "dtype is torch.int8; it must be a floating type", options={"dtype": torch.int8}),
    "dtype of powers": Bad(W, [W], "it must be a floating type", options={"dtype": torch.float8_e8m0fnu}),
    "dtype's name": Bad(W, [W], "dtype is bfloat16; it must be a floating", options={"dtype": "bfloat16"}),
    "once": Bad(W, iter([W]), "models must be a list of at least one model"),
    "missing": Bad("nowhere/at-all", [W], "there is no file or folder 'nowhere/at-all'"),
    "base": Bad(W, [optx.Delta.between({**W, "v": torch.ones(4)}, W)], "from another base: 'v' differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case: str, tmp_path: Path) -> None:
    bad = BAD[case]
    with pytest.raises(optx.OptxError) as caught:
        optx.merge(bad.base, bad.models, bad.method, tmp_path / "out", **(bad.options or {}))
    assert bad.message in str(caught.value)
    assert not list(tmp_path.iterdir())  # nan is found while it is written


def test_outputs_that_are_there_or_missing(tmp_path: Path) -> None:
    save_file(W, tmp_path / "w.safetensors")
    with pytest.raises(optx.OptxError, match="base is on the disk; give out="):
        optx.merge(tmp_path / "w.safetensors", [W], optx.TIES())
    with pytest.raises(optx.OptxError, match="exists already"):
        optx.merge(W, [W], optx.TIES(), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (optx.TIES, {"density": 20}, "TIES: density is 20; it must be between 0 and 1"),
        (optx.TIES, {"scope": "layer"}, "TIES: scope is 'layer'; it must be one of 'global', 'tensor'."),
        (optx.TIES, {"convention": "x"}, "TIES: convention is 'x'"),
        (optx.DARELinear, {"p": 1.0}, "DARELinear: p is 1.0; it must be in [0, 1). p is the share DROPPED"),
        (optx.DARETIES, {"p": (0.5, -0.1)}, "DARETIES: p is -0.1"),
        (optx.DARETIES, {"rescale": "l2"}, "DARETIES: rescale is 'l2'"),
    ],
)
def test_options_out_of_range(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError) as caught:
        kind(**options)
    assert message in str(caught.value)
