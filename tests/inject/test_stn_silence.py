"""Loops in which self-tuning networks would tune nothing, or train nothing, in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import optx


def tuned(warmup: int) -> tuple[nn.Module, optx.SelfTuning]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 2))
    hparams = optx.HParams(drop=optx.hp(0.1, (0, 0.9)))
    return model, optx.attach(model, optx.STN(hparams, dropout="drop", warmup=warmup))  # type: ignore[return-value]


def train(model: nn.Module, stn: optx.SelfTuning, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        with stn.train_batch(3):
            model(torch.randn(3, 5)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def validate(model: nn.Module, stn: optx.SelfTuning) -> None:
    with stn.valid_batch(3):
        F.cross_entropy(model(torch.randn(3, 5)), torch.tensor([0, 1, 0])).backward()
    stn.step_hparams()


def test_a_loop_that_never_tunes_is_told() -> None:
    model, stn = tuned(warmup=4)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, stn, opt, 203)
    with pytest.warns(UserWarning, match=r"204 training batches have passed, and no step_hparams\(\)"):
        train(model, stn, opt, 1)
    train(model, stn, opt, 10)  # once
    model, stn = tuned(warmup=4)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, stn, opt, 6)
    validate(model, stn)
    train(model, stn, opt, 204)  # by a schedule of its own


def test_an_optimizer_of_the_responses_alone_is_told() -> None:
    model, stn = tuned(warmup=4)
    train(model, stn, torch.optim.SGD(stn.parameters(), lr=0.01), 40)
    with pytest.warns(UserWarning, match=r"no weight of a served module has changed.*model\.parameters\(\)"):
        validate(model, stn)
    model, stn = tuned(warmup=4)
    for name, p in model.named_parameters():
        p.requires_grad_("optx" in name)  # a base that is to stay
    train(model, stn, torch.optim.SGD(stn.parameters(), lr=0.01), 40)
    validate(model, stn)
