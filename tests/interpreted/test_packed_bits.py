"""Packed bits in Triton's interpreter, beside the CPU kernels: whole steps of `optx.KeepMask`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optx


def trained(fused: str, dtype: torch.dtype, perp: bool) -> tuple[nn.Module, optx.Masks]:
    g = torch.Generator().manual_seed(0)
    model = nn.Module()
    # A block and a tail, a tail alone, rows of bytes, and a weight without a mask.
    for name, shape in {"long": (131, 16), "short": (3, 8), "odd": (5, 7), "free": (9,)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g).to(dtype)))
    named = list(model.named_parameters())
    masks = optx.Masks.from_bool({n: torch.rand(p.shape, generator=g) > 0.5 for n, p in named[:3]})
    masks.apply_(model)
    base = torch.optim.AdamW(named, lr=0.01, weight_decay=0.1)
    chain = [optx.PerpGrad()] if perp else []
    opt = optx.wrap(base, *chain, optx.KeepMask(masks), fused=fused, rounding="nearest")  # type: ignore[arg-type]
    for _ in range(2):
        for name, p in named:
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
            if name in masks:
                p.grad[~masks[name]] = float("nan")
        opt.step()
    assert opt.plan()[0].path == f"fused {fused}"
    return model, masks


@pytest.mark.long(keep=3)
@pytest.mark.parametrize(
    ("dtype", "perp"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_triton_is_the_cpu(dtype: torch.dtype, perp: bool) -> None:
    (ours, masks), (cpu, _) = trained("triton", dtype, perp), trained("cpu", dtype, perp)
    masks.verify(ours)
    for (name, a), b in zip(ours.named_parameters(), cpu.parameters(), strict=True):
        assert torch.isfinite(a).all(), name
        # Moments in bfloat16 are rounded by random bits, which are not the same ones.
        near = 0.02 if dtype == torch.bfloat16 else 1e-6 if perp else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=near)
