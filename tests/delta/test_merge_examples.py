"""Each file of recipes/merges does what it says, and mergekit's own parser takes those of shared methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_yaml_cases import tensors, theirs
from typer.testing import CliRunner

import optx
from optx import cli
from optx.delta._mergekit import KNOWN

yaml: Any = pytest.importorskip("yaml")

FOLDER = Path(__file__).parents[2] / "recipes" / "merges"
EXPECTED: dict[str, optx.MergeMethod] = {
    "task_arithmetic": optx.TaskArithmetic(0.3, (1.0, 0.5)),
    "ties": optx.TIES(0.2, convention="mergekit"),
    "dare_linear": optx.DARELinear(0.9, weights=(0.5, 0.5), convention="mergekit", seed=1),
    "dare_ties": optx.DARETIES((0.7, 0.9), weights=(0.5, 0.5), convention="mergekit", seed=1),
    "pcb": optx.PCB(0.1),
}
SHARED = [name for name in KNOWN if name != "pcb"]


def test_every_method_of_the_command_has_one() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(KNOWN)


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("name", KNOWN)
def test_it_merges(name: str, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As optx's own method does it, or, where it has none of its own, as mergekit."""
    monkeypatch.chdir(llamas)
    words = ["merge", str(FOLDER / f"{name}.yaml"), str(tmp_path / "merged"), "--seed", "1"]
    shown = CliRunner().invoke(cli.app, words)
    assert shown.exit_code == 0, shown.output
    assert "Note" not in shown.output
    made = tensors(tmp_path / "merged")
    wanted: Any
    if name.startswith("della"):  # other random numbers: see test_merge_yaml.py
        return
    if name in EXPECTED:
        optx.merge("base", ["a", "b"], EXPECTED[name], tmp_path / "other")
        wanted = tensors(tmp_path / "other")
    else:
        wanted = theirs((FOLDER / f"{name}.yaml").read_text(), tmp_path / "other")
    assert set(made) == set(wanted)
    assert all(torch.equal(made[n], t) for n, t in wanted.items())
    for model in ("base", "a", "b"):
        before = tensors(llamas / model)
        assert set(made) != set(before) or any(not torch.equal(made[n], t) for n, t in before.items())


@pytest.mark.parametrize("name", SHARED)
def test_mergekit_takes_it(name: str) -> None:
    """Its parser, and its method knows every parameter."""
    parser = pytest.importorskip("mergekit.config")
    methods = pytest.importorskip("mergekit.merge_methods")
    text = (FOLDER / f"{name}.yaml").read_text()
    config = parser.MergeConfiguration.model_validate(yaml.safe_load(text))
    known = {parameter.name for parameter in methods.get(config.merge_method).spec.parameters}
    parts = [*(config.models or ()), *(source for one in config.slices or () for source in one.sources)]
    assert {str(part.model.model.path) for part in parts} <= {"a", "b", "base"}
    for given in (config.parameters or {}, *(part.parameters or {} for part in parts)):
        assert known.issuperset(given)
