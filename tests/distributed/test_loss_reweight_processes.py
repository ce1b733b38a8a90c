"""LossReweight over two gloo processes under DDP, beside one process that has the joined batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")

# How many samples of 8 the first process has, call by call: also more than at first, none, and all.
SPLITS = (4, 6, 2, 0, 8, 3)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=g), torch.randn(8, 3, generator=g) * torch.arange(8)[:, None]


def train(model: nn.Module, rw: optx.LossReweight, splits: tuple[int, ...], rank: int | None) -> list[Tensor]:
    """The weights of each step; of all samples where ``rank`` is None."""
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    found: list[Tensor] = []
    for step, cut in enumerate(splits):
        x, y = batch(step)
        part = slice(None) if rank is None else (slice(cut), slice(cut, None))[rank]
        opt.zero_grad()
        rw((model(x[part]) - y[part]).square()).backward()
        opt.step()
        assert rw.last_weights is not None
        found.append(rw.last_weights)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "linupper": {},
    "quadratic": {"strategy": "quadratic", "r": 1.0},
    "warmup": {"warmup": 3},
    "limited": {"max_weight": 1.3},
}


def alone_on(rank: int) -> dist.ProcessGroup:
    """A group for each process: to what is in it, there is no other."""
    return [dist.new_group([each]) for each in range(2)][rank]


def ddp_equals_one_process(rank: int) -> None:
    itself = alone_on(rank)
    for options in OPTIONS.values():
        model = nn.parallel.DistributedDataParallel(net())
        rw = optx.LossReweight(**options, max_batch=8)
        reference = optx.LossReweight(**options, process_group=itself)
        weights = train(model, rw, SPLITS, rank)
        alone = net()
        wanted = train(alone, reference, SPLITS, None)
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        for step, cut in enumerate(SPLITS):
            own = wanted[step][(slice(cut), slice(cut, None))[rank]]
            torch.testing.assert_close(weights[step], own, rtol=0, atol=1e-6)
        assert rw.last_mean is not None
        assert reference.last_mean is not None
        assert torch.allclose(rw.last_mean, reference.last_mean)
        assert rw.state_dict() == reference.state_dict()


def each_process_by_itself_is_something_else(rank: int) -> None:
    """The check above can fail: with the range of its own batch only, a process has other weights."""
    model, alone = nn.parallel.DistributedDataParallel(net()), net()
    itself = alone_on(rank)
    train(model, optx.LossReweight(process_group=itself), SPLITS[:1], rank)
    train(alone, optx.LossReweight(process_group=itself), SPLITS[:1], None)
    off = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert off > 1e-3


def off_is_plain_ddp_to_the_bit(rank: int) -> None:
    model, plain = (nn.parallel.DistributedDataParallel(net()) for _ in range(2))
    train(model, optx.LossReweight("uniform"), (4, 4, 4), rank)
    opt = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(3):
        x, y = batch(step)
        part = (slice(4), slice(4, None))[rank]
        opt.zero_grad()
        (plain(x[part]) - y[part]).square().mean(1).mean().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def one_collective_of_a_number_a_sample(rank: int) -> None:
    counted: list[tuple[str, int]] = []
    real = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            counted.append((name, next(one for one in reversed(given) if isinstance(one, Tensor)).numel()))
            return real[name](*given, **named)

        return call

    rw = optx.LossReweight()
    try:
        for name in real:
            setattr(dist, name, counting(name))
        for _ in range(3):
            rw(torch.rand(4 - rank))  # of 4 and 3
        with torch.no_grad():
            rw(torch.rand(4))
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    assert counted == [("all_reduce", 1), *[("all_gather", 4)] * 3]


def a_bad_sample_of_one_process_is_left_out_on_both(rank: int) -> None:
    def losses(model: nn.Module, part: slice) -> Tensor:
        x, y = batch(0)
        y[5] = float("nan")
        return (model(x[part]) - y[part]).square()

    model, alone = nn.parallel.DistributedDataParallel(net()), net()
    rw = optx.LossReweight(skip_nonfinite=True)
    reference = optx.LossReweight(skip_nonfinite=True, process_group=alone_on(rank))
    with pytest.warns(UserWarning, match="1 of 8 samples is not finite; left out, 1 so far"):
        rw(losses(model, (slice(4), slice(4, None))[rank])).backward()
    with pytest.warns(UserWarning, match="1 of 8"):
        reference(losses(alone, slice(None))).backward()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
    assert rw.skipped == 1


def a_process_without_samples_hears_of_anothers_bad_one(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(net())
    x, y = batch(0)
    y[5] = float("nan")
    part = (slice(0, 8), slice(8, 8))[rank]
    with pytest.warns(UserWarning, match="1 of 8"):
        loss = optx.LossReweight(skip_nonfinite=True)((model(x[part]) - y[part]).square().mean(1))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def a_larger_batch_than_the_first_is_refused(rank: int) -> None:
    rw = optx.LossReweight()
    rw(torch.rand(2 + rank))
    with pytest.raises(optx.OptxError, match=r"batch of 4 samples.*at most 3 on any; give max_batch=4"):
        rw(torch.rand(4))
    assert rw.step == 1


def labelled(step: int) -> tuple[Tensor, Tensor]:
    """Six tokens of four classes, of which from one to six count."""
    labels = torch.randint(4, (8, 6), generator=torch.Generator().manual_seed(step))
    return labels.where(torch.arange(6) < torch.tensor([6, 1, 2, 6, 3, 1, 5, 4])[:, None], -100), batch(step)[
        0
    ]


def from_logits_equals_one_process(rank: int) -> None:
    """Of sequences that differ in length, also by length; one process has none in the last call."""
    itself = alone_on(rank)
    for options in ({"r": 0.3}, {"strategy": "extremes", "length_weighting": True}):
        head = nn.Linear(5, 6 * 4)
        models = nn.parallel.DistributedDataParallel(head), copy.deepcopy(head)
        rws = (optx.LossReweight(max_batch=8, **options), optx.LossReweight(process_group=itself, **options))
        for step, cut in enumerate((4, 6, 0)):
            labels, x = labelled(step)
            parts = (slice(cut), slice(cut, None))[rank], slice(None)
            for model, rw, part in zip(models, rws, parts, strict=True):
                model.zero_grad()
                rw.from_logits(model(x[part]).unflatten(1, (6, 4)), labels[part], shift=False).backward()
            for a, b in zip(*(model.parameters() for model in models), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def the_trainers_share_is_that_of_one_process(rank: int) -> None:
    """The Trainer multiplies by the number of processes; they have 15 and 13 of the labels."""
    labels, x = labelled(0)
    itself, items = alone_on(rank), 2 * (labels != -100).sum()  # of two calls
    for options in ({}, {"strategy": "uniform", "length_weighting": True}):
        model, alone = nn.Linear(5, 6 * 4), nn.Linear(5, 6 * 4)
        model = nn.parallel.DistributedDataParallel(model)
        alone.load_state_dict(model.module.state_dict())
        part = (slice(4), slice(4, None))[rank]
        rws = optx.LossReweight(**options), optx.LossReweight(process_group=itself, **options)
        logits = {"logits": model(x[part]).unflatten(1, (6, 4))}
        (2 * rws[0].from_outputs(logits, labels[part], items, shift=False)).backward()
        plain = {"logits": alone(x).unflatten(1, (6, 4))}
        loss = rws[1].from_outputs(plain, labels, items, shift=False)
        loss.backward()
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
        if options:
            flat = plain["logits"].flatten(0, 1)
            wanted = nn.functional.cross_entropy(flat, labels.flatten(), reduction="sum") / items
            torch.testing.assert_close(loss, wanted)


def fsdp_equals_one_process(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model, alone = net(), net()
    fully_shard(model)
    train(model, optx.LossReweight(max_batch=8), (4, 3), rank)
    train(alone, optx.LossReweight(process_group=alone_on(rank)), (4, 3), None)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor().detach(), b.detach(), rtol=0, atol=1e-6)  # type: ignore[attr-defined]


def a_group_of_others_is_refused(rank: int) -> None:
    groups = [dist.new_group([each]) for each in range(2)]
    with pytest.raises(optx.OptxError, match="this process is not in process_group"):
        optx.LossReweight(process_group=groups[1 - rank])(torch.rand(3))


CASES: list[Callable[[int], None]] = [
    from_logits_equals_one_process,
    the_trainers_share_is_that_of_one_process,
    fsdp_equals_one_process,
    a_group_of_others_is_refused,
    ddp_equals_one_process,
    each_process_by_itself_is_something_else,
    off_is_plain_ddp_to_the_bit,
    one_collective_of_a_number_a_sample,
    a_bad_sample_of_one_process_is_left_out_on_both,
    a_process_without_samples_hears_of_anothers_bad_one,
    a_larger_batch_than_the_first_is_refused,
]


test_on_two_processes = on_processes(2, *CASES)
