"""``optx merge`` and ``optx delta``, as typed; mergekit's YAML."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import optx
from optx import cli
from optx.delta._mergekit import read_config

yaml: Any = pytest.importorskip("yaml")


def typed(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def flat(text: str) -> str:
    """Without the terminal's line breaks."""
    return " ".join(text.split())


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """Three folders with a model each: base, a, b."""
    g = torch.Generator().manual_seed(0)
    base = {"x.weight": torch.randn(8, 5, generator=g), "x.bias": torch.randn(8, generator=g)}
    made = {"base": base}
    for name in ("a", "b"):
        made[name] = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in base.items()}
    for name, sd in made.items():
        (tmp_path / name).mkdir()
        save_file(sd, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"of": name}))
    return made


def config(tmp_path: Path, **changes: Any) -> Path:
    """A file of mergekit's; None takes a key out."""
    table: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / "base")},
            {"model": str(tmp_path / "a"), "parameters": {"weight": 1.0, "density": 0.5}},
            {"model": str(tmp_path / "b"), "parameters": {"weight": 0.5}},
        ],
        "parameters": {"normalize": True, "density": 0.25, "int8_mask": True},
        "dtype": "float32",
        **changes,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in table.items() if value is not None}))
    return path


def test_merge_as_the_file_says(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    shown = typed("merge", config(tmp_path), tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "Note: int8_mask is ignored" in flat(shown.output)
    assert "Merged 2 models into" in flat(shown.output)
    method = optx.TIES(density=(0.5, 0.25), weights=(1.0, 0.5), convention="mergekit")
    expected: Any = optx.merge(models["base"], [models["a"], models["b"]], method)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(made[n], t) for n, t in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "of": "base",
        "torch_dtype": "float32",
    }


def test_the_out_file_takes_the_files_dtype(models: Any, tmp_path: Path) -> None:
    shown = typed("merge", config(tmp_path, dtype="bfloat16"), tmp_path / "out.safetensors")
    assert shown.exit_code == 0, shown.output
    assert {t.dtype for t in load_file(tmp_path / "out.safetensors").values()} == {torch.bfloat16}
    shown = typed("merge", config(tmp_path, dtype="bfloat16"), tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told == {"of": "base", "torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("task_arithmetic", {"weight": "1e-1", "lambda": 0.5}, optx.TaskArithmetic(0.5, [0.1, 0.1], False)),
        (
            "ties",
            {"weight": 1, "normalize": False},
            optx.TIES([1.0, 1.0], 1.0, [1.0, 1.0], normalize=False, convention="mergekit"),
        ),
        (
            "dare_linear",
            {"weight": 1.0, "density": 0.25},
            optx.DARELinear([0.75, 0.75], 1.0, [1.0, 1.0], 3, "l1", False, "mergekit"),
        ),
        (
            "dare_ties",
            {"weight": 1.0, "density": 0.5, "rescale": False, "lambda": 2},
            optx.DARETIES([0.5, 0.5], 2.0, [1.0, 1.0], 3, "none", False, "mergekit"),
        ),
        ("pcb", {"ratio": 0.2, "inter": "pairwise"}, optx.PCB(0.2, [1.0, 1.0], inter="pairwise")),
    ],
)
def test_methods(
    models: dict[str, dict[str, Tensor]], name: str, parameters: Any, expected: Any, tmp_path: Path
) -> None:
    table = [{"model": str(tmp_path / m)} for m in "ab"]
    path = config(tmp_path, merge_method=name, models=table, parameters=parameters)
    found = read_config(path, seed=3)
    assert found.models == 2
    assert not found.notes
    made = load_file(found.run(tmp_path / "out.safetensors", lambda names: names))
    wanted: Any = optx.merge(models["base"], [models["a"], models["b"]], expected)
    for key, tensor in wanted.items():
        torch.testing.assert_close(made[key], tensor, rtol=1e-6, atol=1e-7)


def test_mergekit_reads_the_same_file_alike(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    merge_methods = pytest.importorskip("mergekit.merge_methods")
    path = config(tmp_path, merge_method="ties")
    theirs = merge_methods.merge_state_dicts(
        [models["base"], models["a"], models["b"]],
        "ties",
        base=0,
        parameters={"weight": [1.0, 0.5], "density": [0.5, 0.25], "normalize": True},
    )
    assert typed("merge", path, tmp_path / "out").exit_code == 0
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "slices": ({"models": None, "slices": []}, "'slices' must be a list, each with 'sources'"),
    "both": ({"slices": [{"sources": []}]}, "'models' and 'slices' are both there"),
    "modules": ({"modules": {}}, "optx does not do 'modules'"),
    "method": ({"merge_method": "slurp"}, "optx does not do merge_method 'slurp'. Near: 'slerp'"),
    "key": ({"base_modell": "x"}, "there is no 'base_modell'. Near: 'base_model'"),
    "no base": ({"base_model": None}, "ties needs base_model"),
    "gradient": ({"parameters": {"density": [0.1, [0.9]]}}, "'density' is a list of lists"),
    "filter": ({"parameters": {"density": [{"filter": "mlp", "valu": 1}]}}, "must be a table of 'value'"),
    "three": (
        {"merge_method": "slerp", "parameters": {"t": [{"filter": "no.such", "value": 1}]}},
        "slerp takes 2 models; 'models' has 3, the base among them",
    ),
    "unknown": ({"parameters": {"densty": 0.5}}, "ties has no parameter 'densty'. Near: 'density'"),
    "number": ({"parameters": {"lambda": "big"}}, "'lambda' is 'big'; it must be a finite number"),
    "bool": ({"parameters": {"normalize": 2}}, "'normalize' is 2; it must be true or false"),
    "range": ({"parameters": {"lambda": 1, "density": 7}}, "ties: density is 7.0; it must be between"),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float16, bfloat16"),
    "union": ({"tokenizer_source": "union"}, "base' has no tokenizer, which the result's is made of"),
    "hub": ({"base_model": "mistralai/Mistral-7B"}, "there is no file or folder 'mistralai/Mistral-7B'"),
    "list": ({"models": "a"}, "'models' must be a list"),
    "method list": ({"merge_method": ["ties"]}, "merge_method is a list; it must be one of linear"),
    "method table": ({"merge_method": {"ties": 1}}, "merge_method is a table"),
    "dtype list": ({"dtype": ["float32"]}, "dtype is a list; it must be one of float16"),
    "dtype hidden": ({"dtype": ["x"], "out_dtype": "float32"}, "dtype is a list"),
    "dtype false": ({"out_dtype": False}, "out_dtype is False; it must be one of"),
    "nan": ({"parameters": {"lambda": float("nan")}}, "'lambda' is nan; it must be a finite number"),
    "inf": ({"parameters": {"lambda": "-inf"}}, "'lambda' is '-inf'; it must be a finite number"),
    "huge": ({"parameters": {"lambda": 10**400}}, "'lambda' is a number too large to show"),
    "number key": ({"parameters": {7: 1}}, "ties has no parameter 7. Near:"),
    "mask": ({"parameters": {"int8_mask": "maybe"}}, "'int8_mask' is 'maybe'; it must be true or false"),
    "tokenizer": ({"tokenizer_source": ["union"]}, "tokenizer_source is a list; it must be a word"),
    "empty": ({"base_model": ""}, "a model is ''; it must be a path"),
    "model list": ({"base_model": ["a"]}, "a model is a list; it must be a path"),
    "nobody": ({"base_model": "~nobody-here/x"}, "begins with nobody's name"),
    "name": ({"base_model": "x" * 300}, "there is no file or folder 'xxx"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(models: Any, case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    shown = typed("merge", config(tmp_path, **changes), tmp_path / "out")
    assert shown.exit_code == 1
    assert message in flat(shown.output)
    assert isinstance(shown.exception, SystemExit)  # no traceback
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    for path, message in ((tmp_path / "bad.yaml", "is no YAML"), (tmp_path / "none.yaml", "can't be read")):
        shown = typed("merge", path, tmp_path / "out")
        assert shown.exit_code == 1
        assert message in flat(shown.output)


@pytest.mark.parametrize("weight", [".nan", ".inf", "1e999", "'nan'", "true", "null", "2020-01-01"])
def test_a_weight_is_a_finite_number(models: Any, weight: str, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(
        f"merge_method: ties\nbase_model: {tmp_path}/base\n"
        f"models: [{{model: {tmp_path}/a, parameters: {{weight: {weight}}}}}]\n"
    )
    shown = typed("merge", path, tmp_path / "out")
    assert shown.exit_code == 1
    assert isinstance(shown.exception, SystemExit)
    assert "'weight'" in flat(shown.output)
    assert not (tmp_path / "out").exists()


ODD = {
    "a date": ("dtype: 2026-13-01", "is no YAML"),
    "a word for a bool": ("dtype: !!bool maybe", "is no YAML"),
    "deep": ("a: " + "[" * 3000 + "]" * 3000, "nest"),  # newer parsers have a bound of their own
    "a table in itself": (
        "merge_method: ties\nbase_model: &a {model: *a}\nmodels: [{model: x}]",
        "holds itself",
    ),
    "a list in itself": ("merge_method: &a [*a]", "holds itself"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_yaml_is_one_line(case: str, tmp_path: Path) -> None:
    text, message = ODD[case]
    (tmp_path / "odd.yaml").write_text(text)
    shown = typed("merge", tmp_path / "odd.yaml", tmp_path / "out")
    assert isinstance(shown.exception, SystemExit)
    assert message in flat(shown.output)


def test_a_model_without_weight(models: Any, tmp_path: Path) -> None:
    path = config(tmp_path, models=[{"model": str(tmp_path / "a")}])
    assert "has no 'weight'; give it under its parameters" in flat(
        typed("merge", path, tmp_path / "o").output
    )


def test_a_base_without_tokenizer_is_noted(models: Any, tmp_path: Path) -> None:
    notes = read_config(config(tmp_path, tokenizer_source="base")).notes
    assert any("base' has no tokenizer: the models' rows" in note for note in notes)


def test_interrupted(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optx.delta._merge_run.Job.run", interrupted)
    shown = typed("merge", config(tmp_path), tmp_path / "out")
    assert shown.exit_code == 130
    assert "The same command goes on where it stopped" in flat(shown.output)


@pytest.mark.parametrize("command", ["dare", "magnitude"])
def test_delta_prunes(models: dict[str, dict[str, Tensor]], command: str, tmp_path: Path) -> None:
    shown = typed("delta", command, tmp_path / "base", tmp_path / "a", tmp_path / "out", "--p", "0.5")
    assert shown.exit_code == 0, shown.output
    delta = optx.Delta.between(models["base"], models["a"])
    expected: Any = getattr(delta, command)(0.5).apply(models["base"])
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(made[n], t) for n, t in expected.items())


def test_delta_says_what_was_kept_whole(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    words = (tmp_path / "base", tmp_path / "a")
    shown = typed("delta", "dare", *words, tmp_path / "1", "--exclude", r".*bias")
    told = "0.9 of the change was dropped in 1 of 2 tensors, 1 kept their whole change (x.bias)."
    assert told in flat(shown.output)
    shown = typed("delta", "magnitude", *words, tmp_path / "2")
    assert "dropped in 2 of 2 tensors, none kept its whole change." in flat(shown.output)


@pytest.mark.parametrize("command", ["dare", "magnitude"])
def test_delta_help_has_the_default(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    method = inspect.signature(getattr(optx.Delta, command)).parameters
    assert method["exclude"].default in typed("delta", command, "--help").output


def test_merge_help_says_where_paths_are_from() -> None:
    assert "the folder in which the command is run" in flat(typed("merge", "--help").output)


def test_delta_options_are_passed_on(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    words = ("--p", "0.5", "--q", "1.0", "--seed", "4", "--exclude", ".*bias")
    shown = typed("delta", "dare", tmp_path / "base", tmp_path / "a", tmp_path / "out", *words)
    assert shown.exit_code == 0, shown.output
    delta = optx.Delta.between(models["base"], models["a"])
    expected: Any = delta.dare(0.5, 1.0, seed=4, exclude=".*bias").apply(models["base"])
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(made[n], t) for n, t in expected.items())


def test_delta_errors_have_no_traceback(models: Any, tmp_path: Path) -> None:
    shown = typed("delta", "dare", tmp_path / "base", tmp_path / "a", tmp_path / "out", "--p", "1.5")
    assert shown.exit_code == 1
    assert "p is 1.5" in flat(shown.output)
    shown = typed("delta", "dare", tmp_path / "base", tmp_path / "nowhere", tmp_path / "out")
    assert shown.exit_code == 1
    assert "there is no file or folder" in flat(shown.output)


def test_delta_save_and_apply(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    pytest.importorskip("optx.delta._delta_file")
    file = tmp_path / "delta.safetensors"
    assert typed("delta", "save", tmp_path / "base", tmp_path / "a", file).exit_code == 0
    shown = typed("delta", "apply", tmp_path / "base", file, tmp_path / "out", "--scale", "0.5")
    assert shown.exit_code == 0, shown.output
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in models["base"].items():
        torch.testing.assert_close(made[name], (tensor + models["a"][name]) / 2)
