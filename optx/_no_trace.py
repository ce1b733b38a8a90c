"""What a diagnostic puts back: random numbers, modes, buffers, and a whole model."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def randomness_kept() -> Generator[None]:
    """Random numbers of torch, NumPy and Python go on afterwards as if none had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def modes_kept(model: nn.Module) -> Generator[None]:
    """Each module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """In evaluation mode for that time."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def buffers_kept(model: nn.Module) -> Generator[None]:
    """A pass in training mode moves running statistics; reading must not."""
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in kept:
                b.copy_(value)


@contextmanager
def model_kept(model: nn.Module) -> Generator[None]:
    """Weights, buffers, gradients, flags and modes are put back, also after an error."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    for p, _, _ in parameters:
        p.grad = None  # what is computed meanwhile is not added to it
    try:
        with modes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for t, value in zip(tensors, values, strict=True):
                t.copy_(value)
        for p, grad, wanted in parameters:
            p.grad = grad
            p.requires_grad_(wanted)
