"""MESA: the average, whose forward pass it is, resuming, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import optimizer as torch_optimizer

import optx
from optx._errors import OptxError


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))


def official(z: Tensor, past: Tensor, tau: float = 5.0) -> Tensor:
    log_p, q = F.log_softmax(z.double() / tau, 1), F.softmax(past.double() / tau, 1)
    return F.kl_div(log_p, q, reduction="batchmean") * tau**2


class One(nn.Module):
    """Logits (theta x, 0)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((self.theta * x, 0 * x), -1)


def through(mesa: optx.MESA, model: One, values: list[float]) -> list[float]:
    """The average after each call, with theta at these values."""
    found = []
    x = torch.ones(3, dtype=model.theta.dtype)
    for value in values:
        with torch.no_grad():
            model.theta.fill_(value)
        mesa(model(x), x)
        found.append(mesa.state_dict()["tensors"]["theta"].item())
    return found


# ---- the average ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "wanted"), [(0.9, [1.0, 1.1, 1.39]), (1.0, [1.0, 1.0, 1.0]), (0.0, [1.0, 2.0, 4.0])]
)
def test_values_by_hand(beta: float, wanted: list[float]) -> None:
    model = One()
    mesa = optx.MESA(model, beta=beta, start_epoch=0)
    mesa.set_epoch(1)
    assert through(mesa, model, [1.0, 2.0, 4.0]) == pytest.approx(wanted, rel=1e-6)
    x = torch.ones(3)
    loss = mesa(model(x), x)
    assert (loss == 0) == (beta == 0)
    assert loss.item() == pytest.approx(
        0.8 * official(model(x), wanted[-1] * torch.tensor([[1.0, 0.0]] * 3)).item(), rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_averaged_in_float32(dtype: torch.dtype) -> None:
    """At beta 0.999 a bfloat16 average of 1 would stay 1 for ever."""
    model = One(dtype)
    mesa = optx.MESA(model, beta=0.999)
    mesa.set_epoch(0)
    values = [1.0] + [1.0 + 2**-6 * (1 + i % 2) for i in range(200)]
    average = 1.0
    for value in values[1:]:
        average = 0.999 * average + 0.001 * value
    assert through(mesa, model, values)[-1] == pytest.approx(average, rel=1e-6)
    assert mesa.ema.theta == torch.tensor(average).to(dtype)
    assert mesa.nbytes == 4 + 2


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([0.0, 0.5, 0.999]), st.sampled_from([1.0, 5.0]), st.floats(0.1, 2.0), st.integers(1, 4)
)
def test_the_loss_is_that_of_an_average_kept_apart(
    beta: float, tau: float, weight: float, steps: int
) -> None:
    model = net()
    mesa = optx.MESA(model, weight=weight, tau=tau, beta=beta, start_epoch=0)
    mesa.set_epoch(1)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    twin = copy.deepcopy(model).eval()
    for step in range(steps):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        logits = model(x)
        if step == 0:
            twin.load_state_dict(model.state_dict())
        for (name, v), theta in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
            v.copy_(theta if "num_batches" in name else beta * v + (1 - beta) * theta)
        loss = mesa(logits, x)
        assert loss.item() == pytest.approx(
            weight * official(logits, twin(x), tau).item(), rel=1e-3, abs=1e-5
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert mesa.ema[1].num_batches_tracked == steps
    assert not any(module.training for module in mesa.ema.modules())
    assert model.training


def by_optx(p: Any) -> torch.optim.Optimizer:
    return optx.wrap(torch.optim.AdamW(p, lr=0.01), optx.PerpGrad(), fused=True)


class ByData(torch.optim.Optimizer):
    """As older optimizers step: autograd does not notice."""

    def __init__(self, p: Any) -> None:
        super().__init__(p, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad.data, alpha=-0.1)


def by_hand(p: Any) -> Any:
    class Plain:
        params = tuple(p)

        def step(self) -> None:
            with torch.no_grad():
                for p in self.params:
                    p -= 0.1 * p.grad

    return Plain()


@pytest.mark.parametrize("make", [by_optx, ByData, by_hand])
def test_one_update_for_each_step_of_any_optimizer(make: Callable[[Any], Any]) -> None:
    model, other = nn.Linear(5, 4), nn.Linear(2, 2)
    mesa, opt = optx.MESA(model, beta=0.5), make(model.parameters())
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    mesa.set_epoch(0)
    x, wanted = torch.randn(3, 5), model.weight.detach().clone()
    for step in range(3):
        for _ in range(2):  # accumulated
            logits = model(x)
            (logits.square().mean() + mesa(logits, x)).backward()
            other(torch.ones(1, 2)).sum().backward()
            elsewhere.step()  # another model's optimizer is none of its business
        if step:
            wanted = 0.5 * wanted + 0.5 * model.weight.detach()
        opt.step()
    torch.testing.assert_close(mesa.ema.weight, wanted)
    assert mesa.state_dict()["steps"] == 3


def test_it_follows_the_model_to_another_dtype_of_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    mesa = optx.MESA(model, beta=0.5, start_epoch=0)
    mesa.ema.to(memory_format=torch.channels_last)
    mesa.set_epoch(1)
    x = torch.randn(4, 3, 3, 3)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(0.1)
        loss = mesa(model(x), x)
    assert mesa.ema[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mesa.ema[0].weight, model[0].weight - 0.075)
    assert loss > 0


# ---- sharing and ties -----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.body.weight

    def forward(self, ids: Tensor) -> Any:
        return {"logits": self.head(self.inner(self.body(ids)))}


def test_frozen_is_shared_and_tied_stays_tied() -> None:
    model = Tied()
    model.inner.requires_grad_(False)
    mesa = optx.MESA(model)
    ema: Any = mesa.ema
    assert ema.inner.weight is model.inner.weight
    assert ema.head.weight is ema.body.weight
    assert ema.head.weight is not model.head.weight
    assert mesa.nbytes == 9 * 6 * 4
    model.inner.requires_grad_(True)
    with pytest.raises(OptxError, match=r"'inner.weight' was frozen when MESA was made.*make it again"):
        mesa.set_epoch(0)


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def adapted(how: str) -> Any:
    model = tiny_llama()
    if how == "optx":
        handle = optx.attach(model, optx.LoRA(rank=2))
        optx.trainable_only(model, handle)
        return model
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    )


@pytest.mark.parametrize("how", ["optx", "peft"])
def test_an_adapters_average_costs_the_adapter(how: str) -> None:
    model = adapted(how)
    trained = [p for p in model.parameters() if p.requires_grad]
    mesa = optx.MESA(model, beta=0.5, start_epoch=0, weight=1.0)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert mesa.nbytes == sum(4 * p.numel() for p in trained) + buffers
    opt = torch.optim.AdamW(trained, lr=0.05)
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mesa.set_epoch(1)
    losses, shared = [], {p for p in model.parameters() if not p.requires_grad}
    with torch.no_grad():
        start = mesa.ema(input_ids=ids).logits
    for _ in range(3):
        out = model(input_ids=ids, attention_mask=mask, labels=ids)
        losses.append(mesa(out.logits, input_ids=ids, attention_mask=mask, where=mask.bool()))
        opt.zero_grad()
        (out.loss + losses[-1]).backward()
        opt.step()
    assert losses[0].item() == pytest.approx(0, abs=1e-6 if how == "optx" else 1.0)  # PEFT's drops out
    assert losses[1].item() > 1e-4
    assert not any(p.requires_grad or p.grad is not None for p in mesa.ema.parameters() if p not in shared)
    model.eval()
    with torch.no_grad():
        own, averaged = model(input_ids=ids).logits, mesa.ema(input_ids=ids).logits
        with mesa.swap_ema():
            assert torch.equal(model(input_ids=ids).logits, averaged)
        assert torch.equal(model(input_ids=ids).logits, own)
        assert not torch.allclose(averaged, own, atol=1e-5)
        assert not torch.allclose(averaged, start, atol=1e-5)


def look_inside(mesa: optx.MESA, model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    assert torch.equal(model(x), wanted)
    logits = model(x)
    with pytest.raises(OptxError, match=r"the model has its averaged weights \(swap_ema\)"):
        mesa(logits, x)
    with pytest.raises(OptxError, match="swap_ema is on already"), mesa.swap_ema():
        pass
    raise ZeroDivisionError


def test_swapping_is_undone_bit_for_bit() -> None:
    model, x = net(), torch.randn(6, 5)
    mesa = optx.MESA(model, beta=0.5)
    mesa.set_epoch(0)
    mesa(model(x), x)
    for p in model.parameters():
        p.data.mul_(1.5)
    with torch.no_grad():
        model[4].bias.add_(1)
    mesa(model(x), x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        wanted = mesa.ema(x)
    model.eval()
    with pytest.raises(ZeroDivisionError), mesa.swap_ema():
        look_inside(mesa, model, x, wanted)
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k])
    assert [p.data_ptr() for p in model.parameters()] == addresses


# ---- training and resuming ------------------------------------------------------------------------------


class Run:
    def __init__(self, compiled: bool = False, **options: Any) -> None:
        self.model = net(dropout=0.3)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9)
        self.mesa = optx.MESA(self.model, **{"beta": 0.8} | options) if options else None
        self.call: Any = torch.compile(self.model, backend="eager") if compiled else self.model

    def epochs(self, which: range) -> None:
        for epoch in which:
            if self.mesa:
                self.mesa.set_epoch(epoch)
            for _ in range(3):
                x, y = torch.randn(8, 5), torch.randint(4, (8,))
                logits = self.call(x)
                loss = F.cross_entropy(logits, y)
                if self.mesa:
                    loss = loss + self.mesa(logits, x)
                self.opt.zero_grad()
                loss.backward()
                self.opt.step()

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def test_inactive_or_at_weight_0_the_training_is_the_same() -> None:
    found = []
    for options in ({}, {"start_epoch": 3}, {"start_epoch": 0, "weight": 0.0}, {"start_epoch": 1}):
        run = Run(**options)
        run.epochs(range(4))
        found.append((run.weights(), torch.rand(1)))
    for weights, drawn in found[1:3]:
        assert torch.equal(weights, found[0][0])
        assert torch.equal(drawn, found[0][1])
    assert not torch.equal(found[3][0], found[0][0])
    assert torch.equal(found[3][1], found[0][1])  # active, it draws nothing either


@pytest.mark.parametrize("at", [1, 3])
def test_resuming_is_bit_identical(at: int) -> None:
    options: dict[str, Any] = {"start_epoch": 1}
    whole = Run(**options)
    whole.epochs(range(at))
    file = io.BytesIO()
    assert whole.mesa
    torch.save(
        [whole.model.state_dict(), whole.opt.state_dict(), whole.mesa.state_dict(), torch.get_rng_state()],
        file,
    )
    whole.epochs(range(at, 5))
    again = Run(**options)
    file.seek(0)
    model, opt, mesa, rng = torch.load(file, weights_only=True)
    again.model.load_state_dict(model)
    again.opt.load_state_dict(opt)
    assert again.mesa
    again.mesa.load_state_dict(mesa)
    torch.set_rng_state(rng)
    again.epochs(range(at, 5))
    assert torch.equal(again.weights(), whole.weights())
    for a, b in zip(again.mesa.ema.state_dict().values(), whole.mesa.ema.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_saved_between_a_loss_and_its_step_it_is_not_updated_twice() -> None:
    model, x = nn.Linear(5, 4), torch.randn(3, 5)
    mesa = optx.MESA(model, beta=0.5)
    mesa.set_epoch(0)
    mesa(model(x), x)
    state = mesa.state_dict()
    assert not state["behind"]
    again = optx.MESA(model, beta=0.5)
    again.load_state_dict(state)
    again(model(x), x)
    assert again.state_dict()["steps"] == 1


def test_a_compiled_model_gives_the_same_training() -> None:
    runs = [Run(compiled=compiled, start_epoch=0) for compiled in (False, True)]
    for run in runs:
        torch.manual_seed(1)
        run.epochs(range(2))
    assert torch.equal(runs[0].weights(), runs[1].weights())
    compiled = torch.compile(net(), backend="eager")
    assert isinstance(optx.MESA(compiled).ema, nn.Sequential)  # type: ignore[arg-type]


def test_it_may_compute_in_bfloat16() -> None:
    model, x = net(), torch.randn(64, 5)
    losses = {}
    for dtype in (None, torch.bfloat16):
        mesa = optx.MESA(model, dtype=dtype, beta=1.0, start_epoch=0)
        mesa.set_epoch(1)
        model.eval()
        mesa(model(x), x)
        with torch.no_grad():
            model[4].weight.mul_(3)
        losses[dtype] = mesa(model(x), x)
        assert losses[dtype].dtype == torch.float32
        assert mesa.ema[4].weight.dtype == torch.float32
        with torch.no_grad():
            model[4].weight.div_(3)
    assert losses[torch.bfloat16] != losses[None]
    torch.testing.assert_close(losses[torch.bfloat16], losses[None], rtol=0.03, atol=0)


def test_without_gradients_nothing_changes() -> None:
    model, x = One(), torch.ones(2)
    mesa = optx.MESA(model, beta=0.5)
    mesa.set_epoch(9)
    with torch.no_grad():
        assert mesa(model(x), x) == 0
    assert mesa.state_dict()["steps"] == 0


def test_nothing_is_left_of_it() -> None:
    before = len(torch_optimizer._global_optimizer_post_hooks)
    mesa = optx.MESA(net())
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    del mesa
    gc.collect()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before
