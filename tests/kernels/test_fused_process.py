"""Fused CPU steps among processes and threads: forks, two threads that step at once."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import optx
from optx.kernels.step import emit_cpu


def problem(seed: int, n: int = 70_000) -> tuple[nn.Parameter, optx.Wrapped, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(n, generator=g))
    grads = [torch.randn(n, generator=g) for _ in range(2)]
    opt = optx.wrap(torch.optim.AdamW([p], lr=0.01), optx.PerpGrad(), optx.AdamR(0.05), fused=True)
    return p, opt, grads


def train(seed: int, steps: int = 40) -> torch.Tensor:
    p, opt, grads = problem(seed)
    for number in range(steps):
        p.grad = grads[number % 2]
        opt.step()
    return p.detach()


def in_threads(work: list[Any]) -> list[Any]:
    """Run all at once; what each returned. An exception in one is raised here."""
    results: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = work[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_two_threads_step_two_optimizers_at_once() -> None:
    alone = [train(seed) for seed in (1, 2)]
    together = in_threads([lambda: train(1), lambda: train(2)])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_threads_that_compile_the_same_kernel_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None may find a kernel module that another is still executing."""
    name = f"only_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(
        f"import optx\n@optx.rule(writes='g')\ndef {name}(g, by):\n    return g * by\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        rule = getattr(__import__(name), name)
    finally:
        sys.path.remove(str(tmp_path))

    inside = [0, 0]  # threads loading a module now, and the most there were
    load = emit_cpu.load_module

    def slow(*args: Any) -> Any:
        inside[0] += 1
        inside[1] = max(inside)
        time.sleep(0.1)
        try:
            return load(*args)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(emit_cpu, "load_module", slow)

    def work() -> list[float]:
        class Mine(optx.Transform):
            name = "mine"
            rules: ClassVar = {"gradient": rule}
            options: ClassVar = {"by": 3.0}

        p = nn.Parameter(torch.zeros(2))
        opt = optx.wrap(torch.optim.SGD([p], lr=1.0), Mine(), fused=True)
        p.grad = torch.ones(2)
        opt.step()
        return p.tolist()

    assert in_threads([work] * 3) == [[-3.0, -3.0]] * 3
    assert inside == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 on fork with threads
def test_a_forked_child_can_step() -> None:
    """A DataLoader worker inherits a pool of threads that does not exist there."""
    wanted = train(3)  # wakes the pool in this process
    p, opt, grads = problem(3)
    p.grad = grads[0]
    opt.step()  # makes state, with torch's own parallel fills: those hang in a forked process
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number in range(1, 40):
                p.grad = grads[number % 2]
                opt.step()
            from optx.kernels.cpu import pool_name

            # Not a sum by torch, whose own pool is not there either.
            os.write(writer, json.dumps([float(p.detach().numpy().sum()), pool_name()]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    timer = threading.Timer(60, os.kill, (child, 9))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    assert status == 0
    total, pool = json.loads(os.read(reader, 10_000))
    os.close(reader)
    assert total == float(wanted.numpy().sum())
    assert pool == "the calling thread (forked process)"
    assert torch.equal(train(3), wanted)  # and the parent's pool is whole
