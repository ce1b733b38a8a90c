"""`optx.analysis.report`: what applies, why not, and that no trace is left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import optx
from optx.analysis import _report_sections as sections
from optx.analysis import report

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))

from attention_models import TOKENS, built, padded

ALL = list(sections.SECTIONS)
FAST = [title for title in ALL if title != "Lipschitz bounds"]


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has been trained on real handwriting, for a little."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)
    x = F.avg_pool2d(x, 2).flatten(1)  # 4 x 4, which LipSDP is fast for
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 10))
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    return net, x, y


def test_a_network_that_reads_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, x, y = digits()
    loader = DataLoader(TensorDataset(x, y), batch_size=200)
    made = report(net, loader, batches=2, picture=tmp_path / "page.png", html=tmp_path / "page.html")
    assert list(made.sections) == ALL[:-1]
    assert made.left_out == {"Attention margins": "the model has no attention module that optx knows"}
    said = capsys.readouterr().out
    for title in ALL:
        assert title in said
    assert "2 batches" in made.title
    net.eval()
    net.zero_grad()
    logits = net(x[200:400])
    loss = F.cross_entropy(logits, y[200:400])
    loss.backward()
    right = [float((net(x[a : a + 200]).argmax(1) == y[a : a + 200]).double().mean()) for a in (0, 200)]
    assert made["Softmax collapse"].values["right"] == pytest.approx(sum(right) / 2)
    assert made["NLM alignment"].values == pytest.approx(optx.analysis.nlm_alignment(net))
    norms = {name: float(p.grad.norm()) for name, p in net.named_parameters()}  # type: ignore[union-attr]
    assert made["Gradient norms"].values == pytest.approx(norms, rel=1e-5)
    tops = {
        name: float(torch.linalg.svdvals(p.detach())[0]) for name, p in net.named_parameters() if p.ndim > 1
    }
    assert made["Top singular values"].values == pytest.approx(tops, rel=1e-3)
    bounds = made["Lipschitz bounds"].values
    assert 0 < bounds["found"] <= bounds["LipSDP"] <= bounds["product"]
    assert bounds["product"] == pytest.approx(tops["0.weight"] * tops["3.weight"], rel=1e-3)
    assert set(made["Degeneracy"].values) == {"0", "3"}
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in ALL[:-1])
    assert "data:image/png;base64," in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "page.png"]


@pytest.mark.parametrize(("kind", "shifted"), [("gpt2", True), ("bert", False)])
def test_models_of_transformers(kind: str, shifted: bool) -> None:
    model, batch = built(kind), {**padded(), "labels": TOKENS.clone()}
    batch["labels"][0, :3] = -100
    made = report(model, batch, sections=FAST, show=False)
    assert list(made.sections) == FAST
    # Of 12 labels 3 are ignored; where each is the next token's, the first of a row is none.
    assert made["Softmax collapse"].rows[0][0] == ("8" if shifted else "9")
    assert f"{float(model(**batch).loss.detach()):.4g}" == made["Softmax collapse"].rows[0][3]
    if shifted:
        logits = model(**batch).logits[:, :-1]
        kept = batch["labels"][:, 1:] != -100
        right = float((logits.argmax(-1) == batch["labels"][:, 1:])[kept].double().mean())
        assert made["Softmax collapse"].values["right"] == pytest.approx(right)
    assert "look free for that alone" in made["Degeneracy"].note  # what it warns of, where it is read
    assert len(made["Attention margins"].rows) == 2
    found = optx.analysis.attention_margins(model, batch, 0, 0, sample=8)
    assert next(iter(made["Attention margins"].values.values())) == found.saturated


def test_why_something_does_not_apply_is_said() -> None:
    made = report(built("llama"), padded(), show=False)
    assert "there is no loss (the batch has no labels)" in made.left_out["NLM alignment"]
    assert "there is no loss (the batch has no labels)" in made.left_out["Gradient norms"]
    assert made.left_out["Softmax collapse"] == "the batch has no labels"
    assert "inputs are a dict" in made.left_out["Lipschitz bounds"]
    assert "rotary positions" in made.left_out["Attention margins"]
    assert list(made.sections) == ["Top singular values", "Degeneracy"]
    with pytest.raises(KeyError, match="it does not apply: the batch has no labels"):
        made["Softmax collapse"]
    assert set(made.sections) | set(made.left_out) == set(ALL)
    assert all(f"  {title}: {why}" in str(made) for title, why in made.left_out.items())
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    net.requires_grad_(False)
    made = report(net, (torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])), show=False)
    assert "MaxPool2d has no quadratic constraint" in made.left_out["Lipschitz bounds"]
    assert made.left_out["NLM alignment"] == "the loss has no gradient: all parameters are frozen"
    made = report(net, (torch.randn(4, 1, 6, 6), torch.randn(4, 3)), sections=ALL[:2], show=False)
    assert made.left_out["Softmax collapse"] == "labels are torch.float32, no class numbers"


def test_a_loss_of_ones_own() -> None:
    net = nn.Linear(3, 2)
    x, y = torch.randn(5, 3), torch.randn(5, 2)

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(output, batch[1])

    made = report(net, (x, y), loss_fn=loss_fn, sections=FAST, show=False)
    F.mse_loss(net(x), y).backward()
    assert made["Gradient norms"].values["weight"] == pytest.approx(float(net.weight.grad.norm()))  # type: ignore[union-attr]
    with pytest.raises(optx.OptxError, match=r"loss_fn gave shape \(5, 2\); it must give one number"):
        report(net, (x, y), loss_fn=lambda out, _: out, show=False)


@pytest.mark.parametrize("fail", ["", "model", "section"])
def test_no_trace_is_left(fail: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net[3].weight.grad = torch.ones(3, 6)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    grad, state = net[3].weight.grad, torch.get_rng_state()

    def broken(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    picture = tmp_path / "page.png"
    changed = mock.patch.dict(sections.SECTIONS, {"Degeneracy": broken} if fail == "section" else {})
    with changed, mock.patch.object(F, "dropout", broken if fail == "model" else F.dropout):
        if fail:
            with pytest.raises(RuntimeError, match="on purpose"):
                report(net, batch, sections=FAST, show=False, picture=picture)
        else:
            report(net, batch, sections=FAST, show=False, picture=picture)
    assert picture.exists() == (not fail)
    assert len(list(tmp_path.iterdir())) == (not fail)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert net[3].weight.grad is grad
    assert torch.equal(grad, torch.ones(3, 6))
    assert [p.grad is None for p in net.parameters()] == [True] * 4 + [False, True]
    assert [p.requires_grad for p in net.parameters()] == [True, False] + [True] * 4
    assert [m.training for m in net.modules()] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


NET, X = nn.Linear(3, 2), torch.ones(2, 3)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": 3}, "model is a int; it must be a torch.nn.Module"),
    "data": ({"data": 3}, r"data is a int; it must be a batch \(a tensor"),
    "empty": ({"data": []}, "data has no batch"),
    "section": ({"sections": ["Softmax"]}, "there is no section 'Softmax'. Near: 'Softmax collapse'"),
    "a word": ({"sections": "Degeneracy"}, "sections is 'Degeneracy'; it must be a list"),
    "batches": ({"batches": 0}, "batches is 0; it must be at least 1"),
    "path": ({"picture": 3}, "picture is 3; it must be a path"),
    "folder": (
        {"html": "/no/such/page.html"},
        "html is '/no/such/page.html', and there is no folder '/no/such'",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    changed, words = MISTAKES[case]
    with pytest.raises(optx.OptxError, match=f"report: {words}"):
        report(**{"model": NET, "data": X, "show": False, **changed})


def test_files_that_could_not_be_written_are_told_before_the_model_runs(tmp_path: Path) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the model ran")

    net, page = nn.Linear(3, 2), tmp_path / "page"
    net.register_forward_pre_hook(never)
    page.write_bytes(b"as it was")
    with pytest.raises(optx.OptxError, match=r"picture and html are both '.*page'; one would replace"):
        report(net, X, picture=page, html=tmp_path / "." / "page", show=False)
    with pytest.raises(optx.OptxError, match=r"picture is '.*', a folder; it must be the name of a file"):
        report(net, X, picture=tmp_path, show=False)
    refused = mock.patch("tempfile.mkdtemp", side_effect=OSError(30, "Read-only file system"))
    with (
        refused,
        pytest.raises(optx.OptxError, match=r"html is '.*page', which can't be written .*Read-only"),
    ):
        report(net, X, html=page, show=False)
    assert page.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [page]


def test_without_matplotlib_a_file_is_refused_at_once_and_the_page_is_printed() -> None:
    module = sys.modules["optx.analysis.report"]
    with mock.patch.object(module, "find_spec", return_value=None):
        with pytest.raises(optx.OptxError, match="picture needs matplotlib, which is not installed"):
            report(NET, X, picture="page.png", show=False)
        assert "Top singular values" in str(report(NET, X, sections=FAST, show=False))
