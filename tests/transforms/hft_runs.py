"""How the tests of HFT train, and what they look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bases import set_train
from hft_models import weights
from torch import Tensor, nn

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(2))
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model: nn.Module, opt: Any, steps: int, closure: bool = False) -> None:
    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(X.to(next(model.parameters()).dtype)), Y)
        loss.backward()
        return loss

    set_train(opt)
    for _ in range(steps):
        if closure:
            opt.step(evaluate)
        else:
            evaluate()
            opt.step()
    opt.zero_grad()


def push(model: nn.Module, opt: Any, g: float = 1.0) -> None:
    """A step with gradients set by hand, for every parameter."""
    for p in model.parameters():
        p.grad = torch.full_like(p, g)
    opt.step()


def moved(model: nn.Module, opt: Any) -> set[str]:
    before = weights(model)
    push(model, opt)
    return {name for name, w in weights(model).items() if not torch.equal(w, before[name])}


def state_of(opt: Any, p: Tensor) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in opt.state.get(p, {}).items()}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


def with_state(opt: Any) -> int:
    """How many tensors the base keeps state for (with other transforms' slots aside)."""
    return sum(any(not str(key).startswith("optx.") for key in state) for state in opt.state.values())
