"""What `optx list` and `optx show` say of each method, against the method itself, README and the tests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import optx
from optx import _catalog, cli

ROOT = Path(__file__).parents[2]
TESTS = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
METHODS = {entry.name: thing for thing, entry in _catalog._methods()}
every_method = pytest.mark.parametrize("name", METHODS)


def doc(name: str) -> str:
    return inspect.getdoc(METHODS[name]) or ""


def paragraph(name: str, title: str) -> str:
    """``Title: ...`` up to the next empty line, on one line."""
    found = re.search(rf"^{title}: (.+?)(?:\n\s*\n|\Z)", doc(name), re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def paper_values(name: str) -> str:
    found = re.search(r"^Paper values:\n((?:    .*\n)+)", doc(name) + "\n", re.MULTILINE)
    return found[1] if found else ""


def clauses(text: str) -> list[str]:
    """What one ``(the default)`` speaks of: an item, or its part up to a semicolon."""
    items = re.split(r"^    (?=\S)", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for item in items for part in item.split(";") if part.strip()]


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in _catalog._parameters(METHODS[name])}


# ---- the sections ---------------------------------------------------------------------------------------


@every_method
def test_a_method_says_all_that_a_card_has(name: str) -> None:
    assert paper_values(name)
    assert paragraph(name, "Limits").endswith(".")
    assert paragraph(name, "Evidence")
    assert paragraph(name, "Source")
    assert f"{name.rpartition('.')[2]}(" in doc(name).partition("Example:")[2]


@every_method
def test_a_card_has_what_it_may_be_looked_for_by(name: str) -> None:
    words = next(entry for entry in _catalog.methods() if entry.name == name).keywords
    assert len(words) >= 3
    assert len({word.lower() for word in words}) == len(words)


@every_method
def test_the_example_runs_when_pasted(name: str) -> None:
    card = _catalog.card(name)
    assert card is not None
    torch.manual_seed(0)
    exec(card.example, {})


@every_method
def test_a_call_comes_early(name: str) -> None:
    """Not behind pages of text, and the whole card is on a screen and a half, at most two."""
    shown = CliRunner().invoke(cli.app, ["show", name]).output.splitlines()
    assert any(f"{name.rpartition('.')[2]}(" in line for line in shown[:6])
    assert len(shown) <= 80


@every_method
def test_every_argument_is_explained(name: str) -> None:
    section = re.search(r"^Args:\n((?:(?:    .*)?\n)+)", doc(name) + "\n", re.MULTILINE)
    explained = re.findall(r"^    (\w+): ", section[1], re.MULTILINE) if section else []
    assert sorted(explained) == sorted(parameters(name))


# ---- the paper's values ---------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(8)])


def spans(clause: str) -> list[dict[str, Any]]:
    """The arguments of each ``name=value, ...`` of a clause."""
    texts = re.findall(r"``(\w+=.+?)``", clause)
    return [eval(f"dict({text})", {"optx": optx, "model": layers()}) for text in texts]


VALUES = [
    pytest.param(name, given, id=f"{name}({', '.join(given)})-{number}")
    for name in METHODS
    for number, given in enumerate(one for part in clauses(paper_values(name)) for one in spans(part))
]


def adapter(folder: Path) -> Path:
    optx.attach(layers(), optx.LoRA(rank=2), targets="0").save(folder / "adapter")
    return folder / "adapter"


def widths() -> optx.scaling.Shapes:
    return optx.scaling.shapes(nn.Linear(8, 4), base=nn.Linear(4, 4))


def pretraining_runs() -> list[dict[str, float]]:
    return [
        {"params": n, "tokens": d, "lr": d / n, "batch_tokens": d**0.5, "loss": 3.0}
        for n in (1e8, 4e8)
        for d in (1e9, 8e9)
    ]


def wider() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    base = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    opt = torch.optim.AdamW(model.named_parameters())
    return {"target": opt, "shapes": optx.scaling.shapes(model, base=base)}


def mixture() -> optx.policy.ActionMixture:
    means = torch.zeros(3, 4, 2, requires_grad=True)
    return optx.policy.ActionMixture(means, means * 0, means[..., 0])


# What a method needs besides the paper's values.
NEEDED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "init.gg_": lambda _: {"model": layers()},
    "rate": lambda _: {"model": layers()},
    "DSPReg": lambda _: {"domains": 3},
    "GumbelFlow": lambda _: {"vocab": 4},
    "Implicit": lambda _: dict.fromkeys("WUC", torch.eye(2) / 2),
    "Householder": lambda _: {"channels": 4},
    "HFT": lambda _: {"model": nn.Transformer(8, 2, 1, 1, 16, batch_first=True)},
    "MuAdamW": lambda _: {"shapes": wider()["shapes"]},
    "MESA": lambda _: {"model": layers()},
    "MuAttention": lambda _: {"shapes": widths()},
    "MuReadout": lambda _: {"shapes": widths()},
    "SAF": lambda _: {"num_samples": 10},
    "STGuide": lambda _: {"classifier": nn.Flatten()},
    "STN": lambda _: {"hparams": optx.HParams(drop=optx.hp(0.1, (0, 0.9)))},
    "analysis.degeneracy": lambda _: {"model": layers(), "loader": [torch.randn(9, 4)]},
    "analysis.interaction_basis": lambda _: {
        "model": layers(),
        "loader": [torch.randn(9, 4)],
        "layers": ["0", "3"],
    },
    "analysis.attention_svm": lambda _: {"X": torch.eye(3)[None], "z": torch.ones(1, 2), "chosen": [1]},
    "analysis.lipschitz": lambda _: {"model": layers()},
    "analysis.calibration_error": lambda _: {"probs": torch.eye(2), "target": torch.arange(2)},
    "analysis.stability": lambda _: {"model": layers(), "x": torch.zeros(1, 4)},
    "analysis.stability_bound": lambda _: {"epsilon": 0.1, "gamma": 1.0},
    "analysis.robust_counterfactual": lambda _: {
        **{"model": layers(), "x": torch.zeros(1, 4), "base": torch.zeros(1, 4)},
    },
    "compress": lambda _: {"what": {"a": torch.randn(64)}},
    "deepshape": lambda _: {"target": {"a": (20 * torch.randn(200, 1000)).round() / 8192}},
    "rf8.pack": lambda _: {"what": layers()},
    "ppo_pmoe_losses": lambda _: {
        "mixture": mixture(),
        "actions": torch.zeros(3, 2),
        **dict.fromkeys(("old_log_prob", "advantages"), torch.zeros(3)),
    },
    "sac_pmoe_losses": lambda _: {"mixture": mixture(), "q_fn": lambda a: a.sum(-1), "alpha": 0.1},
    "scaling.coordinate_check": lambda _: {
        "make": lambda width: nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)),
        "widths": [4, 8],
        "batches": (torch.randn(5, 3), torch.zeros(5, dtype=torch.long)),
        "optimizer": "sgd",
    },
    "scaling.fit_step_law": lambda _: {"runs": pretraining_runs()},
    "scaling.init_": lambda _: {
        "model": (model := nn.Linear(4, 8)),
        "shapes": optx.scaling.shapes(model, base=nn.Linear(4, 4)),
        "fresh": "fan_in",
    },
    "scaling.mup": lambda _: wider(),
    "scaling.small_init_": lambda _: {"U": torch.empty(4, 2)},
    "scaling.step_law": lambda _: {"params": 1e9, "tokens": 1e11},
    "patch": lambda _: {"model": layers(), "signatures": [dict(layers().state_dict())]},
    "rws.extract": lambda _: {"pretrained": layers(), "standard": layers(), "robust": layers()},
    "shallowest": lambda _: {"model": layers()},
    "Delta.find_q": lambda _: {"model": layers(), "batches": [torch.randn(3, 4)], "p": 0.95},
    "Delta.wanda": lambda _: {"stats": optx.analysis.input_stats(layers(), [torch.randn(3, 4)])},
    "Delta.lora": lambda folder: {"adapter": adapter(folder)},
}


@pytest.mark.parametrize(("name", "given"), VALUES)
def test_a_papers_value_is_accepted(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    assert given.keys() <= parameters(name).keys()
    method = METHODS[name]
    if len(parameters(name)) < len(inspect.signature(method).parameters):
        method = method.__get__(optx.Delta.between(layers(), layers()))
    method(**NEEDED.get(name, lambda _: {})(tmp_path), **given)


@every_method
def test_what_is_called_a_default_is_one(name: str) -> None:
    """And what is not, is none: a value of the paper that is ours says so."""
    for clause in clauses(paper_values(name)):
        ours = [
            all(parameters(name)[key].default == value for key, value in one.items()) for one in spans(clause)
        ]
        if ours:
            assert all(ours) == bool(re.search(r"\(the defaults?\)", clause)), clause


def test_most_methods_have_values_to_try() -> None:
    """Else the section's form has changed, and the two tests above look at nothing."""
    assert len({value.values[0] for value in VALUES}) >= 0.6 * len(METHODS)


# ---- evidence -------------------------------------------------------------------------------------------


def recipe_text(recipe: str) -> str:
    """A recipe's source, with that of the private modules that are its own, and of their parts."""
    folder, shared = ROOT / "recipes", {"_run", "_report", "_assets"}
    texts: dict[str, str] = {}
    todo = [recipe]
    while todo:
        file = folder / f"{(name := todo.pop())}.py"
        if name not in texts and name not in shared and file.exists():
            texts[name] = file.read_text(encoding="utf-8")
            words = set(re.findall(r"\b_[a-z]\w+", texts[name]))
            todo += words if name == recipe else {word for word in words if word.startswith(f"_{recipe}_")}
    return "\n".join(texts.values())


@every_method
def test_the_evidence_is_there(name: str) -> None:
    evidence = paragraph(name, "Evidence")
    recipes, files = re.findall(r"``optx run (\w+)``", evidence), re.findall(r"``(test_\w+\.py)``", evidence)
    assert set(files) <= TESTS
    assert recipes or "no recipe" in evidence
    card = _catalog.card(name)
    assert card is not None
    assert {shown.removeprefix("optx run ") for shown in card.shown} <= set(recipes)
    for recipe in recipes:
        word = "MAM" if f"within `optx.MAM`, ``optx run {recipe}``" in evidence else name.rpartition(".")[2]
        assert re.search(rf"\b{word}\b", recipe_text(recipe))


# ---- README ---------------------------------------------------------------------------------------------


def table() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").partition("## Methods")[2].partition("\n## ")[0]


def in_readme() -> set[str]:
    """The names that the table calls; those that begin with a dot are operations of a delta."""
    called = set(re.findall(r"\boptx\.([\w.]+)\(", table()))
    return called | {
        f"Delta.{name}" for name in re.findall(r"(?:between\(base, tuned\)|`)\.(\w+)\(", table())
    }


@every_method
def test_readme_has_what_the_list_has(name: str) -> None:
    assert name in in_readme()


def test_the_list_has_what_readme_has() -> None:
    assert in_readme() - {"wrap", "attach", "prune", "Delta.between"} <= METHODS.keys()
