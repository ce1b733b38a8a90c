"""Every example in the documentation runs and gives what it says."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import injections
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import optx

ROOT = Path(__file__).parents[2]
PUBLIC = sorted(name for name in vars(optx) if not name.startswith("_"))
# What importing a module leaves behind, and nobody is meant to name.
SUBPACKAGES = {info.name for info in pkgutil.iter_modules(optx.__path__)} - {
    *("analysis", "integrations", "ops", "scaling")
}
PROTOCOLS = (optx.Transform, optx.Injection, optx.Composite, optx.MergeMethod)
METHODS = [
    name
    for name in PUBLIC
    if inspect.isclass(thing := getattr(optx, name))
    and issubclass(thing, PROTOCOLS)
    and thing not in PROTOCOLS
]


def documented() -> list[doctest.DocTest]:
    """The examples of every module of optx (not of its kernels and recipes)."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found: dict[str, doctest.DocTest] = {}
    for info in pkgutil.walk_packages(optx.__path__, "optx."):
        if not info.name.startswith(("optx.kernels", "optx.recipes")):
            module = importlib.import_module(info.name)
            found.update({test.name: test for test in finder.find(module, info.name) if test.examples})
    return list(found.values())


@pytest.mark.parametrize("example", documented(), ids=lambda test: test.name)
def test_docstring_example_runs(example: doctest.DocTest) -> None:
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_help_names_everything_under_its_verb() -> None:
    words = set(re.findall(r"\w+", optx.__doc__ or ""))
    assert {name for name in PUBLIC if name not in SUBPACKAGES} <= words
    verbs = re.findall(r"^    (\w+) ", optx.__doc__ or "", flags=re.MULTILINE)
    assert verbs == ["wrap", "attach", "loss", "delta", "prune", "tell", "config", "engine", "errors"]


def _class_or_function(name: str) -> Any:
    value = getattr(optx, name)
    return value if inspect.isclass(value) or inspect.isfunction(value) else None


@pytest.mark.parametrize("name", [n for n in PUBLIC if _class_or_function(n)])
def test_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(_class_or_function(name)), f"optx.{name} has no docstring"


@pytest.mark.parametrize("name", [*METHODS, "wrap", "attach", "StableMaxCrossEntropy", "rule"])
def test_method_shows_how_to_call_it(name: str) -> None:
    text = inspect.getdoc(getattr(optx, name)) or ""
    assert ">>>" in text
    assert "Args:" in text or not inspect.signature(getattr(optx, name)).parameters


def guide(having: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example of the guide that defines a class, imported as a module."""
    text = (ROOT / ".github/CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    [block] = [block for block in blocks if f"class {having}" in block]
    assert block.count("\n") <= 40
    name = f"guide_{having.lower()}"
    (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def test_the_guides_transform_runs_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = guide("ClipValue", tmp_path, monkeypatch)
    model, opt = readme.model, readme.opt
    start = model.weight.detach().clone()
    (1000.0 * model(torch.ones(1, 3))).sum().backward()
    opt.step()
    assert not torch.equal(model.weight, start)
    assert [t.name for t in opt.transforms] == ["clip_value", "perp_grad"]
    assert opt.plan()[0].path == "fused cpu"


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_the_guides_injection(start: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, merged, saved, loaded and removed as optx's own are."""
    made = guide("OutputGain", tmp_path, monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    x, before = torch.randn(4, 6), injections.snapshot(model)
    bare = model(x)
    handle = optx.attach(model, made.OutputGain(start=start), nn.Linear)
    assert [name for name, _ in handle.named_parameters()] == [
        f"{place}.optx.output_gain.log_gain" for place in (0, 2)
    ]
    assert torch.equal(model(x), bare) == (start == 0.0)
    optx.trainable_only(model, handle)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    model(x).square().sum().backward()
    optimizer.step()
    gains = [p.detach().exp() for p in handle.parameters()]
    trained = torch.tanh((x @ model[0].weight.T + model[0].bias) * gains[0]) @ model[2].weight.T * gains[1]
    torch.testing.assert_close(model(x), trained)
    handle.merge()
    torch.testing.assert_close(model(x), trained)
    handle.unmerge()
    handle.save(tmp_path / "saved")
    trained = model(x)
    handle.remove()
    injections.assert_same(model, before)
    assert torch.equal(model(x), bare)
    loaded = optx.attach(model, tmp_path / "saved")
    assert torch.equal(model(x), trained)
    loaded.remove()
    with pytest.raises(optx.TargetError, match="OutputGain serves Linear modules; '1' is a Tanh"):
        optx.attach(model, made.OutputGain(), "1")
    injections.assert_same(model, before)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_guides_loss(
    gamma: float, reduction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guide("FocalCrossEntropy", tmp_path, monkeypatch)
    torch.manual_seed(0)
    logits = (3 * torch.randn(5, 7, 2, dtype=torch.float64)).requires_grad_()
    target = torch.randint(7, (5, 2))
    target[3, 1] = -1
    criterion = made.FocalCrossEntropy(gamma, ignore_index=-1, reduction=reduction)
    loss = criterion(logits, target)
    p = logits.softmax(1).gather(1, target.clamp_min(0)[:, None])[:, 0]
    each = torch.where(target == -1, 0.0, -((1 - p) ** gamma) * p.log())
    expected = {"mean": each.sum() / 9, "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.gradcheck(lambda z: criterion(z, target), logits)
    got, wanted = (
        torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (loss, expected)
    )
    torch.testing.assert_close(got, wanted)
    if gamma == 0.0:
        torch.testing.assert_close(
            loss, nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction=reduction)
        )
    half = criterion(logits.detach().bfloat16(), target)
    torch.testing.assert_close(half, loss.detach().float(), rtol=0.05, atol=0.05)
    assert half.dtype == torch.float32


def test_the_guides_loss_at_its_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnt for sure, lost for sure, one sample; and a wrong option."""
    made = guide("FocalCrossEntropy", tmp_path, monkeypatch)
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        loss = made.focal_cross_entropy(logits, torch.tensor([0, 0]), gamma)
        assert loss.item() == pytest.approx(100.0)
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert made.focal_cross_entropy(logits[1], torch.tensor(0)).item() == pytest.approx(200.0)
    with pytest.raises(optx.OptxError, match="reduction is 'avg'; it must be 'mean'"):
        made.focal_cross_entropy(logits, torch.tensor([0, 0]), reduction="avg")


def test_readme_lists_every_method() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in METHODS if f"optx.{name}(" not in text]
    assert not missing


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that has what they ask for, in a folder of checkpoints with the names that they use."""
    text = re.sub(r"## With your trainer\n.*?\n## ", "## ", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    diff = re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL)
    blocks = ["\n".join(line[2:] for line in block.splitlines()) for block in diff]
    blocks += re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    sizes = {"q_proj": (8, 8), "v_proj": (8, 8), "up_proj": (8, 16), "down_proj": (16, 8)}
    block = nn.ModuleDict({"attn": nn.ModuleDict(), "mlp": nn.ModuleDict()})
    for i, (name, size) in enumerate(sizes.items()):
        block["mlp" if i > 1 else "attn"][name] = nn.Linear(*size)
    model = nn.ModuleDict({"layers": nn.ModuleList([block, copy.deepcopy(block)])})
    for i, name in enumerate(("base", "tuned", "a", "b")):
        (tmp_path / name).mkdir()
        tensors = {key: t.detach() + 0.1 * i * torch.randn_like(t) for key, t in model.state_dict().items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    said = {"logits": torch.randn(3, 5), "target": torch.tensor([0, 4, 2])}
    names: dict[str, Any] = {"torch": torch, "nn": nn, "optx": optx, **said}
    for block in blocks:
        exec(block, names | {"model": copy.deepcopy(model)})
    assert (tmp_path / "pruned" / "model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()
