"""The transfer recipe: its sweeps on losses whose optima are known, its figures, and a run of seconds."""

from __future__ import annotations

import json
import math
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from optx.recipes import _transfer_report, transfer
from optx.recipes._characters import Characters, loss_of
from optx.recipes._run import warmed_up
from optx.recipes._transfer_curves import Found, Point, optimum
from optx.recipes._transfer_sweeps import REACH, plan

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the king is dead and the crown lies upon the ground while a cold wind blows from the sea. " * 60
WIDTHS = [32, 64, 128]
ARMS = list(transfer.ARMS)


# ---- optima ------------------------------------------------------------------------------------------


@given(
    vertex=st.floats(-20, 20),
    bend=st.floats(0.01, 10),
    start=st.floats(-0.9, -0.1),
    gaps=st.lists(st.floats(0.5, 2), min_size=2, max_size=6),
)
def test_a_parabola_has_its_vertex(vertex: float, bend: float, start: float, gaps: list[float]) -> None:
    xs = [vertex + start]
    for gap in gaps:
        xs.append(xs[-1] + gap)
    xs.append(vertex + start - 1)
    curve = {x: 2.0 + bend * (x - vertex) ** 2 for x in xs}
    found = optimum(curve)
    assert found.grid == min(curve, key=lambda x: curve[x])
    if found.inside:
        assert found.at == pytest.approx(vertex, abs=1e-6)
        assert found.loss == pytest.approx(2.0, abs=1e-6)
    else:
        assert found.grid in (min(xs), max(xs))
        assert (found.at, found.loss) == (found.grid, curve[found.grid])


@pytest.mark.parametrize(
    ("curve", "at", "inside"),
    [
        ({0.0: 1.0, 1.0: 2.0}, 0.0, False),
        ({0.0: 2.0, 1.0: 1.0}, 1.0, False),
        ({0.0: 2.0, 1.0: 1.0, 2.0: math.inf}, 1.0, False),
        ({0.0: 1.0, 1.0: 1.0, 2.0: 1.0}, 0.0, False),  # the first of them
        ({0.0: 3.0, 1.0: 1.0, 2.0: 3.0, 3.0: math.inf}, 1.0, True),
    ],
)
def test_where_there_is_no_parabola(curve: dict[float, float], at: float, inside: bool) -> None:
    found = optimum(curve)
    assert (found.at, found.inside) == (at, inside)


# ---- sweeps ------------------------------------------------------------------------------------------


def planted(point: Point, seed: int) -> dict[str, Any]:
    """Optima: the rate's moves by an octave a doubling in ``standard``, the decay's by two in ``mup``."""
    doublings = math.log2(point.width / 32)
    rate = -5.3 - (doublings if point.arm == "standard" else 0.0)
    decay = 0.5 + (2 * doublings if point.arm == "mup" else 0.0) + 0.2 * (seed - 1)
    if point.arm == "standard" and point.log_lr > rate + 3:
        return {"loss": None}
    loss = 2.0 + 0.1 * (point.log_lr - rate) ** 2 + 0.02 * (point.log_decay - decay) ** 2
    grown = {"standard": 1.0, "mup": 0.5, "mup-sqrt": 0.0, "mup-linear": -0.5}[point.arm] * doublings
    return {"loss": loss, "top": [2.0**grown, 3 * 2.0**grown]}


def swept(loss: Any = planted, seeds: int = 3) -> tuple[dict[str, Any], list[Point]]:
    """Results as a run has them, and the points in the order in which they were made."""
    arms: dict[str, Any] = {f"{arm}/{seed}": {} for arm in ARMS for seed in range(seeds)}
    order: list[Point] = []

    def work(points: list[Point]) -> None:
        for point in dict.fromkeys(points):
            for seed in range(seeds - (point.width == WIDTHS[-1])):
                if point.name not in arms[f"{point.arm}/{seed}"]:
                    order.append(point)
                    arms[f"{point.arm}/{seed}"][point.name] = loss(point, seed)

    plan(WIDTHS, ARMS, (-5.0, 0.0), Found(arms, WIDTHS[0]), work)
    settings = {"widths": WIDTHS, "decay": 1.0, "steps": 7, "batch": 2, "length": 9}
    return {"settings": settings, "arms": arms}, order


def test_sweeps_find_planted_optima() -> None:
    results, order = swept()
    found = Found(results["arms"], 32)
    for place, width in enumerate(WIDTHS):
        for arm in ("standard", "mup", "mup-sqrt"):
            rate = found.best(arm, width, "lr", 0.0)
            assert rate.inside
            assert rate.at == pytest.approx(-5.3 - place * (arm == "standard"))
        for arm in ARMS:
            decay = found.best(arm, width, "decay", -5.0)
            seeds = -0.1 if width == 128 else 0.0  # one seed less
            assert decay.at == pytest.approx(0.5 + 2 * place * (arm == "mup") + seeds)
            assert -5.0 in found.mean(arm, width, "lr", 0.0) or arm == "mup-linear"
            assert 0.0 in found.mean(arm, width, "decay", -5.0)
    assert {point.arm for point in order if point.width == 32} == {"standard"}  # one run for all arms
    assert [point.width for point in order] == sorted(point.width for point in order)
    assert not [p for p in order if p.arm == "mup-linear" and p.log_lr != -5.0]


def test_sweeps_end() -> None:
    """Where less is always better, and where everything but one point diverges."""
    results, order = swept(lambda point, _: {"loss": 2.0 + 0.1 * point.log_lr, "top": [1.0]})
    assert min(point.log_lr for point in order if point.width == 32) == -5.0 - REACH
    assert not Found(results["arms"], 32).best("mup", 32, "lr", 0.0).inside
    swept(lambda point, _: {"loss": 2.0, "top": [1.0]} if point.log_lr == -5.0 else {"loss": None})


def test_tables_say_what_was_planted() -> None:
    results, _ = swept()
    rates, decays, tops = _transfer_report.tables(results)
    by_arm = {row[0]: row[1:] for row in rates.rows}
    assert list(by_arm) == ["standard", "mup", "mup-sqrt"]
    assert by_arm["standard"][3:6] == ("-2.00", "2.00", "-2")
    assert by_arm["mup"][3:6] == ("+0.00", "0.00", "+0")
    assert float(by_arm["standard"][6]) == pytest.approx(0.1 * (2.3**2 - 0.3**2), abs=1e-3)
    assert "3 seeds, at width 128 2." in rates.note
    by_arm = {row[0]: row[1:] for row in decays.rows}
    assert list(by_arm) == ARMS
    assert by_arm["mup-sqrt"][0] == "0.50 (0.30 to 0.70)"
    assert by_arm["mup"][2] == "4.40 (4.30 to 4.50)"
    assert by_arm["mup"][3] == "+3.90"
    by_arm = {row[0]: row[1:] for row in tops.rows}
    assert by_arm["mup-sqrt"] == ("1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)", "0.00")
    assert by_arm["mup"] == ("1.41 (1.41 to 1.41)", "2.00 (2.00 to 2.00)", "1.00")
    assert by_arm["mup-linear"][2] == "1.00"


def test_what_diverged_and_what_has_no_end_is_said() -> None:
    def worse(point: Point, seed: int) -> dict[str, Any]:
        if point.arm == "standard" and point.width == 128 and point.log_lr >= -5:
            return {"loss": None}
        return (
            {"loss": 2.0 + 0.1 * point.log_lr, "top": [1.0, 1.0]}
            if point.arm == "mup"
            else planted(point, seed)
        )

    rates, _, tops = _transfer_report.tables(swept(worse)[0])
    by_arm = {row[0]: row[1:] for row in rates.rows}
    assert by_arm["standard"][6] == "inf"
    assert by_arm["mup"][2].startswith("< ")
    assert not by_arm["mup-sqrt"][2].startswith("< ")
    assert [row[2:] for row in tops.rows if row[0] == "standard"] == [("diverged", "diverged")]


# ---- runs --------------------------------------------------------------------------------------------


def test_all_arms_are_one_run_at_the_narrowest_width() -> None:
    """Bit for bit, which is why it is made once."""
    args = Namespace(layers=1, length=12, widths=[32, 64], steps=6, batch=4)
    data = Characters(TEXT, args.length)
    for width, different in ((32, 1), (64, 4)):
        found = [transfer.train(Point(arm, width, -4.0, 3.0), 0, args, data) for arm in ARMS]
        assert len({(one["loss"], *one["top"]) for one in found}) == different


def by_hand(arm: str, width: int, lr: float, decay: float, args: Namespace, data: Characters) -> float:
    """The same run with table 8 and the square-root rule written out."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    m = width / args.widths[0]
    model = LlamaForCausalLM(transfer.config(width, args, data.letters))
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    with torch.no_grad():
        for p in [*hidden, *([model.lm_head.weight] if arm == "standard" else [])]:
            p.div_(math.sqrt(m))
    first: dict[str, Any] = {"params": hidden, "lr": lr, "weight_decay": decay}
    eps = 1e-8
    if arm == "mup-sqrt":
        model.lm_head.register_forward_pre_hook(lambda _, given: (given[0] / m,))
        first |= {"lr": lr / m, "weight_decay": decay * math.sqrt(m)}
        eps /= m
    groups = [first, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), eps=eps, fused=True)
    schedule = warmed_up(optimizer, args.steps)
    for step in range(args.steps):
        loss = loss_of(model, *data.batch(step, args.batch, 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return data.loss(model)


@pytest.mark.parametrize("arm", ["standard", "mup-sqrt"])
def test_a_run_is_the_same_as_by_hand(arm: str) -> None:
    args = Namespace(layers=1, length=12, widths=[32, 64], steps=6, batch=4)
    data = Characters(TEXT, args.length)
    found = transfer.train(Point(arm, 128, -5.0, 2.0), 0, args, data)["loss"]
    assert found == pytest.approx(by_hand(arm, 128, 2.0**-5, 4.0, args, data), rel=1e-5)


def test_a_run_that_diverges_is_told() -> None:
    args = Namespace(layers=1, length=12, widths=[16, 32], steps=12, batch=4)
    assert transfer.train(Point("standard", 16, 60.0, 0.0), 0, args, Characters(TEXT, 12)) == {"loss": None}


@pytest.mark.long
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    small = [
        "--steps",
        "4",
        "--length",
        "8",
        "--batch",
        "2",
        "--layers",
        "1",
        "--seeds",
        "2",
        "--workers",
        "1",
    ]
    typed = [*small, "--wide-seeds", "1", "--widths", "16", "32", "--data", str(tmp_path / "text.txt")]
    transfer.main([*typed, "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found["arms"]) == [f"{arm}/{seed}" for arm in ARMS for seed in (0, 1)]
    assert not [name for name in found["arms"]["mup/0"] if name.startswith("width 16")]
    assert not [name for name in found["arms"]["mup/1"] if name.startswith("width 32")]
    assert all(len(one["top"]) == 7 for one in found["arms"]["mup/0"].values())
    assert (tmp_path / "run" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert "Top singular values against width 16's" in capsys.readouterr().out

    def none(*_: Any) -> None:
        raise AssertionError("a run that was there was made again")

    monkeypatch.setattr(transfer, "train", none)
    transfer.main([*typed, "--out", str(tmp_path / "run"), "--resume"])
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found


@pytest.mark.long
def test_interrupted_between_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended is kept, and the same command goes on from there."""
    (tmp_path / "text.txt").write_text(TEXT)
    made: list[Point] = []

    def counted(point: Point, seed: int, *_: Any) -> dict[str, Any]:
        made.append(point)
        if len(made) == 3:
            signal.raise_signal(signal.SIGINT)
        return planted(point, seed)

    monkeypatch.setattr(transfer, "train", counted)
    typed = ["--workers", "1", "--seeds", "2", "--widths", "32", "64", "--data", str(tmp_path / "text.txt")]
    out = ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        transfer.main([*typed, *out])
    assert stopped.value.code == 130
    found = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    assert sum(map(len, found.values())) == 3
    transfer.main([*typed, *out, "--resume"])
    whole = ["--out", str(tmp_path / "whole")]
    count = len(made)
    transfer.main([*typed, *whole])
    assert len(made) == 2 * count
    resumed, once = (json.loads((tmp_path / to / "results.json").read_text()) for to in ("run", "whole"))
    assert resumed["arms"] == once["arms"]


def test_a_size_is_the_other_options_defaults() -> None:
    large = vars(transfer.options("large").parse_args(["--size", "large"]))
    assert {name: large[name] for name in transfer.SIZES["large"]} == transfer.SIZES["large"]
    assert large["size"] == "large"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--widths", "32"], r"--widths \[32\]: give two or more multiples of 16"),
        (["--widths", "32", "40"], "--widths"),
        (["--widths", "64", "32"], "--widths"),
        (["--widths", "32", "32"], "--widths"),
        (["--model", "x"], "--model has no meaning here"),
        (["--arms", "adam"], "adam is none of standard"),
    ],
)
def test_what_it_refuses(typed: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=says):
        transfer.main([*typed, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
