"""FTWT's targets, losses and training; test_ftwt_chains.py and test_ftwt_inference.py have the rest."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conv_models import images, trained, vgg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx.inject._conv_chains import Chain
from optx.inject._ftwt_layer import Layer
from optx.inject._ftwt_targets import channel_scores, mass_target, uniform_target
from optx.inject._own_loss import Collected


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


# ---- targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "r", "crossing", "wanted"),
    [
        ([4, 1, 3, 2], 0.7, "drop", [1, 0, 1, 0]),
        ([4, 1, 3, 2], 0.7, "keep", [1, 0, 1, 0]),
        ([4, 1, 3, 2], 0.75, "drop", [1, 0, 1, 0]),
        ([4, 1, 3, 2], 0.75, "keep", [1, 0, 1, 1]),
        ([10, 0, 0, 0], 0.7, "drop", [0, 0, 0, 0]),
        ([10, 0, 0, 0], 0.7, "keep", [1, 0, 0, 0]),
        ([6, 1, 1, 2], 0.5, "drop", [0, 0, 0, 0]),
        ([0, 0, 0, 0], 0.5, "drop", [1, 1, 1, 1]),
        ([0, 0, 0, 0], 0.5, "keep", [1, 1, 1, 1]),
        ([0, 0, 0, 0], 1.0, "drop", [1, 1, 1, 1]),
        ([5, 0, 3, 1e-7], 1.0, "drop", [1, 0, 1, 0]),
        ([2, 2, 2, 2], 0.5, "drop", [1, 1, 0, 0]),
    ],
)
def test_mass(scores: list[float], r: float, crossing: str, wanted: list[int]) -> None:
    assert mass_target(rows(scores), r, crossing).int().tolist() == [wanted]


def test_uniform() -> None:
    assert uniform_target(rows([4, 1, 3, 2]), 0.5).int().tolist() == [[1, 0, 1, 0]]
    assert uniform_target(rows([4, 1, 0, 2, 3]), 0.25).int().tolist() == [[1, 1, 0, 1, 1]]
    assert uniform_target(rows([0, 0, 3, 2]), 0.25).int().tolist() == [[0, 0, 1, 1]]


def by_hand(scores: np.ndarray, r: float, crossing: str) -> list[int]:
    """One sample's target, filter by filter."""
    share = (scores / scores.sum(dtype=np.float32)).astype(np.float32)
    kept, total = [0] * len(share), np.float32(0)
    for c in sorted(range(len(share)), key=lambda c: -share[c]):
        before, total = total, np.float32(total + share[c])
        if crossing == "drop":
            kept[c] = int(not total - np.float32(r) > 1e-5)
        else:
            kept[c] = int(not float(before) >= r - 1e-5)
    return kept


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.sampled_from([0.3, 0.5, 0.8, 0.95]),
    st.sampled_from(["drop", "keep"]),
    st.integers(0, 99),
)
def test_mass_is_that_of_a_loop_and_knows_no_scale(channels: int, r: float, crossing: str, seed: int) -> None:
    scores = torch.rand(3, channels, generator=torch.Generator().manual_seed(seed)) ** 2
    found = mass_target(scores, r, crossing)
    totals = (scores / scores.sum(1, keepdim=True)).sort(1, descending=True).values.cumsum(1)
    near = ((totals - r).abs() < 4e-5).any(1)  # the order of a sum may decide there
    for row, scored, close in zip(found, scores, near, strict=True):
        assert close or row.int().tolist() == by_hand(scored.numpy(), r, crossing)
    assert torch.equal(mass_target(scores * 2.0**-9, r, crossing), found)
    if crossing == "keep":
        assert found.any(1).all()


def test_at_one_only_dead_filters_go() -> None:
    y = F.relu(torch.randn(4, 16, 5, 5) - 2.2)
    y[0, :9] = 0
    target = mass_target(channel_scores(y), 1.0)
    scores = channel_scores(y)
    assert not target[0, :9].any()
    masked = y * target[:, :, None, None]
    assert ((y - masked).abs().amax((1, 2, 3)) <= 1e-5 * scores.sum(1)).all()


def test_scores_are_the_largest_sizes() -> None:
    y = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(channel_scores(y), y.abs().amax((2, 3)), rtol=0, atol=0)
    assert channel_scores(y.bfloat16()).dtype == torch.float32


# ---- the loss ---------------------------------------------------------------------------------------------


def test_cross_entropy_is_a_mean_over_the_batch_and_a_sum_over_filters() -> None:
    target = rows([1, 0, 1], [0, 1, 1]).bool()
    conv = nn.Conv2d(1, 3, 1)
    layer = Layer(Chain("c", "c"), conv, None, Collected("FTWT"), lambda scores: target)
    loss = layer.own_loss(rows([1, -2, 0.5], [0, 3, -1]), torch.zeros(2, 3, 1, 1))
    assert loss.item() == pytest.approx(1.484632, abs=1e-6)


def expected(model: Any, parts: Any, x: Tensor, r: float) -> Tensor:
    """The loss of a plain VGG in training mode with these predictors, layer by layer."""
    losses: list[Tensor] = []
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            p = next(parts)
            pooled = F.adaptive_avg_pool2d(x, 1).softmax(1)
            z = F.conv2d(pooled, p.weight[:, :, None, None], p.bias)[:, :, 0, 0]
            x = layer(x)
        elif isinstance(layer, nn.BatchNorm2d):
            x = layer(x)
            a = F.relu(x).amax((2, 3))
            share = a / a.sum(1, keepdim=True)
            order = share.argsort(1, descending=True)
            kept = share.gather(1, order).cumsum(1) <= r + 1e-5
            g = torch.zeros_like(share).scatter(1, order, kept.float())
            losses.append(F.binary_cross_entropy_with_logits(z, g, reduction="none").mean(0).sum())
            x = x * (z > 0).float()[:, :, None, None]
        else:
            x = layer(x)
    return torch.stack(losses).mean()


def scattered(handle: optx.FilterPruning, seed: int = 3) -> None:
    """Predictors that keep some filters of some samples."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            scale = 0.3 if p.ndim == 1 else 6.0
            p.copy_(scale * torch.randn(p.shape, generator=generator))


def test_the_loss_is_the_mean_over_layers() -> None:
    model = trained("vgg").train()
    handle = optx.attach(model, optx.FTWT(r=0.8))
    scattered(handle)
    model(images())
    loss = handle.loss()
    parts = iter([one.part for one in handle.served])
    torch.testing.assert_close(loss, expected(trained("vgg").train(), parts, images(), 0.8))


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_who_learns_from_what(mode: Any) -> None:
    model = trained("resnet").train()
    handle = optx.attach(model, optx.FTWT(mode=mode))
    model(images())
    handle.loss().backward()
    assert all(p.grad is not None for p in handle.parameters())
    base = [p.grad for p in handle.base_parameters()]
    assert all(grad is None for grad in base) == (mode == "decoupled")
    model.zero_grad(set_to_none=True)
    model(images()).square().sum().backward()
    handle.loss()
    assert all(p.grad is None for p in handle.parameters())
    assert all(p.grad is not None for p in handle.base_parameters())


def test_statistics_are_of_all_filters() -> None:
    model = trained("vgg").train()
    dense = copy.deepcopy(model)
    handle = optx.attach(model, optx.FTWT())
    scattered(handle)
    model(images())
    handle.loss()
    dense(images())
    assert not handle.masks()["0"].all()
    assert torch.equal(model[1].running_mean, dense[1].running_mean)


def test_a_target_without_any_filter_is_told_once() -> None:
    model = trained("vgg").train()
    handle = optx.attach(model, optx.FTWT(r=0.01))
    model(images())
    with pytest.warns(UserWarning, match=r"FTWT: a sample's target of '0' has no filter .* crossing='keep'"):
        handle.loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
        handle.loss()
        handle.remove()
        for options in ({"r": 0.01, "crossing": "keep"}, {"criterion": "uniform", "ratio": 0.9}):
            with optx.attach(model, optx.FTWT(**options)) as kept:
                model(images())
                kept.loss()


def test_predictors_learn_and_freeze() -> None:
    """Masks come to be the targets; frozen they stay, whatever the optimizer has in store."""
    model = trained("vgg").train()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    handle = optx.attach(model, optx.FTWT(r=0.8))
    for group in handle.param_groups(lr=1.0):
        opt.add_param_group(group)
    first = None
    for step in range(24):
        (model(images(seed=step % 2)).square().mean() + handle.loss()).backward()
        first = handle.agreement() if first is None else first
        opt.step()
        opt.zero_grad()
    assert handle.agreement() > max(0.8, first or 1)
    handle.freeze()
    before, weight = [p.clone() for p in handle.parameters()], model[0].weight.clone()
    for _ in range(2):
        (model(images()).square().mean() + handle.loss()).backward()
        opt.step()
    assert handle.loss().item() == 0
    assert all(map(torch.equal, before, handle.parameters()))
    assert not torch.equal(model[0].weight, weight)


def test_embedding_sizes() -> None:
    model = vgg()
    handle = optx.attach(model, optx.FTWT(embedding=100))
    assert [one.part.dim for one in handle.served[:3]] == [6, 4, 3]  # sqrt(100 / (3, 8, 12))
    assert [one.part.weight.shape[1] for one in handle.served[:3]] == [3 * 36, 8 * 16, 12 * 9]
    model(images())
    handle.loss().backward()
    part: Any = handle.served[1].part
    pooled = F.adaptive_avg_pool2d(images(2), 4)
    z = F.linear(torch.cat([pooled.flatten(1)] * 3, 1)[:, :128].softmax(1), part.weight, part.bias)
    torch.testing.assert_close(part.logits(torch.cat([pooled.flatten(1)] * 3, 1)[:, :128]), z)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 1.5}, "r is 1.5"),
        ({"criterion": "mas"}, "criterion is 'mas'"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"crossing": ""}, "crossing is ''"),
        ({"ratio": 1}, "ratio is 1"),
        ({"embedding": 2.5}, "embedding is 2.5"),
        ({"inference": "skip"}, "inference is 'skip'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(optx.OptxError, match=f"FTWT: {match}"):
        optx.FTWT(**options)
