"""LDLT on models: chains that it finds and refuses, merges, files, compiled and functional calls."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import assert_same, snapshot
from ldlt_models import Skip, convs
from ldlt_reference import layers, least, lmi, mlp, spoil, steepest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import optx


class Written(nn.Module):
    """Layers that are registered in another order than they are called in, and functions between them."""

    def __init__(self, between: Any = F.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first, self.middle = nn.Linear(5, 3), nn.Linear(4, 6), nn.Linear(6, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x.flatten(1)), 0.2)
        return self.last(self.between(self.middle(h)))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).tanh()) if x.sum() < 1e9 else x


# ---- chains ----------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_calls() -> None:
    model = Written()
    handle = optx.attach(model, optx.LDLT(2.0), ["first", "last", "middle"])
    assert [link.path for link in handle.chain.links] == ["first", "middle", "last"]
    assert [(link.low, link.high) for link in handle.chain.links[:2]] == [(0.2, 1.0), (0.0, 1.0)]
    spoil(handle, 3.0)
    found = handle.certificate()
    assert (found.first, found.last, found.L, found.holds) == ("first", "last", 2.0, True)
    C = [handle.weight(path).detach().double() for path in ("first", "middle", "last")]
    own = C[0].T @ C[0]  # the slopes differ: by hand
    form = torch.zeros(4 + 6 + 5, 4 + 6 + 5, dtype=torch.float64)
    form[:4, :4] = 4.0 * torch.eye(4) + 0.4 * own
    form[4:10, 4:10] = form[10:, 10:] = 0.0
    form[4:10, 4:10] = 2.0 * torch.eye(6)
    form[10:, 10:] = 2.0 * torch.eye(5) - C[2].T @ C[2]
    form[4:10, :4], form[10:, 4:10] = -1.2 * C[0], -C[1]
    form = form.tril() + form.tril(-1).T
    assert abs(least(form) - found.min_eigenvalue) < 1e-12


def test_slopes_are_those_of_the_activations() -> None:
    for act, wanted in (
        (nn.Sigmoid(), (0.0, 0.25)),
        (nn.LeakyReLU(-0.5), None),
        (nn.LeakyReLU(2.0), (1.0, 2.0)),
        (nn.ELU(3.0), (0.0, 3.0)),
        (nn.Identity(), (0.0, 1.0)),
        (nn.Sequential(nn.Sigmoid(), nn.LeakyReLU(2.0)), (0.0, 0.5)),
    ):
        model = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2))
        if wanted is None:
            with pytest.raises(optx.TargetError, match=r"slopes in \[-0.5, 1.0\], outside of \[0, 1\]"):
                optx.attach(model, optx.LDLT(), "0|2")
            handle = optx.attach(model, optx.LDLT(activation=(-0.5, 1.0)), "0|2")
            wanted = (-0.5, 1.0)
        else:
            handle = optx.attach(model, optx.LDLT(), "0|2")
        link = handle.chain.links[0]
        assert (link.low, link.high) == pytest.approx(wanted)
        spoil(handle, 5.0)
        assert handle.certificate().holds
        assert steepest(handle.merge_and_unload().double(), [3], 20_000, 100) <= 1 + 1e-5


def test_GELU_is_served_where_a_person_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    with pytest.raises(optx.TargetError, match="such as GELU or SiLU"):
        optx.attach(model, optx.LDLT(), ["0", "2"])
    with pytest.raises(optx.TargetError, match=r"activation says slopes in \[0.0, 1.0\]"):
        optx.attach(model, optx.LDLT(activation="relu"), ["0", "2"])
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(x).sum(), x)
    assert -0.13 < slope.min() < -0.128
    assert 1.128 < slope.max() < 1.13
    handle = optx.attach(model, optx.LDLT(activation=(-0.13, 1.13)), ["0", "2"])
    spoil(handle, 5.0)
    assert handle.certificate().holds
    assert steepest(handle.merge_and_unload().double(), [3], 20_000, 100) <= 1 + 1e-5


def test_what_is_declared_serves_a_model_that_cannot_be_traced() -> None:
    model = Untraceable()
    with pytest.raises(optx.TargetError, match=r"can't trace this Untraceable.*LDLT\(activation="):
        optx.attach(model, optx.LDLT(), ["fc1", "fc2"])
    handle = optx.attach(model, optx.LDLT(activation="tanh"), ["fc1", "fc2"])
    spoil(handle, 5.0)
    assert handle.certificate().holds


def test_dropout_is_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    handle = optx.attach(model, optx.LDLT(2.0), ["0", "3"])
    assert (handle.certificate().L, handle.certificate().training_L) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("model", "targets", "words"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "0|2", "a LayerNorm .'1'."),
        (nn.Sequential(nn.Linear(4, 4), optx.MaxMin(), nn.Linear(4, 2)), "0|2", "a MaxMin .'1'."),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "0|2", "a BatchNorm1d"),
        (nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)), "0|2", "a PReLU"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Softplus(1, 1), nn.Linear(4, 2)),
            "0|2",
            "'0': Softplus.*it jumps",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.CELU(-1.0), nn.Linear(4, 2)),
            "0|2",
            "CELU has slopes that are no",
        ),
        (Written(lambda x: F.softplus(x, 1, threshold=1)), "first|middle|last", "Softplus.*it jumps"),
        (Written(lambda x: F.leaky_relu(input=x, negative_slope=-3)), "first|middle|last", r"\[-3.0, 1.0\]"),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)), "0|2", "a Softmax"),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(1.0), nn.Linear(4, 2)), "0|2", "leaves nothing"),
        (mlp([3, 4, 4, 2]), "0|4", "a Linear .'2'.*Leave out|a Linear"),
        (Written(lambda x: torch.softmax(x, 1)), "first|middle|last", "is softmax"),
        (Written(lambda x: F.dropout(x, 0.5)), "first|middle|last", "eval mode too"),
        (Written(lambda x: x.relu() + x), "first|middle|last", "goes to 2 places"),
        (Skip(True), "fc1|out", None),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)), "0|2", "a MaxPool2d"),
        (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 4, 3)
            ),
            "0|2",
            "pads by 'reflect'",
        ),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Linear(4, 3)), "0|2", "nothing flattens"),
        (nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 3)), "0|1", "is a Embedding"),
        (nn.Sequential(*[nn.Linear(4, 4)] * 2), "0", "called more than once|share one|^$"),
    ],
)
def test_what_is_no_chain_is_refused(model: nn.Module, targets: str, words: str | None) -> None:
    before = snapshot(model)
    if words is None:  # what is behind the chain is not in it
        optx.attach(model, optx.LDLT(), targets).remove()
    elif "^$" in words:
        handle = optx.attach(
            model, optx.LDLT(), targets
        )  # one layer, which is used twice, is no chain of two
        handle.remove()
    else:
        with pytest.raises(optx.TargetError, match=words):
            optx.attach(model, optx.LDLT(), targets)
    assert_same(model, before)


def test_shared_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(optx.TargetError, match="share one weight"):
        optx.attach(model, optx.LDLT(), ["0", "2"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"L": 0.0}, "L is 0.0"),
        ({"L": "smallest"}, "it must be one of 'auto'"),
        ({"L": "auto", "init": "raw"}, "keeps none"),
        ({"residual": 2}, "residual is 2"),
        ({"init": "exact"}, "init is 'exact'"),
        ({"activation": "gelu"}, r"Give its slopes: activation=\(-0.13, 1.13\)"),
        ({"activation": (1.0, 0.0)}, "the least and the"),
        ({"activation": 3}, "the least and the"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        optx.LDLT(**options)


def test_nothing_else_can_be_attached() -> None:
    model = mlp([4, 6, 3])
    optx.attach(model, optx.LDLT(), ["0", "2"])
    with pytest.raises(optx.TargetError, match="'ldlt' is there"):
        optx.attach(model, optx.LoRA(rank=1), "0")
    with pytest.raises(optx.TargetError, match="can't know which layers"):
        optx.attach(mlp([4, 6, 3]), optx.LDLT())


# ---- life ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [lambda: mlp([4, 6, 3]), lambda: Skip(True), convs], ids=["mlp", "skip", "convs"]
)
def test_merging_and_removing_leave_no_trace(build: Any) -> None:
    model = build().eval()
    x = torch.randn(2, 2, 8, 8) if build is convs else torch.randn(2, 4)
    before, y = snapshot(model), model(x)
    handle = optx.attach(model, optx.LDLT(residual=isinstance(model, Skip)), layers(model))
    spoil(handle, 2.0)
    attached = model(x)
    assert not torch.allclose(attached, y)
    handle.merge()
    assert torch.allclose(model(x), attached, atol=1e-6)
    assert handle.certificate(shape=(2, 8, 8)).holds
    handle.unmerge()
    assert torch.equal(model(x), attached)
    with handle.disable():
        assert torch.equal(model(x), y)
        with pytest.raises(optx.OptxError, match="is disabled"):
            handle.certificate()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), attached)
    handle.remove()
    assert_same(model, before)
    assert torch.equal(copied(x), attached)


def test_it_trains_saves_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def made(L: Any = 1.5) -> tuple[nn.Module, Any, Any]:
        model = mlp([4, 8, 6, 3])
        handle = optx.attach(model, optx.LDLT(L), ["0", "2", "4"])
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, handle, optx.wrap(base, handle, optx.PerpGrad())

    def step(model: nn.Module, opt: Any, seed: int) -> None:
        torch.manual_seed(seed)
        x = torch.randn(16, 4)
        opt.zero_grad()
        F.cross_entropy(model(x), x.argmax(1) % 3).backward()
        opt.step()

    model, handle, opt = made("auto")
    for seed in range(4):
        step(model, opt, seed)
    kept = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], kept)
    handle.save(tmp_path / "saved")
    for seed in range(4, 8):
        step(model, opt, seed)
    assert handle.certificate().holds

    kept.seek(0)
    mine, of_opt = torch.load(kept, weights_only=True)
    again, other, opt_again = made("auto")
    again.load_state_dict(mine)
    opt_again.load_state_dict(of_opt)
    for seed in range(4, 8):
        step(again, opt_again, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert other.L == handle.L

    bare = mlp([4, 8, 6, 3], seed=5)
    read = optx.attach(bare, tmp_path / "saved")
    assert isinstance(read, optx.LDLTHandle)
    assert read.L == handle.L
    assert read.certificate().holds
    wrong, wrong_handle, _ = made(7.0)
    with pytest.raises((RuntimeError, optx.OptxError), match="gauge"):
        wrong.load_state_dict(mine)
    with pytest.raises(optx.OptxError):
        wrong_handle.load_state_dict(handle.state_dict())


def test_states_of_another_L_are_refused() -> None:
    one, other = (optx.attach(mlp([4, 6, 3], seed=int(L)), optx.LDLT(L), ["0", "2"]) for L in (1.0, 2.0))
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(optx.OptxError, match="chain of L=1, and this one was attached with L=2"):
        other.load_state_dict(one.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="chain of L=1, and this one was attached with L=2"):
        other.model.load_state_dict(one.model.state_dict())


def test_weights_are_made_once_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from optx.lipschitz import _ldlt_part

    counted: list[int] = []
    real = _ldlt_part.weights
    monkeypatch.setattr(_ldlt_part, "weights", lambda *args: counted.append(1) or real(*args))
    model = mlp([4, 8, 6, 3])
    handle = optx.attach(model, optx.LDLT(), ["0", "2", "4"])
    x = torch.randn(5, 4)
    y = model(x)
    assert len(counted) == 1
    assert not handle.chain.made
    y.sum().backward()
    model(x).sum().backward()  # a second pass has a graph of its own
    assert len(counted) == 2
    model[:3](x)  # part of the chain: what is left over is nobody's
    assert len(counted) == 3
    handle.chain.parts[0].V.data.mul_(2.0)  # behind autograd's back
    assert not torch.allclose(model(x), y)
    assert len(counted) == 4
    with parametrize.cached(), torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
    assert len(counted) == 5


def test_a_layer_behind_what_was_left_over_sees_new_values() -> None:
    model = mlp([4, 8, 3])
    handle = optx.attach(model, optx.LDLT(), ["0", "2"])
    h = torch.randn(5, 8)
    model[0](torch.randn(5, 4))  # leaves the second layer's weight
    with torch.no_grad():
        handle.chain.parts[1].V.mul_(3.0)
    assert torch.allclose(model[2](h), F.linear(h, handle.weight("2"), model[2].bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = mlp([4, 8, 6, 3]).to(dtype)
    handle = optx.attach(model, optx.LDLT(), ["0", "2", "4"])
    assert all(p.dtype == torch.float32 for p in handle.parameters())
    x = torch.randn(7, 4, dtype=dtype)
    assert model(x).dtype == dtype
    plain = mlp([4, 8, 6, 3])
    other = optx.attach(plain, optx.LDLT(), ["0", "2", "4"])
    other.load_state_dict(handle.state_dict())
    for path in ("0", "2", "4"):
        plain.get_parameter(f"{path}.bias").data.copy_(model.get_parameter(f"{path}.bias"))
    x = torch.randn(7, 4)
    exact = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other.weight("4"), handle.weight("4"))
        assert (plain(x).float() - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    "build", [lambda: mlp([4, 8, 6, 3]), lambda: Skip(True), convs], ids=["mlp", "skip", "convs"]
)
def test_compiled(build: Any) -> None:
    model = build().train()
    x = torch.randn(2, 2, 8, 8) if build is convs else torch.randn(2, 4)
    handle = optx.attach(model, optx.LDLT(residual=isinstance(model, Skip)), layers(model))
    wanted = model(x)
    gradients = torch.autograd.grad(wanted.square().sum(), handle.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = compiled(x)
        assert torch.allclose(found, wanted, atol=1e-5)
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), handle.parameters()), gradients, strict=True
        ):
            assert torch.allclose(one, other, atol=1e-4)
    with torch.no_grad():
        handle.parameters()[0].mul_(2.0)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_checkpointed_as_a_whole() -> None:
    model = mlp([4, 8, 6, 3])
    handle = optx.attach(model, optx.LDLT(), layers(model))
    x = torch.randn(5, 4)
    wanted = torch.autograd.grad(model(x).square().sum(), handle.parameters())
    kept = checkpoint(model, x, use_reentrant=False)
    found = torch.autograd.grad(kept.square().sum(), handle.parameters())
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    again = torch.autograd.grad(model(x).square().sum(), handle.parameters())  # what it left is nobody's
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_functional_transforms() -> None:
    model = mlp([4, 6, 3])
    handle = optx.attach(model, optx.LDLT(), ["0", "2"])
    x = torch.randn(5, 4)
    values = dict(model.named_parameters())
    run = lambda p: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: E731
    found = torch.func.grad(run)(values)
    run(values).backward()
    for name, p in handle.named_parameters():
        assert p.grad is not None
        assert torch.allclose(found[name], p.grad, atol=1e-5)


def test_the_reference_agrees_on_a_net_by_hand() -> None:
    model = mlp([4, 8, 6, 3])
    handle = optx.attach(model, optx.LDLT(2.0), ["0", "2", "4"])
    spoil(handle, 2.0)
    *C, B = [handle.weight(path).detach().double() for path in ("0", "2", "4")]
    assert handle.certificate().min_eigenvalue == pytest.approx(least(lmi(C, 2.0, None, B)), abs=1e-12)
