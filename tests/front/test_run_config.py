"""`optx run --config FILE`, and that what is there for trainers is found by `optx list`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import optx
from optx import _catalog, cli
from optx.recipes import finetune, merge
from optx.recipes._run import settings_of

YAML = "recipe: finetune\nsteps: 3\nlr: 1e-4\narms: [adamw, adamw+hft]\noverwrite: true\nanswer-length: 7\n"


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_file_is_as_if_it_was_typed(tmp_path: Path) -> None:
    """What is typed wins, wherever it stands; what comes out depends on it, and is recorded."""
    file = written(tmp_path, YAML)
    typed = [
        "--steps",
        "3",
        "--lr",
        "1e-4",
        "--arms",
        "adamw,adamw+hft",
        "--overwrite",
        "--answer-length",
        "7",
    ]
    by_hand, by_file = (
        finetune.options().parse_args(typed),
        finetune.options().parse_args([f"--config={file}"]),
    )
    assert settings_of(by_file) == settings_of(by_hand)
    assert vars(by_file) == {**vars(by_hand), "config": file}
    for words in (["--steps", "5", "--config", str(file)], ["--config", str(file), "--steps", "5"]):
        assert settings_of(finetune.options().parse_args(words)) == {**settings_of(by_hand), "steps": 5}


def test_json_lists_and_switches(tmp_path: Path) -> None:
    file = written(tmp_path, json.dumps({"rates": [0.5, 0.9], "seed": None, "overwrite": False}), "run.json")
    found = merge.options().parse_args(["--config", str(file)])
    assert (found.rates, found.seed, found.overwrite) == ([0.5, 0.9], 0, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stesp: 3", "finetune has no option 'stesp'. Near: 'steps'"),
        ("recipe: grokking", "it is of the recipe 'grokking', and this is finetune"),
        ("steps: 0", "argument --steps: '0' is not a whole number from 1 on"),
        ("steps: [1, 2]", "argument --steps: '1,2' is not a whole number"),
        ("overwrite: 1", "overwrite is 1; it must be true or false"),
        ("steps: true", "steps is True; it must be a word, a number, or a list of them"),
        ("lr: {a: 1}", "lr is {'a': 1}; it must be a word, a number, or a list of them"),
        ("config: other.yaml", "finetune has no option 'config'"),
        ("- steps", "is a list; it must be a table of options"),
        ("a: [", "is no YAML"),
    ],
)
def test_wrong_files_are_refused_by_name(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(SystemExit):
        finetune.options().parse_args(["--config", str(file), "--steps", "4"])
    shown = capsys.readouterr().err
    assert said in shown
    assert "run.yaml" in shown


def test_the_file_names_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(finetune, "main", given.append)
    file = str(written(tmp_path, YAML))
    run = CliRunner().invoke
    assert run(cli.app, ["run", "--config", file, "--steps", "9"]).exit_code == 0
    assert run(cli.app, ["run", f"--config={file}"]).exit_code == 0
    assert run(cli.app, ["run", "finetune", "--config", file]).exit_code == 0
    assert given == [["--config", file, "--steps", "9"], [f"--config={file}"], ["--config", file]]
    nameless = run(cli.app, ["run", "--config", str(written(tmp_path, "steps: 1", "other.yaml"))])
    assert nameless.exit_code == 2
    assert "names no recipe. Add the line `recipe: finetune`" in " ".join(nameless.output.split())
    absent = run(cli.app, ["run", "--config", "absent.yaml"])
    assert absent.exit_code == 2
    assert "'absent.yaml' can't be read (No such file or directory)" in absent.output


# ---- optx list ------------------------------------------------------------------------------------------

FOUND = {
    "trainer": "integrations.transformers.optimizer",
    "TRL": "integrations.transformers",
    "lightning": "integrations.lightning.OptxCallback",
    "accelerate": "integrations.accelerate.adapters_only",
    "fsdp": "wrap",
    "fsdp2": "attach",
    "ddp": "attach",
    "torchrun": "wrap",
    "hydra": "from_config",
    "yaml": "from_config",
    "metrics": "integrations.accelerate.metrics",
}


def test_what_is_there_for_a_trainer_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("methods", "functions", "recipes"):  # looked up once, not for every word
        once = getattr(_catalog, each)()
        monkeypatch.setattr(_catalog, each, lambda once=once: once)
    for word, name in FOUND.items():
        assert name in [entry.name for entry in _catalog.search(word)[0]], word


def test_everything_public_in_integrations_is_listed_and_told() -> None:
    """Read from the files, so that listing loads no trainer."""
    entries = {entry.name: entry for entry in _catalog.engines()}
    for room in ("transformers", "accelerate", "lightning"):
        module = getattr(optx.integrations, room)
        own = {n: one for n, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__}
        for name in [name for name in own if not name.startswith("_") and inspect.getdoc(own[name])]:
            assert entries[f"integrations.{room}.{name}"].summary, name
    full = "integrations.transformers.OptxCallback"
    assert f"help(optx.{full}) in Python tells of it." in CliRunner().invoke(cli.app, ["show", full]).output
