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

import optx


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
        yield _guarded(name, lambda name=name: _package(name))
    yield _guarded("devices", _devices)
    yield _guarded("CPU threads", _threads)
    yield _guarded("kernel cache", _kernel_cache)
    for device in _usable_devices():
        for dtype in (torch.float32, torch.bfloat16):
            for base in (torch.optim.AdamW, torch.optim.SGD, torch.optim.RAdam):
                topic = f"{base.__name__} {str(dtype).removeprefix('torch.')} {device}"
                yield _guarded(topic, lambda *how: _step(*how), base, dtype, device)


def _guarded(topic: str, look: Callable[..., str | Finding], *args: object) -> Finding:
    """A finding even where looking fails: a doctor that crashes helps nobody."""
    try:
        found = look(*args)
    except Exception as error:
        return Finding(topic, f"{type(error).__name__}: {error}", good=False)
    return found if isinstance(found, Finding) else Finding(topic, found)


def _package(name: str) -> str | Finding:
    try:
        return str(importlib.import_module(name).__version__)
    except ModuleNotFoundError:
        return "not installed"


def _devices() -> str:
    found = [f"cpu ({os.cpu_count()} cores)"]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} ({device.name}, {device.total_memory / 2**30:.0f} GiB)")
    found += [name for name in ("mps", "xpu") if _available(name)]
    return ", ".join(found)


def _available(name: str) -> bool:
    return bool(getattr(torch, name, None) and getattr(torch, name).is_available())


def _usable_devices() -> list[str]:
    return ["cpu", *(name for name in ("cuda", "mps", "xpu") if _available(name))]


def _threads() -> str:
    from optx.kernels.cpu import pool_name

    return f"{torch.get_num_threads()}, in {pool_name()}"


def _kernel_cache() -> str:
    from optx.kernels.emit import cache_folder

    folder = cache_folder()
    kept = folder.name == "kernels"
    return (
        f"{folder}" if kept else f"{folder} (for this process only: the user's cache folder is not writable)"
    )


def _step(base: type[torch.optim.Optimizer], dtype: torch.dtype, device: str) -> Finding:
    """Wrap a tiny optimizer, step it, and compare with the same step on the reference path."""
    plan, stepped, seconds = _stepped(base, dtype, device, "auto")
    reference = _stepped(base, dtype, device, False)[1]
    group = plan[0]
    # One step moves by about lr; bfloat16 rounds stochastically, by up to a unit in the last place.
    allowed = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    off = float(((stepped - reference).abs() / reference.abs().clamp(min=1e-2)).max())
    if not off <= allowed:
        return Finding(
            f"{group.chain[-1]}", f"{group.path}, but off from the reference by {off:.1e}", good=False
        )
    why = f" ({group.reason})" if group.reason else ""
    topic = f"{base.__name__} {str(dtype).removeprefix('torch.')} {device}"
    return Finding(topic, f"{group.path}{why}, first step {seconds:.1f} s")


def _stepped(
    base: type[torch.optim.Optimizer], dtype: torch.dtype, device: str, fused: optx.Fused
) -> tuple[optx.Plan, Tensor, float]:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 1025, device=device).to(dtype))
    weight.grad = torch.linspace(1, -2, 1025, device=device).to(dtype)
    opt = optx.wrap(base([weight], lr=0.1), optx.PerpGrad(), fused=fused)
    started = time.perf_counter()
    opt.step()
    stepped = weight.detach().float().cpu()
    return opt.plan(), stepped, time.perf_counter() - started
