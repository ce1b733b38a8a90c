"""The flow recipe's tables and picture, from its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _report
from ._report import Table, by_seed, ranged
from ._run import Run

KINDS = {"dna": "DNA", "motif": "motif"}


def tables(results: dict[str, Any]) -> list[Table]:
    """Words by method, G and C by strength, and vocabularies."""
    settings, arms = results["settings"], by_seed(results["arms"])
    guided = [_guided(name, arms) for name in _trained(arms) if "guided" in arms[name][0]["dna"]]
    return [_words(arms, settings), *guided, *([_tokens(arms)] if _toys(arms) else [])]


def _trained(arms: Mapping[str, Any]) -> list[str]:
    """The arms that were trained."""
    return [name for name in arms if name != "baselines"]


def _toys(arms: Mapping[str, Any]) -> list[str]:
    """Those of them that learned one token's law."""
    return [name for name in _trained(arms) if "tokens" in arms[name][0]]


def _words(arms: Mapping[str, Any], settings: Mapping[str, Any]) -> Table:
    columns = [(kind, k) for kind in KINDS for k in ("2-mers", "3-mers")]
    rows = [
        (name, *(_words_of([one[kind][name] for one in arms["baselines"]], k) for kind, k in columns), "", "")
        for name in arms["baselines"][0]["dna"]
    ]
    for name in _trained(arms):
        dna = [one["dna"] for one in arms[name]]
        cells = [_words_of([one[kind] for one in arms[name]], k) for kind, k in columns]
        shares = ranged([one["gc"] for one in dna], "{:.3f}")
        rows.append((name, *cells, shares, f"{sum(one['seconds'] for one in dna) / len(dna):.1f}"))
    heads = [f"{KINDS[kind]}, {k}" for kind, k in columns]
    return Table(
        ("sequences", *heads, "G and C", "s"),
        rows,
        f"{settings['steps']} steps of training, {settings['euler']} of sampling",
        "KL, in nats, of the words of two and three bases of held-out sequences to those of "
        f"{settings['samples']} samples: DNA, windows of {settings['length']} bases of a genome; motif, GATC "
        "repeated from any letter on, a tenth of the bases drawn anew, in sequences of 16. G and C: their "
        "share in the samples of DNA. s: seconds of training on DNA, the mean; the machine had other work. "
        "Means over seeds; in brackets the least and the most.",
    )


def _words_of(found: list[dict[str, float]], k: str) -> str:
    return ranged([one[k] for one in found], "{:.3f}")


def _guided(name: str, arms: Mapping[str, Any]) -> Table:
    found = [one["dna"]["guided"] for one in arms[name]]
    rows = [
        (
            gamma,
            ranged([one[gamma]["gc"] for one in found]),
            ranged([one[gamma]["differ"] for one in found]),
            ranged([one[gamma]["entropy"] for one in found], "{:.2f}"),
        )
        for gamma in found[0]
    ]
    return Table(
        ("gamma", "G and C", "places that differ", "entropy of 3-mers"),
        rows,
        f"{name}, guided",
        "By a network trained on clean windows to say the share of G and C. Places that differ: in the mean "
        "of all pairs of samples; of four equally frequent bases 0.75. Entropy in nats, at most 4.16.",
    )


def _tokens(arms: Mapping[str, Any]) -> Table:
    names = _toys(arms)
    sizes = list(arms[names[0]][0]["tokens"])
    rows = [
        (name, *(ranged([one["tokens"][size] for one in arms[name]]) for size in sizes)) for name in names
    ]
    heads = [f"{size} tokens" for size in sizes]
    return Table(
        ("method", *heads),
        rows,
        "One token by vocabulary",
        "KL, in nats, of a law by 1 / rank to 4,096 samples; samples of the law itself have about 0.02 of "
        "160 tokens.",
    )


def report(run: Run) -> None:
    """Print the tables and draw them."""
    _report.tell(tables(run.results))
    arms = by_seed(run.results["arms"])
    figure, axes = _report.canvas(3)
    _draw_words(axes.flat[0], arms)
    for number, name in enumerate(_trained(arms)):
        colour = _report.COLOURS[number]
        if "guided" in arms[name][0]["dna"]:
            found = [one["dna"]["guided"] for one in arms[name]]
            _lines(axes.flat[1], [{g: each["gc"] for g, each in one.items()} for one in found], colour, name)
        if name in _toys(arms):
            _lines(axes.flat[2], [one["tokens"] for one in arms[name]], colour, name)
    _report.label(axes.flat[1], "guided by a reader of G and C", "gamma", "share of G and C")
    _report.label(axes.flat[2], "one token's law", "tokens", "KL, nats")
    axes.flat[2].set_xscale("log")
    axes.flat[2].set_yscale("log")
    for ax in axes.flat[1:]:
        if ax.lines:
            ax.legend(frameon=False, fontsize=7)
    _report.save(figure, run.folder / "flow.png")


def _draw_words(ax: Any, arms: Mapping[str, Any]) -> None:
    base = arms["baselines"]
    names = [*base[0]["dna"], *_trained(arms)]
    for offset, (kind, title) in zip((-0.2, 0.2), KINDS.items(), strict=True):
        rows = [
            [one[kind] for one in arms[name]] if name in arms else [one[kind][name] for one in base]
            for name in names
        ]
        means = [sum(one["2-mers"] for one in row) / len(row) for row in rows]
        places = [place + offset for place in range(len(names))]
        colour = _report.COLOURS[0 if kind == "dna" else 1]
        ax.barh(places, means, 0.38, color=colour, label=title)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.grid(axis="x", alpha=0.25, linewidth=0.6)
    ax.legend(frameon=False, fontsize=7)
    _report.label(ax, "words of two bases, made and held out", "KL, nats")


def _lines(ax: Any, found: list[dict[str, float]], colour: str, name: str) -> None:
    """The mean over seeds, and a band from the least to the most."""
    places = [float(one) for one in found[0]]
    _report.band(ax, places, [list(one.values()) for one in found], colour, name, "o-")
