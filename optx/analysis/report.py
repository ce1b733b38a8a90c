"""One page of what can be told of a model: those diagnostics that apply, and why the others do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from optx._errors import OptxError, near
from optx._files import as_path, check_writable
from optx._no_trace import model_kept, randomness_kept
from optx.analysis._report_page import Clock, Report, Section
from optx.analysis._report_pass import OWNER, batches_of, run
from optx.analysis._report_sections import SECTIONS, Material


def report(
    model: nn.Module,
    data: Any,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    sections: Sequence[str] | None = None,
    batches: int = 4,
    picture: str | Path | None = None,
    html: str | Path | None = None,
    show: bool = True,
) -> Report:
    """Run the diagnostics that apply to a model and put what they say on one page.

    Softmax collapse, NLM alignment, gradient norms, top singular values, Lipschitz bounds, degeneracy and
    attention margins. What does not apply is listed with the reason. The model runs in eval mode, forward and
    backward over each batch; gradients, weights, buffers, modes, flags, hooks and random numbers are as they
    were afterwards, after an error too.

    Args:
        model: any module; not a compiled one.
        data: a batch, a list of batches or a DataLoader. A batch is a tensor, a mapping of keyword arguments
            (with ``labels``, transformers' models give a loss), or a pair of inputs and labels.
        loss_fn: of the model's output and the batch, one number. None: the output's own ``loss``, or else
            cross-entropy of the labels, classes being the last dimension.
        sections: which, by title; None: all.
        batches: so many of a loader are taken.
        picture: a path for a PNG, and
        html: for a page that has it within; both need matplotlib, and are written aside and renamed.
        show: print the page.

    Returns:
        A `Report`: ``report["Gradient norms"].values`` has numbers by name; ``left_out`` has reasons.

    Paper values:
        None: each diagnostic has its own.

    Limits: A second copy of the weights is kept meanwhile. Lipschitz bounds are of small networks, attention
    margins of head 0 of six modules; call these themselves for more. Gradients are those of eval mode:
    without dropout, with running statistics.

    Keywords: diagnostics, summary, model card, health check, overview.

    Evidence: no recipe; ``test_report.py``.

    Raises:
        OptxError: data that is none, an unknown section, no matplotlib where it is needed, a file that can't
            be written, or a loss that is none.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> found = optx.analysis.report(model, batch, show=False)
        >>> found.left_out
        {'Attention margins': 'the model has no attention module that optx knows'}

    Source: of each diagnostic its own; `optx.analysis` has them.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"report: model is a {type(model).__name__}; it must be a torch.nn.Module.")
    wanted = _wanted(sections)
    paths = _paths(picture=picture, html=html)
    taken = batches_of(data, batches)
    found, left_out = dict[str, Section](), dict[str, str]()
    with model_kept(model), randomness_kept():
        model.eval()
        material = Material(model, taken, [_one_pass(model, batch, loss_fn) for batch in taken])
        for title in wanted:
            try:
                found[title] = _section(title, material)
            except (OptxError, ImportError) as error:
                left_out[title] = str(error).removeprefix("lipschitz: ").removeprefix("degeneracy: ")
    made = Report(_title(model, taken), found, left_out)
    if show:
        from rich.console import Console

        Console().print(made)
    for name, path in paths.items():
        getattr(made, name)(path)
    return made


def _section(title: str, material: Material) -> Section:
    """One, with what it was warned of in its note: a page is no place to be warned beside."""
    clock = Clock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = SECTIONS[title](material)
    for one in caught:
        if not issubclass(one.category, UserWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return replace(made, note=" ".join([made.note, *dict.fromkeys(said)]).strip(), seconds=clock())


def _one_pass(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Any:
    for p in model.parameters():
        p.grad = None
    return run(model, batch, loss_fn)


def _wanted(sections: Sequence[str] | None) -> list[str]:
    if sections is None:
        return list(SECTIONS)
    if isinstance(sections, str):
        raise OptxError(f"report: sections is {sections!r}; it must be a list of titles.")
    for title in sections:
        if title not in SECTIONS:
            raise OptxError(f"report: there is no section {title!r}. {near(str(title), SECTIONS)}")
    return list(sections)


def _paths(**given: str | Path | None) -> dict[str, Path]:
    """Where files go, before anything is computed that could not be written."""
    found = {name: as_path("report", name, path) for name, path in given.items() if path is not None}
    if found and find_spec("matplotlib") is None:
        raise OptxError(
            f"report: {next(iter(found))} needs matplotlib, which is not installed (pip install matplotlib). "
            "Without a file the page is printed."
        )
    for name, path in found.items():
        if not path.parent.is_dir():
            raise OptxError(f"report: {name} is {str(path)!r}, and there is no folder {str(path.parent)!r}.")
        if path.is_dir():
            raise OptxError(f"report: {name} is {str(path)!r}, a folder; it must be the name of a file.")
        check_writable(OWNER, name, path)
    if len(found) > len({path.resolve() for path in found.values()}):
        raise OptxError(
            f"report: picture and html are both {str(found['html'])!r}; one would replace the other."
        )
    return found


def _title(model: nn.Module, taken: Sequence[Any]) -> str:
    total = sum(p.numel() for p in model.parameters())
    count = f"{len(taken)} batch{'es' * (len(taken) > 1)}"
    return f"{type(model).__name__}: {total:,} parameters, {count}"
