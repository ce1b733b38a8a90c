"""Adapters while they train: gradients, dropout, compiled, autocast, half precision, resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_methods import BERT_NORMS, METHODS
from adapter_models import assert_close, bert, ids, llama, moved, outputs
from injections import checkpoint_layers, no_dropout
from torch import Tensor, nn

import optx

F64 = torch.float64


def loss_of(model: Any) -> Tensor:
    out = model(ids())
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean()


def grads(model: Any, handle: optx.Handle) -> list[Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad.clone() for p in handle.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [llama, bert])
def test_gradients_under_checkpointing(make: Callable[[], Any]) -> None:
    model = make().train()
    model.config.use_cache = False  # as checkpointing has it: a cache brings a mask, and other rounding
    handle = moved(model, optx.MAM(prefix=2, rank=3, mlp=4))
    optx.trainable_only(model, handle)
    no_dropout(model)
    plain = grads(model, handle)
    assert len(plain) == len(handle.parameters())
    assert all(float(g.abs().max()) > 0 for g in plain)
    checkpoint_layers(model)
    for a, b in zip(grads(model, handle), plain, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_those_of_the_formula() -> None:
    model = nn.Sequential(nn.Linear(4, 3, dtype=F64))
    handle = moved(model, optx.HiddenDelta("tanh", compose="scaled", scale="learned", rank=2, norm="in"), "0")
    x = torch.randn(5, 4, dtype=F64, requires_grad=True)
    names = [name for name, _ in handle.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in handle.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values))


def test_dropout_acts_while_training_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).train()
    moved(model, optx.ParallelAdapter(rank=8, dropout=0.5), "0")
    x = torch.randn(5, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.long
def test_compiles_as_one_graph() -> None:
    """What the table of test_attach_torch.py has no row for."""
    model = bert()
    moved(model, optx.SequentialAdapter(rank=3), BERT_NORMS)
    optx.attach(model, optx.ParallelAdapter(rank=3, position="attention", norm="out"))
    optx.attach(model, optx.HiddenDelta("softmax", "heads", rank=3, init="bert"))
    wanted = outputs(model)
    torch._dynamo.reset()
    assert_close(outputs(torch.compile(model, fullgraph=True, backend="aot_eager")), wanted, 1e-6)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_keeps_the_precision_of_what_is_summed(make: Callable[[], Any], method: str) -> None:
    """Under autocast the residual stream of BERT is float32: an adapter must not round it."""
    model = make()
    dtypes: dict[str, list[torch.dtype]] = {"bare": [], "served": []}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for run_of in ("bare", "served"):
            handle = moved(model, METHODS[method][0]()) if run_of == "served" else None
            torch.clear_autocast_cache()  # the head was moved by hand, and its half is from before
            hooks = [
                m.register_forward_hook(lambda _m, _a, out, key=run_of: dtypes[key].append(_first(out).dtype))
                for path, m in model.named_modules()
                if "optx" not in path and type(m).__name__ not in ("DynamicCache",)
            ]
            out = outputs(model)
            for hook in hooks:
                hook.remove()
            assert handle is None or all(p.dtype == torch.float32 for p in handle.parameters())
    assert dtypes["bare"] == dtypes["served"]
    assert_close(out.float(), outputs(model), 0.1)


def _first(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out
    return out[0] if isinstance(out, tuple) else next(iter(out.values()))


def test_the_output_keeps_its_precision() -> None:
    """A sub-layer may give less than it reads."""

    class Rounding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).bfloat16()

    model = nn.Sequential(Rounding(4, 4))
    moved(model, optx.ParallelAdapter(rank=2), "0")
    assert model(torch.randn(3, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_model(method: str) -> None:
    model = llama().bfloat16()
    handle = moved(model, METHODS[method][0]())
    assert all(p.dtype == torch.float32 for p in handle.parameters())
    out = outputs(model)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), outputs(model.float()), 0.15)


@pytest.mark.parametrize("method", [*METHODS, "mam"])
def test_state_comes_back(method: str) -> None:
    make = METHODS[method][0] if method in METHODS else lambda: optx.MAM(prefix=2, rank=3, scale="learned")
    model, fresh = llama(), llama()
    handle = moved(model, make())
    state = {key: t.clone() for key, t in handle.state_dict().items()}
    again = optx.attach(fresh, make())
    again.load_state_dict(state)
    assert torch.equal(outputs(fresh), outputs(model))
    assert type(make()).from_options(make().options()) == make()


def test_training_resumes_bit_for_bit() -> None:
    def start() -> tuple[Any, optx.Handle, torch.optim.Optimizer]:
        model = bert().train()
        torch.manual_seed(7)
        handle = optx.attach(model, optx.MAM(prefix=2, rank=3, mlp=4))
        optx.trainable_only(model, handle)
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=1e-2)

    def steps(model: Any, opt: torch.optim.Optimizer, first: int, last: int) -> None:
        for number in range(first, last):
            torch.manual_seed(number)  # dropout
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()

    model, handle, opt = start()
    steps(model, opt, 0, 6)
    half, half_handle, half_opt = start()
    steps(half, half_opt, 0, 3)
    saved = copy.deepcopy((half_handle.state_dict(), half_opt.state_dict()))
    rest, rest_handle, rest_opt = start()
    rest_handle.load_state_dict(saved[0])
    rest_opt.load_state_dict(saved[1])
    steps(rest, rest_opt, 3, 6)
    for a, b in zip(rest_handle.parameters(), handle.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(handle.parameters()[0], half_handle.parameters()[0])


def test_training_reduces_the_loss() -> None:
    model = bert().eval()
    handle = optx.attach(model, optx.ScaledParallelAdapter(rank=4, scale="learned"))
    optx.trainable_only(model, handle)
    opt = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = (model(ids()).logits - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        opt.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(one.part.scale.detach()) != 1 for one in handle.served)
