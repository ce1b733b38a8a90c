"""The optx command, as typed."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner, Result

import optx
from optx import _catalog, _doctor, cli


def typed(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def flat(text: str) -> str:
    """Without the terminal's line breaks."""
    return " ".join(text.split())


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A recipe in the place of grokking that only notes what it is given."""
    given: list[list[str]] = []
    module = ModuleType("optx.recipes.grokking")
    module.main = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optx.recipes.grokking", module)
    return given


def test_run_passes_everything_on(recipe: list[list[str]]) -> None:
    assert typed("run", "grokking", "--steps", "3", "--out", "x y", "--help").exit_code == 0
    assert recipe == [["--steps", "3", "--out", "x y", "--help"]]


def test_run_help_is_the_recipes() -> None:
    shown = typed("run", "finetune", "--help")
    assert shown.exit_code == 0
    assert shown.output.startswith("usage: optx run finetune")
    for option in ("model", "data", "steps", "seed", "arms", "out", "resume"):
        assert f"--{option}" in shown.output


@pytest.mark.parametrize("words", [("run",), ("run", "--help")])
def test_run_without_a_recipe_lists_them(words: tuple[str, ...]) -> None:
    shown = typed(*words)
    assert shown.exit_code == 0
    assert "optx run finetune" in shown.output
    assert "optx run grokking" in shown.output


def test_run_with_a_wrong_name() -> None:
    shown = typed("run", "fintune")
    assert shown.exit_code == 2
    assert "there is no recipe 'fintune'. Near: 'finetune'" in shown.output


def test_run_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def absent(name: str) -> str:
        if name in ("gguf", "matplotlib"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    shown = typed("run", "grokking")
    assert shown.exit_code == 1
    assert "recipes need gguf, matplotlib, not installed here" in shown.output
    assert _catalog.install_command("recipes") in shown.output


def test_the_install_command_of_a_clone_and_of_a_package(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _catalog.install_command("recipes").startswith("python -m pip install -e '")
    monkeypatch.setattr(_catalog, "__file__", f"{tmp_path}/optx/_catalog.py")
    assert _catalog.install_command("recipes") == "python -m pip install 'optx-torch[recipes]'"


@pytest.mark.parametrize(("raised", "code"), [("asset", 1), ("interrupt", 130)])
def test_run_ends_in_a_sentence(raised: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.recipes import grokking
    from optx.recipes._assets import AssetError

    def fails(_args: list[str]) -> None:
        raise AssetError("bring it [here]") if raised == "asset" else KeyboardInterrupt

    monkeypatch.setattr(grokking, "main", fails)
    shown = typed("run", "grokking")
    assert shown.exit_code == code
    assert ("optx run grokking: bring it [here]" if raised == "asset" else "Interrupted.") in shown.output
    assert "Traceback" not in shown.output


def test_list_names_every_transform_and_recipe() -> None:
    shown = flat(typed("list", "--long").output)
    public = {
        name
        for name, thing in vars(optx).items()
        if isinstance(thing, type) and issubclass(thing, optx.Transform) and thing is not optx.Transform
    }
    assert {"PerpGrad", "AdamR", "HFT"} <= public
    for name in public:
        assert f"{name} wrap arXiv" in shown
    assert "optx.wrap(optimizer, optx.HFT(model))" in shown
    assert "StableMaxCrossEntropy loss arXiv 2501.04697" in shown
    assert "optx.StableMaxCrossEntropy()(logits, target)" in shown
    assert "optx.analysis.softmax_collapse(logits, target)" in shown
    assert "grokking run arXiv 2501.04697" in shown


def test_list_has_one_line_for_each() -> None:
    every = [*_catalog.methods(), *_catalog.recipes()]
    lines = [line for line in typed("list").output.splitlines() if line]
    assert [line.split()[0] for line in lines if line not in ("Methods", "Recipes")] == [
        e.name for e in every
    ]
    assert all(len(line) <= 80 and len(line.split()) > 3 for line in lines if "  " in line)


def test_every_entry_is_complete() -> None:
    for entry in [*_catalog.methods(), *_catalog.recipes()]:
        assert entry.summary.endswith("."), entry
        assert entry.paper, entry
        assert entry.use, entry
    assert not {"Transform", "stablemax_cross_entropy"} & {entry.name for entry in _catalog.methods()}


def test_bench_step_calls_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    module = ModuleType("optx.recipes._bench_step")
    module.main = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optx.recipes._bench_step", module)
    assert typed("bench", "step", "--quick", "--help").exit_code == 0
    assert given == [["--quick", "--help"]]


def test_doctor() -> None:
    shown = typed("doctor")
    assert shown.exit_code == 0, shown.output
    assert torch.__version__ in shown.output
    assert f"{torch.get_num_threads()}, in " in shown.output
    findings = {line[:24].strip(): line[24:] for line in shown.output.splitlines()}
    assert findings["AdamW float32 cpu"].startswith("fused cpu")
    assert findings["AdamW bfloat16 cpu"].startswith("fused cpu")


def test_doctor_reports_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that computes something else, and a package that fails to import."""
    stepped, imported = _doctor._stepped, importlib.import_module

    def off(*how: object) -> object:
        plan, weights, seconds = stepped(*how)  # type: ignore[arg-type]
        return plan, weights + (how[-1] == "auto"), seconds

    def fails(name: str) -> ModuleType:
        if name == "triton":
            raise RuntimeError("libcuda is broken")
        return imported(name)

    monkeypatch.setattr(_doctor, "_stepped", off)
    monkeypatch.setattr(_doctor.importlib, "import_module", fails)
    shown = typed("doctor")
    assert shown.exit_code == 1
    assert "RuntimeError: libcuda is broken" in shown.output
    assert "ArithmeticError: fused cpu differs from the reference by 1.0e+00" in shown.output
    assert "4 of these are broken" in shown.output


def test_help_names_the_commands() -> None:
    shown = typed("--help").output
    for command in ("run", "list", "bench", "doctor"):
        assert command in shown


@pytest.mark.parametrize("name", ["AdamR", "adamr", "optx.LoRA", "stablemaxcrossentropy", "PCB"])
def test_show_is_the_methods_card(name: str) -> None:
    shown = typed("show", name)
    assert shown.exit_code == 0, shown.output
    entry = next(e for e in _catalog.methods() if e.name.lower() == name.removeprefix("optx.").lower())
    for part in (
        entry.name,
        entry.verb,
        entry.summary,
        entry.use,
        "https://arxiv.org/abs/",
        "Args:",
        "Limits:",
    ):
        assert part in shown.output
    assert "Raises:" not in shown.output
    whole = typed("show", name, "--long").output
    assert all(
        line.strip() in whole for line in (inspect.getdoc(getattr(optx, entry.name)) or "").splitlines()
    )


@pytest.mark.parametrize(
    ("asked", "name", "also"),
    [
        ("rsLoRA", "LoRA", ""),
        ("dora", "LoRA", ""),
        ("DARE", "Delta.dare", "DARELinear, DARETIES"),
        ("DAREx", "Delta.find_q", ""),
        ("StableMax", "StableMaxCrossEntropy", ""),
        ("wanda", "Wanda", "Delta.wanda"),
    ],
)
def test_show_knows_other_names(asked: str, name: str, also: str) -> None:
    shown = typed("show", asked)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(f"{name}  ")
    assert (f"also   {also}" in shown.output) == bool(also)


def test_an_operations_card_says_on_what_it_is_called() -> None:
    shown = typed("show", "Delta.dare").output
    assert "    delta = optx.Delta.between(base, tuned)\n    delta.dare(p, q=None, *, seed=0" in shown


def test_show_has_a_card_for_every_method() -> None:
    for entry in _catalog.methods():
        card = _catalog.card(entry.name)
        assert card is not None
        assert card.entry == entry
        assert "'Literal" not in "".join(card.calls)
        assert len(card.calls) in (1, 2)


def test_show_names_the_recipes_that_show_it() -> None:
    card = _catalog.card("PerpGrad")
    assert card is not None
    assert "optx run grokking" in card.shown


def test_show_of_a_wrong_name_is_told_the_near_one() -> None:
    shown = typed("show", "AdmR")
    assert shown.exit_code == 2
    assert "AdamR" in shown.output


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("SGD2", "optx has none"),
        ("forgetting", "finds AdamR, HFT."),
        ("muon", "optx.wrap fuses torch's Muon; help(optx.register_base) has all."),
        ("torch.optim.RAdam", "optx.wrap fuses torch's RAdam"),
        ("Adafactor", "optx.wrap fuses torch's Adafactor and transformers's Adafactor"),
        ("Masks", "help(optx.Masks) in Python"),
        ("optx.Masks.of", "help(optx.Masks.of) in Python"),
    ],
)
def test_show_of_what_is_no_method(asked: str, says: str) -> None:
    shown = typed("show", asked)
    assert shown.exit_code == 2
    assert f"there is no method {asked!r}" in shown.output
    assert says in shown.output
    assert "near" not in shown.output


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("forgetting", ["AdamR", "HFT"]),
        ("weight decay", ["AdamR"]),
        ("rsLoRA", ["LoRA"]),
        ("DoRA", ["LoRA"]),
        ("DARE", ["DARELinear", "DARETIES", "Delta.dare"]),
        ("bf16", ["analysis.softmax_collapse", "wrap"]),
        ("overfitting", ["PerpGrad", "StableMaxCrossEntropy"]),
        ("grok", ["grokking", "PerpGrad", "StableMaxCrossEntropy"]),
        ("2404.18466", ["HFT"]),
    ],
)
def test_a_word_finds_names_before_cards(word: str, first: list[str]) -> None:
    assert [entry.name for entry in _catalog.search(word)[0]][: len(first)] == first


def test_a_word_in_the_text_only_is_told_apart() -> None:
    shown = typed("list", "weight decay").output
    assert "BitFit" in shown.partition("In the cards of: ")[2]
    assert not any(line.startswith("BitFit") for line in shown.splitlines())
    assert any(line.startswith("Delta.wanda") for line in typed("list", "statistics").output.splitlines())


def test_an_optimizer_that_is_fused_is_listed_as_such() -> None:
    assert "optx.wrap fuses pytorch_optimizer's Lion;" in typed("list", "lion").output
    assert "fuses" not in typed("list", "SGD2").output


def test_a_short_word_is_found_whole() -> None:
    """Else SAM is in "samples"."""
    assert [entry.name for entry in _catalog.search("SAM")[0]] == ["MESA", "SAF", "flatness"]
    assert "HFT" in [entry.name for entry in _catalog.search("memor")[0]]


def test_list_keeps_what_has_the_word() -> None:
    listed = typed("list", "prefix")
    assert "PrefixTuning" in listed.output
    assert "AdamR" not in listed.output
    nothing = typed("list", "no such word")
    assert nothing.exit_code == 1
    assert "no method for 'no such word'; optx has none" in nothing.output


def test_the_version_is_the_packages() -> None:
    shown = typed("--version")
    assert shown.output == f"optx {optx.__version__}\n"
    assert optx.__version__ == importlib.metadata.version("optx-torch")
