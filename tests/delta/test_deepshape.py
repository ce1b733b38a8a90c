"""DeepShape against one that sorts everything; files, kills, and the numbers that it is for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import gamma
from torch import Tensor, nn

import optx
from optx import OptxError

GRID = np.arange(10, 300) / 100


def by_sorting(
    state: dict[str, Tensor], s: float, t: float, few: int, step: float
) -> tuple[dict[str, Tensor], int]:
    """As the authors have it, in float64; and how many of the weights in the middle were left over."""
    flat = torch.cat([x.double().reshape(-1) for x in state.values()])
    levels = torch.round(flat / step)
    values, counts = levels.unique(return_counts=True)
    reach = int(values[(counts <= few) & (values > 0)].min())
    cut = flat[flat.abs() <= reach * step]
    n, square, absolute = len(cut), float(cut.square().sum()), float(cut.abs().sum())
    ratios = gamma(1 / GRID) * gamma(3 / GRID) / gamma(2 / GRID) ** 2
    nu = GRID[np.abs(ratios - n * square / absolute**2).argmin()]
    scale = t * math.sqrt(gamma(1 / nu) / gamma(3 / nu) * square / n) / step
    middle = int(cut.mean() / step)
    x = torch.arange(middle - reach, middle + reach + 1).double()
    mass = torch.exp(-(((x - middle).abs() / scale) ** (s * nu)))
    where = ((levels >= middle - reach) & (levels <= middle + reach)).nonzero().flatten()
    where = where[levels[where].argsort(stable=True)]
    numbers = (len(where) * mass / mass.sum()).long()
    left = where[int(numbers.sum()) :]
    levels[where[: len(where) - len(left)]] = x.repeat_interleave(numbers)
    parts = (levels * step).split([x.numel() for x in state.values()])
    made = {n: p.view(t.shape).to(t.dtype) for (n, t), p in zip(state.items(), parts, strict=True)}
    return made, len(left)


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (300, 40), "b.weight": (64, 50, 3), "c.bias": (77,), "d.weight": (20, 9)}
    return {
        n: (0.02 * torch.randn(s, generator=g).double() ** 3 + 0.003).to(dtype) for n, s in shapes.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("s", "t", "few", "step"),
    [(0.8, 0.6, 20, 2**-13), (1.0, 1.0, 3, 2**-10), (0.5, 0.3, 60, 2**-11), (2.5, 0.01, 9, 0.003)],
)
def test_equals_sorting(s: float, t: float, few: int, step: float, dtype: torch.dtype) -> None:
    state = weights(dtype)
    wanted, left = by_sorting(state, s, t, few, step)
    before = {n: x.clone() for n, x in state.items()}
    made = optx.deepshape(state, s, t, min_count=few, step=step, include=".*")
    assert isinstance(made, dict)
    for name, tensor in made.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wanted[name]), name
        assert torch.equal(state[name], before[name])
        assert not torch.equal(tensor, before[name])
    assert left <= 2 * 3000


def test_weights_of_a_grid_already_and_a_mean_of_0() -> None:
    g = torch.Generator().manual_seed(3)
    state = {"w": (torch.randn(400, 50, generator=g) * 30).round() / 8192}
    for few in (2, 30):
        assert torch.equal(
            optx.deepshape(state, min_count=few)["w"],  # type: ignore[index]
            by_sorting(state, 0.8, 0.6, few, 2**-13)[0]["w"],
        )


def test_the_order_stays_and_bits_go() -> None:
    state = {"w": 0.02 * torch.randn(300, 100, generator=torch.Generator().manual_seed(0))}
    made: Any = optx.deepshape(state, min_count=20, step=2**-10)
    levels = [torch.round(x.flatten() * 1024) for x in (state["w"], made["w"])]
    middle = levels[0].abs() < 40
    moved = levels[1][middle][levels[0][middle].argsort(stable=True)]
    assert bool((moved[: -len(moved) // 20].diff() >= 0).all())

    def entropy(x: Tensor) -> float:
        p = x.unique(return_counts=True)[1] / len(x)
        return float(-(p * p.log2()).sum())

    assert entropy(levels[1]) < entropy(levels[0]) - 0.4


def test_what_is_not_chosen_and_what_is_tied() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 40))
    nn.init.normal_(model[0].weight, std=0.05)
    model[2].weight = model[0].weight
    made: Any = optx.deepshape(model, min_count=9, step=2**-8)
    assert list(made) == list(model.state_dict()) or set(made) == set(model.state_dict())
    assert made["0.weight"] is made["2.weight"]
    for name in ("0.bias", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(made[name], model.state_dict()[name])
    model.load_state_dict(made)


def _folder(path: Path, state: dict[str, Tensor]) -> None:
    path.mkdir()
    names = sorted(state)
    for i, some in enumerate((names[:2], names[2:]), 1):
        save_file({n: state[n] for n in some}, path / f"model-0000{i}-of-00002.safetensors")
    (path / "config.json").write_text("{}")


def test_files_and_folders(tmp_path: Path) -> None:
    state = weights()
    wanted: Any = optx.deepshape(state, min_count=20)
    save_file(state, tmp_path / "one.safetensors")
    _folder(tmp_path / "many", state)
    with pytest.raises(OptxError, match="target is on the disk; give out="):
        optx.deepshape(tmp_path / "many")
    one = optx.deepshape(tmp_path / "one.safetensors", min_count=20, out=tmp_path / "a.safetensors")
    many = optx.deepshape(tmp_path / "many", min_count=20, out=tmp_path / "b")
    assert (tmp_path / "b" / "config.json").exists()
    for found in (load_file(one), *[load_file(f) for f in sorted(Path(many).glob("*.safetensors"))]):  # type: ignore[arg-type]
        # The order of a file is that of its bytes: ties of levels go by that.
        again: Any = optx.deepshape({n: state[n] for n in _order(tmp_path / "one.safetensors")}, min_count=20)
        for name, tensor in found.items():
            assert torch.equal(tensor, again[name]) or torch.equal(tensor, wanted[name])


def _order(path: Path) -> list[str]:
    from optx._safetensors import Reader

    return list(Reader(path).entries)


def test_a_killed_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.delta._safetensors_writer import Writer

    monkeypatch.setattr(Writer, "FLUSH", 1)
    save_file(weights(), tmp_path / "one.safetensors")
    whole = optx.deepshape(tmp_path / "one.safetensors", min_count=20, out=tmp_path / "a.safetensors")

    def stops(names: Any) -> Any:
        for i, name in enumerate(names):
            if i == 2:
                raise KeyboardInterrupt
            yield name

    call: dict[str, Any] = {"min_count": 20, "out": tmp_path / "b.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        optx.deepshape(tmp_path / "one.safetensors", **call, progress=stops)
    left: list[str] = []
    optx.deepshape(
        tmp_path / "one.safetensors", **call, progress=lambda names: left.extend(names) or list(left)
    )
    assert len(left) < 4
    assert Path(whole).read_bytes() == (tmp_path / "b.safetensors").read_bytes()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape_scale": 0}, "shape_scale is 0; it must be above 0 and finite"),
        ({"std_scale": math.inf}, "std_scale is inf; it must be above 0 and finite"),
        ({"min_count": 0}, "min_count is 0; it must be at least 1"),
        ({"min_count": 2.5}, "min_count is 2.5; it must be a whole number"),
        ({"step": -1.0}, "step is -1.0; it must be at least 0"),
        ({"step": 10.0}, "no positive level occurs, and at most min_count=1000 times"),
        ({"include": "x"}, "there are no weights with include='x'"),
        ({"target": {"w": torch.full((2, 2), math.nan)}}, "'w' has inf or nan among its weights"),
        ({"target": {"w": torch.tensor([[1.1]])}, "step": 0.5}, "no weight is nearer to 0"),
        ({"target": 3}, "target is a int; it must be"),
    ],
)
def test_mistakes(change: dict[str, Any], said: str) -> None:
    with pytest.raises(OptxError, match=said):
        optx.deepshape(**{"target": weights(), **change})


def test_more_bits_are_told() -> None:
    heavy = {"w": 0.1 * torch.randn(200, 100, generator=torch.Generator().manual_seed(0)) ** 3}
    with pytest.warns(
        UserWarning, match=r"own shape is 0\.\d+;.*takes 0\.\d\d bits a weight more.*Lower std"
    ):
        optx.deepshape(heavy, min_count=20, step=2**-5)
    optx.deepshape(heavy, 0.8, 0.2, min_count=20, step=2**-5)


def test_a_small_model_with_the_large_ones_min_count_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"weights are moved, those up to 1 levels.*Lower min_count, or raise step"
    ):
        optx.deepshape({"w": 0.2 * torch.randn(100, 100)})
