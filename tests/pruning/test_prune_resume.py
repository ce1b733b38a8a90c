"""A run that was killed goes on where it stopped, to the same bits; nothing of another run is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import gpt2, llama
from torch import Tensor

import optx
from optx import FileError, OptxError


def ids(seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


DATA = [ids(1), {"input_ids": ids(2), "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}]


def stop_before(number: int) -> Any:
    """Progress that ends like a kill."""

    def bar(names: Iterable[str]) -> Iterator[str]:
        for i, name in enumerate(names):
            if i == number:
                raise KeyboardInterrupt
            yield name

    return bar


class Counted(optx.SparseGPT):
    """Says how many matrices it had to work on."""

    count = 0

    def prune_matrix(self, weight: Tensor, stats: Any = None) -> tuple[Tensor, Tensor]:
        Counted.count += 1
        return super().prune_matrix(weight, stats)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_goes_on_to_the_same_bits(make: Any, tmp_path: Path) -> None:
    whole = make()
    masks = optx.prune(whole, Counted(), DATA)
    cut, again, done = make(), make(), make()
    with pytest.raises(KeyboardInterrupt):
        optx.prune(cut, Counted(), DATA, resume=tmp_path / "run", progress=stop_before(1))
    Counted.count = 0
    assert optx.prune(again, Counted(), DATA, resume=tmp_path / "run") == masks
    assert Counted.count == len(masks) // 2  # of two blocks the second
    Counted.count = 0
    assert optx.prune(done, Counted(), DATA, resume=tmp_path / "run") == masks
    assert optx.prune(cut, Counted(), DATA, resume=tmp_path / "run") == masks  # half pruned, as it was left
    assert Counted.count == 0
    for model in (again, done, cut):
        assert all(map(torch.equal, whole.state_dict().values(), model.state_dict().values()))


def test_nothing_of_another_run_is_taken(tmp_path: Path) -> None:
    optx.prune(llama(), optx.Wanda(), DATA, resume=tmp_path / "run")
    other, norm = llama(), llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    norm.model.norm.weight.data[0] += 1
    layer = "'model.layers.1.mlp.up_proj.weight'"
    cases: list[tuple[Any, Any, Any, str]] = [
        (llama(), optx.Wanda(0.4), DATA, "differs in method"),
        (llama(), optx.Wanda(), DATA[:1], "differs in data"),
        (
            llama(),
            optx.Wanda(),
            [*DATA[:1], {**DATA[1], "attention_mask": torch.ones(2, 9)}],
            "differs in data",
        ),
        (norm, optx.Wanda(), DATA, "differs in rest of the model"),
        (other, optx.Wanda(), DATA, f"of a model with another {layer}"),
    ]
    for model, method, data, why in cases:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(OptxError, match=why):
            optx.prune(model, method, data, resume=tmp_path / "run")
        assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(OptxError, match="differs in layers"):
        optx.prune(llama(), optx.Wanda(), DATA, exclude=["up_proj"], resume=tmp_path / "run")


def test_a_damaged_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("")
    with pytest.raises(OptxError, match="has files of something else"):
        optx.prune(llama(), optx.Wanda(), DATA, resume=tmp_path / "letters")
    run = tmp_path / "run"
    optx.prune(llama(), optx.Wanda(), DATA, resume=run)
    first = run / "model.layers.0.safetensors"
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(FileError, match="damaged"):
        optx.prune(llama(), optx.Wanda(), DATA, resume=run)
    (run / "model.layers.1.safetensors").replace(first)
    with pytest.raises(FileError, match=r"lacks 'model.layers.0.self_attn.q_proj.weight'"):
        optx.prune(llama(), optx.Wanda(), DATA, resume=run)
    (run / "prune.json").write_text("{}")
    with pytest.raises(FileError, match="damaged"):
        optx.prune(llama(), optx.Wanda(), DATA, resume=run)
