"""EWA: what the averaging and the dealing of tokens must be, by the numbered properties of its spec."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ffn_models import FFN, patches, vit
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import assert_same, snapshot
from torch import Tensor, nn

import optx
from tests.reference import ewa as reference


def attached(model: nn.Module, targets: Any = r".*mlp", **options: Any) -> optx.ExpertHandle:
    return optx.attach(model, optx.EWA(**{"schedule": "constant", **options}), targets)


def holder(module: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"ffn": module})


def experts_of(module: nn.Module) -> Any:
    return module.optx.ewa.experts  # type: ignore[union-attr]


def scattered(module: nn.Module, seed: int = 0) -> None:
    """Give experts values of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in experts_of(module).parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


# ---- averaging (properties 1 to 3) -----------------------------------------------------------------------


def scalars(values: list[float], **options: Any) -> tuple[optx.ExpertHandle, list[Tensor]]:
    model = holder(nn.Linear(1, 1, bias=False))
    handle = attached(model, "ffn", experts=len(values), **options)
    weights = [expert.weight for expert in experts_of(model["ffn"])]
    with torch.no_grad():
        for w, value in zip(weights, values, strict=True):
            w.fill_(value)
    return handle, weights


def test_the_numbers_of_the_spec() -> None:
    handle, weights = scalars([1, 2, 3, 6])
    handle.step()
    torch.testing.assert_close([w.item() for w in weights], [1.8, 2.4, 3.0, 4.8])
    handle.step()
    torch.testing.assert_close([w.item() for w in weights], [2.28, 2.64, 3.0, 4.08])
    handle, weights = scalars([1, 2, 3, 6], beta=0.75)
    handle.step()
    assert [w.item() for w in weights] == [3.0] * 4


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=6),
    st.floats(0, 1),
    st.sampled_from(["others", "mean"]),
)
def test_the_mean_stays_and_deviations_shrink_as_the_reference_says(
    values: list[float], share: float, rule: str
) -> None:
    count = len(values)
    most = (count - 1) / count if rule == "others" else 1.0
    handle, weights = scalars(values, beta=share * most, rule=rule)
    handle.step()
    found, mean = [w.item() for w in weights], sum(values) / count
    assert found == pytest.approx(reference.averaged(values, share * most, rule), abs=1e-5)
    assert sum(found) / count == pytest.approx(mean, abs=1e-5)
    factor = 1 - share * most * (count / (count - 1) if rule == "others" else 1)
    for now, before in zip(found, values, strict=True):
        assert now - mean == pytest.approx(factor * (before - mean), abs=1e-5)


def test_a_rate_of_0_writes_nothing() -> None:
    handle, weights = scalars([0.1, 0.2, 0.7], beta=0)
    before, versions = [w.clone() for w in weights], [w._version for w in weights]
    handle.step()
    assert all(map(torch.equal, weights, before))
    assert versions == [w._version for w in weights]
    assert handle.steps == 1


def test_linear_rates_grow_to_their_end_and_stay() -> None:
    handle, _ = scalars([1, 2], schedule="linear", beta=0.4, total_steps=4)
    rates = []
    for _ in range(6):
        handle.step()
        rates.append(handle.beta)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


# ---- dealing (4 to 6) ------------------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 + self.value


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 7), st.integers(2, 6))
def test_every_token_is_computed_once_by_an_equal_share_of_experts(
    batch: int, tokens: int, count: int
) -> None:
    model = holder(Constant())
    attached(model, "ffn", experts=count, beta=0)
    with torch.no_grad():
        for i, expert in enumerate(experts_of(model["ffn"])):
            expert.value.fill_(i)
    y = model["ffn"](torch.randn(batch, tokens, 1))
    assert y.shape == (batch, tokens, 1)
    sizes = [int((y == i).sum()) for i in range(count)]
    total = batch * tokens
    assert sizes == [total // count + (i < total % count) for i in range(count)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(2, 5))
def test_dealt_tokens_are_those_of_the_reference(seed: int, tokens: int, count: int) -> None:
    model = holder(FFN())
    attached(model, "ffn", experts=count, beta=0)
    scattered(model["ffn"])
    x = torch.randn(2, tokens, 6)
    torch.manual_seed(seed)
    order = torch.randperm(2 * tokens).tolist()
    torch.manual_seed(seed)
    y = model["ffn"](x)
    torch.testing.assert_close(y, reference.dealt(x, order, list(experts_of(model["ffn"]))))
    torch.manual_seed(seed)
    assert torch.equal(model["ffn"](x), y)
    if tokens > 2:
        assert not torch.equal(model["ffn"](x), y)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_identical_experts_are_the_plain_module(count: int) -> None:
    plain = vit().train()
    model = copy.deepcopy(plain)
    handle = attached(model, experts=count)
    for seed in range(3):
        torch.manual_seed(seed)
        torch.testing.assert_close(model(patches()), plain(patches()), atol=1e-6, rtol=1e-6)
    handle.step()
    merged = handle.merge_and_unload().state_dict()
    assert all(torch.equal(t, merged[name]) for name, t in plain.state_dict().items())


def test_evaluation_is_the_merged_model() -> None:
    model = vit()
    handle = attached(model, r".*[13].mlp", beta=0)
    for i in (1, 3):
        scattered(model.blocks[i].mlp, i)
    x = patches()
    with_gradients = model.eval()(x)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(model(x), y)
    torch.testing.assert_close(with_gradients, y)
    plain = vit().eval()
    keys, shapes = list(plain.state_dict()), [t.shape for t in plain.state_dict().values()]
    merged = handle.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(merged(x), y)
    assert type(merged) is type(plain)
    assert list(merged.state_dict()) == keys
    assert [t.shape for t in merged.state_dict().values()] == shapes
    assert all(p.requires_grad for p in merged.parameters())
    plain.load_state_dict(merged.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(plain(x), y)


def test_the_mean_is_that_of_the_experts() -> None:
    model = vit()
    attached(model)
    scattered(model.blocks[0].mlp)
    experts = [expert.fc1.weight.detach().double() for expert in experts_of(model.blocks[0].mlp)]
    mean = (sum(experts) / 4).float()  # type: ignore[union-attr]
    torch.testing.assert_close(model.state_dict()["blocks.0.mlp.fc1.weight"], mean, atol=1e-7, rtol=1e-6)


# ---- gradients (7) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0, 3.0])
def test_a_step_of_sgd_is_an_nth_of_the_dense_step(scale: float) -> None:
    plain = vit()
    model = copy.deepcopy(plain)
    handle = attached(model, r".*1.mlp", beta=0.75, grad_scale=scale)
    start = {name: p.detach().clone() for name, p in plain.blocks[1].mlp.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for net in (plain, model):
        net(patches()).square().sum().backward()
    optimizer.step()
    handle.step()
    for expert in experts_of(model.blocks[1].mlp):
        for name, p in expert.named_parameters():
            dense = plain.blocks[1].mlp.get_parameter(name).grad
            assert dense is not None
            want = start[name] - 0.1 / 4 * scale * dense
            torch.testing.assert_close(p.detach(), want, atol=1e-6, rtol=1e-5)
    for ours, its in zip(model.blocks[0].parameters(), plain.blocks[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad)  # what comes before has its gradient as it is


def test_gradients_of_gradients() -> None:
    model = holder(FFN().double())
    attached(model, "ffn", experts=2, grad_scale=1.0)
    scattered(model["ffn"])

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model["ffn"](x)

    assert torch.autograd.gradgradcheck(call, torch.randn(3, 6, dtype=torch.double, requires_grad=True))


def test_activation_checkpointing_replays_the_order() -> None:
    grads = []
    for checkpointed in (False, True):
        model = vit(depth=2)
        model.checkpointed = checkpointed
        attached(model, beta=0)
        for block in model.blocks:
            scattered(block.mlp)
        torch.manual_seed(3)
        model(patches()).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))


@pytest.mark.long
def test_compiled_whole_it_is_the_same() -> None:
    model = vit(depth=1)
    attached(model)
    scattered(model.blocks[0].mlp)
    call = torch.compile(model, backend="eager", fullgraph=True)
    for mode in (model.train, model.eval):
        mode()
        made = []
        for f in (model, call):
            torch.manual_seed(5)
            model.zero_grad()
            f(patches()).square().sum().backward()
            made.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(made[0], made[1])


# ---- the model's own parameters (8) ----------------------------------------------------------------------


def test_remove_leaves_no_trace() -> None:
    model = vit()
    before = snapshot(model)
    handle = attached(model)
    scattered(model.blocks[0].mlp)
    model.eval()(patches())
    handle.step()
    handle.remove()
    handle.remove()
    model.train()
    assert_same(model, before)


def test_trainable_only_leaves_retired_parameters_alone() -> None:
    model = vit()
    before = snapshot(model)
    handle = attached(model)
    frozen = optx.trainable_only(model, handle)
    assert {p for p in model.parameters() if p.requires_grad} == set(handle.parameters())
    frozen.restore()
    assert not model.blocks[0].mlp.fc1.weight.requires_grad
    handle.remove()
    assert_same(model, before)


def test_a_plain_checkpoint_makes_copies_of_all_experts() -> None:
    source, model = vit(), vit()
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(1.5)
    handle = attached(model)
    scattered(model.blocks[1].mlp)
    model.load_state_dict(source.state_dict(), strict=True)
    want = source.blocks[1].mlp.fc1.weight
    assert all(torch.equal(expert.fc1.weight, want) for expert in experts_of(model.blocks[1].mlp))
    with torch.no_grad():
        assert torch.equal(model.eval()(patches()), source.eval()(patches()))
    handle.remove()  # a base that was loaded stays
    assert torch.equal(model.blocks[1].mlp.fc1.weight, want)


def test_a_part_of_a_checkpoint_leaves_experts_as_they_are() -> None:
    model = vit()
    attached(model)
    scattered(model.blocks[1].mlp)
    model.state_dict()
    before = [p.clone() for p in experts_of(model.blocks[1].mlp).parameters()]
    model.load_state_dict({"head.bias": torch.ones(10)}, strict=False)
    assert all(map(torch.equal, experts_of(model.blocks[1].mlp).parameters(), before))


def test_a_whole_checkpoint_goes_on_where_it_was() -> None:
    model, twin, other = vit(), vit(), vit()
    handles = [attached(net, schedule="linear", total_steps=10) for net in (model, twin, other)]
    scattered(model.blocks[0].mlp)
    handles[0].step()
    twin.load_state_dict(model.state_dict(), strict=True)
    handles[2].load_state_dict(handles[0].state_dict())
    for net, handle in zip((twin, other), handles[1:], strict=True):
        assert handle.steps == 1
        with torch.no_grad():
            assert torch.equal(net.eval()(patches()), model.eval()(patches()))
