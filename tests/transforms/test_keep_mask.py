"""`optx.KeepMask`: what it finds, refuses, keeps and saves, and packed slots on both paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import optx
from optx._mask_bits import pack

KEY = "optx.keep_mask.kept"


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 5), nn.Linear(5, 3)).to(dtype)


def masks_of(model: nn.Module, share: float = 0.5) -> optx.Masks:
    g = torch.Generator().manual_seed(1)
    masks = optx.Masks.from_bool(
        {n: torch.rand(p.shape, generator=g) > share for n, p in model.named_parameters() if p.ndim == 2}
    )
    masks.apply_(model)
    return masks


def give(model: nn.Module, step: int, poison: optx.Masks | None = None) -> None:
    g = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        if poison is not None and name in poison:
            p.grad[~poison[name]] = float("nan")


def run(opt: Any, model: nn.Module, steps: range, poison: optx.Masks | None = None) -> None:
    for step in steps:
        give(model, step, poison)
        opt.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1, **options)


def test_forms_of_the_slot() -> None:
    """Bits where rows are multiples of 8, bytes elsewhere, one number where nothing is pruned."""
    model = net()
    masks = masks_of(model)
    opt = optx.wrap(adamw(model), optx.KeepMask(masks))
    run(opt, model, range(1))
    kept = {n: opt.state[p][KEY] for n, p in model.named_parameters()}
    assert torch.equal(kept["0.weight"], pack(masks["0.weight"]))
    assert kept["0.weight"].shape == (8, 2)
    assert torch.equal(kept["1.weight"], pack(masks["1.weight"]))
    assert torch.equal(kept["2.weight"], masks["2.weight"])
    assert kept["2.weight"].dtype == torch.bool
    assert kept["0.bias"].shape == ()
    assert kept["0.bias"] == 1
    assert opt.keep_mask.current() == masks
    assert opt.plan()[0].path == "fused cpu"
