"""The half that a round freezes, as its optimizer sees it: no gradient, and state only where that is kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import TransformError, warn
from optx.step.base_step import has_modes
from optx.step.state import is_ours
from optx.step.transform import Group


class FrozenHalf:
    """An optimizer's frozen parameters in a round, looked after from step to step."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._told = False

    def take(self, served: Iterable[Tensor]) -> None:
        """Those of these that are frozen now."""
        self.tensors = [p for p in served if not p.requires_grad]

    def drop_gradients(self) -> None:
        """Gradients that were set by hand, or came from a graph made earlier."""
        for p in self.tensors:
            if p.grad is not None:
                p.grad = None

    def watch(self) -> None:
        """Remember what is in them, for `check_unwritten`."""
        self._versions = [p._version for p in self.tensors]

    def check_unwritten(self, base: torch.optim.Optimizer) -> None:
        """Warn, once, if anything wrote to one of them since `watch`."""
        if self._told or self._versions == [p._version for p in self.tensors]:
            return
        self._told = True
        warn(
            "HFT: this step wrote to frozen weights, which have no gradient. If that was "
            f"{type(base).__name__}, they may move by the state that reset_state=False keeps: leave "
            "reset_state=True."
        )

    def with_state(self, base: torch.optim.Optimizer) -> int:
        """How many of them the base has state of."""
        return sum(bool(base_state(base, p)) for p in self.tensors)


class FirstState:
    """Makes what a base that makes state in its constructor (Adagrad) looks for in a step."""

    def __init__(self) -> None:
        self._eager: bool | None = None  # whether the base makes state in its constructor

    def make(self, base: torch.optim.Optimizer, groups: Iterable[Group]) -> None:
        """For the trainable parameters of these groups that have none."""
        for group in groups:
            lacking = [p for p in group["params"] if p.requires_grad and not base_state(base, p)]
            if lacking and self._is_made_first(base):
                for p, state in _anew(base, group, lacking).state.items():
                    base.state[p].update(state)

    def _is_made_first(self, base: torch.optim.Optimizer) -> bool:
        if self._eager is None:
            dummy = nn.Parameter(torch.zeros(1))
            try:
                self._eager = bool(_anew(base, base.param_groups[0], [dummy]).state.get(dummy))
            except Exception:  # no class that is made from groups and its defaults, whatever it misses
                self._eager = False
        return self._eager


def _anew(base: torch.optim.Optimizer, group: Group, params: list[Tensor]) -> torch.optim.Optimizer:
    """An optimizer as the base was when it was made, with the settings of a group."""
    kind: Any = type(base)
    known = inspect.signature(kind).parameters
    return kind(params, **{key: value for key, value in group.items() if key in known and key != "params"})


def check_state_is_here(base: torch.optim.Optimizer) -> None:
    """Refuse a base whose state is another optimizer's, where a new round would not find it."""
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(base).__mro__):
        raise TransformError(
            "HFT: ZeroRedundancyOptimizer keeps its moments in an optimizer of its own, where a new round "
            "can't drop them. Use fully_shard (FSDP2), which shards them too, or the optimizer itself under "
            "DDP."
        )


def check_state_may_stay(base: torch.optim.Optimizer) -> None:
    """Refuse to keep state by which a base moves weights that have no gradient."""
    modes = has_modes(base)
    if modes or isinstance(base, torch.optim.LBFGS):
        why = "moves weights by their state in train() and eval()" if modes else "has one history for all"
        raise TransformError(
            f"HFT: reset_state=False keeps the state of frozen weights, and {type(base).__name__} {why}, "
            "so that they would move. Leave reset_state=True."
        )


def only_rehearsed(base: torch.optim.Optimizer, p: Tensor) -> bool:
    """Whether state is what torch.distributed.checkpoint's step of zeros made, and no checkpoint filled."""
    state = base_state(base, p)
    tensors = [t for key, t in state.items() if isinstance(t, Tensor) and key != "step"]
    of_weight = [t for t in tensors if t.ndim or not p.ndim]
    return float(state.get("step", 0.0)) <= 1.0 and not any(bool(t.any()) for t in of_weight)


def base_state(base: torch.optim.Optimizer, p: Tensor) -> Group:
    """What the base itself keeps of a parameter."""
    state = base.state
    return {key: value for key, value in state[p].items() if not is_ours(key)} if p in state else {}
