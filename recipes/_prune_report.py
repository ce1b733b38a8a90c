"""The prune recipe's tables and picture, from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from . import _prune_digits, _report
from ._prune_digits import KINDS
from ._prune_parts import best
from ._report import Table, ranged
from ._run import Run

NAMES = {
    "norm": "norms",
    "mask": "norms, MaskLoRA",
    "scale": "norms, ScaleLoRA",
    "rebuilt": "by blocks",
    "all": "all, KeepMask",
    "tuned": "dense, all",
}
METHODS = [
    "dense",
    *(f"{how} {what}" for what in ("50%", "2:4") for how in ("magnitude", "wanda", "sparsegpt")),
]
DENSE = "dense + tuned"
WHERE = {"held_out": "held-out Shakespeare", "general": "general English"}


def tables(results: dict[str, Any]) -> list[Table]:
    """Perplexities, what they cost, how the models were pruned, and the digits."""
    arms = _report.by_seed(results["arms"])
    digits = arms.pop("digits", [])
    made: list[Table] = []
    if arms:
        made += [_perplexity(results, arms, where) for where in WHERE]
        made += [_kinds(results, arms), _pruned(results, arms)]
    return made + ([_digits(digits)] if digits else [])


def _kinds_of(arms: Mapping[str, Any]) -> list[str]:
    """What was trained, in the usual order."""
    kinds = {arm.split(" + ")[1] for arm in arms}
    return [kind for kind in NAMES if kind in kinds]


def _methods(results: dict[str, Any]) -> list[str]:
    """The dense model and how it was pruned, in the usual order."""
    return [name for name in METHODS if name in results["pruned"]]


def _perplexity(results: dict[str, Any], arms: Mapping[str, Any], where: str) -> Table:
    kinds = [kind for kind in _kinds_of(arms) if kind != "tuned"]
    rows: list[list[str]] = []
    for method in _methods(results):
        cells = [f"{math.exp(results['pruned'][method][where]):.1f}"]
        for kind in kinds:
            found = arms.get(DENSE if (method, kind) == ("dense", "all") else f"{method} + {kind}", [])
            cells.append(ranged([math.exp(one[where]) for one in found], "{:.1f}") if found else "")
        rows.append([method, *cells])
    s = results["settings"]
    size = f"{s['steps']} steps of {s['batch']} x {s['length']} tokens"
    notes = {
        "held_out": "Before: as pruned, without any training. Mean and range over seeds, which are orders of "
        f"the training text. {s['eval_blocks']} blocks; the first quarter of each is context only. Dense: "
        "all of its weights trained as many steps, for what the text alone is worth.",
        "general": f"The same models on news, of which no training saw any. {s['eval_blocks']} blocks.",
    }
    return Table(
        ["", "before", *(NAMES[kind] for kind in kinds)],
        rows,
        f"Perplexity on {WHERE[where]}, after {size}",
        notes[where],
    )


def _kinds(results: dict[str, Any], arms: Mapping[str, Any]) -> Table:
    kinds = _kinds_of(arms)
    of = {k: [one for arm, found in arms.items() if arm.endswith(f" + {k}") for one in found] for k in kinds}
    rows: list[list[str]] = []
    for kind in kinds:
        own = {key: one["valid"] for key, one in results["rates"].items() if key.startswith(f"{kind}/")}
        tried = [(float(key.split("/")[1]), loss) for key, loss in own.items()]
        trained = statistics.mean(one["trained"] for one in of[kind])
        rows.append(
            [
                NAMES[kind],
                f"{trained:,.0f}",
                f"{trained / results['pruned']['dense']['parameters']:.2%}",
                f"{statistics.median(one['step_ms'] for one in of[kind]) / 1e3:.1f} s",
                _megabytes([one["state_bytes"] for one in of[kind] if "state_bytes" in one]),
                f"{best(results['rates'], kind):g}",
                ", ".join(f"{lr:g}: {math.exp(loss):.1f}" for lr, loss in sorted(tried)),
            ]
        )
    return Table(
        ["", "trained", "share", "step", "optimizer state", "rate", "perplexities on validation text"],
        rows,
        "What is trained, and what it takes",
        "Share: of the dense model's numbers. Step: median, of one thread beside other work, so that a "
        "small difference says nothing. Rate: the best of those on the right, by validation text, at "
        "magnitude 50% and with a seed of its own; it serves all. With the dense model, on the dense model.",
    )


def _megabytes(values: list[int]) -> str:
    """Of a block at a time there is no such number."""
    return f"{statistics.mean(values) / 1e6:,.1f} MB" if values else ""


def _pruned(results: dict[str, Any], arms: Mapping[str, Any]) -> Table:
    rows: list[list[str]] = []
    loaded: list[float] = []
    for method in _methods(results)[1:]:
        one = results["pruned"][method]
        ends = [end for arm, found in arms.items() if arm.startswith(f"{method} + ") for end in found]
        after = ranged([100 * end["sparsity"] for end in ends], "{:.4f} %") if ends else ""
        loaded += [end["as_loaded"]["apart"] for end in ends if "as_loaded" in end]
        seconds = f"{one['seconds']:.0f} s"
        rows.append(
            [method, seconds, one["pattern"], f"{100 * one['sparsity']:.4f} %", after, f"{len(ends)}"]
        )
    s, dense = results["settings"], results["pruned"]["dense"]
    share = max(one.get("served", 0) for one in results["pruned"].values()) / dense["parameters"]
    again = (
        f" {len(loaded)} trained models were saved and loaded by transformers alone: their zeros were there, "
        f"and logits differed by {max(loaded):g} at most."
        if loaded
        else ""
    )
    return Table(
        ["", "time", "pattern", "zeros before", "zeros at the end", "models"],
        rows,
        "Pruned, and verified at the end",
        f"Time: of pruning, one thread; Wanda and SparseGPT see {s['calibration']} x {s['length']} tokens. "
        f"Zeros: of the linear layers in blocks, {share:.1%} of all numbers." + again,
    )


def _digits(found: list[Any]) -> Table:
    shares = [share for share in found[0] if share != "dense"]
    trained = found[0][shares[0]]["trained"]
    rows = [
        [
            f"{100 * float(share):g} %",
            *(ranged([100 * one[share][kind] for one in found], "{:.1f}") for kind in ("pruned", *KINDS)),
        ]
        for share in shares
    ]
    heads = [f"{kind} ({trained[kind]:,})" for kind in KINDS if kind != "all"]
    return Table(
        ["", "pruned", *heads, "all that is left"],
        rows,
        f"Digits, pruned by magnitude, {_prune_digits.STEPS['retrained']} steps of retraining",
        f"Accuracy in % on 497 digits, mean and range over {len(found)} seeds; before pruning "
        f"{ranged([100 * one['dense'] for one in found], '{:.1f}')}. Pruned: the hidden matrices. In "
        "the head: how many numbers are trained.",
    )


def report(run: Run) -> None:
    """Print the tables and draw the picture."""
    run.write()
    _report.tell(tables(run.results))
    _report.save(drawn(run.results), run.folder / "prune.png")


def drawn(results: dict[str, Any]) -> Any:
    """Perplexity by method and kind on both texts, and the digits."""
    arms = _report.by_seed(results["arms"])
    digits = arms.pop("digits", [])
    figure, axes = _report.canvas(2 * bool(arms) + bool(digits))
    if arms:
        for ax, where in zip(axes[0], WHERE, strict=False):
            _draw_perplexity(ax, results, arms, where)
        axes[0, 0].legend(frameon=False, fontsize=7)
    if digits:
        _draw_digits(axes[0, -1], digits)
    return figure


def _draw_perplexity(ax: Any, results: dict[str, Any], arms: Mapping[str, Any], where: str) -> None:
    methods, kinds = _methods(results)[1:], [kind for kind in _kinds_of(arms) if kind != "tuned"]
    ax.axhline(math.exp(results["pruned"]["dense"][where]), color="black", linewidth=0.8)
    before = [math.exp(results["pruned"][method][where]) for method in methods]
    ax.plot(range(len(methods)), before, "kx", markersize=5, label="pruned")
    for number, (colour, kind) in enumerate(zip(_report.COLOURS, kinds, strict=False)):
        for place, method in enumerate(methods):
            found = [math.exp(one[where]) for one in arms.get(f"{method} + {kind}", [])]
            at = place + 0.12 * (number + 1)
            label = NAMES[kind] if place == 0 else None
            ax.plot([at] * len(found), found, ".", color=colour, markersize=5, label=label)
    ax.set_yscale("log")
    ax.set_xticks(range(len(methods)), [method.replace(" ", "\n") for method in methods], fontsize=7)
    _report.label(ax, f"{WHERE[where][0].upper()}{WHERE[where][1:]}; line: dense", y="perplexity")


def _draw_digits(ax: Any, found: list[Any]) -> None:
    shares = [share for share in found[0] if share != "dense"]
    for colour, kind in zip(("black", *_report.COLOURS), ("pruned", *KINDS), strict=False):
        means = [100 * statistics.mean(one[share][kind] for one in found) for share in shares]
        ax.plot(range(len(shares)), means, "x--" if kind == "pruned" else "o-", color=colour, label=kind)
    ax.set_xticks(range(len(shares)), [f"{100 * float(share):g} %" for share in shares])
    ax.legend(frameon=False, fontsize=7)
    _report.label(ax, "Digits", "pruned", "accuracy, %")
