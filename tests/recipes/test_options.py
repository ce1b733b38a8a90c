"""A recipe's options: what makes no sense is said in one line, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from optx.recipes import (
    _bench,
    adapt,
    counterfactuals,
    finetune,
    formats,
    grokking,
    merge,
    modes,
    qlora,
    recover,
    reweight,
    transfer,
)

COUNTS: dict[Any, tuple[str, ...]] = {
    adapt: ("seeds", "batch", "length", "test", "steps"),
    counterfactuals: ("seeds", "walk", "factuals", "others", "steps"),
    finetune: ("seeds", "batch", "length", "answer-length", "eval-blocks", "steps"),
    formats: ("seeds", "width", "layers", "batch", "length", "tuning-steps", "tuning-length", "eval-blocks"),
    grokking: ("seeds", "p", "width", "every", "steps"),
    merge: ("seeds", "masks", "batch", "length", "valid", "test", "steps"),
    modes: ("seeds", "k", "width", "batch", "env-steps", "random", "keep", "workers", "steps"),
    qlora: ("seeds", "rank", "alpha", "batch", "length", "eval-blocks", "steps"),
    recover: ("seeds", "size", "rank", "measurements", "every", "steps"),
    reweight: ("seeds", "batch", "length", "width", "layers", "passages", "every", "steps"),
    transfer: ("seeds", "wide-seeds", "batch", "length", "layers", "workers", "steps"),
}
RATES: dict[Any, tuple[str, ...]] = {
    adapt: ("sweep",),
    counterfactuals: ("lr", "sigma"),
    finetune: ("lr",),
    formats: ("lr", "tuning-lr"),
    grokking: ("lr",),
    merge: ("lr", "head-lr"),
    modes: ("lr", "init", "alpha", "control-lr"),
    qlora: ("lr",),
    recover: ("outlier", "share"),
    reweight: ("lr", "r", "noisy", "duplicated"),
    transfer: ("lr", "decay"),
}
BAD = [
    *(
        (recipe, name, text)
        for recipe, found in COUNTS.items()
        for name in found
        for text in ("0", "-1", "x")
    ),
    *(
        (recipe, name, x)
        for recipe, found in RATES.items()
        for name in found
        for x in ("nan", "0", "-1", "inf")
    ),
    *((recipe, "seed", text) for recipe in COUNTS for text in ("-1", "4294967296", "1" * 20)),
    *((counterfactuals, "tau", text) for text in ("0", "1", "nan")),
    *((grokking, "share", text) for text in ("0", "1", "2", "nan")),
    *((merge, "rates", text) for text in ("0", "1", "x")),
    (merge, "pull", "-0.1"),
    (finetune, "length", "3"),
    (qlora, "length", "3"),
    (adapt, "sweep", "1,,3"),
    (grokking, "p", "1"),
]


@pytest.mark.parametrize(("recipe", "name", "text"), BAD)
def test_what_makes_no_sense_is_said(
    recipe: Any, name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe.main([f"--{name}", text, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --{name}: " in said
    assert " is not a " in said
    assert not (tmp_path / "out").exists()


def test_the_least_that_makes_sense_is_taken() -> None:
    for recipe, names in COUNTS.items():
        least = {"length": 4, "p": 2, "tuning-length": 4, **({"width": 4} if recipe is formats else {})}
        typed = [word for name in names for word in (f"--{name}", str(least.get(name, 1)))]
        args = vars(recipe.options().parse_args([*typed, "--seed", "4294967295"]))
        assert all(args[name.replace("-", "_")] == least.get(name, 1) for name in names)
    assert merge.options().parse_args(["--pull", "0"]).pull == 0.0


def test_no_pair_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--share 0\.1: of 9 pairs that is none to train on"):
        grokking.main(["--p", "3", "--share", "0.1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    for recipe in COUNTS:
        assert recipe.options().parse_args(["--out", "~/x"]).out == Path("/somewhere/x")
    assert finetune.options().parse_args(["--prompts", "~/x"]).prompts == Path("/somewhere/x")
    assert _bench.parser("x", "").parse_args(["--json", "~/x"]).json == Path("/somewhere/x")
    with pytest.raises(SystemExit):
        grokking.options().parse_args(["--out", "~nobody-of-that-name/x"])
    assert "argument --out: '~nobody-of-that-name/x': " in capsys.readouterr().err
