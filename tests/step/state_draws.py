"""What the state machine draws from, and where it writes what it does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor

import optx

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(3, 4), (5,), (), (0,), (2, 3, 2, 2), (33, 3)]

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw amsgrad": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adam": (torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.95)}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}


def _perp(_: Any) -> list[optx.Transform]:
    return [optx.PerpGrad()]


def _adamr(anchors: Any) -> list[optx.Transform]:
    return [optx.AdamR(anchor=anchors)]


def _both(anchors: Any) -> list[optx.Transform]:
    return [optx.PerpGrad(), optx.AdamR(anchor=anchors)]


CHAINS: dict[str, Callable[[Any], list[optx.Transform]]] = {
    "none": lambda _: [],
    "perp": _perp,
    "adamr": _adamr,
    "both": _both,
}


class Variety:
    """What is drawn from. Every new kernel takes seconds to compile, so that the tests' run has few."""

    def __init__(self) -> None:
        self.choose(full=False)

    def choose(self, full: bool) -> None:
        self.bases = list(BASES) if full else ["adamw", "sgd"]
        self.chains = list(CHAINS) if full else ["none", "both"]
        self.dtypes = [F32, F32, F32, BF16, F64, F16] if full else [F32]
        self.casts = [F32, BF16, F64, F16] if full else [F32, BF16]
        self.moments = [F32, BF16, F64, F16, torch.int64] if full else [F32, torch.int64]
        self.gradients = [F32, BF16, F64, F16] if full else [F32]
        self.options = OPTIONS if full else [o for o in OPTIONS if o[0] not in _STRUCTURAL]


_STRUCTURAL = ("maximize", "amsgrad", "nesterov", "momentum", "weight_decay", "dampening")
OPTIONS: list[tuple[str, Any]] = [
    ("lr", 0.03),
    ("lr", np.float64(0.02)),
    ("lr", np.array(0.01)),
    ("lr", torch.tensor(0.02)),
    ("lr", torch.tensor(0.02, dtype=F64)),
    ("lr", 0),
    ("lr", "0.1"),
    ("lr", None),
    ("lr", torch.ones(2)),
    ("weight_decay", 0.0),
    ("weight_decay", 0.05),
    ("weight_decay", np.float32(0.05)),
    ("maximize", True),
    ("maximize", False),
    ("amsgrad", True),
    ("amsgrad", False),
    ("nesterov", True),
    ("nesterov", False),
    ("momentum", 0),
    ("momentum", 0.8),
    ("dampening", 0.1),
    ("betas", (0.7, 0.9)),
    ("betas", (np.float64(0.9), 0.99)),
    ("eps", 1e-6),
    ("perp_grad", False),
    ("perp_grad", True),
    ("adamr", False),
    ("adamr", True),
    ("adamr_weight", 0.1),
    ("adamr_weight", -1.0),
    ("perp_grad_rescale", 0.5),
]

GRADIENTS = [
    "plain",
    "plain",
    "plain",
    "none",
    "transposed",
    "gaps",
    "expanded",
    "neg",
    "zero",
    "dtype",
    "nan",
]
DATA = [
    "same", "dtype", "shape", "gaps", "transposed", "reshaped", "freed", "shrunk", "odd address",
    "expanded", "two",
]  # fmt: skip
ENTRIES = [
    "same", "dtype", "shape", "gaps", "transposed", "expanded", "alias", "meta", "fake", "freed", "number",
    "none", "missing", "numpy", "two",
]  # fmt: skip


class Log:
    """Writes each rule before it acts, past every buffer, and counts."""

    def __init__(self) -> None:
        self._file: int | None = None
        self.counts: Counter[str] = Counter()
        self.examples = 0

    def open(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write(self, line: str) -> None:
        if self._file is not None:
            os.write(self._file, f"{line}\n".encode())

    def count(self, *what: str) -> None:
        self.counts.update(what)


LOG = Log()
VARIETY = Variety()


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = F32) -> Tensor:
    """The same numbers for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=g, dtype=F64).to(dtype)


def laid_out(t: Tensor, kind: str) -> Tensor:
    """The same elements, lying otherwise."""
    if kind == "transposed" and t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "transposed" and t.ndim > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "gaps" and t.ndim:
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if kind == "expanded" and t.ndim and t.shape[0]:
        return t[:1].expand(t.shape)
    if kind == "odd address" and t.numel():
        whole = torch.empty(t.numel() + 1, dtype=t.dtype)
        whole[1:] = t.flatten()
        return whole[1:].view(t.shape)
    return t


def freed(t: Tensor, size: int) -> Tensor:
    """A tensor whose storage has that many bytes now."""
    if t.untyped_storage().resizable():
        t.untyped_storage().resize_(size)
    return t


# A step after an edit: seed and kinds of its gradients, their other dtype, and whether a closure makes them.
STEP = st.tuples(
    st.integers(0, 999),
    st.lists(st.sampled_from(GRADIENTS), min_size=1, max_size=4),
    st.integers(0, 3),
    st.booleans(),
)


def edit(**strategies: Any) -> Any:
    """A rule that edits, and mostly steps then: of so many rules hypothesis would seldom choose the step."""

    def decorate(function: Callable[..., None]) -> Any:
        def act(self: Any, then: Any, **arguments: Any) -> None:
            function(self, **arguments)
            if then is not None:
                self.take_step(*then)

        act.__name__, act.__doc__ = function.__name__, function.__doc__
        return rule(then=st.one_of(st.none(), STEP, STEP), **strategies)(act)

    return decorate


def edit_at(**more: Any) -> Any:
    """With the numbers that most take: contents, and which parameter."""
    return edit(seed=st.integers(0, 999), at=st.integers(0, 7), **more)
