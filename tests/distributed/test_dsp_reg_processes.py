"""DSP-Reg in two gloo processes: DDP and FSDP2, each beside the same run in one process."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")


ANCHORED: dict[str, Any] = {"decoupled": True, "anchor": "init"}  # of the same kernels, which take seconds


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def wrapped(model: nn.Module, fused: Any = False, **options: Any) -> optx.Wrapped:
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0)
    return optx.wrap(base, optx.DSPReg(2, **options), fused=fused)


def loss_of(model: nn.Module, step: int, d: int, part: slice = slice(None)) -> Tensor:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + d))[part]
    return ((d + 1) * model(x)).square().mean()


def train(model: nn.Module, opt: optx.Wrapped, steps: Iterable[int], parts: Iterable[slice]) -> None:
    """Micro-batches of a domain add up; what comes before the last is not exchanged under DDP."""
    parts = list(parts)
    for step in steps:
        opt.zero_grad()
        for d in range(2):
            with opt.dsp_reg.domain(d):
                for part in parts:
                    last = part is parts[-1] or not hasattr(model, "no_sync")
                    with nullcontext() if last else model.no_sync():  # pyright: ignore
                        (loss_of(model, step, d, part) / len(parts)).backward()
        opt.step()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[attr-defined]


def assert_alike(model: nn.Module, opt: optx.Wrapped, other: nn.Module, theirs: optx.Wrapped) -> None:
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(a).detach(), b.detach(), rtol=0, atol=1e-5)
    wanted = theirs.dsp_reg.sensitivity()
    found = {name.removeprefix("module."): s for name, s in opt.dsp_reg.sensitivity().items()}
    assert found.keys() == wanted.keys()
    for name, s in found.items():
        torch.testing.assert_close(whole(s), wanted[name], rtol=1e-3, atol=1e-4)


def ddp(rank: int) -> None:
    """Variances are of the gradients averaged over ranks, domain by domain."""
    for view in (False, True):
        model = nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=view)
        opt = wrapped(model, fused=view, weight=2.0, **ANCHORED)
        train(model, opt, range(4), [slice(4 * rank, 4 * rank + 2), slice(4 * rank + 2, 4 * rank + 4)])
        alone = net()
        theirs = wrapped(alone, weight=2.0, **ANCHORED)
        train(alone, theirs, range(4), [slice(None)])
        assert_alike(model, opt, alone, theirs)
        # The check can fail: a rank's own gradients have other variances.
        own = net()
        local = wrapped(own, weight=2.0, **ANCHORED)
        train(own, local, range(4), [slice(4 * rank, 4 * rank + 4)])
        apart = [(a - b).abs().max() for a, b in zip(own.parameters(), alone.parameters(), strict=True)]
        assert max(apart) > 1e-3


def rounds(rank: int) -> None:
    """Domains in the inner loop; DDP is told to exchange in the last round, as the Trainer does."""
    for view in (False, True):
        model = nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=view)
        opt = wrapped(model, weight=2.0, accumulate=True)
        for step in range(4):
            opt.zero_grad()
            for a in range(3):
                start = 4 * rank + a
                part = slice(start, start + (2 if a == 2 else 1))
                for d in range(2):
                    with opt.dsp_reg.domain(d), nullcontext() if a == 2 else model.no_sync():
                        (loss_of(model, step, d, part) * (part.stop - part.start) / 4).backward()
            opt.step()
        alone = net()
        theirs = wrapped(alone, weight=2.0)
        train(alone, theirs, range(4), [slice(None)])
        assert_alike(model, opt, alone, theirs)
    other = wrapped(model, accumulate=True, measure="denoised")
    with pytest.raises(optx.OptxError, match="with several processes use"), other.dsp_reg.domain(0):
        pass


def fsdp(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for options in (ANCHORED, {"norm": "layer", "decoupled": False}):
        model = net()
        for part in (model[0], model[2], model):  # the last layer's one row is on one rank alone
            fully_shard(part)
        opt = wrapped(model, fused=True, **options)
        train(model, opt, range(4), [slice(None)])
        alone = net()
        theirs = wrapped(alone, **options)
        train(alone, theirs, range(4), [slice(None)])
        assert_alike(model, opt, alone, theirs)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.zero_grad(set_to_none=False)
        train(model, opt, [4], [slice(None)])
    with pytest.raises(optx.TransformError, match="norm='max'"):
        wrapped(model, norm="max")


def shared_forward(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(net())
    opt = wrapped(model)
    with pytest.raises(optx.OptxError, match="exchange the gradients of the first only"):
        opt.dsp_reg.backward({d: loss_of(model, 0, d) for d in range(2)})


CASES = [ddp, rounds, fsdp, shared_forward]


test_on_two_processes = on_processes(2, *CASES)
