"""The merge recipe's tables and picture, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import _report
from ._merge_parts import LAMBDAS
from ._report import Table, ranged
from ._run import Run

TELLING = "0.99"
"""The share dropped at which the methods part; a report says by seed what it costs."""

MARKS = {"AdamW": "o-", "AdamR": "s--"}


def tables(results: dict[str, Any]) -> list[Table]:
    """One for each part that was run."""
    made = {"prune": _pruned, "merge": _merged, "patch": _patched}
    return [made[part](results["settings"], found) for part, found in _parts(results).items()]


def report(run: Run) -> None:
    """Print a table for each part and draw the picture."""
    _report.tell(tables(run.results))
    parts = _parts(run.results)
    figure, axes = _report.canvas(len(parts))
    for ax, (part, found) in zip(axes[0], parts.items(), strict=True):
        {"prune": _draw_pruned, "merge": _draw_merged, "patch": _draw_patched}[part](ax, found)
    _report.save(figure, run.folder / "merge.png")


def _parts(results: dict[str, Any]) -> dict[str, dict[tuple[str, ...], Any]]:
    """Results by part, and by the rest of their key: optimizer, task and seed, as far as it has them."""
    parts: dict[str, dict[tuple[str, ...], Any]] = {}
    for key, found in results["arms"].items():
        part, *rest = key.split("/")
        parts.setdefault(part, {})[tuple(rest)] = found
    return {part: parts[part] for part in ("prune", "merge", "patch") if part in parts}


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
    return ranged(values, "{:.1f}", "{:.0f}")


def _trials(found: Mapping[tuple[str, ...], Any]) -> list[tuple[str, str]]:
    """Method and rate of what was pruned."""
    one = next(iter(found.values()))
    return [(m, p) for m, _, p in (key.partition("/") for key in one) if p]


def _pruned(settings: Mapping[str, Any], found: dict[tuple[str, ...], Any]) -> Table:
    rates = list(dict.fromkeys(p for _, p in _trials(found)))
    rows: list[Sequence[str]] = []
    for trained in _trained(found):
        full = _by_seed(found, trained, "full")
        rows.append((f"{trained}, whole", _text(full), *[""] * len(rates)))
        for method in dict.fromkeys(method for method, _ in _trials(found)):
            scores = [_by_seed(found, trained, f"{method}/{p}") for p in rates]
            rows.append((f"{trained}, {method}", "", *map(_text, scores)))
    return Table(
        ("", "p = 0", *(f"p = {p}" for p in rates)),
        rows,
        f"Pruned: {settings['steps']} steps at lr {settings['lr']:g}, then a share p of the change dropped",
        f"Accuracy in %, mean over tasks ({settings['test']} test sentences each) and {settings['masks']} "
        "masks; in brackets the range over seeds. The pretrained encoder under the experts' heads: "
        f"{_each(found, lambda t: _text(_by_seed(found, t, 'pretrained')))}. Root mean square of the change: "
        f"{_each(found, lambda t: f'{_change(found, t):.1e}')}.{_lost(found, rates)}",
    )


def _each(found: Mapping[tuple[str, ...], Any], say: Callable[[str], str]) -> str:
    return ", ".join(f"{trained} {say(trained)}" for trained in _trained(found))


def _change(found: Mapping[tuple[str, ...], Any], trained: str) -> float:
    return statistics.mean(one["change"] for key, one in found.items() if key[0] == trained)


def _lost(found: dict[tuple[str, ...], Any], rates: Sequence[str]) -> str:
    """What dropping costs at the rate at which the methods part."""
    if TELLING not in rates:
        return ""
    costs: list[str] = []
    for trained in _trained(found):
        for method in dict.fromkeys(method for method, _ in _trials(found)):
            full, scores = _by_seed(found, trained, "full"), _by_seed(found, trained, f"{method}/{TELLING}")
            lost = [a - b for a, b in zip(full, scores, strict=True)]
            costs.append(f"{trained}, {method} {statistics.mean(lost):.1f} ({_listed(lost)})")
    return f" Points lost at p = {TELLING}, mean and by seed: {'; '.join(costs)}."


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def _merged(settings: Mapping[str, Any], found: dict[tuple[str, ...], Any]) -> Table:
    rows: list[Sequence[str]] = []
    tasks: list[str] = []
    for trained in _trained(found):
        ones = [one for key, one in found.items() if key[0] == trained]
        tasks = list(ones[0]["experts"]["accuracy"])
        for method in ones[0]:
            means = _means(ones, method)
            each = [100 * statistics.mean(one[method]["accuracy"][task] for one in ones) for task in tasks]
            scales = ", ".join(f"{one[method]['lam']:.2g}" for one in ones if "lam" in one[method])
            cells = (f"{statistics.mean(means):.1f}", _listed(means), *(f"{e:.1f}" for e in each), scales)
            rows.append((f"{trained}, {method}", *cells))
    return Table(
        ("", "mean", "by seed", *tasks, "scales"),
        rows,
        "Merged: one encoder for all tasks",
        "Accuracy in %, each task under its own head, mean over seeds. Experts: each on its own task. "
        f"Scales, by seed, were chosen on {settings['valid']} other sentences a task, of "
        f"{', '.join(f'{lam:.2g}' for lam in LAMBDAS)}.",
    )


def _means(ones: Sequence[Any], method: str) -> list[float]:
    """Mean accuracy over tasks in per cent, by seed."""
    return [100 * statistics.mean(one[method]["accuracy"].values()) for one in ones]


def _patched(_settings: Mapping[str, Any], found: dict[tuple[str, ...], Any]) -> Table:
    rows: list[Sequence[str]] = []
    for corruption in next(iter(found.values())):
        ones = [one[corruption] for one in found.values()]
        curve = (_pair([one["curve"][count] for one in ones]) for count in range(len(ones[0]["curve"])))
        last = (_pair([one[name] for one in ones]) for name in ("4 bits", "robust"))
        rows.append((corruption, *curve, *last))
    return Table(
        ("", *(f"K = {count}" for count in range(len(rows[0]) - 3)), "4, 4 bits", "robust"),
        rows,
        "Patched: digits, signature of the first K layers",
        f"Accuracy in % on clean / corrupted digits, mean over {len(found)} seeds. Robust: a network trained "
        f"on corrupted digits. In 4 bits the signature of 4 layers "
        f"is {next(iter(next(iter(found.values())).values()))['smaller']:.1f} times smaller.",
    )


def _pair(pairs: Sequence[Sequence[float]]) -> str:
    clean, corrupted = (100 * statistics.mean(values) for values in zip(*pairs, strict=True))
    return f"{clean:.0f} / {corrupted:.0f}"


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
