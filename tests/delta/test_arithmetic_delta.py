"""What checkpoint operations compute, number by number: faults of one line that other tests let pass."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import optx
from optx.delta._random_mask import Dropout

BOTH: Any = pytest.mark.parametrize("scope", ["global", "tensor"])


def merged(
    method: optx.MergeMethod, *changes: dict[str, list[float]], dtype: torch.dtype = torch.float32
) -> Any:
    """What a merge makes of models that are these changes of zeros."""
    models = [{name: torch.tensor(t, dtype=dtype) for name, t in one.items()} for one in changes]
    made = optx.merge({name: torch.zeros_like(t) for name, t in models[0].items()}, models, method)
    assert isinstance(made, dict)
    return {name: t.tolist() for name, t in made.items()}


# ---- TIES ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_gives_entries_that_cancel_out_the_sign_elected_most_often(scope: Any, sign: float) -> None:
    """Entries of the whole model vote, not their sizes: a 9 does not outvote two -1s (the authors' code)."""
    ties = optx.TIES(density=1.0, scope=scope)
    one = {"a": [3.0, 9.0], "b": [-1.0, -2.0, -1.0]}
    two = {"a": [-3.0, 9.0], "b": [-1.0, 4.0, -1.0]}
    one, two = ({n: [sign * x for x in t] for n, t in m.items()} for m in (one, two))
    # -1, -1 and those of a: 9; -2 + 4 is a fourth vote, so there are two for each. Then plus.
    assert merged(ties, one, two)["a"] == [3.0, 9.0 * sign]
    one["b"].append(-sign)
    two["b"].append(0.0)
    assert merged(ties, one, two)["a"] == [-3.0 * sign, 9.0 * sign]


@BOTH
@pytest.mark.parametrize("convention", ["paper", "mergekit"])
def test_ties_keeps_as_many_of_a_float64_model(scope: Any, convention: Any) -> None:
    """Thresholds are float32, and so is what they are compared with: float32(0.1) is larger than 0.1."""
    ties = optx.TIES(density=0.3, scope=scope, convention=convention)
    made = merged(ties, {"a": [0.1, 0.01, 0.02, -0.7]}, dtype=torch.float64)["a"]
    assert made == [0.1 if convention == "paper" else 0.0, 0.0, 0.0, -0.7]
    exactly = optx.TIES(density=0.5, scope=scope, convention=convention)
    made = merged(exactly, {"a": [0.1, 0.01, -0.1, 0.7, 0.05, 0.1]}, dtype=torch.float64)["a"]
    rest = 0.1 if convention == "paper" or scope == "global" else 0.0  # of equal ones, mergekit's the first
    assert made == [0.1, 0.0, -0.1, 0.7, 0.0, rest]


# ---- random choices -----------------------------------------------------------------------------------


def splitmix(key: int, count: int) -> list[int]:
    """The numbers of a tensor's stream (Steele, Lea and Flood 2014), in Python's integers."""
    made: list[int] = []
    for i in range(count):
        z = (key + i * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        made.append(z ^ (z >> 31))
    return made


def key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def test_masks_and_columns_are_those_of_the_stream() -> None:
    """What a seed draws stays the same from version to version, or a pruned model can't be made again."""
    tuned = {"layer.weight": torch.ones(3, 40)}
    delta = optx.Delta.between({"layer.weight": torch.zeros(3, 40)}, tuned)
    numbers = splitmix(key(7, "layer.weight"), 120)
    kept = delta.dare(0.6, seed=7)["layer.weight"].flatten().ne(0).tolist()
    assert kept == [z / 2**64 < 0.4 for z in numbers]
    columns = delta.structural(0.6, seed=7)["layer.weight"].ne(0)
    first = sorted(range(40), key=numbers[:40].__getitem__)[:16]
    assert columns.all(0).nonzero().flatten().tolist() == sorted(first)
    assert int(columns.sum()) == 3 * 16


# ---- PCB ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "left"), [(0.5, 2), (0.3, 1), (0.79, 3), (0.01, 1)])
def test_pcb_keeps_whole_entries(ratio: float, left: int) -> None:
    """The paper's: int(ratio n), at least one; of the code's, those above place int((1 - ratio) n)."""
    change = {"a": [1.0, -2.0, 3.0, -4.0, 5.0]}
    made = merged(optx.PCB(ratio=ratio, score="paper"), change)["a"]
    assert [x != 0 for x in made] == [i >= 5 - left for i in range(5)]
    made = merged(optx.PCB(ratio=ratio, score="code", clip=0.0), change)["a"]
    assert [x != 0 for x in made] == [i > min(int(5 * (1 - ratio)), 4) for i in range(5)]


# ---- interrupted --------------------------------------------------------------------------------------


def test_a_signature_goes_on_only_with_what_it_began_itself(tmp_path: Path) -> None:
    """What an interrupted `apply` has written is another signature's: none of it may stay."""
    base = tmp_path / "base"
    base.mkdir()
    files = {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    for name, file in files.items():
        save_file({name: torch.zeros(4)}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    def signature(value: float) -> optx.Signature:
        return optx.Signature({name: torch.full((4,), value) for name in files})

    def stopping(todo: Iterable[str]) -> Iterator[str]:
        for name in todo:
            if name == "c":  # the first file is done
                raise KeyboardInterrupt
            yield name

    with pytest.raises(KeyboardInterrupt):
        signature(1.0).delta().apply(base, tmp_path / "out", progress=stopping)
    signature(2.0).delta().apply(base, tmp_path / "out")
    made = {name: load_file(tmp_path / "out" / file)[name].tolist() for name, file in files.items()}
    assert made == dict.fromkeys(files, [2.0] * 4)


# ---- ComPEFT ------------------------------------------------------------------------------------------


def test_compressed_moves_to_a_device_whole() -> None:
    tuned = {"a": torch.randn(70), "b": torch.randn(3, 5), "steps": torch.tensor([3])}
    base = {name: torch.zeros_like(t) for name, t in tuned.items()}
    moved = optx.compress(optx.Delta.between(base, tuned)).to("meta")
    assert {t.device.type for t in (*moved.masks.values(), *moved.whole.values())} == {"meta"}


# ---- what is on another device, or in another precision -------------------------------------------------


def test_a_mask_is_where_it_is_asked_for() -> None:
    assert Dropout(1, 0.5, 1.0).keep(0, 5, "meta").device.type == "meta"


@pytest.mark.parametrize("strategy", ["output", "learned", "analytic", "mse"])
def test_q_of_a_model_in_bfloat16(strategy: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).to(torch.bfloat16)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(16, 12, dtype=torch.bfloat16)
    q = optx.Delta.between(base, tuned).find_q(tuned, [x], 0.8, strategy, seeds=(0,))
    found = list(q.values()) if isinstance(q, dict) else [q]
    assert all(0.199 <= one <= 1.0 for one in found)
    assert next(tuned.parameters()).dtype == torch.bfloat16


# ---- pruning ------------------------------------------------------------------------------------------


def test_a_recipe_tells_statistics_apart_that_are_nearly_the_same() -> None:
    """An interrupted `apply` goes on where the recipe's text is the same."""
    model = nn.Sequential(nn.Linear(6, 4))
    delta = optx.Delta.between({"0.weight": torch.zeros(4, 6)}, {"0.weight": torch.randn(4, 6)})

    def recipe(scale: float) -> str:
        inputs = scale * torch.ones(3, 6)
        stats = optx.analysis.input_stats(model, [inputs])
        return repr(delta.wanda(0.5, {"0.weight": stats["0.weight"]}).recipe)

    assert recipe(1.0) == recipe(1.0)
    assert recipe(1.0) != recipe(1.000001)


def test_eta_is_not_negative() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    delta = optx.Delta.between({"0.weight": torch.zeros(4, 6)}, {"0.weight": torch.randn(4, 6)})
    assert delta.find_q(model, [torch.ones(3, 6)], 0.5, "analytic", eta=0.0)
    for strategy in ("analytic", "output"):
        with pytest.raises(optx.OptxError, match="eta"):
            delta.find_q(model, [torch.ones(3, 6)], 0.5, strategy, eta=-1e-3)  # type: ignore[arg-type]


# ---- several passes -----------------------------------------------------------------------------------

PASSES: list[optx.MergeMethod] = [
    optx.TaskArithmetic(),
    optx.TIES(density=0.5),
    optx.TIES(density=0.5, convention="mergekit"),
    optx.TIES(density=0.5, scope="global", convention="mergekit"),
    optx.DARETIES(0.5),
    optx.PCB(0.5),
    optx.PCB(0.5, scope="tensor"),
]


@pytest.mark.parametrize("method", PASSES, ids=repr)
def test_a_method_says_how_many_passes_it_takes(method: optx.MergeMethod, tmp_path: Path) -> None:
    """What a progress bar ends at: those to prepare, and the one that writes."""
    begun: list[int] = []

    def progress(names: Iterable[str]) -> Iterable[str]:
        begun.append(1)
        return names

    many = (1 << 19) + 1  # fewer are sorted at once
    models = [
        {n: torch.randn(many, generator=torch.Generator().manual_seed(i)) for n in "ab"} for i in (1, 2)
    ]
    base = {n: torch.zeros(many) for n in "ab"}
    optx.merge(base, models, method, tmp_path / "out.safetensors", progress=progress)
    assert len(begun) == 1 + method.passes


def test_pcb_of_many_entries_is_the_size_of_the_changes() -> None:
    """Scores are means of softmaxes, not shares of one: 4096^4 times smaller, they would count as none."""
    change = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    models = [{"a": change}, {"a": change.clone()}]
    made = optx.merge({"a": torch.zeros(4096)}, models, optx.PCB(ratio=0.25, score="paper"))
    assert isinstance(made, dict)
    kept = made["a"] != 0
    assert int(kept.sum()) == 1024
    torch.testing.assert_close(made["a"][kept], change[kept], rtol=1e-5, atol=0)


# ---- signatures in few levels -----------------------------------------------------------------------


def test_signatures_are_quantized_within_what_can_be_stored() -> None:
    with pytest.raises(optx.OptxError, match="levels"):
        optx.Signature({}).quantize(1)
    for size in (15.0, 15.5):
        signature = optx.Signature({"a": torch.tensor([size, -size, 0.25])})
        if size > 15.0:
            with pytest.raises(optx.OptxError, match=r"up to 15\.0, and one is 15\.5"):
                signature.quantize(256, "tanh")
        else:
            assert signature.quantize(256, "tanh")["a"][:2].tolist() == pytest.approx([15.0, -15.0], rel=1e-3)
