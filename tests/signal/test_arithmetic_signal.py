"""What losses compute, number by number: faults of one line that other tests let pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import optx


class Traced(Tensor):
    """A tensor subclass: its losses are computed by torch operations, a few rows at a time."""


def softmax_form(z: Tensor) -> Tensor:
    """Proposition 1: what softmax cross-entropy takes in the place of z."""
    return z.sign() * z.abs().log1p()


@pytest.mark.parametrize("kind", ["labels", "smoothed", "weighted", "probabilities"])
@pytest.mark.parametrize("subclass", [False, True])
def test_stablemax_of_more_rows_than_are_taken_at_once(kind: str, subclass: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(700, 800, generator=generator)
    labels = torch.randint(800, (700,), generator=generator)
    labels[::7] = -100
    options = {"label_smoothing": 0.1} if kind == "smoothed" else {}
    if kind == "weighted":
        options["weight"] = torch.rand(800, generator=generator)  # type: ignore[assignment]
    target = torch.softmax(z.flip(0), 1) if kind == "probabilities" else labels
    got = z.clone().as_subclass(Traced) if subclass else z.clone()
    got.requires_grad_()
    loss = optx.stablemax_cross_entropy(got, target, **options)  # type: ignore[arg-type]
    loss.backward()
    exact = z.double().requires_grad_()
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    target = target.double() if target.is_floating_point() else target
    wanted = F.cross_entropy(softmax_form(exact), target, **wide)  # type: ignore[arg-type]
    wanted.backward()
    assert exact.grad is not None
    assert got.grad is not None
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    off = got.grad.as_subclass(Tensor).double() - exact.grad
    assert float(off.abs().max()) <= 1e-6 * float(exact.grad.abs().max())


def test_the_first_label_out_of_range_is_named() -> None:
    with pytest.raises(IndexError, match=r"target 5 \(sample 1 of 3\)"):
        optx.stablemax_cross_entropy(torch.zeros(3, 3), torch.tensor([0, 5, 7]))
