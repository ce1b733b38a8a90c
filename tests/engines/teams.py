"""Runs cells on teams of one, two or four of four processes: one start, in which groups come and go."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import IMPORTED

import optx

PROCESSES = 4
MODELS = ("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class Team:
    """Processes that do one cell together.

    Attributes:
        rank: of this process in it.
        world: how many there are; with one there is no process group.
        folder: for files that later phases read.
    """

    rank: int
    world: int
    folder: Path


Found = dict[str, Any]
Cell = Callable[[Team], Found]


@dataclass(frozen=True)
class Phase:
    """Cells that are done by teams of one size, shared out among the teams; by name."""

    world: int
    cells: Mapping[str, Cell]


def results(phases: Sequence[Phase]) -> dict[str, Found]:
    """What the first process of each cell's team found; ``{"refused": words}`` where optx raised."""
    mp.get_context("forkserver").set_forkserver_preload([*IMPORTED, *MODELS])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "found").mkdir()
        given = (phases, folder, dict(os.environ))
        died: Exception | None = None
        try:
            mp.start_processes(_worker, given, nprocs=PROCESSES, start_method="forkserver")  # type: ignore[no-untyped-call]
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            died = error
        found = {
            path.stem: torch.load(path, weights_only=True) for path in sorted(Path(folder, "found").iterdir())
        }
        if died is not None:
            raise AssertionError(f"a process ended early; {len(found)} cells were done") from died
    return found


def _worker(rank: int, phases: Sequence[Phase], folder: str, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number, phase in enumerate(phases):
        team, teams = rank // phase.world, PROCESSES // phase.world
        mine = Team(rank % phase.world, phase.world, Path(folder))
        with _group(mine, f"{folder}/meet.{number}.{team}"):
            for name in list(phase.cells)[team::teams]:
                _do(name, phase.cells[name], mine)
        with _group(Team(rank, PROCESSES, Path(folder)), f"{folder}/end.{number}"):
            dist.barrier()  # the next phase reads what this one wrote


@contextlib.contextmanager
def _group(team: Team, meeting: str) -> Any:
    if team.world == 1:
        yield
        return
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=team.rank,
        world_size=team.world,
        timeout=timedelta(minutes=3),
    )
    yield
    dist.destroy_process_group()


def here(phases: Sequence[Phase]) -> dict[str, Found]:
    """The same of cells that need one process, by this one: four would import all trainers."""
    with tempfile.TemporaryDirectory() as folder:
        team = Team(0, 1, Path(folder))
        return {name: _found_by(cell, team) for phase in phases for name, cell in phase.cells.items()}


def _found_by(cell: Cell, team: Team) -> Found:
    """What a cell finds, or the words that it is refused with."""
    try:
        return cell(team)
    except optx.OptxError as error:
        return {"refused": str(error)}


def _do(name: str, cell: Cell, team: Team) -> None:
    try:
        found = _found_by(cell, team)
    except Exception:
        print(f"{name}, process {team.rank} of {team.world}:\n{traceback.format_exc()}", flush=True)
        raise
    if team.rank == 0:
        torch.save(found, team.folder / "found" / f"{name}.pt")
