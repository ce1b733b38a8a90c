"""What every recipe's command line needs around its loop: options, Ctrl-C, checkpoints, results."""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import platform
import re
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import optx
from optx._files import written_aside
from optx.kernels.available import why_unavailable

from ._config_file import Options
from ._interrupt import Interrupt
from ._live import Live
from ._options import first_seed, path, positive
from ._parallel import ALONE, WEIGHTS, Team, processes
from ._report import console

SettingsError = SystemExit
"""Recipes are commands: what is wrong with their options is said in one line, without a traceback."""


def parser(name: str, doc: str, steps: int, **options: dict[str, Any]) -> argparse.ArgumentParser:
    """The options that all recipes have, and a recipe's own.

    Args:
        name: of the recipe.
        doc: its module docstring; shown by ``--help``.
        steps: default of ``--steps``.
        options: keyword arguments of ``add_argument`` by option name (``lr`` for ``--lr``).
    """
    made = Options(
        prog=f"optx run {name}",
        description=inspect.cleandoc(doc),
        formatter_class=type("Form", (argparse.RawDescriptionHelpFormatter, _Defaults), {}),
    )
    made.add_argument("--steps", type=positive, default=steps, help="optimizer steps of each arm")
    made.add_argument("--seed", type=first_seed, default=0, help="of the data order and all random draws")
    made.add_argument("--out", type=path, default=Path("runs") / name, help="folder for results and picture")
    made.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    made.add_argument(
        "--config", type=path, help="YAML or JSON with any of these options; what is typed wins"
    )
    for option, keywords in options.items():
        made.add_argument(f"--{option.replace('_', '-')}", **keywords)
    return made


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


NOT_SETTINGS = (
    "arms",
    "parts",
    "seeds",
    "out",
    "config",
    "resume",
    "overwrite",
    "json",
    "threads",
    "workers",
    "folder",
    "work",
    "fsdp",
)
"""Options that say how much is run, how fast and where to, and not what comes out."""


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that results depend on, as results.json has them."""
    found = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def command(options: argparse.ArgumentParser, settings: Mapping[str, Any]) -> str:
    """What one types for these settings today: the options that differ from their defaults."""
    words = [options.prog]
    for name, default in defaults(options).items():
        if (value := settings.get(name, default)) != default:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(shlex.quote(f"{v}") for v in values)]
    return " ".join(words)


def defaults(options: argparse.ArgumentParser) -> dict[str, Any]:
    """Every option's default, as results.json would have it."""
    return json.loads(json.dumps(vars(options.parse_args([])), default=str))


def chosen(text: str, known: Iterable[str], option: str = "--arms") -> list[str]:
    """A comma-separated choice, such as ``--arms adamw,adamw+hft``."""
    known = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise SettingsError(f"{option}: {', '.join(wrong) or 'nothing'} is none of {', '.join(known)}.")
    return list(dict.fromkeys(names))


def device() -> torch.device:
    """A GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """Seconds, after the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def environment() -> dict[str, Any]:
    """What measurements depend on, for results.json."""
    where = device()
    name = torch.cuda.get_device_name() if where.type == "cuda" else _processor()
    return {
        "date": datetime.date.today().isoformat(),
        "optx": optx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{where.type} ({name})",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Model and instructions: torch's, and those that Numba compiles for."""
    parts = [platform.machine(), f"torch {torch.backends.cpu.get_cpu_capability()}"]
    about = Path("/proc/cpuinfo")
    if about.exists() and (found := re.search(r"^model name\s*: (.+)$", about.read_text(), re.MULTILINE)):
        parts.insert(0, found[1].strip())
    if why_unavailable("numba") is None:
        from optx.kernels import processor

        parts.append(f"Numba {processor.name()} {processor.vectors()}")
    return ", ".join(parts)


class Run:
    """A recipe's folder: ``results.json`` grows arm by arm, ``checkpoint.pt`` is an arm that was interrupted.

    Both are written aside and renamed, so a kill leaves the old file whole.

    Args:
        folder: where to write; made if missing.
        settings: what must be the same for results to be comparable and for a checkpoint to be continued.
        resume: go on with what the folder holds.
        overwrite: replace the run that the folder holds, at the first write.
        team: the processes that run it together; the first one alone reads and writes the folder.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        resume: bool,
        overwrite: bool = False,
        team: Team = ALONE,
    ) -> None:
        self.folder, self.settings, self.resume, self.team = folder, settings, resume, team
        self.interrupt = Interrupt()
        self._live, self._now = Live(), dict[str, str]()
        if team is ALONE and processes() > 1:
            raise SettingsError(f"{processes()} processes were started: this recipe runs in one.")
        if resume and overwrite:
            raise SettingsError("--resume goes on with the run that --overwrite replaces. Give one of them.")
        found = team.told(lambda: self._opened(overwrite))
        self._replaces = not resume  # the checkpoint that is there is of another run
        new = {"settings": self.settings, "environment": environment() | team.about, "arms": {}}
        self.results: dict[str, Any] = found or new

    def _opened(self, overwrite: bool) -> dict[str, Any] | None:
        """The results of the run to go on with; raises unless the folder may be written into."""
        try:
            self._check_folder(self.resume, overwrite)
            found = self._earlier() if self.resume and self.json.exists() else None
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):  # known before training
                return found
        except OSError as error:
            raise SettingsError(
                f"--out: {self.folder}: {error.strerror}. Give a folder that is there or can be made."
            ) from None

    def _check_folder(self, resume: bool, overwrite: bool) -> None:
        """Raise if the folder is none, or has something that this run would write over."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "is a link to nothing"
            raise SettingsError(f"--out: {self.folder} {what}. Give the name of a folder.")
        for file in (self.json, self.checkpoint):
            if file.is_dir():
                raise SettingsError(f"--out: {self.folder} has a folder {file.name}. Give another --out.")
            if resume and file.is_symlink() and not file.exists():
                raise SettingsError(f"--resume: {file} is a link to nothing. Give another --out.")
        if resume or overwrite:
            return
        names = (self.json, self.checkpoint, *sorted(self.folder.glob("*.png")))
        if earlier := next((file.name for file in names if os.path.lexists(file)), None):
            raise SettingsError(
                f"--out: {self.folder} has a {earlier} of an earlier run. Give another --out, --resume to go "
                "on with that run, or --overwrite to replace it."
            )

    def _earlier(self) -> dict[str, Any]:
        """The results that the folder has."""
        try:
            found = json.loads(self.json.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._not_ours(self.json, str(error)) from None
        for part in ("settings", "environment", "arms"):
            if not isinstance(found, dict) or not isinstance(found.get(part), dict):
                raise self._not_ours(self.json, f"it has no {part}")
        self._compare(found["settings"])
        return found

    def _not_ours(self, file: Path, why: str) -> SystemExit:
        return SettingsError(
            f"--resume: {file} is not what a run writes: {why.splitlines()[0]}. Give --overwrite to replace "
            "it, or another --out."
        )

    @property
    def json(self) -> Path:
        """The results file."""
        return self.folder / "results.json"

    @property
    def checkpoint(self) -> Path:
        """The interrupted arm."""
        return self.folder / "checkpoint.pt"

    def _compare(self, found: dict[str, Any]) -> None:
        differs = [k for k in self.settings if found.get(k) != self.settings[k]]
        if differs:
            raise SettingsError(
                f"--resume: {self.folder} holds a run with "
                + ", ".join(f"--{k} {found.get(k)}, not {self.settings[k]}" for k in differs)
                + ". Give the same options, or another --out."
            )

    def finished(self, arm: str) -> bool:
        """Whether the folder has this arm's results already."""
        return arm in self.results["arms"]

    def part(self, key: str, work: Callable[..., Any], *arguments: Any) -> None:
        """Do one part and write its results, unless the folder has them; None from it means interrupted."""
        if not self.finished(key):
            if (found := work(*arguments)) is None:
                raise SystemExit(130)
            self.results["arms"][key] = found
            self.write()

    def write(self) -> None:
        """Write results.json."""
        if not self.team.leads:
            return
        if self._replaces:
            self.checkpoint.unlink(missing_ok=True)
            self._replaces = False
        with written_aside(self.json) as aside:
            aside.write_text(json.dumps(self.results, indent=2) + "\n")

    def save(self, arm: str, state: dict[str, Any]) -> None:
        """Write the checkpoint of an interrupted arm, with torch's random state."""
        random = self.team.gathered(torch.get_rng_state())
        if self.team.leads:
            self._save({"settings": self.settings, "arm": arm, "rng": random, **state})
            console.print(f"Stopped in arm {arm}; the same command with --resume goes on from there.")
        self.team.together()  # torchrun ends all as soon as one has ended

    def _save(self, kept: dict[str, Any]) -> None:
        status = console.status("Writing the checkpoint")
        with status, written_aside(self.checkpoint) as aside, aside.open("wb") as file:
            torch.save(kept, file)
            file.flush()
            os.fsync(file.fileno())
        self._replaces = False
        self.write()

    def load(self, arm: str) -> dict[str, Any] | None:
        """The checkpoint of this arm, if it was interrupted; sets torch's random state as it was.

        The first process has all of it, the others all but the weights.
        """
        if not self.resume:
            return None
        whole: dict[str, Any] = {}

        def small() -> dict[str, Any] | None:
            whole.update(self._read(arm) or {})
            return {name: part for name, part in whole.items() if name not in WEIGHTS} or None

        if (told := self.team.told(small)) is None:
            return None
        random = told["rng"][self.team.rank % len(told["rng"])]  # there may be more processes now
        torch.set_rng_state(random.cpu())
        return told | whole

    def _read(self, arm: str) -> dict[str, Any] | None:
        """The checkpoint, if there is one of this arm."""
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location=device(), weights_only=True)
        except Exception as error:  # bytes that are no checkpoint raise whatever they are read as
            raise self._not_ours(self.checkpoint, type(error).__name__) from None
        if not (isinstance(state, dict) and {"settings", "arm", "rng"} <= state.keys()):
            raise self._not_ours(self.checkpoint, "it has no settings, arm and random state")
        if state["arm"] != arm:
            return None
        self._compare(state["settings"])
        return state

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        console.print(line)

    def steps(self, arm: str, start: int, stop: int) -> Iterator[int]:
        """The steps from `start` to `stop`, under a progress bar; ends early if the user wants to stop."""
        columns = (
            TextColumn("{task.description:20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}", markup=False),
        )
        with Progress(*columns, console=console) as bars, self.interrupt:
            self._now = {}
            bar = bars.add_task(arm, total=stop, completed=start, now="")
            for step in range(start, stop):
                if self.team.agrees(self.interrupt.wanted):
                    self.interrupt.wanted = True
                    return
                yield step
                bars.update(bar, completed=step + 1, **self._now)

    def live(
        self,
        loss: Tensor | float | None,
        optimizer: Optimizer | None = None,
        handle: optx.Handle | None = None,
    ) -> None:
        """Show a step's loss and metrics beside the bar; at most twice a second, and on a terminal alone."""
        if (line := self._live.line(loss, optimizer, handle)) is not None:
            self._now = {"now": line}


def warmed_up(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A schedule: up over the first tenth of the steps, then linearly down."""
    warmup = max(1, steps // 10)
    return LambdaLR(optimizer, lambda s: min((s + 1) / warmup, (steps - s) / (steps - warmup + 1)))


def median_ms(seconds: Sequence[float]) -> float:
    """Median in milliseconds, without the first two steps (allocation, compilation) where there are more."""
    return 1e3 * statistics.median(seconds[2:] or seconds)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, a transform's own included."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def gradient_bytes(optimizer: Optimizer) -> int:
    """Bytes of all gradients that there are: what is frozen has none."""
    weights = (p for group in optimizer.param_groups for p in group["params"])
    return sum(p.grad.numel() * p.grad.element_size() for p in weights if p.grad is not None)
