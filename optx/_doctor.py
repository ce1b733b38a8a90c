"""``optx doctor``: what this machine has, and which paths steps take on it. Every line is measured."""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._cache import UnsafeCacheError, kernel_folder
from optx.kernels.available import why_unavailable
from optx.step.plan import Plan
from optx.step.transform import Fused
from optx.step.wrap import wrap
from optx.transforms.perpgrad import PerpGrad


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at.
        found: what was found.
        good: False for what is broken; a thing that is merely absent is good.
    """

    topic: str
    found: str
    good: bool = True


def examine() -> Iterator[Finding]:
    """Look at everything, one finding at a time (compiling a first kernel takes seconds)."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("torch", "numba", "triton", "transformers"):
        yield _guarded(name, _package, name)
    yield _guarded("devices", _devices)
    yield _guarded("CPU threads", _threads)
    yield _guarded("kernel cache", _kernel_cache)
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    cases = ((adamw, torch.float32), (adamw, torch.bfloat16), (sgd, torch.float32))
    for device in _usable_devices():
        for base, dtype in cases:
            topic = f"{base.__name__} {str(dtype).removeprefix('torch.')} {device}"
            yield _guarded(topic, _step, base, dtype, device)


def _guarded(topic: str, look: Callable[..., str], *args: object) -> Finding:
    """A finding even where looking fails: a doctor that crashes helps nobody."""
    try:
        return Finding(topic, look(*args))
    except Exception as error:
        return Finding(topic, f"{type(error).__name__}: {error}", good=False)


def _package(name: str) -> str:
    try:
        version = str(importlib.import_module(name).__version__)
    except ModuleNotFoundError as error:
        if error.name != name:  # it is there, and something that it needs is not
            raise
        return "not installed"
    reason = why_unavailable(name) if name in ("numba", "triton") else None
    return version if reason is None else f"{version}, not used: {reason}"


def _devices() -> str:
    found = [f"cpu ({os.cpu_count()} cores)"]
    for i in range(torch.cuda.device_count()):
        total = torch.cuda.mem_get_info(i)[1]
        found.append(f"cuda:{i} ({torch.cuda.get_device_name(i)}, {total / 2**30:.0f} GiB)")
    found += [name for name in ("mps", "xpu") if _available(name)]
    return ", ".join(found)


def _available(name: str) -> bool:
    return bool(getattr(torch, name, None) and getattr(torch, name).is_available())


def _usable_devices() -> list[str]:
    return ["cpu", *(name for name in ("cuda", "mps", "xpu") if _available(name))]


def _threads() -> str:
    if why_unavailable("numba") is not None:
        return f"{torch.get_num_threads()}, torch's own"
    from optx.kernels.cpu import pool_name

    return f"{torch.get_num_threads()}, in {pool_name()}"


def _kernel_cache() -> str:
    try:
        folder = kernel_folder()
        folder.probe()
    except UnsafeCacheError:
        raise
    except OSError as error:
        return f"none, so each process compiles its own kernels: {error}"
    return str(folder.path)


def _step(base: Callable[..., Optimizer], dtype: torch.dtype, device: str) -> str:
    """Wrap a tiny optimizer, step it, and compare with the same step in float32 on the reference path."""
    plan, stepped, seconds = _stepped(base, dtype, dtype, device, "auto")
    expected = _stepped(base, dtype, torch.float32, device, False)[1]
    off = float((stepped - expected).abs().max())
    allowed = 1e-6 if dtype == torch.float32 else 2.0**-6  # two units in the last place of a bfloat16 of 1
    if not off <= allowed:
        raise ArithmeticError(f"{plan[0].path} differs from the reference by {off:.1e}")
    why = f": {plan[0].reason}" if plan[0].reason else ""
    return f"{plan[0].path}{why} (first step {seconds:.1f} s)"


def _stepped(
    base: Callable[..., Optimizer], values: torch.dtype, dtype: torch.dtype, device: str, fused: Fused
) -> tuple[Plan, Tensor, float]:
    """The plan, the weights after one step, and how long it took; inputs are representable in `values`."""
    weight = torch.nn.Parameter(torch.linspace(-0.9, 0.9, 1025, device=device).to(values).to(dtype))
    weight.grad = torch.linspace(1, -2, 1025, device=device).to(values).to(dtype)
    opt = wrap(base([weight], lr=0.1), PerpGrad(), fused=fused)
    started = time.perf_counter()
    opt.step()
    stepped = weight.detach().float().cpu()
    return opt.plan(), stepped, time.perf_counter() - started
