"""Ctrl-C, a scheduler's warning or a timeout in the middle of a step: all groups have moved, or none."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from bases import LooseAdam
from torch import nn

import optx
from optx.step.interrupts import Held

GROUPS = 3
STRIDE = 7  # of a step's calls, every so many are tried


class Interrupted(BaseException):
    pass


def handler(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def at_call(number: int, act: Callable[[], Any]) -> bool:
    """Run something and raise a signal at its ``number``-th call of a function; False if there are fewer."""
    calls = 0
    overrides = torch._C._get_torch_function_state()

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call") and arg is not sys.setprofile:
            calls += 1
            if calls == number:
                signal.raise_signal(signal.SIGUSR1)

    sys.setprofile(count)
    try:
        act()
    except Interrupted:
        pass
    finally:
        sys.setprofile(None)
        # A signal may hit torch's own scopes as they end: what they had set aside stays so in this thread.
        torch.set_grad_enabled(True)
        torch._C._set_torch_function_state(overrides)
    return calls >= number


def make(base: str, fused: Any) -> tuple[list[nn.Parameter], optx.Wrapped]:
    params = [nn.Parameter(torch.full((3,), 2.0)) for _ in range(GROUPS)]
    groups = [{"params": [p]} for p in params]
    if base == "LooseAdam":
        return params, optx.wrap(LooseAdam(groups, lr=0.01), optx.PerpGrad())
    opt = torch.optim.AdamW(groups, lr=0.01, weight_decay=0)
    return params, optx.wrap(opt, optx.PerpGrad(), optx.AdamR(), fused=fused)


def seen(params: list[nn.Parameter], opt: optx.Wrapped) -> list[dict[str, Any]]:
    """Of every group, all that a step moves."""
    state = [{k: v for k, v in opt.state.get(p, {}).items() if not k.endswith("anchor")} for p in params]
    return [
        {"weight": p.tolist(), **{k: torch.as_tensor(v).tolist() for k, v in entry.items()}}
        for p, entry in zip(params, state, strict=True)
    ]


@pytest.mark.long
@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need it")
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in generators
@pytest.mark.parametrize(("base", "fused"), [("AdamW", "cpu"), ("AdamW", False), ("LooseAdam", False)])
def test_a_signal_anywhere_in_a_step_leaves_no_half_step(base: str, fused: Any) -> None:
    params, opt = make(base, fused)
    g = torch.tensor([1.0, -2.0, 0.5])

    def step() -> None:
        for p in params:
            p.grad = g.clone()
        opt.step()

    for _ in range(2):
        step()
    old = signal.signal(signal.SIGUSR1, handler)
    counts: list[float] = []
    try:
        number, interrupted = 1, True
        while interrupted:
            before = seen(params, opt)
            interrupted = at_call(number, opt.step)
            after = seen(params, opt)
            assert all(entry == after[0] for entry in after), f"half a step, interrupted at call {number}"
            moved = {key: after[0][key] != before[0][key] for key in after[0]}
            whole = {"weight": True, "step": True, "exp_avg": True, "exp_avg_sq": True}
            changed = {key: moved[key] for key in whole}
            assert changed in (whole, dict.fromkeys(whole, False)), f"at call {number}: {changed}"
            for p in params:
                assert p.grad is not None
                assert torch.equal(p.grad, g), f"at call {number}"
            counts.append(after[0]["step"])
            number += STRIDE
    finally:
        signal.signal(signal.SIGUSR1, old)
    # It was interrupted before and after what counts.
    assert len(counts) > 50
    assert len(set(counts)) > 10
    assert len(set(counts)) < len(counts)
    step()


def test_a_signal_interrupts_a_closure_at_once() -> None:
    """It may run for minutes."""
    p = nn.Parameter(torch.tensor([2.0, 1.0]))
    opt = optx.wrap(torch.optim.LBFGS([p], lr=0.1), optx.PerpGrad())
    lines: list[str] = []

    def closure() -> Any:
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        lines.append("before")
        signal.raise_signal(signal.SIGUSR1)
        lines.append("after")
        return loss

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Interrupted):
            opt.step(closure)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert lines == ["before"]
    assert p.tolist() == [2.0, 1.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_signals_wait_in_a_process_that_another_thread_forked() -> None:
    """There that thread is the main one."""
    ended: list[int] = []

    def fork() -> None:
        child = os.fork()
        if not child:
            arrived: list[int] = []
            signal.signal(signal.SIGUSR1, lambda number, _: arrived.append(number))
            with Held():
                signal.raise_signal(signal.SIGUSR1)
                waits = not arrived
            os._exit(0 if waits and arrived else 1)
        ended.append(os.waitpid(child, 0)[1])

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    assert ended == [0]
