"""What the interaction basis takes for batches, what it refuses by name, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from injections import assert_same, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optx
from optx.analysis import interaction_basis


class Net(nn.Module):
    """Layers on the path, beside it, used twice and never."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        self.lost, self.never, self.index = nn.Linear(5, 5), nn.Linear(5, 5), Argmax()
        self.image, self.drop = Image(), nn.Dropout(0.5)

    def forward(
        self, x: Tensor, scale: float = 1.0, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        h = self.a(x)
        self.lost(h)
        self.index(h)
        self.image(h)
        h = self.drop(self.act(self.act(h)))
        return {"loss": h.mean(), "logits": self.b(h) * scale}


class Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


class Image(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None, None]


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


X = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["act"], r"'act' is called more than once"),
        (["never"], r"'never' is not called by this Net"),
        (["lost"], r"'lost' doesn't lead to the model's output"),
        (["lost", "b"], r"'lost' doesn't lead to 'b'"),
        (["index"], r"'index' \(Argmax\) gives a torch.int64 tensor"),
        (["image"], r"'image' \(Image\) gives a tensor of shape \(30, 1, 1, 5\)"),
        (["b", "a"], r"in the order in which the model calls them: a, b"),
        (["a", "a"], r"layers has 'a' twice"),
        (["aa"], r"no module is called 'aa'. Near: 'a'"),
        ([""], r"no module is called ''"),
        ([], r"layers is \[\]"),
        ("a", r"layers is 'a'; it must be a list"),
    ],
)
def test_layers_that_are_refused(layers: Any, said: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(optx.OptxError, match=said):
        interaction_basis(model, [X], layers)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "both"}, r"kind is 'both'; it must be one of 'local', 'global', 'pca'"),
        ({"sources": 0}, "sources is 0"),
        ({"sources": 1.5}, "sources is 1.5"),
        ({"eps": -1e-5}, "eps is -1e-05"),
        ({"eps": 1}, "eps is 1"),
        ({"centre": "yes"}, "centre is 'yes'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"output": lambda out: out["loss"]}, "has no floating tensor with a batch"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(optx.OptxError, match=said):
        interaction_basis(net(), [X], ["a"], **options)


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ([], "loader has no batch"),
        (iter([X]), "can be read once only"),
        (X, "loader is a Tensor"),
        ({"x": X}, "loader is a dict"),
        ([(X, X, X)], "a batch is a tuple of 3"),
        ([X[:0]], "no sample"),
        ([X * torch.inf], "'a' have inf or nan"),
    ],
)
def test_loaders_that_are_refused(loader: Any, said: str) -> None:
    with pytest.raises(optx.OptxError, match=said):
        interaction_basis(net(), loader, ["a"])


def test_models_that_are_refused() -> None:
    with pytest.raises(optx.OptxError, match="model is a function"):
        interaction_basis(lambda x: x, [X], ["a"])  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="compiled model"):
        interaction_basis(torch.compile(net()), [X], ["a"])  # type: ignore[arg-type]


class Mapped(Mapping[str, Any]):
    """As transformers' BatchEncoding: a mapping that is no dict."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def __getitem__(self, key: str) -> Any:
        return self.given[key]

    def __iter__(self) -> Any:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def test_batches_in_any_form_are_the_same() -> None:
    y = torch.zeros(30, dtype=torch.long)
    loaders = {
        "tensor": [X],
        "two": list(X.split(17)),
        "pair": [(X, y)],
        "list": [[X, y]],
        "one": [(X,)],
        "dict": [{"x": X}],
        "pair of dict": [({"x": X}, y)],
        "mapping": [Mapped(x=X)],
        "DataLoader": DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True),
        "empty one": [X, X[:0]],
    }
    found = {name: interaction_basis(net(), one, ["a", "b"])["a"] for name, one in loaders.items()}
    for name, one in found.items():
        assert one.rows == 30, name
        torch.testing.assert_close(one.Lambda, found["tensor"].Lambda, rtol=1e-10, atol=0, msg=name)
        torch.testing.assert_close(one.C, found["tensor"].C, rtol=0, atol=1e-8, msg=name)
    other = interaction_basis(net(), [{"x": X, "scale": 2.0}], ["a", "b"])["a"]
    torch.testing.assert_close(other.Lambda, 4 * found["tensor"].Lambda, rtol=1e-10, atol=0)


def test_it_leaves_no_trace() -> None:
    model = net().train()
    model.b.eval()
    model.a.weight.requires_grad_(False)
    model.b.bias.grad = torch.ones(3).double()
    before, grad = snapshot(model), model.b.bias.grad
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(X), batch_size=8, shuffle=True)
    torch.set_rng_state(state)
    ib = interaction_basis(model, loader, ["a", "b"], sources=2)
    ib.edges()
    assert_same(model, before)
    assert model.b.bias.grad is grad
    assert torch.equal(torch.get_rng_state(), state)

    def fails(out: Any) -> Tensor:
        raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        interaction_basis(model, loader, ["a", "b"], output=fails)
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_within_no_grad(mode: Any) -> None:
    plain = interaction_basis(net(), [X], ["a", "b"])
    model = net()
    with mode():
        within = interaction_basis(model, [X], ["a", "b"])
        edges = within.edges()
    assert torch.equal(within["a"].C, plain["a"].C)
    assert torch.equal(edges["a", "b"], plain.edges()["a", "b"])


def test_operations_in_place_are_not_seen() -> None:
    """The layer's output is what it gave, whatever is done to it afterwards."""
    torch.manual_seed(0)
    parts = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)]
    plain = interaction_basis(nn.Sequential(*parts).double(), [X], ["0"])["0"]
    inplace = nn.Sequential(parts[0], nn.ReLU(inplace=True), parts[2]).double()
    assert torch.equal(interaction_basis(inplace, [X], ["0"])["0"].C, plain.C)


def test_few_samples_are_told() -> None:
    with pytest.warns(UserWarning, match=r"'a' has 5 features, and the loader 3 samples \(and positions\)"):
        interaction_basis(net(), [X[:3]], ["a"])


def test_a_model_without_values_is_told() -> None:
    with pytest.raises(optx.OptxError, match="on the meta device"):
        interaction_basis(net().to("meta"), [X], ["a"])


def test_nothing_after_the_next_layer_is_computed() -> None:
    """But for the first pass, which looks at the whole model; and what is attached looks away."""
    model, calls = net(), list[int]()
    hook = model.b.register_forward_pre_hook(lambda *_: calls.append(1))
    handle = optx.attach(model, optx.LoRA(rank=1), targets="a")
    interaction_basis(model, [X, X], ["a", "drop"]).edges()
    assert len(calls) == 1 + 2  # the look, and the output's derivatives for the last layer
    hook.remove()
    assert model(X)["logits"].shape == (30, 3)
    handle.remove()


def test_what_output_counts() -> None:
    twice = interaction_basis(net(), [X], ["a"], output=lambda out: 2 * out["logits"])["a"]
    once = interaction_basis(net(), [X], ["a"])["a"]
    torch.testing.assert_close(twice.Lambda, 4 * once.Lambda, rtol=1e-10, atol=0)


def test_a_wide_target_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 5000))
    with pytest.warns(UserWarning, match="5,000 numbers are as many backward passes a batch. sources=64"):
        interaction_basis(model, [torch.randn(2, 4)], ["0"])


def test_table_and_lookup() -> None:
    ib = interaction_basis(net(), [X], ["a", "b"])
    lines = str(ib).splitlines()
    assert lines[0].split()[:5] == ["layer", "width", "rank_gram", "rank_jacobian", "dim"]
    assert lines[2].split()[:5] == ["a", "5", "4", "5", "4"]
    assert "local: a 4, b 3" in repr(ib)
    assert (list(ib), len(ib), "a" in ib, "c" in ib) == (["a", "b"], 2, True, False)
    with pytest.raises(KeyError, match="no basis of 'act'"):
        ib["act"]
