"""What an engine trains: a method with a small real model, its data and its loss, in one module.

A `Task`'s forward takes a batch and gives ``{"loss": ..., "logits": ...}``, as models of transformers do, so
that a Trainer, Lightning or a plain loop train the very same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import injections
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx

STEPS, BATCH = 5, 8
Kind = Literal["transform", "injection", "loss"]
Batch = dict[str, Tensor]

# Where the true gradient is 0 (the bias of attention's keys), Adam makes a whole step of rounding's noise.
ADAMW: dict[str, float] = {"lr": 5e-3, "eps": 1e-3, "weight_decay": 0.1}


class Small(nn.Module):
    """Blocks of matrices, norms and biases whose rows neither two nor four processes share evenly."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@dataclass(frozen=True)
class Row:
    """One public method, and how it is used.

    Attributes:
        name: the class in `optx`.
        net: the model.
        transform: of the task and what the engine calls.
        attach: adds the injection.
        signal: makes the loss.
        task: the class of the module that engines train.
        adamw: other settings than `ADAMW`.
        apart: the model's other parameters are trained too.
        unused: some trainable parameters get no gradient in a step, which DDP must be told of.
    """

    name: str
    kind: Kind
    net: Callable[[], nn.Module] = Small
    transform: Callable[[Task, nn.Module], optx.Transform] | None = None
    attach: Callable[[nn.Module], Any] | None = None
    signal: Callable[[Task], Any] | None = None
    task: Callable[[Row], Task] = field(default_factory=lambda: Task)
    adamw: Mapping[str, float] = field(default_factory=dict[str, float])
    apart: bool = False
    unused: bool = False

    def __str__(self) -> str:
        return self.name


class Task(nn.Module):
    """A row, ready to be trained."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row
        self.net = row.net()
        self.handle: Any = None
        if row.attach is not None:
            self.handle = row.attach(self.net)
            if not row.apart:
                optx.trainable_only(self.net, self.handle)
        self.net.train()
        injections.no_dropout(self.net)
        self.signal: Any = None if row.signal is None else row.signal(self)

    # ---- what a loop calls ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Tensor]:
        """The batch's loss and logits."""
        made = self.net(x)
        logits = made if isinstance(made, Tensor) else made.logits
        return {"loss": self.loss(logits, x, y, index), "logits": logits}

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """The mean over the batch."""
        if logits.ndim == 3:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        return F.cross_entropy(logits, y)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """A process's share of a step's samples, as many as every other's."""
        g = torch.Generator().manual_seed(step)
        first = self.first()
        x = (
            torch.randint(3, 64, (BATCH, 7), generator=g)
            if first == "tokens"
            else torch.randn(BATCH, *first, generator=g)
        )
        y = torch.randint(2, (BATCH,), generator=g)
        each = BATCH // world
        mine = slice(rank * each, (rank + 1) * each)
        return {"x": x[mine], "y": y[mine], "index": torch.arange(BATCH)[mine]}

    def first(self) -> Any:
        """What one sample is: tokens, or the shape of a tensor."""
        if hasattr(self.net, "config"):
            return "tokens"
        return (3, 8, 8) if any(isinstance(m, nn.Conv2d) for m in self.net.modules()) else (6,)

    def optimizer(
        self, call: nn.Module | None = None, base: torch.optim.Optimizer | None = None
    ) -> torch.optim.Optimizer:
        """AdamW over what is trained, with the row's transform; ``call`` is what an engine made of this."""
        base = torch.optim.AdamW(self.trained(), **ADAMW | self.row.adamw) if base is None else base
        if self.row.transform is None:
            return base
        return optx.wrap(base, self.row.transform(self, self if call is None else call))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names in `net`, and parameters."""
        return [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]

    def begin(self, step: int) -> None:
        """Before a step; each is an epoch."""
        if hasattr(self.signal, "set_epoch"):
            self.signal.set_epoch(step)

    def backward(
        self,
        call: nn.Module,
        batch: Batch,
        opt: Any,
        differentiate: Callable[[Tensor], Any] = Tensor.backward,
    ) -> None:
        """Gradients of a batch, by what the engine made of this; ``differentiate`` is the engine's way."""
        differentiate(call(**batch)["loss"])

    def end(self, step: int, rank: int, world: int) -> None:
        """After a step."""

    # ---- what a checkpoint has besides the model and the optimizer -----------------------------------------

    def extra(self) -> Any:
        """The loss's or the handle's own state."""
        return self.signal.state_dict() if hasattr(self.signal, "load_state_dict") else None

    def load_extra(self, state: Any) -> None:
        """Go on from `extra`."""
        if state is not None:
            self.signal.load_state_dict(state)


def train(
    task: Task, call: nn.Module, opt: Any, steps: range = range(STEPS), rank: int = 0, world: int = 1
) -> None:
    """A plain loop."""
    for step in steps:
        task.begin(step)
        opt.zero_grad()
        task.backward(call, task.batch(step, rank, world), opt)
        opt.step()
        task.end(step, rank, world)
