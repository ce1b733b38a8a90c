"""One start of four gloo processes for all tests that need several: teams of one, two or four do their jobs.

A test says what it needs by the mark ``jobs``, as those do that `on_processes` makes, and asks the fixture
``done`` for what came of it. The first that asks has the jobs of all tests of the session run; pytest's other
worker waits for it, if it comes to such a test at all.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[int], Any]
FOLDER = "OPTX_TEST_FOLDER"  # where a module's cases, and later ones, have files
PROCESSES = 4
LONGEST = 170.0  # seconds for a job: what takes longer hangs
# What a process would spend most of its time on, and with it what torch imports at first use: the server that
# processes are forked from has it.
IMPORTED = (
    *(
        "torch",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.distributed.optim",
    ),
    *(
        "torch.distributed.checkpoint.state_dict",
        "optx",
        "optx.kernels.jit",
        "optx.kernels.step.cpu",
        "pytest",
    ),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
)


@dataclass(frozen=True)
class Team:
    """Processes that do one job together.

    Attributes:
        rank: of this process in it.
        world: how many there are; with one there is no process group.
        folder: for files that later jobs, or tests, read.
    """

    rank: int
    world: int
    folder: Path


@dataclass(frozen=True)
class Job:
    """What a team does.

    Attributes:
        name: no other job's.
        world: how many processes it takes.
        run: what each of them calls; what it gives is kept.
        stage: after all jobs of lower ones.
        together: jobs of one name here are done by one team, as they import the same.
    """

    name: str
    world: int
    run: Callable[[Team], Any]
    stage: int = 0
    together: str = ""


@dataclass(frozen=True)
class _Case:
    """A function of a test's module: only processes that call it import that."""

    module: str
    function: str
    beside: str

    def __call__(self, team: Team) -> Any:
        os.environ[FOLDER] = str(team.folder / self.module)
        Path(os.environ[FOLDER]).mkdir(exist_ok=True)
        sys.path.insert(0, self.beside)  # another folder may have a module of that name
        module = importlib.import_module(self.module)
        sys.path.remove(self.beside)
        return getattr(module, self.function)(team.rank)


def on_processes(world: int, *cases: Case, **more: Any) -> Callable[..., None]:
    """A test for each of a module's functions, which so many processes call with their rank.

    ``more`` is a `Job`'s.
    """
    params = [pytest.param(_name(case), id=case.__name__, marks=needs(world, case, **more)) for case in cases]

    @pytest.mark.parametrize("job", params)
    def test(job: str, done: Done) -> None:
        done.found(job)

    return test


def needs(world: int, *cases: Case, **more: Any) -> pytest.MarkDecorator:
    """The same for a test that looks at what they found, or left in their module's folder."""
    return pytest.mark.jobs(*(_job(world, case, **more) for case in cases))


def _job(world: int, case: Case, **more: Any) -> Job:
    beside = str(Path(case.__code__.co_filename).parent)
    return Job(_name(case), world, _Case(case.__module__, case.__name__, beside), **more)


def _name(case: Case) -> str:
    return f"{case.__module__}.{case.__name__}"


@pytest.fixture(scope="session")
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What came of the jobs of all tests."""
    import fcntl

    if not dist.is_gloo_available():
        pytest.skip("gloo")
    every = {
        job.name: job
        for item in request.session.items
        for mark in item.iter_markers("jobs")
        for job in mark.args
    }
    mine = tmp_path_factory.getbasetemp()
    both = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    folder, lock = both / "processes", both / "processes.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            run(list(every.values()), folder)
    return Done(folder)


@dataclass(frozen=True)
class Done:
    """What jobs left in a folder."""

    folder: Path

    def files(self, module: str) -> Path:
        """Those of a module's cases."""
        return self.folder / module

    def found(self, name: str | Case) -> Any:
        """What a job's first process found; fails if any of them did."""
        return self.every(name)[0]

    def every(self, name: str | Case) -> list[Any]:
        """What each of a job's processes found; fails with what those that failed said."""
        name = name if isinstance(name, str) else _name(name)
        said = [torch.load(file, weights_only=True) for file in sorted(_said(self.folder, name, "*"))]
        failed = "\n".join(f"process {one['rank']}: {one['failed']}" for one in said if one["failed"])
        whole = bool(said) and len(said) == said[0]["world"]
        ended = self.folder / "ended"
        if failed or not whole:
            pytest.fail(
                f"{name}: {failed or 'not done. '}{ended.read_text() if ended.exists() else ''}",
                pytrace=False,
            )
        return [one["found"] for one in said]


def _said(folder: Path, name: str, rank: int | str) -> list[Path]:
    name = re.sub(r"[^\w.]", "_", name)
    return (
        list((folder / "said").glob(f"{name}@{rank}"))
        if rank == "*"
        else [folder / "said" / f"{name}@{rank}"]
    )


def forked(folder: Path, world: int, *cases: Case) -> None:
    """Have cases done by forks of this very process, with what it has imported; fail if one does."""
    run((_job(world, case) for case in cases), folder, "fork", world)
    for case in cases:
        Done(folder).found(case)


# ---- the start ---------------------------------------------------------------------------------------------


def results(jobs: Iterable[Job]) -> dict[str, Any]:
    """What the first process of each job found."""
    jobs = list(jobs)
    with tempfile.TemporaryDirectory() as folder:
        run(jobs, Path(folder))
        return {job.name: Done(Path(folder)).found(job.name) for job in jobs}


def run(jobs: Iterable[Job], folder: Path, start: str = "forkserver", processes: int = PROCESSES) -> None:
    """Have all jobs done, and leave what they said in the folder."""
    if start == "forkserver":
        mp.get_context(start).set_forkserver_preload(list(IMPORTED))
    for name in ("said", "doing"):
        (folder / name).mkdir()
    key: Callable[[Job], tuple[int, int]] = lambda job: (job.stage, job.world)  # noqa: E731
    rounds = [_in_turn(some) for _, some in itertools.groupby(sorted(jobs, key=key), key)]
    given = (processes, rounds, str(folder), dict(os.environ))  # the server's own is that of its start
    context: Any = mp.start_processes(  # type: ignore[no-untyped-call]
        _worker, given, nprocs=processes, join=False, start_method=start
    )
    try:
        while not context.join(timeout=2):
            if slow := _slow(folder):
                raise TimeoutError(f"no end after {LONGEST:.0f} seconds: {', '.join(sorted(slow))}")
    except (mp.ProcessRaisedException, mp.ProcessExitedException, TimeoutError) as error:
        (folder / "ended").write_text(f"All were stopped: {error}")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _in_turn(jobs: Iterable[Job]) -> list[list[Job]]:
    """What a team takes at once."""
    units: dict[str, list[Job]] = {}
    for job in jobs:
        units.setdefault(job.together or f"{job.name} alone", []).append(job)
    return list(units.values())


def _slow(folder: Path) -> set[str]:
    now = time.time()
    return {
        name
        for file in (folder / "doing").iterdir()
        if now - file.stat().st_mtime > LONGEST and (name := file.read_text())
    }


# ---- in a process ------------------------------------------------------------------------------------------


def _worker(
    rank: int, processes: int, rounds: list[list[list[Job]]], place: str, environment: Mapping[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    folder = Path(place)
    store = dist.FileStore(f"{place}/store", processes)
    store.set_timeout(timedelta(minutes=10))
    for number, units in enumerate(rounds):
        world = units[0][0].world
        team = Team(rank % world, world, folder)
        for job in _turns(store, units, f"{number}", rank // world, team.rank):
            (folder / "doing" / str(rank)).write_text(job.name)
            _do(job, team, f"{place}/meet.{number}.{job.name}")
            (folder / "doing" / str(rank)).write_text("")
        if store.add(f"{number} ended", 1) == processes:
            store.set(f"{number} over", "")
        store.wait([f"{number} over"])  # the next round reads what this one wrote


def _turns(store: dist.Store, units: list[list[Job]], of: str, team: int, rank: int) -> Iterator[Job]:
    """A team's first process takes what is next, and tells the others which."""
    for turn in itertools.count():
        told = f"{of}.{team}.{turn}"
        if rank == 0:
            store.set(told, str(store.add(f"{of} taken", 1) - 1))
        at = int(store.get(told))
        if at >= len(units):
            return
        yield from units[at]


def _do(job: Job, team: Team, meeting: str) -> None:
    found, failed, environment = None, "", dict(os.environ)
    try:
        with _group(team, meeting), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = job.run(team)
    except (Exception, SystemExit, pytest.fail.Exception):
        failed = traceback.format_exc()
    os.environ.clear()
    os.environ.update(environment)
    said = {"found": found, "failed": failed, "rank": team.rank, "world": team.world}
    [file] = _said(team.folder, job.name, team.rank)
    torch.save(said, file)


@contextlib.contextmanager
def _group(team: Team, meeting: str) -> Iterator[None]:
    """A group for each job: where one process fails, the others' next words to it do, and all go on."""
    if team.world == 1:
        yield
        return
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=team.rank,
        world_size=team.world,
        timeout=timedelta(minutes=2),
    )
    try:
        yield
        dist.barrier()  # who is done first must not be gone before another has come
    finally:
        dist.destroy_process_group()
