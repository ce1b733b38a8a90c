"""SphericalHead: what the head hands on in training is no output, and whoever takes it for one is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines.language import small_llama
from processes import on_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import optx

SIZE = 8


def network() -> tuple[nn.Sequential, optx.SphericalHandle]:
    """As many classes as the head has inputs: shapes say nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
    handle: Any = optx.attach(model, optx.SphericalHead(optx.ZLoss(a=0.1, b=20.0), lr=0.1), targets="2")
    return model, handle


X, Y = torch.randn(6, 4), torch.arange(6)


@pytest.mark.parametrize(
    "criterion",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.MultiMarginLoss(),
        lambda x, y: -x.log_softmax(-1)[y, y].mean(),
        lambda x, y: F.cross_entropy(x.float().view(-1, SIZE), y),
        lambda x, y: F.cross_entropy(torch.stack([x, x])[0], y),
        optx.ZLoss(),
        optx.StableMaxCrossEntropy(),
        optx.functional.cross_entropy2,
        lambda x, y: optx.LossReweight(max_batch=6).from_logits(x, y),
        lambda x, y: (x * 2).sum(),
        lambda x, y: x.backward(torch.ones_like(x)),
    ],
)
@pytest.mark.parametrize("how", ["eager", "compiled", "autocast"])
def test_a_loss_of_its_own_is_refused_at_once(criterion: Any, how: str) -> None:
    model, _ = network()
    call: Any = torch.compile(model, backend="eager") if how == "compiled" else model
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        pytest.raises(optx.OptxError, match=r"SphericalHead: \w+\(\) was called with .* its input and not"),
    ):
        criterion(call(X), Y)


@pytest.mark.parametrize("how", ["eager", "compiled", "autocast"])
def test_the_handles_loss_takes_it(how: str) -> None:
    model, handle = network()
    call: Any = torch.compile(model, backend="eager") if how == "compiled" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = handle.loss(call(X).view(2, 3, SIZE), Y.view(2, 3))
    assert type(loss) is torch.Tensor
    loss.backward()
    weight: Any = model[0].weight
    assert type(weight.grad) is torch.Tensor
    assert weight.grad.any()
    handle.step()
    assert F.cross_entropy(model.eval()(X), Y).isfinite()
    model.train()
    with torch.no_grad():
        assert F.cross_entropy(model(X), Y).isfinite()


def test_a_models_own_loss_is_refused_at_its_first_forward() -> None:
    model: Any = small_llama(32).train()
    optx.attach(model, optx.SphericalHead(), targets="lm_head")
    ids = torch.randint(9, (2, 5))
    with pytest.raises(optx.OptxError, match=r"SphericalHead: cross_entropy\(\) was called"):
        model(ids, labels=ids)


@pytest.mark.parametrize("injection", [optx.VQLogits(codes=2, init="blocks"), optx.LoRA(rank=1)])
def test_nothing_else_is_on_its_head_in_either_order(injection: Any) -> None:
    model, handle = network()
    before = list(model.state_dict())
    name = type(injection).__name__
    with pytest.raises(optx.TargetError, match=f"attach: {name} can't serve '2': 'spherical_head' is there"):
        optx.attach(model, injection, targets="2")
    assert list(model.state_dict()) == before
    handle.remove()
    optx.attach(model, injection, targets="2")
    with pytest.raises(
        optx.TargetError, match=f"{injection.name!r} is attached to '2' already, and Spherical"
    ):
        optx.attach(model, optx.SphericalHead(), targets="2")


def several_processes_are_refused(rank: int) -> None:
    for wrapped in (DistributedDataParallel, fully_shard):
        model, handle = network()
        body: Any = model[0]
        factors = handle.served[0].part.factors
        before = [t.clone() for t in factors]
        if wrapped is fully_shard:
            fully_shard(body)
        call: Any = DistributedDataParallel(model) if wrapped is DistributedDataParallel else model
        with pytest.raises(optx.OptxError, match="several processes would have several heads"):
            handle.loss(call(X), Y)
        assert all(map(torch.equal, factors, before))
        assert handle.steps == 0
    assert dist.get_world_size() == 2


def codes_of_the_root_under_fsdp2(rank: int) -> None:
    codes_under_fsdp2(rank, own=False)


def codes_under_fsdp2(rank: int, own: bool = True) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, SIZE), nn.Linear(SIZE, 40))
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    handle: Any = optx.attach(model, optx.VQLogits(codes=8, init="blocks"), targets="1")
    labels = torch.arange(6) * 6
    loss = handle.loss(model[0](X), labels)
    loss.backward()
    expected = [model[0].weight.grad, handle.codebook.grad]
    model.zero_grad()
    fully_shard(model[0])  # the head is left out, as the error of the other way says
    with handle.hidden():
        hidden: Any = model(X)
    again = handle.loss(hidden, labels)
    again.backward()
    assert torch.equal(again, loss)
    assert torch.allclose(model[0].weight.grad.full_tensor(), expected[0], atol=1e-6)
    assert torch.allclose(handle.codebook.grad, expected[1], atol=1e-6)
    whole = nn.Sequential(nn.Linear(4, SIZE), nn.Linear(SIZE, 40))
    whole.load_state_dict(weights)
    handle = optx.attach(whole, optx.VQLogits(codes=8, init="blocks"), targets="1")
    if own:
        fully_shard(whole[1])
    fully_shard(whole)
    with handle.hidden():
        hidden = whole(X)
    if not own:  # what the root has stays whole until the backward pass
        handle.loss(hidden, labels).backward()
        root: Any = whole[0].weight
        assert torch.allclose(root.grad.full_tensor(), expected[0], atol=1e-6)
        assert torch.allclose(handle.codebook.grad.full_tensor(), expected[1], atol=1e-6)
        return
    with pytest.raises(optx.OptxError, match=r"codebook is sharded over a device mesh .* Leave the head out"):
        handle.loss(hidden, labels)


test_on_two_processes = on_processes(
    2, several_processes_are_refused, codes_under_fsdp2, codes_of_the_root_under_fsdp2
)
