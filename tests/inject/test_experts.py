"""LoRA on experts that are one 3-D parameter: W + s B A for each, whichever way the module computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import shake
from expert_models import BOTH
from torch import Tensor
from torch.nn import functional as F

import optx
from optx.inject._low_rank_sum import LowRankSum

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def lora(model: Any, targets: Any = BOTH, **options: Any) -> optx.Handle:
    handle = optx.attach(model, optx.LoRA(**{"rank": 3, **options}), targets=targets)
    shake(handle.parameters(), by=0.3)
    return handle


def grads(loss: Tensor, handle: optx.Handle) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, handle.parameters())


# ---- the sum that is not made -----------------------------------------------------------------------


def a_sum(dtype: torch.dtype = torch.float64) -> tuple[LowRankSum, Tensor]:
    torch.manual_seed(0)
    W, L, R = (torch.randn(4, *shape, dtype=dtype) for shape in ((8, 16), (8, 3), (3, 16)))
    return LowRankSum(W, L, R), W + L @ R


def same(a: Any, b: Tensor) -> None:
    torch.testing.assert_close(a.made() if isinstance(a, LowRankSum) else a, b)


USES = {
    "one expert": lambda w: w[2],
    "one expert by a tensor": lambda w: w[torch.tensor(2)],
    "experts of tokens": lambda w: w[torch.tensor([0, 3, 3])],
    "a table of experts": lambda w: w[torch.tensor([[0, 3], [1, 1]])],
    "a mask": lambda w: w[torch.tensor([True, False, True, False])],
    "a slice": lambda w: w[1:3],
    "rows of one": lambda w: w[2][1:4],
    "an entry": lambda w: w[2, 1],
    "linear": lambda w: F.linear(torch.ones(5, 16).to(w.dtype), w[1]),
    "linear with a bias": lambda w: F.linear(
        torch.ones(5, 16).to(w.dtype), w[1], torch.arange(8).to(w.dtype)
    ),
    "times one": lambda w: torch.ones(5, 8).to(w.dtype) @ w[1],
    "one times": lambda w: w[1] @ torch.ones(16, 5).to(w.dtype),
    "transposed": lambda w: torch.ones(5, 16).to(w.dtype) @ w[1].T,
    "bmm": lambda w: torch.bmm(torch.ones(4, 5, 8).to(w.dtype), w),
    "bmm from the left": lambda w: torch.bmm(w, torch.ones(4, 16, 1).to(w.dtype)).squeeze(-1),
    "matmul of a transposed stack": lambda w: torch.matmul(torch.ones(4, 5, 16).to(w.dtype), w.mT),
    "another transpose": lambda w: w.transpose(0, 1),
    "an einsum": lambda w: torch.einsum("eoi,ei->eo", w, torch.ones(4, 16).to(w.dtype)),
    "a method": lambda w: w.chunk(2, dim=1)[1],
    "an operator": lambda w: torch.add(w, 1),
    "a sum from the left": lambda w: torch.ones(4, 8, 16).to(w.dtype) + torch.mul(w, 2),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_is_done_with_it_is_done_with_the_sum(use: str) -> None:
    unmade, made = a_sum()
    same(USES[use](unmade), USES[use](made))


def test_a_product_of_groups_takes_any_rank() -> None:
    """3 numbers of 4 bytes are not the 16 bytes that torch's kernel wants a row to be."""
    unmade, made = a_sum(torch.float32)
    x, ends = torch.randn(6, 8), torch.tensor([1, 1, 4, 6], dtype=torch.int32)
    same(F.grouped_mm(x, unmade, offs=ends), F.grouped_mm(x, made, offs=ends))


def test_what_knows_no_such_sum_fails_on_it() -> None:
    unmade, _ = a_sum()
    with pytest.raises(TypeError, match="ndarray"):
        torch.from_numpy(unmade)
