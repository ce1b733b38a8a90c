"""The adapters on hidden vectors as the tests have them, and their formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from adapter_models import outputs
from torch import Tensor

import optx

BERT_NORMS = r".*\.\d+\.output\.LayerNorm"


def run(model: Any) -> Tensor:
    if "ViT" in type(model).__name__:
        return outputs(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return outputs(model)


def adapter(part: Any, x: Tensor) -> Tensor:
    """f(x W_down + b_d) W_up + b_u, of a relu adapter without norm, and without its scale."""
    return torch.relu(x @ part.W_down.t() + part.b_down) @ part.W_up.t() + part.b_up


METHODS: dict[str, tuple[Callable[[], optx.Injection], bool]] = {
    "sequential": (lambda: optx.SequentialAdapter(rank=3), True),
    "sequential ffn": (lambda: optx.SequentialAdapter(rank=3, position="ffn", norm="in"), True),
    "sequential norm": (lambda: optx.SequentialAdapter(rank=3, norm="out", form="gelu"), True),
    "parallel": (lambda: optx.ParallelAdapter(rank=3), True),
    "parallel attention": (lambda: optx.ParallelAdapter(rank=3, position="attention"), True),
    "scaled": (lambda: optx.ScaledParallelAdapter(rank=3), True),
    "scaled both": (lambda: optx.ScaledParallelAdapter(rank=3, scale="learned", position="both"), True),
    "multihead": (lambda: optx.MultiHeadParallelAdapter(rank=3), True),
    "bert start": (lambda: optx.ParallelAdapter(rank=3, init="bert"), False),
    "prefix": (lambda: optx.PrefixTuning(length=3), False),
}
