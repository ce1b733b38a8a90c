"""`optx.scaling.shapes` on torch's modules: what is width and how much, the table, the file, the mistakes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import optx
from optx.scaling import Shapes, Width


def mlp(width: int, depth: int = 1, outputs: int = 3) -> nn.Sequential:
    hidden = [nn.Linear(width, width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(8, width), *hidden, nn.LayerNorm(width), nn.Linear(width, outputs))


def shapes_of(make: Callable[[int], nn.Module], width: int = 64, base: int = 16) -> Shapes:
    return optx.scaling.shapes(make(width), base=make(base))


def row(width: Width) -> tuple[str, float, float]:
    return width.kind, width.fan_in, width.fan_out


# ---- what is width ------------------------------------------------------------------------------------


def test_an_mlp() -> None:
    shapes = shapes_of(mlp)
    assert {name: row(width) for name, width in shapes.items()} == {
        "0.weight": ("input", 1.0, 4.0),
        "0.bias": ("vector", 1.0, 4.0),
        "1.weight": ("matrix", 4.0, 4.0),
        "1.bias": ("vector", 1.0, 4.0),
        "2.weight": ("vector", 1.0, 4.0),
        "2.bias": ("vector", 1.0, 4.0),
        "3.weight": ("output", 4.0, 1.0),
        "3.bias": ("scalar", 1.0, 1.0),
    }
    assert [width.ninf for width in shapes.values()] == [1, 1, 2, 1, 1, 1, 1, 0]
    assert [width.m for width in shapes.values()] == [4.0] * 7 + [1.0]
    assert shapes["1.weight"] == Width("1.weight", (64, 64), (16, 16), "matrix", 4.0, 4.0, (), (16, 16))


class Several(nn.Module):
    """One of each module whose weight has an order of its own, 3 n or n wide."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.conv3 = nn.Conv1d(3 * n, n, 5), nn.Conv3d(n, 3 * n, 3)
        self.grouped = nn.Conv2d(3 * n, n, 3, groups=4)
        self.depthwise = nn.Conv2d(n, n, 3, groups=n)
        self.up = nn.ConvTranspose2d(3 * n, n, 2)
        self.up_grouped = nn.ConvTranspose1d(3 * n, n, 2, groups=4)
        self.up_depthwise = nn.ConvTranspose2d(n, n, 2, groups=n)
        self.stem, self.head = nn.Conv2d(3, n, 16), nn.ConvTranspose2d(n, 3, 16)
        self.attention = nn.MultiheadAttention(n, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(n, 2, kdim=5, vdim=3 * n)
        self.lstm, self.gru = nn.LSTM(3 * n, n, proj_size=n // 2), nn.GRU(7, n)
        self.cell = nn.GRUCell(3 * n, n)
        self.bilinear = nn.Bilinear(n, 5, 3 * n)
        self.table, self.bag = nn.Embedding(50, n), nn.EmbeddingBag(50, n)
        self.norm = nn.BatchNorm2d(n)
        self.gain, self.temperature = nn.Parameter(torch.ones(n, 1, 1)), nn.Parameter(torch.ones(()))
        self.one = nn.Parameter(torch.ones(1))
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, n)), nn.Parameter(torch.zeros(9, n))
        self.register_buffer("counts", torch.zeros(n))


def test_every_kind_of_module() -> None:
    """n is three times and 3 n is three times the base's, so that turned fans show in the second model."""
    found = {name: row(width) for name, width in shapes_of(Several, 24, 8).items()}
    matrices = ["conv1", "conv3", "grouped", "up", "up_grouped"]
    assert {found[f"{name}.weight"] for name in matrices} == {("matrix", 3.0, 3.0)}
    vectors = ["depthwise.weight", "up_depthwise.weight", "stem.weight", "table.weight", "bag.weight", "gain"]
    vectors += ["token", "position", "gru.weight_ih_l0", "attention.bias_k", "cross.k_proj_weight"]
    assert {found[name] for name in vectors} == {("input", 1.0, 3.0)}
    assert found["head.weight"] == ("output", 3.0, 1.0)
    inner = "attention.in_proj_weight attention.out_proj.weight cross.q_proj_weight cross.v_proj_weight "
    inner += "lstm.weight_ih_l0 lstm.weight_hh_l0 lstm.weight_hr_l0 gru.weight_hh_l0 cell.weight_ih"
    assert {found[name] for name in inner.split()} == {("matrix", 3.0, 3.0)}
    assert found["bilinear.weight"] == ("matrix", 3.0, 3.0)
    assert {found[name] for name in ("temperature", "one", "head.bias")} == {("scalar", 1.0, 1.0)}
    assert found["norm.weight"] == found["lstm.bias_ih_l0"] == ("vector", 1.0, 3.0)
    assert "counts" not in found


class Uneven(nn.Module):
    """Inputs and outputs that grow by other ratios: 2 and 3."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(n, k), nn.Conv2d(n, k, 3)
        self.grouped = nn.Conv2d(n, k, 3, groups=2)
        self.up, self.up_grouped = nn.ConvTranspose2d(n, k, 3), nn.ConvTranspose2d(n, k, 3, groups=2)
        self.lstm, self.bilinear = nn.LSTM(n, k), nn.Bilinear(n, 5, k)
        self.cross = nn.MultiheadAttention(k, 1, kdim=n)


def test_fan_in_and_fan_out_are_told_apart() -> None:
    shapes = optx.scaling.shapes(Uneven(16, 36), base=Uneven(8, 12))
    names = ["linear", "conv", "grouped", "up", "up_grouped", "bilinear"]
    turned = [*(f"{name}.weight" for name in names), "lstm.weight_ih_l0", "cross.k_proj_weight"]
    assert {row(shapes[name]) for name in turned} == {("matrix", 2.0, 3.0)}
    assert {shapes[name].m for name in turned} == {2.0}


@settings(max_examples=40, deadline=None)
@given(
    base=st.integers(1, 12),
    ratio=st.integers(2, 5),
    extra=st.integers(0, 3),
    seed=st.integers(0, 3),
)
def test_ratios_are_those_of_the_sizes(base: int, ratio: int, extra: int, seed: int) -> None:
    """Also where the target is no multiple of the base, and with delta where it is narrower or the base."""
    kinds = [
        lambda w: nn.Linear(w, w),
        lambda w: nn.Conv1d(w, w, 1),
        lambda w: nn.Embedding(7, w),
        lambda w: nn.GRU(w, w),
    ]
    make = kinds[seed]
    wide = ratio * base + extra
    first = next(iter(optx.scaling.shapes(make(wide), base=make(base)).values()))
    assert first.m == pytest.approx(wide / base)
    again = next(iter(optx.scaling.shapes(make(base), base=make(wide), delta=make(wide + 1)).values()))
    assert (again.kind, again.m) == (first.kind, pytest.approx(base / wide))
    same = next(iter(optx.scaling.shapes(make(base), base=make(base), delta=make(wide)).values()))
    assert (same.kind, same.m) == (first.kind, 1.0)


def test_the_package_mup_finds_the_same() -> None:
    """On what it reads rightly: all but convolutions that are transposed, and weights stored as (in, out)."""
    mup = pytest.importorskip("mup")

    def make(width: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, 2, 3 * width)
        parts = [nn.Embedding(11, width), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)]
        more = [nn.Conv2d(3, width, 3), nn.Conv2d(width, 2 * width, 3), nn.LSTM(width, width), mlp(width)]
        return nn.Sequential(*parts, *more)

    model = make(48)
    mup.set_base_shapes(model, make(16), delta=make(24), rescale_params=False, do_assert=False)
    shapes = optx.scaling.shapes(make(48), base=make(16), delta=make(24))
    assert list(shapes) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        width, theirs = shapes[name], p.infshape
        assert (width.ninf, width.m) == (theirs.ninf(), theirs.width_mult()), name
        if p.ndim > 1 and name != "0.weight":  # an embedding, stored as (in, out)
            fans = [dim.width_mult() for dim in theirs.fanin_fanout()]
            assert [width.fan_in, width.fan_out] == fans, name


def test_a_module_in_two_places_is_one_with_both_names() -> None:
    def make(width: int) -> nn.Module:
        shared = nn.Linear(width, width)
        return nn.Sequential(nn.Linear(4, width), shared, nn.Tanh(), shared)

    shapes = shapes_of(make)
    assert shapes["1.weight"].tied == ("3.weight",)
    assert shapes["3.weight"] is shapes["1.weight"]
    assert len(shapes) == 4


# ---- what the user says -------------------------------------------------------------------------------


def test_kinds_are_corrected_in_a_new_object() -> None:
    shapes = shapes_of(mlp)
    new = shapes.set(input=["0.weight", r"3\.weight"], scalar=r"2\..*")
    assert [row(new[name]) for name in ("3.weight", "2.bias")] == [("input", 1.0, 4.0), ("scalar", 1.0, 1.0)]
    assert row(shapes["3.weight"]) == ("output", 4.0, 1.0)
    assert new.set(output=r"3\.weight", vector=r"2\..*")["3.weight"] == shapes["3.weight"]
    assert row(shapes.set(output=r"1\.weight")["1.weight"]) == ("output", 4.0, 1.0)
    assert row(shapes.set(matrix=r"3\.weight")["3.weight"]) == ("matrix", 4.0, 1.0)


def test_a_weight_stored_as_in_out_is_turned() -> None:
    class Own(nn.Module):
        def __init__(self, n: int, k: int) -> None:
            super().__init__()
            self.hidden, self.readout = nn.Parameter(torch.zeros(n, k)), nn.Parameter(torch.zeros(k, 3))

    shapes = optx.scaling.shapes(Own(16, 36), base=Own(8, 12)).set(turned=["hidden", "readout"])
    assert [row(width) for width in shapes.values()] == [("matrix", 2.0, 3.0), ("output", 3.0, 1.0)]
    wider = optx.scaling.shapes(Own(32, 24), base=shapes)
    assert [row(width) for width in wider.values()] == [("matrix", 4.0, 2.0), ("output", 2.0, 1.0)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input": "9.weight"}, r"input='9.weight' matches no parameter. Near: '\d.weight'"),
        ({"matrix": ["1.weight", "x"]}, "matrix='x' matches no parameter"),
        ({"output": "("}, r"output='\(' is not a regular expression"),
        ({"output": "1.weight", "input": "1.*"}, "'1.weight' is both input= and output="),
    ],
)
def test_a_wrong_correction(given: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        shapes_of(mlp).set(**given)


# ---- the table ----------------------------------------------------------------------------------------


def test_the_table_folds_what_is_repeated() -> None:
    def make(width: int) -> nn.Module:
        experts = lambda: nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))  # noqa: E731
        layers = nn.ModuleList(
            nn.ModuleDict({"experts": experts(), "norm": nn.LayerNorm(width)}) for _ in range(30)
        )
        return nn.ModuleDict({"layers": layers, "head": nn.Linear(width, 5)})

    shapes = shapes_of(make)
    assert [line.split() for line in repr(shapes).splitlines()] == [
        ["name", "shape", "base", "kind", "fan-in", "fan-out", "m"],
        ["─" * len(repr(shapes).splitlines()[0])],
        ["layers.{0..29}.experts.{0..3}.weight", "64", "x", "64", "16", "x", "16", "matrix", "4", "4", "4"],
        ["layers.{0..29}.norm.weight", "64", "16", "vector", "1", "4", "4"],
        ["layers.{0..29}.norm.bias", "64", "16", "vector", "1", "4", "4"],
        ["head.weight", "5", "x", "64", "5", "x", "16", "output", "4", "1", "4"],
        ["head.bias", "5", "5", "scalar", "1", "1", "1"],
    ]


def test_what_is_not_alike_has_its_own_row() -> None:
    def make(width: int) -> nn.Module:
        layers = [nn.Linear(width, width if i != 3 else 2 * width, bias=i == 5) for i in range(6)]
        return nn.Sequential(*layers)

    names = [line.split()[0] for line in repr(shapes_of(make)).splitlines()[2:]]
    assert names == ["{0,1,2,4,5}.weight", "3.weight", "5.bias"]


def test_the_table_shows_ties_and_brackets() -> None:
    from rich.console import Console

    def make(width: int) -> nn.Module:
        table, head = nn.Embedding(7, width), nn.Linear(width, 7, bias=False)
        head.weight = table.weight
        return nn.ModuleDict({"[bold]": table, "head": head})

    lines = repr(shapes_of(make)).splitlines()
    assert lines[2].split()[0] == "[bold].weight"
    assert lines[3].strip() == "= head.weight"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(shapes_of(make).table())
    assert "[bold].weight" in console.export_text()


# ---- the file -----------------------------------------------------------------------------------------


def test_a_file_gives_them_back_and_serves_another_target(tmp_path: Path) -> None:
    shapes = shapes_of(mlp).set(input="3.weight")
    shapes.save(tmp_path / "shapes.json")
    again = Shapes.load(tmp_path / "shapes.json")
    assert again == shapes
    assert hash(again) == hash(shapes)
    assert again != shapes_of(mlp)
    assert Shapes.from_data(json.loads(json.dumps(shapes.as_data()))) == shapes
    wider = optx.scaling.shapes(mlp(128), base=str(tmp_path / "shapes.json"))
    assert (wider["1.weight"].m, wider["3.weight"].kind, wider["3.weight"].m) == (8.0, "input", 8.0)
    same = optx.scaling.shapes(mlp(16), base=shapes)
    assert [width.kind for width in same.values()] == [width.kind for width in shapes.values()]
    assert {width.m for width in same.values()} == {1.0}


def test_shapes_made_before_serve_every_module() -> None:
    first = shapes_of(Several, 24, 8)
    assert optx.scaling.shapes(Several(40), base=first) == shapes_of(Several, 40, 8)
    first = optx.scaling.shapes(Uneven(16, 36), base=Uneven(8, 12))
    assert optx.scaling.shapes(Uneven(32, 24), base=first) == optx.scaling.shapes(
        Uneven(32, 24), base=Uneven(8, 12)
    )


def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
    data = shapes_of(mlp).as_data()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "holds no shapes"),
        (damaged(lambda d: d.update(version=2)), "has version 2; this optx knows version 1"),
        (damaged(lambda d: d["parameters"][0].update(kind="wide")), "is damaged"),
        (damaged(lambda d: d["parameters"][0].update(fan_out=-1.0)), "is damaged"),
        (damaged(lambda d: d["parameters"][0].update(fan_in=math.inf)), "is damaged"),
        (damaged(lambda d: d["parameters"][0].pop("shape")), "is damaged"),
        (damaged(lambda d: d["parameters"][0].update(shape=[3])), "is damaged"),
        (
            damaged(lambda d: d["parameters"].append(d["parameters"][0])),
            "is damaged: it has no",
        ),
        (damaged(lambda d: d["parameters"].clear()), "is damaged: it has no parameters"),
    ],
)
def test_a_wrong_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "shapes.json").write_text(text)
    with pytest.raises(optx.FileError, match=message):
        optx.scaling.shapes(mlp(64), base=tmp_path / "shapes.json")


def test_a_kill_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = shapes_of(mlp)
    shapes.save(tmp_path / "shapes.json")
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shapes.set(scalar=".*").save(tmp_path / "shapes.json")
    assert Shapes.load(tmp_path / "shapes.json") == shapes
    assert [file.name for file in tmp_path.iterdir()] == ["shapes.json"]


# ---- mistakes -----------------------------------------------------------------------------------------


def lazy(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.LazyLinear(3))


def tied(width: int) -> nn.Module:
    model = nn.Sequential(nn.Embedding(6, width), nn.Linear(width, 6, bias=False))
    model[1].weight = model[0].weight
    return model


def untied(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(6, width), nn.Linear(width, 6, bias=False))


def conv(width: int, kernel: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, kernel))


def experts(width: int, count: int = 4) -> nn.Module:
    model = nn.Module()
    model.up_proj = nn.Parameter(torch.zeros(count, 2 * width, width))
    return model


MISTAKES: list[tuple[Any, Any, Any, str]] = [
    (mlp(64, depth=2), mlp(16), None, r"base has no parameter '4.weight', and model has.*same depth"),
    (mlp(64), mlp(16, depth=2), None, r"model has no parameter '4.weight', and base has"),
    (mlp(64), mlp(16), mlp(32, depth=2), r"base has no parameter '4.weight', and delta has"),
    (
        nn.Conv1d(4, 16, 1),
        nn.Linear(4, 8),
        None,
        r"'weight' has 2 dimensions in base and 3 in model",
    ),
    (mlp(16), mlp(16), None, r"base and model have the same shapes, so it can't be told.*Pass delta="),
    (mlp(64), mlp(16), mlp(16), r"base and delta have the same shapes.*Pass a delta= of"),
    (
        mlp(64, 1, 9),
        mlp(16),
        mlp(32),
        r"'3.weight' is \(9, 64\) in model and .* delta leaves dimension 0",
    ),
    (
        experts(64, 8),
        experts(16),
        None,
        r"'up_proj' differs in 3 dimensions, \(4, 32, 16\) in base",
    ),
    (conv(64, 5), conv(16), None, r"'0.weight' differs in 3 dimensions.*Keep the others"),
    (
        conv(16, (3, 5)),
        conv(16),
        None,
        r"'0.weight' differs in dimension 3, .*neither its fan-in",
    ),
    (
        tied(64),
        untied(16),
        None,
        r"'0.weight' and '1.weight' are one tensor in model and two in",
    ),
    (nn.ReLU(), nn.ReLU(), None, r"shapes: (model|base): this ReLU has no parameters"),
    (lazy(64), lazy(16), None, r"'1.weight' of this Sequential is lazy and has no shape yet"),
    ("gpt2", mlp(16), None, r"model is 'gpt2'; it must be a module, a transformers config or a callable"),
    (lambda: 3, mlp(16), None, r"model\(\) returned 3; it must return a module"),
    (mlp(64), None, None, r"base is None; it must be a module"),
    (mlp(64), Shapes([Width("0.weight", (1,), (1,), "vector")]), mlp(16), r"leave delta= out"),
    (
        mlp(64),
        Shapes([Width("0.weight", (64, 8), (16, 8), "input")]),
        None,
        r"base has no parameter '0.bias'",
    ),
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("model", "base", "delta", "message"), MISTAKES)
def test_a_mistake_is_named(model: Any, base: Any, delta: Any, message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        optx.scaling.shapes(model, base=base, delta=delta)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        optx.scaling.shapes(mlp(64), base=tmp_path / "none.json")


def test_what_was_no_width_before_is_none_now() -> None:
    saved = shapes_of(mlp)
    with pytest.raises(optx.OptxError, match=r"'3.weight' is \(9, 64\) in model .*its fan-out is no"):
        optx.scaling.shapes(mlp(64, 1, 9), base=saved)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp(64, depth=2), r"has '2.weight' of shape \(64, 64\), and they of \(64,\)"),
        (mlp(64)[:3], r"has no parameter '3.weight'. Near: '\d.weight'"),
        (nn.Sequential(*mlp(64), nn.Linear(3, 3)), r"has a parameter '4.weight' that they don't know"),
        (mlp(32), r"has '0.weight' of shape \(32, 8\), and they of \(64, 8\)"),
    ],
)
def test_another_models_shapes_are_told(model: nn.Module, message: str) -> None:
    with pytest.raises(optx.OptxError, match=f"are another model's: this one {message}"):
        shapes_of(mlp).check(model)


def test_shapes_tell_what_is_tied() -> None:
    with pytest.raises(
        optx.OptxError, match=r"has a parameter '1.weight' that they don't|ties '0.weight' with noth"
    ):
        shapes_of(tied).check(untied(64))
    with pytest.raises(optx.OptxError, match=r"ties '0.weight' with '1.weight', and they with nothing"):
        shapes_of(untied).check(tied(64))
