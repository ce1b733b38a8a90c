"""`optx.S4DLayer` as a module: dtypes, masks, shapes, resume; and `optx.param_groups`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optx
from optx.inject import _s4d_ops


def small(width: int = 3, **options: Any) -> optx.S4DLayer:
    torch.manual_seed(0)
    return optx.S4DLayer(width, **{"d_state": 8, **options}).eval()


# ---- dtypes ----------------------------------------------------------------------------------------------


def test_half_precision_is_of_activations_and_never_of_steps() -> None:
    layer, u = small(train_B=True), torch.randn(2, 50, 3)
    exact = layer(u)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    kept = {name: p.dtype for name, p in half.named_parameters()}
    assert kept.pop("out.weight") == kept.pop("out.bias") == torch.bfloat16
    assert set(kept.values()) == {torch.float32}
    assert torch.equal(half.log_dt, layer.log_dt)
    found = half(u.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), exact, atol=0.03)
    y, state = half.step(u[:, 0].bfloat16(), half.initial_state(2))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        under = layer(u)
    assert torch.allclose(under.float(), exact, atol=0.03)
    assert layer.double()(u.double()).dtype == torch.float64


def test_under_autocast_the_state_space_itself_is_as_exact_as_without() -> None:
    layer, u = small(output="none"), torch.randn(2, 50, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(u), layer(u))
        under = layer(u)
    assert torch.equal(under, layer(u))


# ---- torch.compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, pytest.param(False, marks=pytest.mark.long)])
def test_compiled_it_is_the_same(bidirectional: bool) -> None:
    """In one graph, in which the kernel is one operation; and going on from a state."""
    options: dict[str, Any] = {"train_B": True, "bidirectional": bidirectional, "disc": "bilinear"}
    layer, u = small(**options), torch.randn(2, 20, 3)
    wanted = torch.autograd.grad(layer(u).square().sum(), [*layer.parameters()])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled: Any = torch.compile(layer, fullgraph=True, backend=backend)
    y = compiled(u)
    assert torch.equal(y, layer(u))
    found = torch.autograd.grad(y.square().sum(), [*layer.parameters()])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    (graph,) = graphs
    assert "optx.s4d_kernel" in graph.code
    assert "complex" not in graph.code
    if not bidirectional:
        state = layer(u, return_state=True).state
        again, end = compiled(u, state=state, return_state=True)
        assert torch.allclose(again, layer(u, state=state), atol=1e-6)
        assert torch.allclose(end, layer(u, state=state, return_state=True).state, atol=1e-6)


def test_the_kernel_is_an_operation_by_torch_s_rules() -> None:
    layer = small(train_B=True, bidirectional=True)
    weights = (layer.log_dt, layer.log_A_real, layer.A_imag, layer.B, layer.C)
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(_s4d_ops.OPERATIONS.s4d_kernel.default, (*weights, "zoh", 21, dtype))


# ---- masks and shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("side", ["front", "behind"])
def test_padding_leaves_no_trace(side: str, bidirectional: bool) -> None:
    layer = small(bidirectional=bidirectional)
    u = torch.randn(1, 20, 3)
    padding = torch.full((1, 7, 3), torch.nan)  # what is masked may be anything
    where = torch.ones(1, 27, dtype=torch.bool)
    where[:, slice(0, 7) if side == "front" else slice(20, 27)] = False
    padded = torch.cat([padding, u] if side == "front" else [u, padding], 1)
    found = layer(padded, mask=where)[where].view(1, 20, 3)
    assert torch.allclose(found, layer(u), atol=1e-6)


def test_the_state_is_that_behind_the_last_token() -> None:
    layer, u = small(), torch.randn(3, 20, 3)
    lengths = (20, 13, 1)
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    state = layer(u, mask=mask, return_state=True).state
    for row, length in enumerate(lengths):
        alone = layer(u[row : row + 1, :length], return_state=True).state
        assert torch.allclose(state[row], alone[0], atol=1e-6)


def test_axes() -> None:
    layer, turned = small(), small(transposed=True)
    u = torch.randn(2, 9, 3)
    assert torch.allclose(turned(u.mT).mT, layer(u), atol=1e-6)
    assert torch.allclose(layer(u[0]), layer(u)[0], atol=1e-6)
    y, state = layer.step(u[0, 0], layer.initial_state())
    assert (y.shape, state.shape) == ((3,), (3, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_state": 7}, "d_state is 7; modes come in pairs"),
        ({"d_state": 0}, "d_state is 0"),
        ({"width": 0}, "width is 0"),
        ({"init": "hippo"}, "init is 'hippo'; it must be one of 'legs', 'inv'"),
        ({"disc": "euler"}, "disc is 'euler'"),
        ({"output": "relu"}, "output is 'relu'"),
        ({"dt_min": 0.2}, "dt_max=0.1 is below dt_min=0.2"),
        ({"dt_min": 0}, "dt_min is 0"),
        ({"dropout": 2}, "dropout is 2"),
        ({"max_lr": -1}, "max_lr is -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        optx.S4DLayer(**{"width": 3, **options})


def test_no_sequence_is_no_error() -> None:
    """A shard of a batch may be empty; its gradients must be there, for other ranks."""
    layer = optx.S4DLayer(4, d_state=8)
    y, state = layer(torch.randn(0, 5, 4), return_state=True)
    assert (y.shape, state.shape) == ((0, 5, 4), (0, 4, 4))
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_calls_that_mean_nothing() -> None:
    layer, u = small(), torch.randn(2, 9, 3)
    mask, state = torch.ones(2, 9, dtype=torch.bool), small().initial_state(2)
    for call, words in (
        (lambda: layer(u.mT), r"\(2, 3, 9\).*must be \(batch, L, 3\)"),
        (lambda: layer(u.long()), "floating point"),
        (lambda: layer(u[:, :0]), "no token"),
        (lambda: layer(u, mask=mask[:, :8]), r"mask has shape \(2, 8\).*\(2, 9\)"),
        (lambda: layer(u, mask=mask.float()), "must be bool"),
        (lambda: layer(u, mask=mask, state=state), "mask and state were both given"),
        (lambda: layer(u, state=state[:1]), r"state has shape \(1, 3, 4\).*\(2, 3, 4\)"),
        (lambda: layer(u, state=state.real), "must be complex"),
        (lambda: layer.step(u, state), "one token"),
        (lambda: layer.step(u[:, 0], state[:1]), "state has shape"),
    ):
        with pytest.raises(optx.OptxError, match=words):
            call()


# ---- param groups (property 8) -----------------------------------------------------------------------------


def in_groups(model: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    """Rate and decay by parameter; each is in one group."""
    names = {p: name for name, p in model.named_parameters()}
    groups = optx.param_groups(model, **options)
    every = [names[p] for group in groups for p in group["params"]]
    assert sorted(every) == sorted(names[p] for p in names if p.requires_grad)
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_steps_a_and_b_are_slow_and_do_not_decay_and_the_rest_does() -> None:
    model = nn.Sequential(nn.Linear(2, 3), small(train_B=True), nn.Linear(3, 2))
    found = in_groups(model, lr=1e-2, weight_decay=0.05)
    slow = {name for name, settings in found.items() if settings == (1e-3, 0.0)}
    assert slow == {"1.log_dt", "1.log_A_real", "1.A_imag", "1.B"}
    assert {settings for name, settings in found.items() if name not in slow} == {(1e-2, 0.05)}
    assert in_groups(model, lr=1e-4)["1.log_dt"] == (1e-4, 0.0)  # not faster than all
    assert "A_imag" not in in_groups(small(init="real"), lr=1e-2)
    model[0].requires_grad_(False)
    assert "0.weight" not in in_groups(model, lr=1e-2)


def test_any_module_may_ask_and_marked_parameters_are_understood() -> None:
    model = nn.ModuleDict({"asks": nn.Linear(2, 2), "marked": nn.Linear(2, 2)})
    model["asks"].param_options = {"bias": {"lr": 0.5, "betas": (0.5, 0.6)}}
    model["marked"].weight._optim = {"weight_decay": 0.0}  # as state-spaces/s4 has it
    groups = optx.param_groups(model, lr=0.1, weight_decay=0.2, betas=(0.9, 0.95))
    opt = torch.optim.AdamW(groups, lr=1)
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in opt.param_groups] == [
        (0.1, 0.2, (0.9, 0.95)),
        (0.5, 0.2, (0.5, 0.6)),
        (0.1, 0.0, (0.9, 0.95)),
    ]
    wrapped = optx.wrap(torch.optim.AdamW(optx.param_groups(model, lr=0.1)), optx.Clip(1.0))
    assert [group["lr"] for group in wrapped.param_groups] == [0.1, 0.5]


def test_groups_that_can_not_be() -> None:
    def asking(options: Any) -> nn.Module:
        module = nn.Linear(2, 2)
        module.param_options = options
        return module

    tied = nn.ModuleList([asking({"weight": {"lr": 1}}), asking({"weight": {"lr": 2}})])
    tied[1].weight = tied[0].weight  # type: ignore[union-attr]
    for model, words in (
        (asking({"wieght": {}}), r"asks for settings of 'wieght', which is no parameter.*'weight'"),
        (asking({"weight": 3}), "'weight' asks for 3"),
        (asking([1]), r"param_options of '' is \[1\]"),
        (asking({"weight": {"max_lr": -1}}), "max_lr of 'weight' is -1"),
        (tied, "'0.weight' and '1.weight' are one parameter"),
        (nn.ReLU(), "no parameter of this ReLU"),
        (None, "the model is None"),
    ):
        with pytest.raises(optx.OptxError, match=words):
            optx.param_groups(model, lr=1.0)  # type: ignore[arg-type]
    for options in ({"lr": -1}, {"lr": 1, "weight_decay": -1}):
        with pytest.raises(optx.OptxError, match="is -1"):
            optx.param_groups(nn.Linear(2, 2), **options)


# ---- resume ----------------------------------------------------------------------------------------------


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        u = torch.randn(4, 17, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(u) - u.roll(3, 1)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small(init="lin").train()
        return model, torch.optim.AdamW(optx.param_groups(model, lr=1e-2))

    whole, opt = fresh()
    train(whole, opt, range(6))
    assert all(
        (a != b).any() for a, b in zip(whole.parameters(), small(init="lin").parameters(), strict=True)
    )
    model, opt = fresh()
    train(model, opt, range(3))
    torch.save((model.state_dict(), opt.state_dict()), tmp_path / "run.pt")
    torch.manual_seed(99)
    model = optx.S4DLayer(3, d_state=8, init="lin")
    opt = torch.optim.AdamW(optx.param_groups(model, lr=1e-2))
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    train(model, opt, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
