"""The spherical family on logits: the sources' numbers, the laws, torch's conventions, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optx
from optx._spherical import SphericalLoss

FORMS = ("z", "mse", "spherical", "taylor")


def plain(form: str, o: Tensor, c: int, a: float = 0.1, b: float = 10.0) -> Tensor:
    """One row's loss as the paper writes it."""
    if form == "z":
        z = (o[c] - o.mean()) / o.std(correction=0)
        return torch.log1p(torch.exp(a * (b - z))) / a
    if form == "mse":
        one_hot = torch.zeros_like(o)
        one_hot[c] = 1
        return (o - one_hot).square().sum()
    s = o.square() + 1e-2 if form == "spherical" else 1 + o + o.square() / 2
    return (s.sum() / s[c]).log()


@pytest.mark.parametrize(
    ("c", "a", "b", "loss", "grad"),
    [
        (3, 1.0, 0.0, 0.2322352, [-0.0370723, 0.0185361, 0.0741446, -0.0556084]),
        (0, 0.5, 2.0, 3.6863393, [-0.2258478, 0.3011304, 0.0752826, -0.1505652]),
    ],
)
def test_the_numbers_of_the_spec(c: int, a: float, b: float, loss: float, grad: list[float]) -> None:
    o = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    found = optx.ZLoss(a, b)(o, torch.tensor(c))
    found.backward()
    assert found.item() == pytest.approx(loss, abs=5e-8)
    torch.testing.assert_close(o.grad, torch.tensor(grad, dtype=torch.float64), atol=5e-8, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(2, 30),
    st.integers(0, 10**6),
    st.sampled_from(["mean", "sum", "none"]),
)
def test_each_form_and_its_gradient(form: Any, classes: int, seed: int, reduction: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(3, classes, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randint(classes, (3, 2), generator=generator)
    y[1, 0] = -7
    found = optx.ZLoss(form=form, ignore_index=-7, reduction=reduction)(o, y)
    each = [[plain(form, o[i, :, j], max(0, int(y[i, j]))) for j in range(2)] for i in range(3)]
    each[1][0] = o.new_zeros(())
    rows = torch.stack([torch.stack(row) for row in each])
    wanted = rows if reduction == "none" else rows.sum() / (5 if reduction == "mean" else 1)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    got, right = (torch.autograd.grad((one * weight).sum(), o)[0] for one in (found, wanted))
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 50), st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 10**6))
def test_shift_and_scale_change_nothing(classes: int, scale: float, shift: float, seed: int) -> None:
    o = torch.randn(2, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y, criterion = torch.tensor([0, classes - 1]), optx.ZLoss(0.5, 3.0)
    first = criterion(o, y)
    torch.testing.assert_close(criterion(scale * o + shift, y), first, rtol=1e-9, atol=0)
    o.requires_grad_()
    (g,) = torch.autograd.grad(criterion(o, y), o)
    assert g.sum(1).abs().max() < 1e-12
    assert (g * o).sum(1).abs().max() < 1e-12 * max(1.0, float(o.detach().norm()))


def test_the_largest_z_and_both_ends_of_sharpness() -> None:
    one_hot = torch.zeros(1, 100, dtype=torch.float64)
    one_hot[0, 7] = 1
    y = torch.tensor([7])
    # a large: the loss is b - z, so that z can be read off it.
    assert 20 - optx.ZLoss(1e6, 20.0)(one_hot, y).item() == pytest.approx(math.sqrt(99), abs=1e-6)
    o = torch.randn(1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.tensor([4])
    z = ((o[0, 4] - o.mean()) / o.std(correction=0)).squeeze()
    number = z.item()
    for b in (number - 1, number + 1):
        assert optx.ZLoss(1e7, b)(o, target).item() == pytest.approx(max(0.0, b - number), abs=1e-6)
    (sharp,) = torch.autograd.grad(optx.ZLoss(1e-9, 2.0)(o, target), o)
    (half,) = torch.autograd.grad(-z / 2, o)
    torch.testing.assert_close(sharp, half, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form: Any) -> None:
    o = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    criterion, y = optx.ZLoss(form=form), torch.tensor([1, 4])
    assert torch.autograd.gradgradcheck(lambda o: criterion(o, y), o)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_sums_in_float32(form: Any) -> None:
    o = (30 + torch.randn(4, 3000, generator=torch.Generator().manual_seed(2))).bfloat16().requires_grad_()
    y, criterion = torch.arange(4), optx.ZLoss(form=form, reduction="none")
    wide = o.detach().double().requires_grad_()
    found, wanted = criterion(o, y), criterion(wide, y)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0.005, atol=0)
    got, right = (torch.autograd.grad(one.sum(), x)[0] for one, x in ((found, o), (wanted, wide)))
    torch.testing.assert_close(got.double(), right, rtol=0.01, atol=0.01 * float(right.abs().max()))


def test_a_row_that_is_flat_has_no_gradient_and_a_batch_of_them_is_told() -> None:
    o = torch.full((2, 5), 0.1, requires_grad=True)  # whose float32 mean is not 0.1
    criterion = optx.ZLoss(0.1, 10.0)
    with pytest.warns(UserWarning, match="in all 2 rows of the batch the logits are one number"):
        loss = criterion(o, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.e) / 0.1, rel=1e-6)
    assert o.grad is not None
    assert not o.grad.any()


def test_compiled_it_is_the_same() -> None:
    criterion = optx.ZLoss(0.5, 3.0)
    o = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([0, 5, 2])
    torch.testing.assert_close(criterion.of_rows(o, y).mean(), criterion(o, y))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"a": 0.0}, "a is 0.0; it must be a finite number above 0"),
        ({"b": math.nan}, "b is nan; it must be a finite number"),
        ({"form": "softmax"}, "form is 'softmax'; it must be one of 'z', 'mse', 'spherical', 'taylor'"),
        ({"form": "mse", "a": 1.0}, "a=1.0 is of the Z-loss alone"),
        ({"form": "taylor", "eps": 1.0}, "eps=1.0 is of the Z-loss and spherical softmax alone"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"ignore_index": 1.5}, "ignore_index is 1.5; it must be a whole number"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(optx.OptxError, match=f"ZLoss: {said}"):
        optx.ZLoss(**options)


@pytest.mark.parametrize(
    ("logits", "target", "error", "said"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), IndexError, r"target 3 \(sample 1 of 2\) is out of range"),
        (torch.zeros(2, 3), torch.tensor([0]), optx.ShapeError, "target .* has shape"),
        (
            torch.zeros(2, 5, 3),
            torch.zeros(2, 5).long(),
            optx.ShapeError,
            r"target .* must be \(2, 3\): classes are dimension 1.* pass logits\.movedim\(-1, 1\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), TypeError, "target .* it takes class numbers"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), TypeError, "logits have dtype"),
    ],
)
def test_inputs_that_do_not_fit(logits: Tensor, target: Tensor, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"ZLoss: {said}"):
        optx.ZLoss()(logits, target)


def test_it_says_how_it_was_made() -> None:
    assert repr(optx.ZLoss()) == "ZLoss()"
    made = optx.ZLoss(b=3.0, form="z", reduction="sum")
    assert repr(made) == "ZLoss(b=3.0, reduction='sum')"
    assert repr(SphericalLoss(**optx.ZLoss(form="mse").arguments())) == "SphericalLoss(form='mse')"


@pytest.mark.parametrize("form", ["z", "mse", "spherical", "taylor"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_is_ignored_has_no_gradient_even_if_it_is_nan(form: Any, create_graph: bool) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    y = torch.tensor([1, -100, 3, -100])

    def grad(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        [found] = torch.autograd.grad(optx.ZLoss(form=form)(x, y), x, create_graph=create_graph)
        return found.detach()

    plain = grad(x)
    broken = x.clone()
    broken[1], broken[3] = torch.nan, torch.inf
    assert plain[0].any()
    assert not plain[1::2].any()
    assert torch.equal(grad(broken), plain)


def cross_entropy2(logits: Tensor, labels: Tensor) -> Tensor:
    return optx.functional.cross_entropy2(logits, labels)


def stablemax(logits: Tensor, labels: Tensor) -> Tensor:
    return optx.StableMaxCrossEntropy(label_smoothing=0.1)(logits, labels)


def reweighted(logits: Tensor, labels: Tensor) -> Tensor:
    return optx.LossReweight(max_batch=4).from_logits(logits, labels, shift=False)


@pytest.mark.parametrize("loss", [cross_entropy2, stablemax, reweighted])
@pytest.mark.parametrize("create_graph", [False, True])
def test_nor_under_the_other_losses_that_ignore_a_label(loss: Any, create_graph: bool) -> None:
    x, y = torch.randn(4, 5), torch.tensor([1, -100, 3, -100])

    def grad(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        [found] = torch.autograd.grad(loss(x, y), x, create_graph=create_graph)
        return found.detach()

    broken = x.clone()
    broken[1], broken[3] = torch.nan, torch.inf
    plain = grad(x)
    assert plain[0].any()
    assert torch.equal(grad(broken), plain)
