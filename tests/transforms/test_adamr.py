"""AdamR's laws (arXiv 2410.09344 and its official code), on both paths."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fused_cases import BF16, F32, F64, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from torch import Tensor, nn

import optx

both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
SHAPES: list[tuple[int, ...]] = [(4, 3), (), (0,), (33,)]


def named(tensors: Sequence[Tensor]) -> list[tuple[str, nn.Parameter]]:
    return [(f"t{i}", nn.Parameter(t.clone())) for i, t in enumerate(tensors)]


def anchors_of(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"t{i}": t for i, t in enumerate(tensors)}


def steps(opt: torch.optim.Optimizer, count: int = 3, seed: int = 50, scale: float = 1.0) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for number in range(count):
        for p, g in zip(params, draw([p.shape for p in params], seed + number, params[0].dtype), strict=True):
            p.grad = g * scale
        opt.step()


def weights_of(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach() for group in opt.param_groups for p in group["params"]]


def assert_same(a: Any, b: Any, atol: float = 0.0) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@both
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_worked_example(fused: bool, dtype: torch.dtype) -> None:
    a, b = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([0.5], dtype=dtype)
    pairs = named([a, b])
    anchor = anchors_of([torch.tensor([0.9, 2.2], dtype=dtype), b.clone()])
    opt = optx.wrap(torch.optim.Adam(pairs, lr=0.1), optx.AdamR(0.05, anchor=anchor), fused=fused)
    pairs[0][1].grad = torch.tensor([0.3, -0.4], dtype=dtype)
    pairs[1][1].grad = torch.tensor([1.2], dtype=dtype)
    opt.step()
    r = (float(opt.totals["adamr.second"]) / float(opt.totals["numel"])) ** 0.5
    assert r == pytest.approx(0.75055535, abs=1e-8 if dtype == F64 else 1e-7)
    tolerance = 5e-9 if dtype == F64 else 3e-7
    wanted = [[0.89933383, 2.10133234], [0.40000000]]
    assert_same(weights_of(opt), [torch.tensor(w, dtype=dtype) for w in wanted], tolerance)


@pytest.mark.long(keep=3)
@both
@pytest.mark.parametrize(
    ("norm", "base", "numbers"),
    [
        ("l2", "adam", {"lr": 0.01}),
        ("l1", "adam", {"lr": 0.01}),
        ("l2", "adam", {"lr": 0.01, "weight_decay": 0.2}),
        ("l1", "adam", {"lr": 0.01, "weight_decay": 0.2, "amsgrad": True, "betas": (0.5, 0.9)}),
        ("l2", "adamw", {"lr": 0.01, "weight_decay": 0.2, "amsgrad": True, "maximize": True}),
    ],
    ids=["adam", "l1 adam", "adam l2", "l1 adam l2 amsgrad", "adamw amsgrad maximize"],
)
def test_r_is_what_a_second_pass_over_the_moments_gives(
    fused: bool, norm: Any, base: str, numbers: dict[str, Any]
) -> None:
    """Coupled decay enters the moments; a gradient that comes late counts late."""
    start, anchors = draw(SHAPES, 0, F64), draw(SHAPES, 1, F64)
    pairs = named(start)
    make = torch.optim.Adam if base == "adam" else torch.optim.AdamW
    chain = optx.AdamR(0.3, norm=norm, anchor=anchors_of(anchors))
    opt = optx.wrap(make(pairs, **numbers), chain, fused=fused)
    reference = Reference(start, base, numbers, adamr={"weight": 0.3, "norm": norm}, anchors=anchors)
    for number in range(6):
        grads: list[Tensor | None] = list(draw(SHAPES, 20 + number, F64))
        if number in (1, 4):
            grads[number % 4] = None
            grads[3] = None
        for (_, p), g in zip(pairs, grads, strict=True):
            p.grad = g
        opt.step()
        reference.step(grads)
        r = (float(opt.totals["adamr.second"]) / float(opt.totals["numel"])) ** 0.5
        assert r == pytest.approx(reference.scale, rel=1e-12)
    assert_same(weights_of(opt), reference.weights, 1e-13)


@both
def test_weight_zero_is_the_base(fused: bool) -> None:
    start = draw(SHAPES, 0, F32)
    plain = torch.optim.Adam(named(start), lr=0.01)
    opt = optx.wrap(torch.optim.Adam(named(start), lr=0.01), optx.AdamR(0.0), fused=fused)
    steps(plain, 10)
    steps(opt, 10)
    assert_same(weights_of(opt), weights_of(plain), 5e-7 if fused else 0.0)


@both
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_at_the_anchor_the_first_step_is_adams(fused: bool, norm: Any) -> None:
    start = draw(SHAPES, 0, F64)
    plain = torch.optim.Adam(named(start), lr=0.01)
    opt = optx.wrap(torch.optim.Adam(named(start), lr=0.01), optx.AdamR(7.0, norm=norm), fused=fused)
    steps(plain, 1)
    steps(opt, 1)
    assert_same(weights_of(opt), weights_of(plain), 1e-15)
    steps(plain, 1)
    steps(opt, 1)
    assert not torch.allclose(weights_of(opt)[0], weights_of(plain)[0], rtol=0, atol=1e-6)


@both
def test_without_gradients_it_converges_geometrically(fused: bool) -> None:
    """g = 0 from the start: r is 1, and each step keeps 1 - lr * weight of the distance."""
    start, anchors = draw(SHAPES, 0, F64), draw(SHAPES, 1, F64)
    base = torch.optim.Adam(named(start), lr=0.1)
    opt = optx.wrap(base, optx.AdamR(0.5, anchor=anchors_of(anchors)), fused=fused)
    steps(opt, 20, scale=0.0)
    wanted = [a + 0.95**20 * (w - a) for w, a in zip(start, anchors, strict=True)]
    assert_same(weights_of(opt), wanted, 1e-13)


@both
def test_l1_moves_by_the_same_amount_and_stays_at_the_anchor(fused: bool) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.25], dtype=F64))
    anchor = {"p": torch.tensor([0.0, 0.0, 0.25], dtype=F64)}
    opt = optx.wrap(torch.optim.Adam([("p", p)], lr=0.1), optx.AdamR(0.5, "l1", anchor), fused=fused)
    steps(opt, 3, scale=0.0)
    assert_same([p.detach()], [torch.tensor([0.85, -1.85, 0.25], dtype=F64)], 1e-15)


@both
def test_anchor_zero_without_r_is_adamws_decay(fused: bool) -> None:
    start = draw(SHAPES, 0, F64)
    plain = torch.optim.AdamW(named(start), lr=0.01, weight_decay=0.3)
    base = torch.optim.AdamW(named(start), lr=0.01, weight_decay=0.0)
    opt = optx.wrap(base, optx.AdamR(0.3, anchor="zero", normalize=False), fused=fused)
    steps(plain, 5)
    steps(opt, 5)
    assert_same(weights_of(opt), weights_of(plain), 1e-14)
    assert not [k for s in opt.state.values() for k in s if "anchor" in k]  # and takes no memory


@both
@settings(max_examples=15)
@given(c=st.floats(1e-3, 1e3))
def test_scaling_gradients_divides_the_pull(fused: bool, c: float) -> None:
    """eps = 0: Adam's part stays, the decay part is divided by c."""
    start, anchors = draw(SHAPES, 0, F64), draw(SHAPES, 1, F64)
    after = []
    for scale in (1.0, c):
        base = torch.optim.Adam(named(start), lr=1e-4, eps=0.0)
        opt = optx.wrap(base, optx.AdamR(0.5, anchor=anchors_of(anchors)), fused=fused)
        steps(opt, 1, scale=scale)
        after.append(weights_of(opt))
    plain = torch.optim.Adam(named(start), lr=1e-4, eps=0.0)
    steps(plain, 1)
    pull, scaled = ([a - b for a, b in zip(x, weights_of(plain), strict=True)] for x in after)
    assert float(pull[0].abs().max()) > 1e-6
    assert_same(scaled, [x / c for x in pull], 1e-14 * max(1.0, 1 / c))


@both
def test_groups_share_r_and_keep_their_own_weight(fused: bool) -> None:
    start, anchors = draw(SHAPES, 0, F64), draw(SHAPES, 1, F64)

    def run(*cuts: int, **second: Any) -> list[Tensor]:
        pairs = named(start)
        edges = [0, *cuts, len(pairs)]
        groups = [{"params": pairs[i:j]} for i, j in itertools.pairwise(edges)]
        groups[-1].update(second)
        base = torch.optim.Adam(groups, lr=0.01)
        opt = optx.wrap(base, optx.AdamR(0.5, anchor=anchors_of(anchors)), fused=fused)
        steps(opt)
        return weights_of(opt)

    one = run()
    assert_same(run(1), one, 1e-15)
    assert_same(run(1, 3), one, 1e-15)
    other = run(1, adamr_weight=0.0)
    assert torch.equal(other[0], one[0])
    assert not torch.equal(other[3], one[3])


@both
def test_a_group_left_out_has_no_pull_no_anchor_and_no_say_in_r(fused: bool) -> None:
    start, anchors = draw(SHAPES, 0, F64), draw(SHAPES, 1, F64)
    pairs = named(start)
    groups = [{"params": pairs[:2]}, {"params": pairs[2:], "adamr": False}]
    base = torch.optim.Adam(groups, lr=0.01)
    opt = optx.wrap(base, optx.AdamR(0.5, anchor=anchors_of(anchors[:2])), fused=fused)
    steps(opt)
    numbers = {"lr": 0.01}
    inside = Reference(start[:2], "adam", numbers, adamr={"weight": 0.5}, anchors=anchors[:2])
    outside = Reference(start[2:], "adam", numbers)
    for number in range(3):
        grads = draw(SHAPES, 50 + number, F64)
        inside.step(grads[:2])
        outside.step(grads[2:])
    assert_same(weights_of(opt), [*inside.weights, *outside.weights], 1e-14)


@both
def test_bfloat16_pulls_survive_rounding(fused: bool) -> None:
    """A pull of 1e-4 of the weight is a fortieth of an ulp: nearest rounding would lose every one."""
    n, count = 4000, 60
    p = nn.Parameter(torch.full((n,), 1.5, dtype=BF16))
    base = torch.optim.SGD([("p", p)], lr=0.01)
    opt = optx.wrap(base, optx.AdamR(0.01, anchor={"p": torch.zeros(n)}, normalize=False), fused=fused)
    for _ in range(count):
        p.grad = torch.zeros_like(p)
        opt.step()
    lost = 1.5 - float(p.detach().double().mean())
    wanted = 1.5 * (1 - (1 - 1e-4) ** count)
    ulp, each = 2.0**-7, 1.5e-4
    sigma = (count * each * ulp / n) ** 0.5  # a sum of rare jumps of one ulp
    assert abs(lost - wanted) <= 4 * sigma
    assert wanted > 20 * sigma


@both
def test_overshoot_warns_once(fused: bool) -> None:
    """lr * weight / r above 1; with gradients of 1e-3, a weight of 0.05 is 50 lr."""
    start, anchors = draw(SHAPES, 0, F32), draw(SHAPES, 1, F32)
    chain = [optx.AdamR(0.05, anchor=anchors_of(anchors)) for _ in range(2)]
    quiet, loud = (optx.wrap(torch.optim.Adam(named(start), lr=0.1), t, fused=fused) for t in chain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(quiet, 3, scale=0.05)
    with pytest.warns(UserWarning, match=r"lr \* weight / r is .* overshoots the anchor") as caught:
        steps(loud, 3, scale=1e-4)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@both
def test_lr_0_moves_nothing(fused: bool) -> None:
    """torch's distributed checkpoint steps with zero gradients and lr 0."""
    for dtype in (F32, BF16):
        start = draw(SHAPES, 0, dtype)
        base = torch.optim.AdamW(named(start), lr=0.0)
        opt = optx.wrap(base, optx.AdamR(0.5, anchor=anchors_of(draw(SHAPES, 1, dtype))), fused=fused)
        steps(opt, 1, scale=0.0)
        assert all(torch.equal(a, b) for a, b in zip(weights_of(opt), start, strict=True))


def test_bases_without_a_second_moment() -> None:
    p = nn.Parameter(torch.ones(3))
    for make in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad):
        with pytest.raises(optx.TransformError, match=rf"{make.__name__} has none.*AdamR\(normalize=False\)"):
            optx.wrap(make([p], lr=0.1), optx.AdamR())


@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.RAdam])
def test_r_of_bases_that_run_as_they_are(make: Any) -> None:
    start, anchors = draw(SHAPES, 0, F64), draw(SHAPES, 1, F64)
    pulled = optx.wrap(make(named(start), lr=1e-6), optx.AdamR(0.5, anchor=anchors_of(anchors)))
    reference = Reference(start, "adam", {"lr": 1e-6}, adamr={"weight": 0.5}, anchors=anchors)
    for number in range(4):
        steps(pulled, 1, seed=70 + number)
        reference.step(draw(SHAPES, 70 + number, F64))
        r = (float(pulled.totals["adamr.second"]) / float(pulled.totals["numel"])) ** 0.5
        assert r == pytest.approx(reference.scale, rel=1e-10)
