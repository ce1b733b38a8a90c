"""Each file of recipes/merges does what it says, and mergekit's own parser takes those of shared methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import optx
from optx import cli
from optx.delta._mergekit import _METHODS as KNOWN  # pyright: ignore[reportPrivateUsage]

yaml: Any = pytest.importorskip("yaml")

FOLDER = Path(__file__).parents[2] / "recipes" / "merges"
EXPECTED: dict[str, optx.MergeMethod] = {
    "task_arithmetic": optx.TaskArithmetic(0.3, (1.0, 0.5)),
    "ties": optx.TIES(0.2, convention="mergekit"),
    "dare_linear": optx.DARELinear(0.9, weights=(0.5, 0.5), convention="mergekit", seed=1),
    "dare_ties": optx.DARETIES((0.7, 0.9), weights=(0.5, 0.5), convention="mergekit", seed=1),
    "pcb": optx.PCB(0.1),
}


def test_every_method_of_the_command_has_one() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(KNOWN) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_merges(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {"x.weight": torch.randn(40, 25, generator=generator), "x.bias": torch.randn(40)}
    models = {"base": base}
    for other in ("a", "b"):
        models[other] = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    for folder, tensors in models.items():
        Path(folder).mkdir()
        save_file(tensors, f"{folder}/model.safetensors")
    shown = CliRunner().invoke(cli.app, ["merge", str(FOLDER / f"{name}.yaml"), "merged", "--seed", "1"])
    assert shown.exit_code == 0, shown.output
    assert "Note" not in shown.output
    wanted: Any = optx.merge(base, [models["a"], models["b"]], EXPECTED[name])
    made = load_file("merged/model.safetensors")
    assert all(torch.equal(made[n], t) for n, t in wanted.items())
    assert not any(torch.equal(made[n], t) for n, t in base.items())


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "pcb"])
def test_mergekit_takes_it(name: str) -> None:
    """Its parser, and its method knows every parameter."""
    parser = pytest.importorskip("mergekit.config")
    methods = pytest.importorskip("mergekit.merge_methods")
    text = (FOLDER / f"{name}.yaml").read_text()
    config = parser.MergeConfiguration.model_validate(yaml.safe_load(text))
    assert [str(model.model.model.path) for model in config.models] == ["a", "b"]
    assert str(config.base_model.model.path) == "base"
    known = {parameter.name: parameter for parameter in methods.get(config.merge_method).spec.parameters}
    for given in (config.parameters or {}, *(model.parameters or {} for model in config.models)):
        for key, value in given.items():
            known[key].validate(value)
