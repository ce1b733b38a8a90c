"""SAF and MESA over two gloo processes under DDP, with the sampler that a DDP loop has."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")
SAMPLES = 33  # odd: the sampler pads one process's last batch with a sample of the other's


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(SAMPLES, 5, generator=g), torch.randint(4, (SAMPLES,), generator=g))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def train(rank: int, saf: optx.SAF, epochs: int, model: nn.Module) -> dict[int, float]:
    """An ordinary loop under DDP; the share of samples with a past, by epoch."""
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    indexed = optx.with_index(data())
    sampler = DistributedSampler(indexed, num_replicas=2, rank=rank, shuffle=True)
    served = {}
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        saf.set_epoch(epoch)
        for x, y, index in DataLoader(indexed, batch_size=4, sampler=sampler):
            logits = model(x)
            opt.zero_grad()
            (F.cross_entropy(logits, y) + saf(logits, index)).backward()
            opt.step()
        served[epoch] = saf.report()["served"]
    return served


def gathered_all_samples_have_a_past(rank: int) -> None:
    for options in ({}, {"top_k": 2, "dtype": torch.bfloat16}):
        saf = optx.SAF(SAMPLES, weight=1.0, lookback=2, start_epoch=1, gather=True, **options)  # type: ignore[arg-type]
        model = nn.parallel.DistributedDataParallel(net())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            served = train(rank, saf, 5, model)
        # All but, on one of them, the sample that the sampler repeats: its entry is this epoch's already.
        assert all(served[epoch] >= 16 / 17 for epoch in (2, 3, 4))
        # Both processes have one and the same record.
        for mine in saf.state_dict()["record"].values():
            if isinstance(mine, Tensor):
                both = [torch.empty_like(mine.view(torch.uint8)) for _ in range(2)]
                dist.all_gather(both, mine.view(torch.uint8))
                assert torch.equal(*both)


def each_by_itself_loses_half_and_says_so(rank: int) -> None:
    saf = optx.SAF(SAMPLES, lookback=2, start_epoch=1)
    with pytest.warns(UserWarning, match="With a DistributedSampler give gather=True"):
        served = train(rank, saf, 6, nn.parallel.DistributedDataParallel(net()))
    assert 0.1 < sum(served[epoch] for epoch in range(2, 6)) / 4 < 0.9


def a_fixed_part_needs_no_exchange(rank: int) -> None:
    part = optx.with_index(Subset(data(), range(rank, SAMPLES, 2)))
    saf = optx.SAF(len(part), lookback=1, start_epoch=0)  # type: ignore[arg-type]
    model = nn.parallel.DistributedDataParallel(net())
    with counted() as calls:
        for epoch in range(3):
            saf.set_epoch(epoch)
            for x, _, index in DataLoader(part, batch_size=4, shuffle=True, drop_last=True):
                saf(model(x), index)
            assert epoch == 0 or saf.report()["served"] >= 0.5  # drop_last leaves others out in each epoch
    assert not calls


class counted:
    """The collectives of SAF that were called."""

    def __enter__(self) -> list[int]:
        self.real, found = dist.all_gather, []

        def call(out: list[Tensor], given: Tensor, **options: Any) -> Any:
            found.append(given.numel())
            return self.real(out, given, **options)

        dist.all_gather = call  # type: ignore[assignment]
        return found

    def __exit__(self, *_: object) -> None:
        dist.all_gather = self.real


def one_collective_of_the_outputs_a_step(rank: int) -> None:
    saf = optx.SAF(8, gather=True)
    with counted() as calls:
        for epoch in range(3):
            saf.set_epoch(epoch)
            saf(torch.randn(4, 10, requires_grad=True), [4 * rank + i for i in range(4)])
    assert calls == [4 * (10 * 2 + 8)] * 3


def gathering_equals_one_process(rank: int) -> None:
    """Two halves of a batch, and the gradient of their mean, as one process has them of the whole."""
    model, alone = nn.parallel.DistributedDataParallel(net()), net()
    saf, whole = (optx.SAF(8, weight=2.0, lookback=1, start_epoch=0, gather=g) for g in (True, False))
    x, order = data()[:8][0], torch.arange(8)
    for epoch in range(3):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(epoch))
        for one, loss, part in ((model, saf, order[4 * rank : 4 * rank + 4]), (alone, whole, order)):
            loss.set_epoch(epoch)
            one.zero_grad()
            logits = one(x[part])
            (logits.square().mean() + loss(logits, part)).backward()
            with torch.no_grad():
                for p in one.parameters():
                    p -= p.grad
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def averages_agree_under_ddp(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(net())
    mesa = optx.MESA(model, beta=0.5, start_epoch=0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    mesa.set_epoch(1)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2 * step + rank))
        logits = model(x)
        loss = mesa(logits, x)
        opt.zero_grad()
        (logits.square().mean() + loss).backward()
        opt.step()
    assert loss > 0
    mine = mesa.state_dict()["tensors"]["0.weight"]
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)


def sharded_models_are_refused(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = net()
    mesa = optx.MESA(model, start_epoch=0)
    mesa.set_epoch(1)
    fully_shard(model)
    with pytest.raises(optx.OptxError, match=r"'0.weight' was sharded or reshaped since MESA was made"):
        mesa.set_epoch(2)
    with pytest.raises(optx.OptxError, match=r"'0.weight' is sharded \(FSDP2 or another DTensor\)"):
        optx.MESA(model)
    # SAF sees outputs only.
    saf = optx.SAF(4, lookback=1, start_epoch=0)
    for epoch in range(2):
        saf.set_epoch(epoch)
        loss = saf(model((epoch + 1) * torch.ones(2, 5)), [0, 1])
    loss.backward()
    assert loss > 0


def uneven_batches_are_gathered(rank: int) -> None:
    for top_k in (None, 2):
        saf = optx.SAF(20, lookback=1, start_epoch=0, gather=True, top_k=top_k)
        outputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        for epoch in range(2):
            saf.set_epoch(epoch)
            first = 10 * (rank ^ epoch)  # four samples and three, then each the other's
            mine = torch.arange(first, first + 4 - rank)
            loss = saf((epoch + 1) * outputs[mine].requires_grad_(), mine)
        tags = saf.state_dict()["record"]["tags"][0]
        assert (tags >= 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
        assert saf.report()["served"] == (1 if rank else 3 / 4)
        assert loss > 0
    with pytest.raises(
        optx.OptxError, match="batch has 5 samples and no process's first one had more than 4"
    ):
        saf(torch.randn(5, 3, requires_grad=True), range(5))


def another_processs_state_is_told_of_at_once(rank: int) -> None:
    def made(**options: Any) -> optx.SAF:
        return optx.SAF(6, lookback=2, start_epoch=1, **options)

    mine = made()
    mine.set_epoch(0)
    mine(torch.randn(2, 3, requires_grad=True), [2 * rank, 2 * rank + 1])
    states: list[Any] = [None, None]
    dist.all_gather_object(states, mine.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made().load_state_dict(states[rank])
        made().load_state_dict(made(gather=True).state_dict())
    said = f"of process {1 - rank} of 2 without gather=True, and is loaded in process {rank} of 2: 4 of 6 sam"
    with pytest.warns(UserWarning, match=said):
        made().load_state_dict(states[1 - rank])
    with pytest.warns(UserWarning, match="of 2 with it: 4 of 6 samples have no output in it"):
        made(gather=True).load_state_dict(states[rank])


CASES: list[Callable[[int], None]] = [
    gathered_all_samples_have_a_past,
    each_by_itself_loses_half_and_says_so,
    a_fixed_part_needs_no_exchange,
    one_collective_of_the_outputs_a_step,
    gathering_equals_one_process,
    uneven_batches_are_gathered,
    another_processs_state_is_told_of_at_once,
    averages_agree_under_ddp,
    sharded_models_are_refused,
]


test_on_two_processes = on_processes(2, *CASES)
