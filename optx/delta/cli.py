"""``optx merge`` and ``optx delta``: checkpoints merged and changed from the command line."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from optx._errors import OptxError
from optx.delta._delta import Delta
from optx.delta._delta_pruning import HEADS
from optx.delta._mergekit import read_config
from optx.delta._name_filter import chooser
from optx.delta._overwrite import output

app = typer.Typer(help="Take, prune, save and apply what fine-tuning changed.", no_args_is_help=True)

Base = Annotated[Path, typer.Argument(help="safetensors file, or folder with a model")]
Tuned = Annotated[Path, typer.Argument(help="the same model after fine-tuning")]
Out = Annotated[Path, typer.Argument(help="a .safetensors file, or a new folder laid out as the base's")]
Include = Annotated[str | None, typer.Option(help="regex of the names to take; full match")]
Exclude = Annotated[str | None, typer.Option(help="regex of the names to leave; full match")]
Whole = Annotated[
    str,
    typer.Option(
        help="regex of the names that are taken whole from TUNED, new heads and larger vocabularies among "
        "them; full match, '' for none"
    ),
]
P = Annotated[float, typer.Option("--p", help="share DROPPED, 0 <= p < 1")]
Seed = Annotated[int, typer.Option(help="of the random masks")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an OUT that exists, once done")]


def add_to(main: typer.Typer) -> None:
    """Hook both into the ``optx`` command."""
    main.add_typer(app, name="delta")
    main.command("merge")(merge)


def merge(
    config: Annotated[Path, typer.Argument(help="YAML file, as mergekit's")],
    out: Out,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Merge models as a YAML file says, in mergekit's format.

    Methods: linear, slerp, passthrough, model_stock, task_arithmetic, ties, dare_linear, dare_ties, nearswap,
    nuslerp, multislerp, karcher, breadcrumbs, breadcrumbs_ties, della, della_linear, sce, arcee_fusion, and
    optx's pcb.

    Paths in the file are taken from the folder in which the command is run, not from the file's. Killed
    before it is done, the same command goes on where it stopped.
    """
    with _plainly("optx merge"):
        what = read_config(config, seed)
        for note in what.notes:
            _say(f"Note: {note}")
        with output(out, overwrite, [config, *what.inputs]) as path, _bar(what.passes) as bar:
            what.run(path, bar)
    _say(f"Merged {what.models} models into {out}.")


@app.command()
def save(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Argument(help="a .safetensors file")],
    include: Include = None,
    exclude: Exclude = None,
    whole: Annotated[
        str, typer.Option(help="regex of the names that are taken whole from TUNED where BASE has no such")
    ] = "",
    overwrite: Overwrite = False,
) -> None:
    """Write what fine-tuning changed as a file of its own."""
    with _plainly("optx delta save"), output(out, overwrite, [base, tuned]) as path:
        _between(base, tuned, include, exclude, whole).save(path)
    _say(f"Wrote {out} ({out.expanduser().stat().st_size:,} bytes).")


@app.command("apply")
def apply_(
    base: Base,
    delta: Annotated[Path, typer.Argument(help="a file that `optx delta save` wrote")],
    out: Out,
    scale: Annotated[float, typer.Option(help="of the change")] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Add a saved change to its base."""
    with _plainly("optx delta apply"), output(out, overwrite, [base, delta]) as path:
        loaded = Delta.load(delta)
        with _bar(1) as bar:
            loaded.apply(base, path, scale=scale, progress=bar)
    _say(f"Wrote {out}.")


@app.command()
def dare(
    base: Base,
    tuned: Tuned,
    out: Out,
    p: P = 0.9,
    q: Annotated[float | None, typer.Option(help="what is kept is divided by it; 1 - p by default")] = None,
    seed: Seed = 0,
    include: Include = None,
    exclude: Whole = HEADS,
    overwrite: Overwrite = False,
) -> None:
    """Drop a share of the change at random, rescale the rest, and add it to the base (DARE)."""
    with _plainly("optx delta dare"), output(out, overwrite, [base, tuned]) as path:
        pruned = _between(base, tuned, whole=exclude).dare(p, q, seed=seed, include=include, exclude=exclude)
        with _bar(1) as bar:
            pruned.apply(base, path, progress=bar)
    _say_pruned(out, p, pruned, include, exclude)


@app.command()
def magnitude(
    base: Base,
    tuned: Tuned,
    out: Out,
    p: P = 0.9,
    include: Include = None,
    exclude: Whole = HEADS,
    overwrite: Overwrite = False,
) -> None:
    """Drop the smallest of the change, tensor by tensor, and add the rest to the base."""
    with _plainly("optx delta magnitude"), output(out, overwrite, [base, tuned]) as path:
        pruned = _between(base, tuned, whole=exclude).magnitude(p, include=include, exclude=exclude)
        with _bar(1) as bar:
            pruned.apply(base, path, progress=bar)
    _say_pruned(out, p, pruned, include, exclude)


def _between(
    base: Path, tuned: Path, include: str | None = None, exclude: str | None = None, whole: str | None = None
) -> Delta:
    return Delta.between(base, tuned, include=include, exclude=exclude, whole=whole)


def _say_pruned(out: Path, p: float, delta: Delta, include: str | None, exclude: str) -> None:
    """What was dropped where, and what was left whole."""
    keep = chooser(include, exclude)
    floating = [name for name, entry in delta.entries.items() if entry.dtype.is_floating_point]
    whole = [name for name in floating if not keep(name)]
    pruned = len(floating) - len(whole)
    names = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
    rest = f"{len(whole)} kept their whole change ({names})" if whole else "none kept its whole change"
    _say(f"Wrote {out}; {p:.4g} of the change was dropped in {pruned} of {len(floating)} tensors, {rest}.")


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


@contextmanager
def _plainly(command: str) -> Generator[None]:
    """Errors in one sentence, without a traceback."""
    try:
        yield
    except (OptxError, OSError) as error:
        _say(f"{command}: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _say("Interrupted. The same command goes on where it stopped.")
        raise typer.Exit(130) from None


class _Bar:
    """Counts tensors over several passes over the names; wraps them as ``tqdm`` does."""

    def __init__(self, progress: Progress, passes: int) -> None:
        self._progress, self._passes = progress, passes
        self._task = progress.add_task("", total=None)
        self._known = 0

    def __call__(self, names: Iterable[str]) -> Iterator[str]:
        todo = list(names)
        self._known = max(self._known, len(todo) * self._passes)
        self._progress.update(self._task, total=self._known)
        for name in todo:
            self._progress.update(self._task, description=name)
            yield name
            self._progress.advance(self._task)


@contextmanager
def _bar(passes: int) -> Generator[_Bar]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress, passes)
