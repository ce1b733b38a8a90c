"""The optimizers that `optx.wrap` is tested on: torch's, and those of four other libraries."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


class LooseAdam(torch.optim.RAdam):
    """Steps as its parent, whose rules do not serve it: the base runs as it is."""


@dataclass(frozen=True)
class Base:
    """One optimizer and what is special about it."""

    name: str
    make: Make
    closure: bool = False  # its step needs a closure
    modes: bool = False  # it has train() and eval()
    grows: bool = True  # its own add_param_group works after training started

    def __str__(self) -> str:
        return self.name


def _torch_bases() -> list[Base]:
    o = torch.optim
    bases = [
        Base("SGD", lambda p: o.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01)),
        Base("SGD-plain", lambda p: o.SGD(p, lr=0.05)),
        Base("Adam", lambda p: o.Adam(p, lr=0.01)),
        Base("AdamW", lambda p: o.AdamW(p, lr=0.01, weight_decay=0.1)),
        Base("AdamW-amsgrad", lambda p: o.AdamW(p, lr=0.01, amsgrad=True)),
        Base("AdamW-fused", lambda p: o.AdamW(p, lr=0.01, fused=True)),
        Base("RAdam", lambda p: o.RAdam(p, lr=0.01)),
        Base("NAdam", lambda p: o.NAdam(p, lr=0.01)),
        Base("Adagrad", lambda p: o.Adagrad(p, lr=0.05)),
        Base("Adadelta", lambda p: o.Adadelta(p, lr=0.5)),
        Base("Adamax", lambda p: o.Adamax(p, lr=0.01)),
        Base("ASGD", lambda p: o.ASGD(p, lr=0.05)),
        Base("RMSprop", lambda p: o.RMSprop(p, lr=0.01)),
        Base("Rprop", lambda p: o.Rprop(p, lr=0.01)),
        Base("Adafactor", lambda p: o.Adafactor(p, lr=0.01)),
        Base("Muon", lambda p: o.Muon([w for w in p if w.ndim == 2], lr=0.01)),
        Base("LBFGS", lambda p: o.LBFGS(p, lr=0.1, max_iter=3), closure=True, grows=False),
    ]
    return bases


def _torch_optimizer_bases() -> list[Base]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_optimizer as t
    names = (
        "AccSGD AdaBelief AdaBound AdaMod AggMo DiffGrad Lamb MADGRAD NovoGrad QHAdam QHM RAdam "
        "SGDP SGDW SWATS Yogi"
    )
    special: dict[str, Make] = {
        "NovoGrad": lambda p: t.NovoGrad(p, lr=0.01),
    }

    def make(name: str) -> Make:
        def build(p: Iterable[Any]) -> torch.optim.Optimizer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return special[name](p) if name in special else getattr(t, name)(p, lr=0.01)

        return build

    # Both set up per-parameter lists in their constructor only.
    fixed = ("AdaBound", "MADGRAD")
    return [Base(f"torch_optimizer.{name}", make(name), grows=name not in fixed) for name in names.split()]


def _other_bases() -> list[Base]:
    import pytorch_optimizer
    import schedulefree
    from transformers.optimization import Adafactor

    return [
        Base(
            "schedulefree.AdamW",
            lambda p: schedulefree.AdamWScheduleFree(list(p), lr=0.01, foreach=False),
            modes=True,
        ),
        Base("schedulefree.SGD", lambda p: schedulefree.SGDScheduleFree(list(p), lr=0.05), modes=True),
        Base("pytorch_optimizer.Lion", lambda p: pytorch_optimizer.Lion(list(p), lr=0.001)),
        Base("pytorch_optimizer.Adan", lambda p: pytorch_optimizer.Adan(list(p), lr=0.01)),
        Base("pytorch_optimizer.NovoGrad", lambda p: pytorch_optimizer.NovoGrad(list(p), lr=0.01)),
        Base("pytorch_optimizer.StableAdamW", lambda p: pytorch_optimizer.StableAdamW(list(p), lr=0.01)),
        Base(
            "transformers.Adafactor",
            lambda p: Adafactor(list(p), lr=0.01, relative_step=False, scale_parameter=False),
        ),
    ]


BASES = [*_torch_bases(), *_torch_optimizer_bases(), *_other_bases()]
BY_NAME = {b.name: b for b in BASES}


class Net(nn.Module):
    """A small real model: a matrix, biases, a norm, and a 0-dim parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale


def make_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """The same weights every time."""
    torch.manual_seed(seed)
    return Net(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The same data for the same step."""
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(16, 6, generator=g).to(dtype), torch.randint(3, (16,), generator=g)


def loss_of(net: nn.Module, step: int) -> Tensor:
    """Cross-entropy on a step's batch."""
    x, y = batch(step, next(net.parameters()).dtype)
    return nn.functional.cross_entropy(net(x).float(), y)


def set_train(opt: torch.optim.Optimizer) -> None:
    """schedulefree asks for it."""
    if hasattr(opt, "train"):
        opt.train()


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: Iterable[int], closure: bool = False) -> None:
    """An ordinary loop."""
    set_train(opt)
    for step in steps:
        if closure:

            def evaluate(step: int = step) -> Tensor:
                opt.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            opt.step(evaluate)
        else:
            opt.zero_grad()
            loss_of(net, step).backward()
            opt.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def through_a_file(state: Any) -> Any:
    """As ``torch.save`` writes it, read as data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a state dict by path."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in pairs for k, v in flat(value, f"{name}/{key}").items()}
    return {name: tree}
