"""`Wrapped.metrics`: numbers of a step for a log, against computations of their own in float64."""

import pytest
import torch

import optx


def test_lr_is_each_groups_where_they_differ_and_a_removed_wrapper_says_so():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.5, 0.25), strict=True)]
    opt = optx.wrap(torch.optim.SGD(groups), optx.PerpGrad())
    rates = {"optx/lr": 0.375, "optx/lr/0": 0.5, "optx/lr/1": 0.25}
    assert opt.metrics() == {**rates, "optx/skipped_steps": 0.0}
    opt.param_groups[0]["lr"] = torch.tensor(0.25)
    assert opt.metrics() == {"optx/lr": 0.25, "optx/skipped_steps": 0.0}
    opt.remove()
    with pytest.raises(optx.OptxError, match=r"metrics\(\) after remove"):
        opt.metrics()
