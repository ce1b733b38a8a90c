"""WideNet: what sharing, routing and balance must be, by the numbered properties of its spec."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ffn_models import FFN, Vit, patches, vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import optx
from optx.inject._mixture import Mixture, Routing, evenness
from optx.inject._own_loss import Collected
from tests.reference import widenet as reference


def attached(model: nn.Module, **options: Any) -> optx.WideHandle:
    torch.manual_seed(2)
    return optx.attach(model, optx.WideNet(**options))


def still(**options: Any) -> dict[str, Any]:
    """No noise, and nobody dropped."""
    return {"noise": 0.0, "capacity": None, "jitter": 0.0, **options}


def mixture(count: int = 4, k: int = 2, capacity: float | None = None, alike: bool = False) -> Mixture:
    torch.manual_seed(1)
    first = FFN().double()
    experts = nn.ModuleList(copy.deepcopy(first) if alike else FFN().double() for _ in range(count))
    router = nn.Linear(6, count, bias=False).double()
    return Mixture(experts, router, Routing(k, capacity, None, 0.0, False), Collected("WideNet"))


def counted(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- parameters (1) --------------------------------------------------------------------------------------


def test_parameters_are_counted_once() -> None:
    sizes = {"width": 32, "hidden": 64, "depth": 4, "positions": 16}
    assert counted(vit(**sizes)) == 35_242
    model = vit(**sizes)
    handle = attached(model)
    assert counted(model) == 22_698
    assert (
        len({id(block.attn) for block in model.blocks}) == len({id(block.mlp) for block in model.blocks}) == 1
    )
    assert len({id(block.norm1) for block in model.blocks}) == 4
    assert handle.report().rows[0].trainable == sum(p.numel() for p in handle.parameters())
    other = vit(**sizes)
    attached(other, norms="shared")
    assert counted(other) == 22_314 == counted(model) - 3 * 2 * 2 * 32


# ---- routing (2 to 4, 8) ---------------------------------------------------------------------------------


def test_one_expert_is_the_shared_dense_block() -> None:
    model, dense = vit(), vit()
    for block in dense.blocks[1:]:
        block.attn, block.mlp = dense.blocks[0].attn, dense.blocks[0].mlp
    handle = attached(model, **still(experts=1, top_k=1, balance=0.3))
    torch.testing.assert_close(model(patches()), dense(patches()))
    assert handle.loss().item() == pytest.approx(4 * 0.3)


def test_all_of_identical_experts_are_the_ffn_and_some_are_less() -> None:
    x = torch.randn(5, 3, 6, dtype=torch.double)
    moe = mixture(k=4, alike=True)
    want = moe.experts[0](x)
    torch.testing.assert_close(moe(x), want)
    for k in (1, 2, 3):
        moe = mixture(k=k, alike=True)
        selected = moe.router(x).softmax(-1).topk(k).values.sum(-1, keepdim=True)
        torch.testing.assert_close(moe(x), selected * want)
        assert bool((moe(x).norm(dim=-1) < want.norm(dim=-1)).all())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([None, 0.3, 1.0, 1.2]),
    st.integers(0, 99),
)
def test_queues_are_those_of_the_reference(
    tokens: int, count: int, k: int, capacity: float | None, seed: int
) -> None:
    k = min(k, count)
    moe = mixture(count, k, capacity)
    x = torch.randn(tokens, 6, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    limit = None if capacity is None else max(int(capacity * k * tokens / count), 1)
    want, taken = reference.mixed(x, moe.router(x), list(moe.experts), k, limit)
    torch.testing.assert_close(moe(x.view(1, tokens, 6))[0], want)
    assert limit is None or max(map(len, taken)) <= limit
    assert moe.dropped[""] == pytest.approx(1 - sum(map(len, taken)) / (k * tokens))
    order = torch.randperm(tokens)
    moe.eval()  # nobody is dropped
    torch.testing.assert_close(moe(x[order]), moe(x)[order])


def test_a_dropped_token_passes_through_its_block() -> None:
    model = vit(depth=2)
    handle = attached(model, experts=2, top_k=1, capacity=0.01, noise=0.0, jitter=0.0)
    seen: list[Tensor] = []
    model.blocks[0].mlp.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    model(patches())
    rows = seen[0].flatten(0, 1)
    assert int((rows != 0).any(-1).sum()) == len({*handle.loads()["blocks.0"].nonzero().flatten().tolist()})
    seen.clear()
    model.eval()(patches())
    assert bool((seen[0].flatten(0, 1) != 0).any(-1).all())


def test_noise_is_of_the_scores_in_training_alone() -> None:
    model = vit()
    attached(model, noise=3.0, balance=0.0)
    assert not torch.equal(model(patches()), model(patches()))
    torch.manual_seed(0)
    first = model(patches())
    torch.manual_seed(0)
    assert torch.equal(model(patches()), first)
    model.eval()
    assert torch.equal(model(patches()), model(patches()))


def test_gradients_of_the_mixture() -> None:
    moe = mixture(capacity=0.8)
    x = torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(moe, x)
    assert torch.autograd.gradgradcheck(moe, x)
    rows, weight = x.detach(), moe.router.weight
    assert torch.autograd.gradcheck(lambda w: functional_call(moe, {"router.weight": w}, rows), weight)


# ---- balance (5, 6) --------------------------------------------------------------------------------------

CHANCES = [[0.7, 0.2, 0.1, 0.0], [0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.3, 0.2]]


def test_the_balance_of_the_spec() -> None:
    picks = torch.tensor([[0, 1], [0, 1], [1, 2], [2, 1]])
    chances = torch.tensor(CHANCES, requires_grad=True)
    value, load = evenness(picks, chances)
    torch.testing.assert_close(load.detach(), torch.tensor([0.25, 0.5, 0.25, 0.0]))
    assert 0.01 * value.item() == pytest.approx(0.012375)
    assert 0.01 * evenness(picks[:, :1], chances)[0].item() == pytest.approx(0.012625)
    value.backward()
    torch.testing.assert_close(chances.grad, load.expand(4, 4))  # E f_e / M: by P alone


def test_the_loss_is_that_of_all_blocks() -> None:
    model = vit()
    handle = attached(model, balance=0.5, noise=0.0)
    tokens: list[Tensor] = []
    model.blocks[0].mlp.register_forward_hook(lambda m, args, y: tokens.append(args[0]))
    model(patches())
    router = handle.mixture.router
    want = 0.0
    for x in tokens:
        chances = router(x.flatten(0, 1)).softmax(-1)
        want += 0.5 * float(evenness(chances.topk(2).indices, chances)[0].detach())
    assert len(tokens) == 4
    assert handle.loss().item() == pytest.approx(want, rel=1e-5)
    with pytest.raises(optx.OptxError, match="nothing has been collected"):
        handle.loss()
    loads = handle.loads()
    assert list(loads) == [f"blocks.{i}" for i in range(4)]
    assert not torch.equal(loads["blocks.0"], loads["blocks.3"])  # norms of their own route otherwise
    model(patches())
    handle.loss().backward()
    assert router.weight.grad is not None
    silent = vit()
    assert attached(silent, balance=0.0).loss().item() == 0


def test_an_empty_batch_has_no_balance() -> None:
    model = vit()
    handle = attached(model)
    assert model(patches(0)).shape == (0, 10)
    assert handle.loss().item() == 0


def test_a_balance_that_nobody_takes_is_told() -> None:
    model = vit()
    attached(model)
    model(patches())
    with pytest.warns(
        UserWarning, match="WideNet: the last forward in training mode collected a loss that nobody took"
    ):
        model(patches())


# ---- tied weights (7) ------------------------------------------------------------------------------------


def test_a_tied_gradient_is_the_sum_over_blocks() -> None:
    model = vit().double()
    handle = attached(model, **still(experts=3))
    apart: Vit = copy.deepcopy(model)
    mixtures = [copy.deepcopy(handle.mixture) for _ in apart.blocks]
    for block, own in zip(apart.blocks, mixtures, strict=True):
        block.attn, block.mlp = copy.deepcopy(block.attn), own
    for net in (model, apart):
        net(patches().double()).square().sum().backward()
    for name, p in model.blocks[0].attn.named_parameters():
        each = [block.attn.get_parameter(name).grad for block in apart.blocks]
        torch.testing.assert_close(p.grad, sum(each[1:], each[0]), atol=1e-9, rtol=1e-5)
    for name, p in handle.mixture.named_parameters():
        each = [one.get_parameter(name).grad for one in mixtures]
        torch.testing.assert_close(p.grad, sum(each[1:], each[0]), atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("init", ["first", "mean", "fresh"])
def test_how_shared_weights_begin(init: Any) -> None:
    model, before = vit(), vit()
    handle = attached(model, init=init, jitter=0.0)
    weights = [block.mlp.fc1.weight.detach() for block in before.blocks]
    want = weights[0] if init == "first" else torch.stack(weights).mean(0)
    experts = [expert.fc1.weight.detach() for expert in handle.mixture.experts]
    if init == "fresh":
        assert not torch.equal(experts[0], experts[1])
        assert not any(torch.equal(experts[0], w) for w in weights)
    else:
        for w in experts:
            torch.testing.assert_close(w, want)
        qkv = torch.stack([block.attn.qkv.weight.detach() for block in before.blocks])
        torch.testing.assert_close(
            model.blocks[2].attn.qkv.weight, qkv[0] if init == "first" else qkv.mean(0)
        )
    shaken = vit()
    handle = attached(shaken, jitter=0.1)
    off = handle.mixture.experts[1].fc1.weight.detach() - weights[0]
    assert 0.05 < float(off.std() / weights[0].std()) < 0.2
