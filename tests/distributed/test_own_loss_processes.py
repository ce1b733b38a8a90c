"""An injection's own loss under DistributedDataParallel, over two gloo processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conv_models import images, vgg
from processes import on_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")


def served() -> tuple[nn.Module, optx.FilterPruning]:
    torch.manual_seed(0)
    model = vgg(norm=False)
    return model, optx.attach(model, optx.FTWT(r=0.9))


def gradients_are_those_of_the_whole_batch(rank: int) -> None:
    model, handle = served()
    call = DistributedDataParallel(model)
    alone, own = served()
    for seed in range(2):
        x = images(4, seed=seed)
        (call(x[2 * rank : 2 * rank + 2]).square().mean() + handle.loss()).backward()
        (alone(x).square().mean() + own.loss()).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def what_ddp_would_not_average_is_an_error(rank: int) -> None:
    model, handle = served()
    call = DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(optx.OptxError, match="takes what only the own loss uses for unused"):
        call(images())
    call = DistributedDataParallel(model)
    (call(images()).sum() + handle.loss()).backward()
    handle.freeze()
    with pytest.raises(optx.OptxError, match=r"frozen since .* wrapped the model"):
        call(images())
    (DistributedDataParallel(model)(images()).sum() + handle.loss()).backward()


CASES = [gradients_are_those_of_the_whole_batch, what_ddp_would_not_average_is_an_error]


test_on_two_processes = on_processes(2, *CASES)
