"""Many small trainings side by side, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import torch

MOST = 16
"""Processes; each has torch in memory."""

Work = Callable[..., Any]
Prepare = Callable[..., Sequence[Any]]


class Processes:
    """Where trainings run; use as a context manager.

    Args:
        count: of processes; with 1, all runs in this one.
        prepare: makes what each training is given after its own arguments, once in each process; at the
            top of a module.
        given: its arguments.
    """

    def __init__(self, count: int, prepare: Prepare, *given: Any) -> None:
        self.count, self._prepare, self._given = count, prepare, given
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        if self.count == 1:
            _prepare(self._prepare, self._given)
        else:
            # Not forked: torch's threads would not be there in the child, and it would wait for them.
            spawn = multiprocessing.get_context("spawn")
            start = (self._prepare, self._given)
            self._pool = ProcessPoolExecutor(self.count, spawn, _start, start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        _prepared.clear()

    def each(self, work: Work, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """The place and the result of every job, in the order in which they end.

        Args:
            work: called with a job's arguments and what was prepared; at the top of a module.
            jobs: their arguments.
        """
        if self._pool is None:
            yield from ((place, _call(work, job)) for place, job in enumerate(jobs))
            return
        futures: dict[Future[Any], int] = {
            self._pool.submit(_call, work, job): place for place, job in enumerate(jobs)
        }
        yield from ((futures[done], done.result()) for done in as_completed(futures))


_prepared: list[Any] = []


def _prepare(prepare: Prepare, given: Sequence[Any]) -> None:
    _prepared[:] = prepare(*given)


def _call(work: Work, job: tuple[Any, ...]) -> Any:
    return work(*job, *_prepared)


def _start(prepare: Prepare, given: Sequence[Any]) -> None:
    """In a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _prepare(prepare, given)


def _end_with_parent() -> None:
    """A pool's process waits for work for ever, also after a kill of who would give it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def cores() -> int:
    """How many processes there is room for; one where a GPU does the work."""
    if torch.cuda.is_available():
        return 1
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, MOST)
