"""The merge recipe's tables and picture, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _report
from ._run import Run

MARKS = {"AdamW": "o-", "AdamR": "s--"}


def report(run: Run, parts: Sequence[str]) -> None:
    """Print a table for each part and draw the picture."""
    shown = {part: _found(run, part) for part in parts}
    for part, found in shown.items():
        {"prune": _pruned, "merge": _merged, "patch": _patched}[part](run, found)
    figure, axes = _report.canvas(len(shown))
    for ax, (part, found) in zip(axes[0], shown.items(), strict=True):
        {"prune": _draw_pruned, "merge": _draw_merged, "patch": _draw_patched}[part](ax, found)
    _report.save(figure, run.folder / "merge.png")


def _found(run: Run, part: str) -> dict[tuple[str, ...], Any]:
    """Results of one part, by the rest of their key: optimizer, task and seed, as far as it has them."""
    keyed = {tuple(key.split("/")): found for key, found in run.results["arms"].items()}
    return {key[1:]: found for key, found in keyed.items() if key[0] == part}


def _by_seed(found: Mapping[tuple[str, ...], Any], trained: str, of: str) -> list[float]:
    """One number per seed: the mean in per cent over tasks and masks."""
    seeds: dict[str, list[float]] = {}
    for key, one in found.items():
        if key[0] == trained:
            values = one[of] if isinstance(one[of], list) else [one[of]]
            seeds.setdefault(key[-1], []).append(100 * statistics.mean(values))
    return [statistics.mean(values) for values in seeds.values()]


def _trained(found: Iterable[tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(key[0] for key in found))


def _text(values: Sequence[float]) -> str:
    """Mean, and what the seeds range over."""
    return f"{statistics.mean(values):.1f} ({min(values):.0f}-{max(values):.0f})"


def _trials(found: Mapping[tuple[str, ...], Any]) -> list[tuple[str, str]]:
    """Method and rate of what was pruned."""
    one = next(iter(found.values()))
    return [(m, p) for m, _, p in (key.partition("/") for key in one) if p]


def _pruned(run: Run, found: dict[tuple[str, ...], Any]) -> None:
    columns: dict[str, dict[str, str]] = {"p = 0": {}}
    for trained in _trained(found):
        full = _text(_by_seed(found, trained, "full"))
        for method, p in _trials(found):
            row = f"{trained}, {method}"
            columns["p = 0"][row] = full
            columns.setdefault(f"p = {p}", {})[row] = _text(_by_seed(found, trained, f"{method}/{p}"))
    floors = ", ".join(
        f"{trained} {_text(_by_seed(found, trained, 'pretrained'))}" for trained in _trained(found)
    )
    sizes = ", ".join(
        f"{trained} {statistics.mean(one['change'] for key, one in found.items() if key[0] == trained):.1e}"
        for trained in _trained(found)
    )
    _report.show(
        f"Pruned: {run.settings['steps']} steps at lr {run.settings['lr']:g}, then a share p dropped",
        columns,
        f"Accuracy in %, mean over tasks ({run.settings['test']} test sentences each) and masks; in "
        f"brackets the range over seeds. The pretrained encoder under the experts' heads: {floors}. Root "
        f"mean square of the change: {sizes}.",
    )


def _merged(run: Run, found: dict[tuple[str, ...], Any]) -> None:
    columns: dict[str, dict[str, str]] = {}
    for trained in _trained(found):
        ones = [one for key, one in found.items() if key[0] == trained]
        for method in ones[0]:
            row = f"{trained}, {method}"
            scores = [one[method]["accuracy"] for one in ones]
            for task in scores[0]:
                mean = statistics.mean(score[task] for score in scores)
                columns.setdefault(task, {})[row] = f"{100 * mean:.1f}"
            columns.setdefault("mean", {})[row] = _text(_means(ones, method))
            scales = [f"{one[method]['lam']:.2g}" for one in ones if "lam" in one[method]]
            columns.setdefault("scales", {})[row] = " ".join(scales)
    _report.show(
        "Merged: one encoder for all tasks",
        columns,
        "Accuracy in %, each task under its own head, mean over seeds; in brackets the range. Experts: each "
        f"on its own task. Scales, by seed, were chosen on {run.settings['valid']} other sentences a task.",
    )


def _means(ones: Sequence[Any], method: str) -> list[float]:
    """Mean accuracy over tasks in per cent, by seed."""
    return [100 * statistics.mean(one[method]["accuracy"].values()) for one in ones]


def _patched(_run: Run, found: dict[tuple[str, ...], Any]) -> None:
    columns: dict[str, dict[str, str]] = {}
    for corruption in next(iter(found.values())):
        ones = [one[corruption] for one in found.values()]
        for count in range(len(ones[0]["curve"])):
            columns.setdefault(f"K = {count}", {})[corruption] = _pair([one["curve"][count] for one in ones])
        columns.setdefault("4, 4 bits", {})[corruption] = _pair([one["4 bits"] for one in ones])
        columns.setdefault("robust", {})[corruption] = _pair([one["robust"] for one in ones])
    _report.show(
        "Patched: digits, signature of the first K layers",
        columns,
        f"Accuracy in % on clean / corrupted digits, mean over {len(found)} seeds. Robust: a network trained "
        f"on corrupted digits. In 4 bits the signature of 4 layers "
        f"is {next(iter(found.values()))['blur']['smaller']:.1f} times smaller.",
    )


def _pair(pairs: Sequence[Sequence[float]]) -> str:
    clean, corrupted = (100 * statistics.mean(values) for values in zip(*pairs, strict=True))
    return f"{clean:.0f}/{corrupted:.0f}"


def _draw_pruned(ax: Any, found: dict[tuple[str, ...], Any]) -> None:
    methods = list(dict.fromkeys(method for method, _ in _trials(found)))
    for trained in _trained(found):
        full = statistics.mean(_by_seed(found, trained, "full"))
        ax.axhline(full, color="black", linewidth=0.8, linestyle="-" if trained == "AdamW" else "--")
        for colour, method in zip(_report.COLOURS, methods, strict=False):
            rates = [p for m, p in _trials(found) if m == method]
            scores = [statistics.mean(_by_seed(found, trained, f"{method}/{p}")) for p in rates]
            kept = [1 - float(p) for p in rates]
            ax.plot(kept, scores, MARKS[trained], color=colour, markersize=4, label=f"{method}, {trained}")
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.legend(frameon=False, fontsize=7)
    _report.label(ax, "Pruned; black: the whole change", "share of the change that is kept", "accuracy, %")


def _draw_merged(ax: Any, found: dict[tuple[str, ...], Any]) -> None:
    names = list(next(iter(found.values())))
    for shift, colour, trained in zip((-0.2, 0.2), _report.COLOURS, _trained(found), strict=False):
        ones = [one for key, one in found.items() if key[0] == trained]
        scores = [_means(ones, name) for name in names]
        places = [i + shift for i in range(len(names))]
        ax.bar(places, [statistics.mean(s) for s in scores], width=0.38, color=colour, label=trained)
        for place, values in zip(places, scores, strict=True):
            ax.plot([place] * len(values), values, "k.", markersize=3)
    ax.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=7)
    ax.legend(frameon=False, fontsize=7)
    _report.label(ax, "Merged: mean over tasks; dots are seeds", y="accuracy, %")


def _draw_patched(ax: Any, found: dict[tuple[str, ...], Any]) -> None:
    for colour, corruption in zip(_report.COLOURS, next(iter(found.values())), strict=False):
        curves = zip(*(one[corruption]["curve"] for one in found.values()), strict=True)
        points = [[100 * statistics.mean(values) for values in zip(*pairs, strict=True)] for pairs in curves]
        for which, line in ((0, ":"), (1, "o-")):
            label = f"{corruption}, corrupted" if which else f"{corruption}, clean"
            ax.plot([p[which] for p in points], line, color=colour, markersize=4, label=label)
    ax.legend(frameon=False, fontsize=7)
    _report.label(ax, "Patched digits", "layers patched", "accuracy, %")
